//! Watches that are asked for their events from time to time.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
};
use uuid::Uuid;

use super::{MAX_BATCH, MAX_EVENTS, MAX_WATCHES, Tree, WatchError};
use crate::{blocking::blocking, fds, proto::filesystem::FilesystemEvent};

/// The right to one watch, given back when dropped.
pub(in crate::filesystem) type Slot = OwnedSemaphorePermit;

/// All watches of the sandbox: counts every one and owns those that have an id.
#[derive(Debug)]
pub(in crate::filesystem) struct Registry {
    slots: Arc<Semaphore>,
    watchers: Mutex<HashMap<String, Watcher>>,
}

#[derive(Debug)]
struct Watcher {
    tree: Arc<Mutex<Tree>>,
    reader: AbortHandle,
    _slot: Slot,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            slots: Arc::new(Semaphore::new(MAX_WATCHES)),
            watchers: Mutex::default(),
        }
    }
}

impl Registry {
    /// Reserves one watch.
    pub(in crate::filesystem) fn slot(&self) -> Result<Slot, WatchError> {
        Arc::clone(&self.slots)
            .try_acquire_owned()
            .map_err(|_| WatchError::TooMany)
    }

    /// Keeps a watch and reads its events as they come, so that new directories are entered early.
    pub(in crate::filesystem) fn insert(
        &self,
        tree: Tree,
        slot: Slot,
    ) -> Result<String, WatchError> {
        let descriptor = readable(&tree)?;
        let tree = Arc::new(Mutex::new(tree));
        let shared = Arc::clone(&tree);
        let reader = tokio::spawn(async move {
            while let Ok(mut ready) = descriptor.readable().await {
                let tree = Arc::clone(&shared);
                match blocking(move || lock(&tree).read()).await {
                    Ok(true) => ready.clear_ready(),
                    Ok(false) => {}
                    // Whoever asks next meets it, too.
                    Err(WatchError::Io { .. }) => break,
                    Err(_) => {}
                }
            }
        });
        let watcher = Watcher {
            tree,
            reader: reader.abort_handle(),
            _slot: slot,
        };
        let id = format!("w{}", Uuid::new_v4().simple());
        lock(&self.watchers).insert(id.clone(), watcher);
        Ok(id)
    }

    /// The events since the last call, up to this moment.
    pub(in crate::filesystem) async fn take(
        &self,
        id: &str,
    ) -> Result<Vec<FilesystemEvent>, WatchError> {
        let tree = match lock(&self.watchers).get(id) {
            Some(watcher) => Arc::clone(&watcher.tree),
            None => return Err(WatchError::NotFound(id.to_owned())),
        };
        blocking(move || {
            let mut tree = lock(&tree);
            // In batches, and no more of them than can be kept: somebody may be writing faster.
            for _ in 0..MAX_EVENTS / MAX_BATCH {
                if tree.read()? {
                    break;
                }
            }
            tree.take()
        })
        .await
    }

    /// Ends a watch.
    pub(in crate::filesystem) fn remove(&self, id: &str) -> Result<(), WatchError> {
        match lock(&self.watchers).remove(id) {
            Some(_) => Ok(()),
            None => Err(WatchError::NotFound(id.to_owned())),
        }
    }
}

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A descriptor that becomes readable with the tree.
pub(super) fn readable(tree: &Tree) -> Result<AsyncFd<OwnedFd>, WatchError> {
    tree.descriptor()
        .and_then(|descriptor| fds::watch(descriptor, Interest::READABLE))
        .map_err(|error| tree.io_error(error))
}
