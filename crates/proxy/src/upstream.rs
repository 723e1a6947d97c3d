//! The way into sandboxes.

use std::io;

use axum::body::Body;
use cubicle_ids::SandboxId;
use cubicle_node::Node;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use tokio::io::{AsyncRead, AsyncWrite};

/// A stream to a port inside a sandbox.
pub trait GuestIo: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> GuestIo for T {}

/// Why a sandbox was not reached.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// There is no such sandbox (any more).
    #[error("there is no sandbox {0}")]
    NotFound(SandboxId),
    /// It is there but cannot be reached yet.
    #[error("the sandbox {0} is not ready yet")]
    NotReady(SandboxId),
    /// Nothing listens on the port.
    #[error("nothing listens on port {port} in the sandbox {id}")]
    PortClosed {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: u16,
    },
    /// It is there and does not answer as it should.
    #[error("the sandbox {id} did not answer: {source}")]
    Unreachable {
        /// Which sandbox.
        id: SandboxId,
        /// What happened.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl UpstreamError {
    /// [`Self::Unreachable`] because of an I/O error.
    pub(crate) fn timed_out(id: &SandboxId) -> Self {
        Self::Unreachable {
            id: id.clone(),
            source: Box::new(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }
}

/// The way into sandboxes: a node, or something that stands for one.
#[async_trait::async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Sends a request to the guest daemon of a sandbox. Path, query, headers and body arrive as
    /// they are.
    async fn request(
        &self,
        id: &SandboxId,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError>;

    /// Opens a stream to a TCP port on the sandbox's localhost.
    async fn connect(&self, id: &SandboxId, port: u16) -> Result<Box<dyn GuestIo>, UpstreamError>;

    /// The life a sandbox is in as the machine knows it, which learns first of a new one. `None`
    /// where it does not know.
    fn generation(&self, id: &SandboxId) -> Option<u64> {
        let _ = id;
        None
    }
}

#[async_trait::async_trait]
impl Upstream for Node {
    async fn request(
        &self,
        id: &SandboxId,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        let request = request.map(|body| {
            body.map_err(|error| Box::new(error) as cubicle_node::BoxError)
                .boxed_unsync()
        });
        Self::request(self, id, request)
            .await
            .map(|response| response.map(Body::new))
            .map_err(|error| translate(error, id))
    }

    async fn connect(&self, id: &SandboxId, port: u16) -> Result<Box<dyn GuestIo>, UpstreamError> {
        match Self::connect(self, id, port).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(translate(error, id)),
        }
    }

    fn generation(&self, id: &SandboxId) -> Option<u64> {
        Self::generation(self, id)
    }
}

fn translate(error: cubicle_node::Error, id: &SandboxId) -> UpstreamError {
    use cubicle_node::Error;
    match error {
        Error::NotFound { id } | Error::Killed { id } => UpstreamError::NotFound(id),
        Error::NotReady { id } => UpstreamError::NotReady(id),
        Error::PortClosed { id, port } => UpstreamError::PortClosed { id, port },
        other => UpstreamError::Unreachable {
            id: id.clone(),
            source: Box::new(other),
        },
    }
}
