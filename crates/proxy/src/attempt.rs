//! One request's way into a sandbox, over the lives that the sandbox goes through meanwhile.

use std::{fmt, time::Duration};

use axum::body::Body;
use cubicle_ids::SandboxId;
use http::{Request, Response};

use crate::{
    envd,
    metrics::add,
    ports::{Endpoint, PortError, repeatable},
    proxy::Proxy,
    reply::Reply,
    route::Target,
    routes::{Availability, NotWoken, SandboxRoute},
    upstream::UpstreamError,
};

/// How long a request waits for a paused sandbox to wake up. A restore takes a fraction of a second,
/// a boot several.
const WAKE_PATIENCE: Duration = Duration::from_secs(60);

/// Why an attempt failed.
enum Failure {
    Envd(UpstreamError),
    Port(PortError),
}

impl Failure {
    fn upstream(&self) -> Option<&UpstreamError> {
        match self {
            Self::Envd(error) => Some(error),
            Self::Port(error) => error.upstream(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Envd(error) => error.fmt(f),
            Self::Port(error) => error.fmt(f),
        }
    }
}

impl Proxy {
    /// Sends a request to a sandbox in the given life. If that life ends before there is an answer,
    /// the request goes to the next one, where that is harmless.
    pub(crate) async fn attempts(
        &self,
        target: &Target,
        generation: u64,
        request: Request<Body>,
    ) -> Result<Response<Body>, Reply> {
        let again = repeatable(&request);
        let failure = match self.attempt(target, generation, request).await {
            Ok(response) => return Ok(response),
            Err(failure) => failure,
        };
        let metrics = &self.inner.metrics;
        let now = self.present(&target.id)?;
        let same_life = now.availability == Availability::Running && now.generation == generation;
        if same_life {
            return Err(self.explain(target, &failure));
        }
        let Some(again) = again else {
            if now.availability == Availability::Busy {
                add(&metrics.unreachable, 1);
                return Err(Reply::busy(&target.id));
            }
            add(&metrics.interrupted, 1);
            return Err(Reply::interrupted(&target.id));
        };
        let now = self.awake(&target.id, now).await?;
        add(&metrics.retried, 1);
        self.attempt(target, now.generation, again)
            .await
            .map_err(|failure| self.explain(target, &failure))
    }

    async fn attempt(
        &self,
        target: &Target,
        generation: u64,
        request: Request<Body>,
    ) -> Result<Response<Body>, Failure> {
        if envd::is_envd(target) {
            let outcome = self.inner.upstream.request(&target.id, request).await;
            return outcome.map_err(Failure::Envd);
        }
        let endpoint = Endpoint {
            id: target.id.clone(),
            generation,
            port: target.port,
        };
        match self.inner.ports.send(&endpoint, request).await {
            Ok(response) => Ok(response.map(Body::new)),
            Err(error) => Err(Failure::Port(error)),
        }
    }

    /// The sandbox, if it is there for requests, now or once it is awake. The machine knows of a new
    /// life before the routing table does.
    pub(crate) fn present(&self, id: &SandboxId) -> Result<SandboxRoute, Reply> {
        let inner = &self.inner;
        let sandbox = inner.routes.lookup(id);
        let Some(mut sandbox) = sandbox.filter(|s| s.availability != Availability::Away) else {
            add(&inner.metrics.not_found, 1);
            return Err(Reply::no_sandbox(id));
        };
        if let Some(generation) = inner.upstream.generation(id) {
            sandbox.generation = generation;
        }
        Ok(sandbox)
    }

    /// The sandbox as it runs, woken if it was asleep.
    pub(crate) async fn awake(
        &self,
        id: &SandboxId,
        sandbox: SandboxRoute,
    ) -> Result<SandboxRoute, Reply> {
        let metrics = &self.inner.metrics;
        let sandbox = if sandbox.availability == Availability::Busy {
            // A freeze or a restore: a fraction of a second.
            let settled = self.inner.routes.settled(id);
            let _ = tokio::time::timeout(WAKE_PATIENCE, settled).await;
            self.present(id)?
        } else {
            sandbox
        };
        match sandbox.availability {
            Availability::Running => return Ok(sandbox),
            Availability::Asleep => {}
            Availability::Busy | Availability::Away => {
                add(&metrics.unreachable, 1);
                return Err(Reply::busy(id));
            }
        }
        let woken = tokio::time::timeout(WAKE_PATIENCE, self.inner.routes.wake(id)).await;
        if let Err(why) = woken.unwrap_or(Err(NotWoken::Busy)) {
            tracing::info!(sandbox = %id, %why, "a request did not wake it");
            add(&metrics.not_woken, 1);
            return Err(Reply::not_woken(id, &why));
        }
        add(&metrics.woken, 1);
        let sandbox = self.present(id)?;
        if sandbox.availability == Availability::Running {
            return Ok(sandbox);
        }
        // Paused again already: whoever did that is asked to wait for it.
        add(&metrics.unreachable, 1);
        Err(Reply::busy(id))
    }

    /// What a client is told when its request did not come through.
    fn explain(&self, target: &Target, failure: &Failure) -> Reply {
        let metrics = &self.inner.metrics;
        match failure.upstream() {
            Some(UpstreamError::PortClosed { port, .. }) => {
                add(&metrics.port_closed, 1);
                return Reply::port_closed(&target.id, *port);
            }
            Some(UpstreamError::NotReady(_)) => {
                add(&metrics.unreachable, 1);
                return Reply::busy(&target.id);
            }
            Some(UpstreamError::NotFound(_)) => {
                add(&metrics.not_found, 1);
                return Reply::no_sandbox(&target.id);
            }
            Some(UpstreamError::Unreachable { .. }) | None => {}
        }
        tracing::warn!(sandbox = %target.id, port = target.port, error = %failure, "a request failed");
        add(&metrics.unreachable, 1);
        Reply::unreachable(&target.id)
    }
}
