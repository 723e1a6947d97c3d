//! One life of a channel: from the handshake until the connection breaks.

use std::{
    fmt,
    future::Future,
    time::{Duration, Instant},
};

use cubicle_ids::SandboxId;
use cubicle_protocol::{
    channel::{
        self, CONNECTION_WINDOW, MAX_FRAME_SIZE, MAX_STREAMS, Nonce, STREAM_WINDOW,
        host::HostChannel,
    },
    guest_api::{Entropy, InitRequest, InitResponse, Introduced, Timestamp},
};
use cubicle_vmm::{ChannelStream, Vm};
use futures::FutureExt as _;
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::timeout_at;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Identity, LifeTimings, Outgoing};
use crate::{
    error::{Error, Result},
    shares::{self, Shares},
};

/// First and longest wait for the guest's reply to one hello. A hello is lost only if it crosses
/// the moment in which a guest's port is closed, so the first wait is seldom used up; under load
/// a guest may well take longer, so the wait doubles.
const REPLY_WAIT: Duration = Duration::from_millis(250);
const REPLY_WAIT_MAX: Duration = Duration::from_secs(4);

/// While streams are open, a connection that moves nothing for this long is asked whether it still
/// lives, and given as long again to answer. A guest daemon that was killed and started again knows
/// nothing of the connection and would never say so.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// An HTTP/2 connection to the guest daemon. Dropping it ends it.
pub(super) struct Life {
    sender: http2::SendRequest<Outgoing>,
    over: CancellationToken,
    _end_on_drop: DropGuard,
}

impl fmt::Debug for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Life")
            .field("over", &self.over.is_cancelled())
            .finish_non_exhaustive()
    }
}

impl Life {
    /// Connects, shakes hands and tells the guest who it is.
    pub(super) async fn begin(
        vm: &dyn Vm,
        id: &SandboxId,
        identity: &Identity,
        patience: Duration,
    ) -> Result<(Self, InitResponse, LifeTimings)> {
        let begun = Instant::now();
        let deadline = tokio::time::Instant::now() + patience;
        let unanswered = |last: String| Error::Unanswered {
            id: id.clone(),
            after: patience,
            last,
        };

        let mut wait = REPLY_WAIT;
        let mut last = String::new();
        let mut channel = loop {
            let until = deadline.min(tokio::time::Instant::now() + wait);
            match timeout_at(until, shake_hands(vm, id)).await {
                Ok(Ok(channel)) => break channel,
                Ok(Err(
                    error @ (Error::Vm(cubicle_vmm::Error::Gone { .. })
                    | Error::Handshake {
                        source: channel::Error::Version { .. },
                        ..
                    }),
                )) => {
                    return Err(error);
                }
                Ok(Err(error)) => {
                    last = error.to_string();
                    // The stream ended at once: trying again at once would spin.
                    tokio::time::sleep_until(until).await;
                }
                Err(_elapsed) => {}
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(unanswered(last));
            }
            wait = (wait * 2).min(REPLY_WAIT_MAX);
        };
        let replied = Instant::now();

        let answer = timeout_at(deadline, introduce(&mut channel, id, identity))
            .await
            .map_err(|_elapsed| unanswered("the guest did not say who it is".to_owned()))??;
        let introduced = Instant::now();

        let over = CancellationToken::new();
        let end_on_drop = over.clone().drop_guard();
        let (sender, connection) = http2::Builder::new(Executor { over: over.clone() })
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME_SIZE)
            .initial_max_send_streams(MAX_STREAMS as usize)
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .handshake(TokioIo::new(channel))
            .await
            .map_err(|source| Error::Broken {
                id: id.clone(),
                source,
            })?;
        // Boxed here, where the compiler still sees that it may change threads.
        let connection = connection.boxed();
        tokio::spawn({
            let (over, id) = (over.clone(), id.clone());
            async move {
                if let Some(Err(error)) = over.run_until_cancelled(connection).await {
                    tracing::debug!(sandbox = %id, %error, "a life of the channel ended");
                }
                over.cancel();
            }
        });
        let life = Self {
            sender,
            over,
            _end_on_drop: end_on_drop,
        };

        let timings = LifeTimings {
            channel: replied - begun,
            init: introduced - replied,
        };
        Ok((life, answer, timings))
    }

    /// Sends a request; the error gives it back if the guest cannot have seen it.
    pub(super) async fn send(
        &self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Outgoing>>> {
        self.sender.clone().try_send_request(request).await
    }

    /// Ends this life; all its streams fail.
    pub(super) fn end(&self) {
        self.over.cancel();
    }

    /// Serves the guest's shares for as long as this life lasts, which this does not prolong.
    pub(super) fn serve(&self, shares: &Shares) {
        let work = shares.serve(&self.sender);
        let over = self.over.clone();
        tokio::spawn(async move {
            over.run_until_cancelled(work).await;
        });
    }

    /// Resolves when this life is over.
    pub(super) async fn ended(&self) {
        self.over.cancelled().await;
    }
}

/// Tells the guest who it is, by the clock of this moment and with entropy that nobody had before.
async fn introduce(
    channel: &mut HostChannel<ChannelStream>,
    id: &SandboxId,
    identity: &Identity,
) -> Result<InitResponse> {
    let request = InitRequest {
        timestamp: Some(Timestamp::now()),
        entropy: Some(Entropy::generate()),
        mounts: identity.init.mounts.clone().map(shares::told),
        ..identity.init.clone()
    };
    let unreadable = |reason: String| Error::GuestAnswer {
        id: id.clone(),
        call: "its introduction",
        reason,
    };
    let introduced = channel.introduce(&request).await;
    let introduced = introduced.map_err(|error| unreadable(error.to_string()))?;
    let response = match introduced {
        Introduced::Became(response) => response,
        Introduced::Refused(message) => {
            return Err(Error::Init {
                id: id.clone(),
                message: message.chars().take(500).collect(),
            });
        }
    };
    if let Some((snapshot, nonce)) = &identity.restored
        && response.previous_nonce.as_ref() != Some(nonce)
    {
        return Err(Error::WrongMemory {
            id: id.clone(),
            snapshot: snapshot.clone(),
        });
    }
    Ok(response)
}

async fn shake_hands(
    vm: &dyn Vm,
    id: &SandboxId,
) -> Result<channel::host::HostChannel<ChannelStream>> {
    let stream = vm.connect_channel().await?;
    channel::host::handshake(stream, Nonce::generate())
        .await
        .map_err(|source| Error::Handshake {
            id: id.clone(),
            source,
        })
}

/// Runs what HTTP/2 spawns, and drops all of it when the life is over: a graceful end would wait
/// for tunnels to close by themselves.
#[derive(Clone)]
struct Executor {
    over: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        let over = self.over.clone();
        tokio::spawn(async move {
            over.run_until_cancelled(future).await;
        });
    }
}
