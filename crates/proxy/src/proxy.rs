//! From a classified request to its response.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, HeaderValue, Uri, Version, request::Parts};
use subtle::ConstantTimeEq as _;

use crate::{
    envd,
    forward::{Active, Counted, Direction, incoming},
    headers,
    metrics::{Metrics, add},
    ports::Ports,
    reply::{self, Reply},
    rewrite::{self, Place},
    route::{self, Route, SignedFile, Target, Via},
    routes::{Routes, SandboxRoute},
    upgrade,
    upstream::Upstream,
};

/// The data plane. Cheap to clone.
#[derive(Clone)]
pub struct Proxy {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) routes: Arc<dyn Routes>,
    pub(crate) upstream: Arc<dyn Upstream>,
    pub(crate) ports: Ports,
    pub(crate) metrics: Arc<Metrics>,
}

impl Proxy {
    /// A data plane over this routing table and this way into sandboxes.
    #[must_use]
    pub fn new(routes: Arc<dyn Routes>, upstream: Arc<dyn Upstream>) -> Self {
        let metrics = Arc::new(Metrics::default());
        let ports = Ports::new(Arc::clone(&upstream), Arc::clone(&metrics));
        Self {
            inner: Arc::new(Inner {
                routes,
                upstream,
                ports,
                metrics,
            }),
        }
    }

    /// What has been done so far; also a collector for a Prometheus registry.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.metrics
    }

    /// Tells from its head whether a request is for a sandbox: `None` if it is for the API.
    #[must_use]
    pub fn classify(&self, parts: &Parts) -> Option<Route> {
        route::classify(parts)
    }

    /// Answers a request that [`Self::classify`] gave this route.
    pub async fn serve(&self, route: Route, request: Request) -> Response {
        let client = request.headers().clone();
        match self.dispatch(route, request).await {
            Ok(response) => response,
            Err(reply) => reply.into_response(&client),
        }
    }

    async fn dispatch(&self, route: Route, request: Request) -> Result<Response, Reply> {
        let inner = &self.inner;
        let target = match route {
            Route::Refused(refusal) => {
                add(&inner.metrics.refused, 1);
                return Err(Reply::refused(&refusal.to_string()));
            }
            Route::Signed(file) => self.owner(&file)?,
            Route::Target(target) => target,
        };
        inner.metrics.routed(target.via);
        let sandbox = self.admit(&target, request.headers()).await?;
        let envd = envd::is_envd(&target);
        let host = route::host_value(&request);
        let (prefix, path) = inside(&target, request.uri());
        if envd && !envd::is_public(&path) {
            add(&inner.metrics.refused, 1);
            return Err(Reply::no_such_call(&path));
        }

        let active = Active::new(&inner.metrics);
        let mut request = request;
        let client_end = upgrade::client_end(&mut request);
        let protocol =
            headers::upgrade(request.headers()).filter(|_| !envd && client_end.is_some());
        let masked = sandbox.mask_request_host.as_deref().and_then(|mask| {
            HeaderValue::from_str(&mask.replace("${PORT}", &target.port.to_string())).ok()
        });
        let (mut parts, body) = request.into_parts();
        let inner_host = masked.clone().or_else(|| host.clone());
        headers::prepare_request(
            &mut parts.headers,
            &parts.extensions,
            host.clone(),
            masked,
            prefix.as_deref(),
        );
        if let Some(protocol) = &protocol {
            headers::set_upgrade(&mut parts.headers, protocol.clone());
        }
        parts.uri =
            inside_uri(&path, parts.uri.query()).ok_or_else(|| Reply::no_such_call(&path))?;
        // What extensions say is about the client's connection.
        parts.extensions = http::Extensions::new();
        let request = Request::from_parts(parts, incoming(body, &inner.metrics));

        let mut response = self.attempts(&target, sandbox.generation, request).await?;
        upgrade::join(client_end, &mut response, &inner.metrics);
        let mut response = response.map(|body| self.outgoing(body, active));

        let switched = headers::upgrade(response.headers())
            .filter(|_| response.status() == http::StatusCode::SWITCHING_PROTOCOLS);
        headers::strip_hop_by_hop(response.headers_mut());
        if let Some(protocol) = switched {
            headers::set_upgrade(response.headers_mut(), protocol);
        }
        if let Some(prefix) = &prefix {
            let place = Place {
                prefix,
                host: host.as_ref().and_then(|host| host.to_str().ok()),
                inner_host: inner_host.as_ref().and_then(|host| host.to_str().ok()),
                port: target.port,
            };
            rewrite::response(response.headers_mut(), &place);
        }
        reply::mark_ok(response.headers_mut());
        // The version that the sandbox spoke says nothing about this connection.
        *response.version_mut() = Version::HTTP_11;
        Ok(response)
    }

    /// The guest daemon of the sandbox that signed a URL.
    fn owner(&self, file: &SignedFile) -> Result<Target, Reply> {
        match self.inner.routes.find_by_signature(file) {
            Some(id) => Ok(Target {
                id,
                port: cubicle_protocol::ENVD_PORT,
                via: Via::Signature,
            }),
            None => {
                add(&self.inner.metrics.forbidden, 1);
                Err(Reply::unsigned())
            }
        }
    }

    /// The sandbox, if the request may go there now; wakes it if that is what it waits for.
    async fn admit(&self, target: &Target, headers: &HeaderMap) -> Result<SandboxRoute, Reply> {
        let metrics = &self.inner.metrics;
        let sandbox = self.present(&target.id)?;
        // The guest daemon has a token of its own, and checks it.
        if let Some(token) = sandbox
            .traffic_token
            .as_deref()
            .filter(|_| !envd::is_envd(target))
        {
            let presented = headers::TRAFFIC_TOKENS
                .iter()
                .filter_map(|name| headers.get(*name));
            if !presented
                .into_iter()
                .any(|value| value.as_bytes().ct_eq(token.as_bytes()).into())
            {
                add(&metrics.forbidden, 1);
                return Err(Reply::forbidden(&target.id));
            }
        }
        self.awake(&target.id, sandbox).await
    }

    fn outgoing(&self, body: Body, active: Active) -> Body {
        Body::new(Counted::new(
            body,
            &self.inner.metrics,
            Direction::Out,
            Some(active),
        ))
    }
}

/// The prefix that stands before the sandbox's paths, if any, and the path inside the sandbox.
fn inside(target: &Target, uri: &Uri) -> (Option<String>, String) {
    match (target.via, route::split_prefix(uri.path())) {
        (Via::Path, Some((prefix, path))) => (Some(prefix.to_owned()), path.to_owned()),
        _ => (None, uri.path().to_owned()),
    }
}

fn inside_uri(path: &str, query: Option<&str>) -> Option<Uri> {
    match query {
        Some(query) => format!("{path}?{query}").parse().ok(),
        None => path.parse().ok(),
    }
}

/// A middleware that answers what is for a sandbox and leaves the rest to the API's own routes.
/// Goes around a whole router, before any route is matched:
/// `router.layer(axum::middleware::from_fn_with_state(proxy, cubicle_proxy::intercept))`.
pub async fn intercept(State(proxy): State<Proxy>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let route = proxy.classify(&parts);
    let request = Request::from_parts(parts, body);
    match route {
        Some(route) => proxy.serve(route, request).await,
        None => next.run(request).await,
    }
}
