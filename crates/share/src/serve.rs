//! Requests from a stream, replies to another.

use std::{
    fmt::Display,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use cubicle_protocol::share::{Errno, Frame, Frames, MAX_IN_FLIGHT, Reply, Request, encode};
use futures::{Stream, StreamExt as _};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc};

use crate::{
    error::{Error, Result},
    share::Share,
};

/// Most requests of one share that are worked on at a time; others wait.
pub const MAX_PARALLEL: usize = 8;

/// The threads that all shares of this process have together. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Workers {
    permits: Arc<Semaphore>,
}

impl Workers {
    /// At most `threads` at a time. They are those that the runtime has for blocking work.
    #[must_use]
    pub fn new(threads: NonZeroUsize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(threads.get())),
        }
    }
}

/// A reply on its way to the guest. As long as it waits, it counts as a request in flight.
#[derive(Debug)]
pub struct Outgoing {
    frame: Bytes,
    _place: OwnedSemaphorePermit,
}

impl Outgoing {
    /// What is to be sent. From here on the guest may have another request in flight.
    #[must_use]
    pub fn into_frame(self) -> Bytes {
        self.frame
    }
}

/// Serves a share until the stream of requests ends or nobody wants replies any more. There are at
/// most [`MAX_IN_FLIGHT`] replies in the channel: nothing more is read from a guest that does not
/// take them.
///
/// Requests that are being worked on when this future is dropped are seen through; nobody learns
/// what came of them, and the guest asks again.
///
/// # Errors
/// [`Error::Broken`] when the stream fails, [`Error::Protocol`] when the guest sends nonsense.
pub async fn serve<E: Display>(
    share: Arc<Share>,
    workers: Workers,
    requests: impl Stream<Item = Result<Bytes, E>>,
    replies: mpsc::UnboundedSender<Outgoing>,
) -> Result<()> {
    let mut requests = std::pin::pin!(requests);
    let mut frames = Frames::new();
    let in_flight = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    // What the life before has begun must be over: its end is not known to the guest, which is
    // about to ask again, and would undo what the guest does after that.
    let all = u32::try_from(MAX_PARALLEL).unwrap_or(u32::MAX);
    let Ok(_) = share.turns.acquire_many(all).await.map(drop) else {
        return Ok(());
    };
    while let Some(piece) = requests.next().await {
        frames.push(&piece.map_err(|error| Error::Broken(error.to_string()))?);
        while let Some(frame) = frames.take::<Request>()? {
            let taken = async {
                let place = Arc::clone(&in_flight).acquire_owned().await?;
                let own = Arc::clone(&share.turns).acquire_owned().await?;
                let all = Arc::clone(&workers.permits).acquire_owned().await?;
                Ok::<_, AcquireError>((place, own, all))
            };
            let Ok((place, own, all)) = taken.await else {
                return Ok(());
            };
            let (share, replies) = (Arc::clone(&share), replies.clone());
            tokio::task::spawn_blocking(move || {
                // Given back when the work is over, also if nobody waits for it any more.
                let _threads = (own, all);
                if let Some(frame) = answer(&share, &frame) {
                    let _place = place;
                    let _ = replies.send(Outgoing { frame, _place });
                }
            });
        }
        if replies.is_closed() {
            return Ok(());
        }
    }
    Ok(())
}

/// Does what is asked for; the reply as a frame, if there is one.
fn answer(share: &Share, frame: &Frame<Request>) -> Option<Bytes> {
    let id = frame.message.id;
    let done = catch_unwind(AssertUnwindSafe(|| {
        share.perform(&frame.message, &frame.data)
    }));
    let (reply, data) = done.unwrap_or_else(|_| {
        tracing::error!(id, "a request of a guest ended in a panic");
        let outcome = Err(Errno(rustix::io::Errno::IO.raw_os_error()));
        Some((Reply { id, outcome }, Vec::new()))
    })?;
    let encoded = encode(&reply, &data);
    encoded
        .inspect_err(|error| tracing::error!(%error, id, "cannot encode a reply to a guest"))
        .ok()
}
