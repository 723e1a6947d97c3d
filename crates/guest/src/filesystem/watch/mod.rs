//! Changes of a directory, as they happen.
//!
//! Each watch is one inotify instance, so that what it has to say is neither delayed nor crowded
//! out by another. Whoever asks gets everything that happened before the question: the kernel
//! queues an event before the system call that caused it returns, and the queue is emptied before
//! an answer is given.

mod registry;
mod stream;
mod tree;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use connectrpc::ErrorCode;
use rustix::fs::statfs;

use super::Error;
use crate::access::State;

pub(super) use registry::{Registry, Slot};
pub(super) use stream::stream;
pub(super) use tree::Tree;

/// How many watches there may be at a time, streams included. The kernel allows 128 inotify
/// instances per user by default, and some are left to programs.
const MAX_WATCHES: usize = 100;

/// How many events a watch keeps for its next question.
const MAX_EVENTS: usize = 1 << 16;

/// How many events are read in one go, so that a busy directory doesn't keep its reader forever.
const MAX_BATCH: usize = 4096;

/// What to watch.
#[derive(Debug, Clone, Copy)]
pub(super) struct WatchOptions {
    pub(super) recursive: bool,
    pub(super) include_entry: bool,
    pub(super) allow_network_mounts: bool,
}

/// Why a directory is not watched, or not any longer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The limit on watches is reached.
    #[error("there are {MAX_WATCHES} watches already; remove one first")]
    TooMany,
    /// The directory has more directories below it than the kernel allows to watch.
    #[error("'{}' has too many directories below it to watch them all", .0.display())]
    TooLarge(PathBuf),
    /// Changes that others make to a network file system are not seen.
    #[error("cannot watch path on network filesystem: '{}'", .0.display())]
    NetworkMount(PathBuf),
    /// More happened than could be kept.
    #[error("events in '{}' came faster than they were fetched; some are lost", .0.display())]
    Lost(PathBuf),
    /// Nothing has that id.
    #[error("watcher with id '{0}' not found")]
    NotFound(String),
    /// The kernel refused.
    #[error("cannot watch '{}': {source}", path.display())]
    Io {
        /// The watched directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl WatchError {
    pub(super) const fn code(&self) -> ErrorCode {
        match self {
            Self::TooMany | Self::TooLarge(_) => ErrorCode::ResourceExhausted,
            Self::NetworkMount(_) => ErrorCode::InvalidArgument,
            Self::Lost(_) => ErrorCode::DataLoss,
            Self::NotFound(_) => ErrorCode::NotFound,
            Self::Io { .. } => ErrorCode::Internal,
        }
    }
}

/// Begins to watch the directory at `path`.
///
/// # Errors
/// [`Error::NotFound`], [`Error::NotADirectory`], [`Error::Io`], [`Error::Watch`].
pub(super) fn open(path: PathBuf, options: WatchOptions, state: Arc<State>) -> Result<Tree, Error> {
    let found = std::fs::metadata(&path).map_err(Error::io("watch", &path))?;
    if !found.is_dir() {
        return Err(Error::NotADirectory(path));
    }
    if !options.allow_network_mounts && is_on_network(&path)? {
        return Err(WatchError::NetworkMount(path).into());
    }
    Ok(Tree::open(path, options, state)?)
}

/// Whether a path is on NFS, SMB or FUSE.
fn is_on_network(path: &Path) -> Result<bool, Error> {
    /// File system types in `statfs`, from linux/magic.h; the two of CIFS are SMB's first version
    /// and its later ones.
    const NETWORK: [u32; 5] = [
        libc::NFS_SUPER_MAGIC as u32,
        libc::SMB_SUPER_MAGIC as u32,
        0xff53_4d42,
        0xfe53_4d42,
        libc::FUSE_SUPER_MAGIC as u32,
    ];
    let found = statfs(path).map_err(|errno| Error::io("watch", path)(errno.into()))?;
    // The type is 32 bits in a wider field, sign-extended by some file systems.
    Ok(NETWORK.contains(&(found.f_type as u32)))
}
