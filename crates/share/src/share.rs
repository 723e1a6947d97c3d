use std::{os::fd::OwnedFd, path::Path, sync::Arc};

use cubicle_protocol::share::{FileRef, Status};
use rustix::{
    fs::{FileType, Gid, OFlags, Stat, Uid, fstat},
    io::Errno,
    process::geteuid,
};
use tokio::sync::Semaphore;

use crate::{
    error::{Error, Result},
    files::{OpenFile, OpenFiles},
    root::{Root, reopen},
    serve::MAX_PARALLEL,
    space::Space,
    status,
};

/// What a guest may do to a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Look.
    ReadOnly,
    /// Look and change.
    ReadWrite,
}

/// A directory of the host for one sandbox. See the crate.
#[derive(Debug)]
pub struct Share {
    pub(crate) root: Root,
    pub(crate) access: Access,
    pub(crate) files: OpenFiles,
    pub(crate) space: Space,
    /// One for each request that is worked on.
    pub(crate) turns: Arc<Semaphore>,
    device: u64,
    /// Whom new files are given to; `None`: they are that user's anyway, or cannot be given away.
    owner: Option<(Uid, Gid)>,
}

impl Share {
    /// Shares `directory`. It is held from here on, whatever is done to its path.
    ///
    /// # Errors
    /// [`Error::Directory`] if it is none, or cannot be used.
    pub fn open(directory: &Path, access: Access) -> Result<Self> {
        let failed = |source: std::io::Error| Error::Directory {
            path: directory.to_owned(),
            source,
        };
        let root = Root::open(directory).map_err(failed)?;
        let stat = fstat(&root).map_err(|errno| failed(errno.into()))?;
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        Ok(Self {
            root,
            access,
            files: OpenFiles::new(),
            space: Space::default(),
            turns: Arc::new(Semaphore::new(MAX_PARALLEL)),
            device: stat.st_dev,
            owner: geteuid().is_root().then_some(owner),
        })
    }

    pub(crate) fn status(&self, stat: &Stat) -> Status {
        status::status(stat, self.device)
    }

    pub(crate) fn owner(&self) -> Option<(Uid, Gid)> {
        self.owner
    }

    /// Gets hold of a file without opening it, and makes sure that it is the one that is meant.
    pub(crate) fn find(&self, file: &FileRef) -> rustix::io::Result<(OwnedFd, Stat)> {
        let found = self.root.find(&file.path)?;
        let stat = fstat(&found)?;
        if file.inode != 0 && status::inode(&stat, self.device) != file.inode {
            return Err(Errno::STALE);
        }
        Ok((found, stat))
    }

    /// Opens a regular file, or takes it from the cache.
    pub(crate) fn file(&self, file: &FileRef, write: bool) -> rustix::io::Result<Arc<OwnedFd>> {
        match self.files.get(file.inode, write) {
            Some(fd) => Ok(fd),
            None => self.open_anew(file, write),
        }
    }

    /// Opens the regular file that is at a path now.
    pub(crate) fn open_anew(
        &self,
        file: &FileRef,
        write: bool,
    ) -> rustix::io::Result<Arc<OwnedFd>> {
        let (found, stat) = self.find(file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::STALE),
            // Opening a device does things, and opening a pipe waits for somebody.
            _ => return Err(Errno::ACCESS),
        }
        let flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let fd = Arc::new(reopen(&found, flags)?);
        self.keep(&stat, &fd, write);
        Ok(fd)
    }

    /// Keeps an open regular file for the requests that follow.
    pub(crate) fn keep(&self, stat: &Stat, fd: &Arc<OwnedFd>, writable: bool) {
        let fd = Arc::clone(fd);
        let inode = status::inode(stat, self.device);
        self.files.keep(inode, OpenFile { fd, writable });
    }
}
