//! The host end of a sandbox's channel: requests and tunnels into one VM.
//!
//! A [`Link`] belongs to one VM. It begins a *life* (handshake, HTTP/2, identity), hands requests
//! to it, and when it breaks while the VM lives, begins the next. The guest is told who it is at
//! the start of each life, so a guest daemon that was restarted is configured again before any
//! request reaches it. Nothing of one life leaks into the next: when a life ends, every stream that
//! was open on it fails at once.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_protocol::{
    ENVD_AUTHORITY, ERROR_HEADER, ERROR_PORT_CLOSED, HOST_AUTHORITY,
    guest_api::{InitRequest, InitResponse},
};
use cubicle_vmm::Vm;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header, uri};
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    error::{Error, Result},
    shares::Shares,
};

mod life;
#[cfg(test)]
mod tests;

use life::Life;

/// Error of a [`Body`].
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Body of requests to a sandbox and of its answers.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

/// A body on its way into the channel. Unlike [`Body`]'s, its error is a type of its own, without
/// which the compiler cannot tell that the futures of the connection may change threads.
pub(crate) type Outgoing = UnsyncBoxBody<Bytes, OutgoingError>;

/// The body of a request failed.
#[derive(Debug, thiserror::Error)]
#[error("the body of a request broke off: {0}")]
pub(crate) struct OutgoingError(BoxError);

fn outgoing(body: Body) -> Outgoing {
    body.map_err(OutgoingError).boxed_unsync()
}

/// A body with nothing in it.
#[must_use]
pub fn empty_body() -> Body {
    http_body_util::Empty::new()
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A body that is these bytes.
#[must_use]
pub fn full_body(bytes: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// How long a request waits for the next life when the last one broke: more than one attempt.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(15);

/// How long one attempt to begin the next life takes at most.
const RECONNECT_ATTEMPT: Duration = Duration::from_secs(5);

/// Pause after a failed attempt to begin the next life; doubles up to [`RECONNECT_PAUSE_MAX`].
/// Only a guest whose daemon keeps dying gets to see it.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// What a guest is told at the start of each life, and what is expected of it.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Without clock and entropy, which are added fresh each time.
    pub(crate) init: InitRequest,
    /// The snapshot that was restored and the nonce in its memory image, checked at the first life.
    pub(crate) restored: Option<(SnapshotId, String)>,
}

/// How long each part of beginning a life took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LifeTimings {
    /// From the first attempt to connect until the guest's reply.
    pub(crate) channel: Duration,
    /// From the reply until the guest had taken on its identity.
    pub(crate) init: Duration,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    id: SandboxId,
    lives: watch::Receiver<State>,
    closed: CancellationToken,
    _keeper: AbortOnDropHandle<()>,
}

#[derive(Debug, Clone)]
enum State {
    Up(Arc<Life>),
    /// Between two lives; why the last attempt failed.
    Down(String),
}

impl Link {
    /// Begins the first life, within `patience`.
    pub(crate) async fn open(
        vm: Arc<dyn Vm>,
        id: &SandboxId,
        mut identity: Identity,
        patience: Duration,
    ) -> Result<(Self, InitResponse, LifeTimings)> {
        let (life, answer, timings) = Life::begin(vm.as_ref(), id, &identity, patience).await?;
        let shares = Shares::open(id, &identity.init).await;
        life.serve(&shares);
        // From here on the guest holds this instance's nonce, not that of the snapshot.
        identity.restored = None;
        let (states, lives) = watch::channel(State::Up(Arc::new(life)));
        let closed = CancellationToken::new();
        let keeper = Keeper {
            vm,
            id: id.clone(),
            identity,
            shares,
            states,
            closed: closed.clone(),
        };
        let keeper = AbortOnDropHandle::new(tokio::spawn(keeper.run()));
        Ok((
            Self {
                id: id.clone(),
                lives,
                closed,
                _keeper: keeper,
            },
            answer,
            timings,
        ))
    }

    /// Ends the current life with all its streams and begins no other. Dropping the link does the
    /// same.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        if let State::Up(life) = &*self.lives.borrow() {
            life.end();
        }
    }

    /// Forwards an envd request. Its `Host` and scheme are replaced; everything else arrives as it
    /// is.
    pub(crate) async fn request(&self, request: Request<Body>) -> Result<Response<Body>> {
        self.request_as(ENVD_AUTHORITY, request).await
    }

    /// Sends a request of the node's own.
    pub(crate) async fn call(&self, request: Request<Body>) -> Result<Response<Body>> {
        self.request_as(HOST_AUTHORITY, request).await
    }

    async fn request_as(
        &self,
        authority: &'static str,
        mut request: Request<Body>,
    ) -> Result<Response<Body>> {
        set_authority(&mut request, authority);
        let response = self.send(request.map(outgoing)).await?;
        Ok(response.map(|body| {
            body.map_err(|error| Box::new(error) as BoxError)
                .boxed_unsync()
        }))
    }

    /// Opens a tunnel to `port` on the guest's localhost.
    pub(crate) async fn connect(&self, port: u16) -> Result<GuestStream> {
        let uri = Uri::builder()
            .authority(format!("127.0.0.1:{port}"))
            .build()
            .map_err(|_| Error::PortClosed {
                id: self.id.clone(),
                port,
            })?;
        let mut request = Request::new(outgoing(empty_body()));
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        let response = self.send(request).await?;
        match response.status() {
            StatusCode::OK => {
                let upgraded =
                    hyper::upgrade::on(response)
                        .await
                        .map_err(|source| Error::Broken {
                            id: self.id.clone(),
                            source,
                        })?;
                Ok(GuestStream(TokioIo::new(upgraded)))
            }
            _ if response.headers().get(ERROR_HEADER)
                == Some(&HeaderValue::from_static(ERROR_PORT_CLOSED)) =>
            {
                Err(Error::PortClosed {
                    id: self.id.clone(),
                    port,
                })
            }
            status => Err(Error::Tunnel {
                id: self.id.clone(),
                port,
                status,
            }),
        }
    }

    /// Sends on the current life. A request that a dying life did not take goes to the next one;
    /// one that may have reached the guest is never sent twice.
    async fn send(
        &self,
        mut request: Request<Outgoing>,
    ) -> Result<Response<hyper::body::Incoming>> {
        let deadline = tokio::time::Instant::now() + RECONNECT_PATIENCE;
        loop {
            let life = self.life(deadline).await?;
            match life.send(request).await {
                Ok(response) => return Ok(response),
                Err(mut failure) => match failure.take_message() {
                    Some(unsent) if !self.closed.is_cancelled() => {
                        request = unsent;
                        life.end();
                        self.wait_for_another(&life, deadline).await?;
                    }
                    _ if self.closed.is_cancelled() => {
                        return Err(Error::Killed {
                            id: self.id.clone(),
                        });
                    }
                    _ => {
                        let source = failure.into_error();
                        return Err(Error::Broken {
                            id: self.id.clone(),
                            source,
                        });
                    }
                },
            }
        }
    }

    async fn life(&self, deadline: tokio::time::Instant) -> Result<Arc<Life>> {
        if let State::Up(life) = &*self.lives.borrow() {
            return Ok(life.clone());
        }
        self.wait(deadline, |state| matches!(state, State::Up(_)))
            .await
    }

    async fn wait_for_another(
        &self,
        old: &Arc<Life>,
        deadline: tokio::time::Instant,
    ) -> Result<Arc<Life>> {
        self.wait(
            deadline,
            |state| matches!(state, State::Up(life) if !Arc::ptr_eq(life, old)),
        )
        .await
    }

    async fn wait(
        &self,
        deadline: tokio::time::Instant,
        good: impl FnMut(&State) -> bool,
    ) -> Result<Arc<Life>> {
        let mut lives = self.lives.clone();
        let killed = || Error::Killed {
            id: self.id.clone(),
        };
        let found = tokio::select! {
            found = tokio::time::timeout_at(deadline, lives.wait_for(good)) => found,
            () = self.closed.cancelled() => return Err(killed()),
        };
        match found {
            Ok(Ok(state)) => match &*state {
                State::Up(life) => Ok(life.clone()),
                State::Down(_) => Err(killed()),
            },
            Ok(Err(_keeper_is_gone)) => Err(killed()),
            Err(_elapsed) => {
                let last = match &*self.lives.borrow() {
                    State::Up(_) => String::new(),
                    State::Down(why) => why.clone(),
                };
                Err(Error::Unanswered {
                    id: self.id.clone(),
                    after: RECONNECT_PATIENCE,
                    last,
                })
            }
        }
    }
}

/// Gives `request` another authority and keeps its path and query.
fn set_authority(request: &mut Request<Body>, authority: &'static str) {
    let mut parts = uri::Parts::default();
    parts.scheme = Some(uri::Scheme::HTTP);
    parts.authority = Some(uri::Authority::from_static(authority));
    parts.path_and_query = Some(
        request
            .uri()
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| uri::PathAndQuery::from_static("/")),
    );
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    *request.version_mut() = http::Version::HTTP_2;
    request.headers_mut().remove(header::HOST);
}

/// Begins lives for as long as the VM runs and the link is open.
struct Keeper {
    vm: Arc<dyn Vm>,
    id: SandboxId,
    identity: Identity,
    shares: Shares,
    states: watch::Sender<State>,
    closed: CancellationToken,
}

impl Keeper {
    async fn run(self) {
        let mut pause = RECONNECT_PAUSE;
        loop {
            let current = match &*self.states.borrow() {
                State::Up(life) => Some(life.clone()),
                State::Down(_) => None,
            };
            if let Some(life) = current {
                tokio::select! {
                    // A life that ends because the link was closed has no successor.
                    biased;
                    () = self.closed.cancelled() => return life.end(),
                    () = self.vm.exited() => return life.end(),
                    () = life.ended() => {}
                }
                tracing::info!(sandbox = %self.id, "the channel broke, connecting again");
                self.states.send_replace(State::Down(String::new()));
            }
            let begun = tokio::select! {
                begun = Life::begin(self.vm.as_ref(), &self.id, &self.identity, RECONNECT_ATTEMPT) => begun,
                () = self.closed.cancelled() => return,
                () = self.vm.exited() => return,
            };
            match begun {
                Ok((life, ..)) => {
                    pause = RECONNECT_PAUSE;
                    life.serve(&self.shares);
                    self.states.send_replace(State::Up(Arc::new(life)));
                }
                Err(error) => {
                    tracing::warn!(sandbox = %self.id, %error, "could not connect to the guest");
                    self.states.send_replace(State::Down(error.to_string()));
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = self.closed.cancelled() => return,
                        () = self.vm.exited() => return,
                    }
                    pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
                }
            }
        }
    }
}

/// A stream to a port of a sandbox.
#[derive(Debug)]
pub struct GuestStream(TokioIo<hyper::upgrade::Upgraded>);

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
