//! HTTP/1.1 to servers on the ports of sandboxes.

use std::{
    error::Error as _,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use cubicle_ids::SandboxId;
use http::{Request, Response, Uri, Version, uri::PathAndQuery};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{
        Client, Error as ClientError,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    metrics::{Metrics, add},
    upstream::{GuestIo, Upstream, UpstreamError},
};

/// How long a sandbox may take to say whether it accepts a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a connection that nothing uses is kept. Servers commonly close theirs after 5 seconds
/// (Node.js) or later; a connection that turns out to be closed costs a second attempt.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How many unused connections are kept for one port.
const IDLE_MAX: usize = 16;

/// A port in one life of a sandbox: what connections are kept for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) id: SandboxId,
    pub(crate) generation: u64,
    pub(crate) port: u16,
}

impl Endpoint {
    /// The client keeps connections by authority, so the authority is the whole key. It is never
    /// sent: the `Host` header is set by then, and a request line has a path only.
    fn uri(&self, path: Option<&PathAndQuery>) -> Result<Uri, http::Error> {
        Uri::builder()
            .scheme("http")
            .authority(format!("g{}.{}:{}", self.generation, self.id, self.port))
            .path_and_query(path.map_or("/", PathAndQuery::as_str))
            .build()
    }

    fn of(uri: &Uri) -> Option<Self> {
        let (generation, id) = uri.host()?.strip_prefix('g')?.split_once('.')?;
        Some(Self {
            id: id.parse().ok()?,
            generation: generation.parse().ok()?,
            port: uri.port_u16()?,
        })
    }
}

/// The client of all ports of all sandboxes.
pub(crate) struct Ports {
    client: Client<Connector, Body>,
    metrics: Arc<Metrics>,
}

impl Ports {
    pub(crate) fn new(upstream: Arc<dyn Upstream>, metrics: Arc<Metrics>) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_MAX)
            .set_host(false)
            // A request that a kept connection did not take any more goes to a new one.
            .retry_canceled_requests(true)
            .build(Connector {
                upstream,
                metrics: Arc::clone(&metrics),
            });
        Self { client, metrics }
    }

    /// Sends a request whose URI has a path only.
    pub(crate) async fn send(
        &self,
        endpoint: &Endpoint,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, PortError> {
        *request.uri_mut() = endpoint
            .uri(request.uri().path_and_query())
            .map_err(PortError::Uri)?;
        *request.version_mut() = Version::HTTP_11;
        let again = repeatable(&request);
        match self.client.request(request).await {
            Err(error) if again.is_some() && closed_before_answer(&error) => {
                add(&self.metrics.retried, 1);
                let again = again.unwrap_or_default();
                self.client.request(again).await.map_err(PortError::Client)
            }
            outcome => outcome.map_err(PortError::Client),
        }
    }
}

/// The same request again, if sending it twice is harmless.
pub(crate) fn repeatable(request: &Request<Body>) -> Option<Request<Body>> {
    if !request.method().is_idempotent() || !request.body().is_end_stream() {
        return None;
    }
    let mut again = Request::new(Body::empty());
    *again.method_mut() = request.method().clone();
    *again.uri_mut() = request.uri().clone();
    *again.headers_mut() = request.headers().clone();
    Some(again)
}

/// A server closes a kept connection when it likes, also just when a request is on its way.
fn closed_before_answer(error: &ClientError) -> bool {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<hyper::Error>() {
            return error.is_incomplete_message() || error.is_closed() || error.is_canceled();
        }
        source = error.source();
    }
    false
}

/// Why a port did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    #[error("the request's path cannot be sent: {0}")]
    Uri(http::Error),
    #[error("{}", describe(.0))]
    Client(ClientError),
}

fn describe(error: &ClientError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

impl PortError {
    /// Why there was no connection, if that is why.
    pub(crate) fn upstream(&self) -> Option<&UpstreamError> {
        let Self::Client(error) = self else {
            return None;
        };
        let mut source = error.source();
        while let Some(error) = source {
            if let Some(error) = error.downcast_ref::<UpstreamError>() {
                return Some(error);
            }
            source = error.source();
        }
        None
    }
}

#[derive(Clone)]
struct Connector {
    upstream: Arc<dyn Upstream>,
    metrics: Arc<Metrics>,
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<Tunnel>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { upstream, metrics } = self.clone();
        Box::pin(async move {
            let Endpoint { id, port, .. } =
                Endpoint::of(&uri).ok_or_else(|| format!("{uri} is not of a sandbox"))?;
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, upstream.connect(&id, port))
                .await
                .unwrap_or_else(|_| Err(UpstreamError::timed_out(&id)))?;
            add(&metrics.connections, 1);
            Ok(TokioIo::new(Tunnel(stream)))
        })
    }
}

/// A connection through the channel.
struct Tunnel(Box<dyn GuestIo>);

impl Connection for Tunnel {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_endpoint_is_its_authority(id in "[a-z0-9]{1,32}", generation: u64, port in 1_u16.., path in "/[a-z%?=/]{0,20}") {
            let endpoint = Endpoint { id: id.parse().unwrap(), generation, port };
            let path: PathAndQuery = path.parse().unwrap();
            let uri = endpoint.uri(Some(&path)).unwrap();
            prop_assert_eq!(uri.path_and_query(), Some(&path));
            prop_assert_eq!(Endpoint::of(&uri), Some(endpoint));
        }
    }
}
