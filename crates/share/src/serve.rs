//! Requests from a stream, replies to another.

use std::{fmt::Display, num::NonZeroUsize, sync::Arc};

use bytes::Bytes;
use cubicle_protocol::share::{Errno, Frame, Frames, MAX_IN_FLIGHT, Reply, Request, encode};
use futures::{Stream, StreamExt as _};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};

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

/// Serves a share until the stream of requests ends or nobody wants replies any more.
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
    replies: mpsc::Sender<Bytes>,
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
    let mut tasks = JoinSet::new();
    while let Some(piece) = requests.next().await {
        frames.push(&piece.map_err(|error| Error::Broken(error.to_string()))?);
        while let Some(frame) = frames.take::<Request>()? {
            // A guest that asks for more than it may has to wait: nothing more is read from it.
            let Ok(place) = Arc::clone(&in_flight).acquire_owned().await else {
                return Ok(());
            };
            while tasks.try_join_next().is_some() {}
            let turn = Turn {
                share: Arc::clone(&share),
                all: Arc::clone(&workers.permits),
                replies: replies.clone(),
            };
            tasks.spawn(turn.take(frame, place));
        }
        if replies.is_closed() {
            return Ok(());
        }
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

/// One request's way through the queue.
struct Turn {
    share: Arc<Share>,
    all: Arc<Semaphore>,
    replies: mpsc::Sender<Bytes>,
}

impl Turn {
    async fn take(self, frame: Frame<Request>, place: OwnedSemaphorePermit) {
        let turn = Arc::clone(&self.share.turns).acquire_owned().await;
        let (Ok(own), Ok(all)) = (turn, self.all.acquire_owned().await) else {
            return;
        };
        let share = self.share;
        let id = frame.message.id;
        let done = tokio::task::spawn_blocking(move || {
            // Given back when the work is over, also if nobody waits for it any more.
            let _threads = (own, all);
            let (reply, data) = share.perform(&frame.message, &frame.data)?;
            Some(encode(&reply, &data))
        })
        .await;
        match done {
            Ok(None) => {}
            Ok(Some(Ok(reply))) => {
                let _ = self.replies.send(reply).await;
            }
            Ok(Some(Err(error))) => tracing::error!(%error, "cannot encode a reply to a guest"),
            Err(error) => {
                tracing::error!(%error, "a request of a guest ended in a panic");
                let outcome = Err(Errno(rustix::io::Errno::IO.raw_os_error()));
                if let Ok(reply) = encode(&Reply { id, outcome }, &[]) {
                    let _ = self.replies.send(reply).await;
                }
            }
        }
        drop(place);
    }
}
