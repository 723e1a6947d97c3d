//! Watches that report as long as somebody listens.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use connectrpc::ConnectError;
use futures::{Stream, stream};
use http::HeaderMap;
use tokio::{
    io::unix::AsyncFd,
    time::{sleep, sleep_until},
};

use super::{
    Tree, WatchError,
    registry::{Slot, lock, readable},
};
use crate::{
    blocking::blocking,
    filesystem::Error,
    proto::filesystem::{
        FilesystemEvent, WatchDirResponse,
        watch_dir_response::{Event, KeepAlive, StartEvent},
    },
};

/// How long a stream is silent at most, if the client doesn't say.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// The header by which a client says it, in seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

/// The events of `tree`, behind one that says that the watch is in place. Ends with the stream's
/// deadline, with an error, or by being dropped.
pub(in crate::filesystem) fn stream(
    tree: Tree,
    slot: Slot,
    headers: &HeaderMap,
    deadline: Option<Instant>,
) -> Result<impl Stream<Item = Result<WatchDirResponse, ConnectError>> + Send + use<>, WatchError> {
    let follower = Follower {
        descriptor: readable(&tree)?,
        tree: Arc::new(Mutex::new(tree)),
        events: VecDeque::new(),
        started: false,
        silence: keepalive(headers),
        deadline,
        _slot: slot,
    };
    Ok(stream::try_unfold(
        follower,
        async |mut follower: Follower| {
            let event = follower.next().await?;
            Ok(Some((
                WatchDirResponse {
                    event: Some(event),
                    ..Default::default()
                },
                follower,
            )))
        },
    ))
}

fn keepalive(headers: &HeaderMap) -> Duration {
    headers
        .get(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|&seconds: &u64| seconds > 0)
        .map_or(KEEPALIVE, Duration::from_secs)
}

struct Follower {
    tree: Arc<Mutex<Tree>>,
    descriptor: AsyncFd<OwnedFd>,
    events: VecDeque<FilesystemEvent>,
    started: bool,
    silence: Duration,
    deadline: Option<Instant>,
    _slot: Slot,
}

impl Follower {
    async fn next(&mut self) -> Result<Event, ConnectError> {
        if !std::mem::replace(&mut self.started, true) {
            return Ok(StartEvent::default().into());
        }
        if self.events.is_empty() {
            let deadline = self.deadline;
            let expired = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            let silence = sleep(self.silence);
            tokio::select! {
                result = self.wait() => result.map_err(Error::from)?,
                () = silence => return Ok(KeepAlive::default().into()),
                () = expired => {
                    return Err(ConnectError::deadline_exceeded("the watch has reached its timeout"));
                }
            }
        }
        match self.events.pop_front() {
            Some(event) => Ok(event.into()),
            None => Ok(KeepAlive::default().into()),
        }
    }

    /// Waits until there are events. What it has read is kept if it is dropped on the way.
    async fn wait(&mut self) -> Result<(), WatchError> {
        while self.events.is_empty() {
            let ready = self.descriptor.readable().await;
            let mut ready = ready.map_err(|source| lock(&self.tree).io_error(source))?;
            let tree = Arc::clone(&self.tree);
            if blocking(move || lock(&tree).read()).await? {
                ready.clear_ready();
            }
            self.events = lock(&self.tree).take()?.into();
        }
        Ok(())
    }
}
