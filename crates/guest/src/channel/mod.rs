//! Serves the host on the virtio-serial port.
//!
//! - `port` is the port itself: opened once, never closed, asleep while the host is away.
//! - `life` cuts the bytes on it into lives.
//! - `tunnel` joins a `CONNECT` to a port of the sandbox's own localhost.
//!
//! Invariants:
//! - At most one life at a time. When a hello comes, every stream, request and tunnel of the life
//!   before is dropped, and no byte of it is written after the reply to the new one.
//! - The host being away costs nothing, and ends nothing but, once it is back, the old life.

mod life;
mod port;
mod tunnel;

#[cfg(test)]
mod tests;

use std::{convert::Infallible, future::poll_fn, io, pin::pin, sync::Arc, task::Poll};

use axum::{Router, body::Body};
use cubicle_protocol::{
    HOST_AUTHORITY,
    channel::{CONNECTION_WINDOW, MAX_FRAME_SIZE, MAX_STREAMS, STREAM_WINDOW, introduction},
    guest_api::{InitRequest, Introduced},
};
use futures::future::BoxFuture;
use http::{Method, Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use life::{Life, Wire};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

pub use port::Port;

/// How much one stream may have waiting to be sent, in bytes.
const SEND_BUFFER: usize = 256 << 10;

/// How many streams the host may give up before the guest has looked at them. The default guards
/// against strangers; the host is none, and gives up many at once when a client goes away.
const MAX_ABANDONED: usize = 16_384;

/// Takes what the host says first in a life, and answers it.
pub type Introduce = Arc<dyn Fn(InitRequest) -> BoxFuture<'static, Introduced> + Send + Sync>;

/// Told of a port that somebody asked for and on which nobody listens. True: somebody does now.
pub type Knock = Arc<dyn Fn(u16) -> BoxFuture<'static, bool> + Send + Sync>;

/// What is served on the channel: requests say by their authority which of the two they are for.
#[derive(Clone)]
pub struct Doors {
    /// Who the guest is from now on.
    pub introduce: Introduce,
    /// For the host's own requests.
    pub host: Router,
    /// For requests that the host forwards.
    pub public: Router,
    /// For tunnels to a port that is closed.
    pub knock: Knock,
}

/// Serves one life after another until the port fails.
///
/// # Errors
/// What the kernel said when the port could not be read or written.
pub async fn serve(port: Port, doors: Doors) -> io::Result<Infallible> {
    let mut wire = Wire::new(port);
    loop {
        let hello = wire.hello().await?;
        tracing::debug!(nonce = %hello.nonce, version = hello.version, "a new life");
        wire.reply(hello).await?;
        if let Err(error) = introduce(&mut wire.life(), &doors).await {
            tracing::debug!(%error, "the life ended before it began");
            continue;
        }
        let life = CancellationToken::new();
        let _end = life.clone().drop_guard();
        let executor = Executor(life);
        let requests = service_fn({
            let executor = executor.clone();
            let doors = doors.clone();
            move |request| answer(request, doors.clone(), executor.clone())
        });
        let connection = http2::Builder::new(executor)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .max_frame_size(MAX_FRAME_SIZE)
            .max_concurrent_streams(MAX_STREAMS)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(MAX_ABANDONED)
            .max_local_error_reset_streams(None)
            .serve_connection(TokioIo::new(wire.life()), requests);
        // Ends when the life does: its stream fails on the next hello.
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the life is over");
        }
    }
}

/// Hears who the guest is to be and says what came of it.
async fn introduce(life: &mut Life<'_>, doors: &Doors) -> io::Result<()> {
    let request = introduction::hear(life).await?;
    let answer = (doors.introduce)(request).await;
    introduction::say(life, &answer).await
}

/// Runs what a life spawns, and drops it with the life.
#[derive(Clone)]
struct Executor(CancellationToken);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        let life = self.0.clone();
        tokio::spawn(async move {
            let mut future = pin!(future);
            let mut ended = pin!(life.cancelled());
            poll_fn(|cx| match ended.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(()),
                Poll::Pending => future.as_mut().poll(cx).map(drop),
            })
            .await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    doors: Doors,
    executor: Executor,
) -> Result<Response<Body>, Infallible> {
    if request.method() == Method::CONNECT {
        return Ok(tunnel::open(request, &executor, &doors.knock).await);
    }
    let own = request
        .uri()
        .authority()
        .is_some_and(|authority| authority == HOST_AUTHORITY);
    let door = if own { doors.host } else { doors.public };
    door.oneshot(request.map(Body::new)).await
}
