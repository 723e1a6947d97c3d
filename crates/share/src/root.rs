//! Paths below a directory, resolved so that none leads out of it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use cubicle_protocol::share::RelativePath;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2},
    io::Errno,
};

/// How often a lookup is tried again that a rename somewhere on the machine has disturbed.
const ATTEMPTS: u32 = 16;

/// Beneath the directory, and neither a symbolic link nor a mount on the way: the guest resolves
/// links itself, and another file system would have inode numbers of its own.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// The top of a shared tree.
#[derive(Debug)]
pub(crate) struct Root {
    directory: OwnedFd,
}

/// A directory and the name of something that is, or may come to be, in it.
pub(crate) struct Place<'a> {
    pub(crate) parent: OwnedFd,
    pub(crate) name: &'a [u8],
}

impl Root {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, path, flags, Mode::empty())?;
        Ok(Self { directory })
    }

    /// Gets hold of what a path names, without opening it.
    pub(crate) fn find(&self, path: &RelativePath) -> rustix::io::Result<OwnedFd> {
        self.resolve(path.as_bytes(), OFlags::PATH | OFlags::NOFOLLOW)
    }

    /// Opens a directory to read it.
    pub(crate) fn directory(&self, path: &RelativePath) -> rustix::io::Result<OwnedFd> {
        self.resolve(path.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The directory that `path` is in, and its name there. The root is in no directory that is
    /// ours: `EBUSY`.
    pub(crate) fn place<'a>(&self, path: &'a RelativePath) -> rustix::io::Result<Place<'a>> {
        let (parent, name) = path.split().ok_or(Errno::BUSY)?;
        let parent = self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Place { parent, name })
    }

    fn resolve(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        beneath(self.directory.as_fd(), path, flags)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Place<'_> {
    /// Opens the directory that is there.
    pub(crate) fn directory(&self) -> rustix::io::Result<OwnedFd> {
        beneath(
            self.parent.as_fd(),
            self.name,
            OFlags::RDONLY | OFlags::DIRECTORY,
        )
    }

    /// Makes a regular file, to read and write it.
    pub(crate) fn create(&self) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        openat(&self.parent, self.name, flags, Mode::RUSR | Mode::WUSR)
    }
}

fn beneath(from: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    for _ in 0..ATTEMPTS {
        match openat2(from, path, flags | OFlags::CLOEXEC, Mode::empty(), BENEATH) {
            // Something was renamed while the kernel looked.
            Err(Errno::AGAIN) => {}
            // A link is where the guest believes a directory to be: it has to look again.
            Err(Errno::LOOP) => return Err(Errno::STALE),
            result => return result,
        }
    }
    Err(Errno::STALE)
}

/// A path to what `fd` is open on, for calls that take no descriptor opened with `O_PATH`.
pub(crate) fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Opens what `found` holds. The caller has made sure that it is a regular file.
pub(crate) fn reopen(found: &OwnedFd, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    openat(CWD, proc_path(found), flags, Mode::empty())
}
