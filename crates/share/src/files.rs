//! Files that are kept open, so that reading one does not open it for every piece.

use std::{
    num::NonZeroUsize,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lru::LruCache;

/// Most files that one share keeps open.
pub const MAX_OPEN_FILES: usize = 64;

/// Open regular files, by inode. An open file keeps its inode from being used for another one.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    files: Mutex<LruCache<u64, OpenFile>>,
}

/// A file, open to be read, and to be written if `writable`.
#[derive(Debug, Clone)]
pub(crate) struct OpenFile {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) writable: bool,
}

impl OpenFiles {
    pub(crate) fn new() -> Self {
        let capacity = NonZeroUsize::new(MAX_OPEN_FILES).unwrap_or(NonZeroUsize::MIN);
        Self {
            files: Mutex::new(LruCache::new(capacity)),
        }
    }

    /// The file, if it is open in that way.
    pub(crate) fn get(&self, inode: u64, write: bool) -> Option<Arc<OwnedFd>> {
        let mut files = self.lock();
        let file = files.get(&inode)?;
        (file.writable || !write).then(|| Arc::clone(&file.fd))
    }

    /// Keeps a file open until there is no more room, or nobody needs it.
    pub(crate) fn keep(&self, inode: u64, file: OpenFile) {
        let replaced = self.lock().push(inode, file);
        // Closed here, when the lock is free again: that may take its time.
        drop(replaced);
    }

    /// Closes a file when nobody uses it any more.
    pub(crate) fn release(&self, inode: u64) {
        let released = self.lock().pop(&inode);
        drop(released);
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<u64, OpenFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
