//! The directory that layers are unpacked into, reached through descriptors alone.
//!
//! No path that came from outside is ever given to the kernel relative to anything but the root's
//! descriptor, and then only by `openat2` with `RESOLVE_IN_ROOT`: symbolic links in it, absolute
//! ones too, lead to where they would lead inside of a container, never out. The last component
//! is always used with its parent's descriptor, in calls that follow no link.

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, fchmod, fchown,
        fremovexattr, fstat, mkdirat, openat, openat2, readlinkat, statat, unlinkat,
    },
    io::Errno,
};

use super::Fault;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// No real image nests deeper; whoever walks the tree holds a descriptor for each level.
const MAX_DEPTH: usize = 256;
/// The longest path from the root, in bytes, with room for what the tree itself lies in.
const MAX_PATH: usize = 3584;

/// What a directory with a default access control list gives to what is made in it.
pub(super) const INHERITED: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];

/// An open directory in the tree.
#[derive(Debug)]
pub(super) struct Directory {
    fd: OwnedFd,
    /// Tells it apart from all others in the tree.
    pub(super) inode: u64,
}

impl Directory {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where something is, or will be: a name in a directory.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) parent: Rc<Directory>,
    pub(super) name: Vec<u8>,
}

impl Place {
    pub(super) fn stat(&self) -> Result<Option<Stat>, Fault> {
        match statat(self.parent.fd(), &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Fault::system("look at it", error)),
        }
    }
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// The tree.
pub(super) struct Tree {
    root: Rc<Directory>,
    root_path: PathBuf,
    /// The directory that was used last, which is mostly the one that is wanted next.
    last: Option<(Vec<u8>, Rc<Directory>)>,
    /// Whether some directory has an access control list for what is made in it.
    pub(super) has_default_acls: bool,
}

impl Tree {
    /// `path` is an empty directory that nobody else uses.
    pub(super) fn open(path: &Path) -> Result<Tree, Fault> {
        let fd = rustix::fs::open(path, DIRECTORY, Mode::empty())
            .map_err(|error| Fault::system("open the directory", error))?;
        let root = Rc::new(directory(fd)?);
        Ok(Tree {
            root_path: real_path(root.fd())?,
            root,
            last: None,
            has_default_acls: false,
        })
    }

    pub(super) fn root(&self) -> &Directory {
        &self.root
    }

    /// The place that a path means. Directories on the way are made where they are missing.
    pub(super) fn place(&mut self, components: &[&[u8]]) -> Result<Place, Fault> {
        let Some((name, parents)) = components.split_last() else {
            return Err(Fault::Malformed("the root itself"));
        };
        let path = parents.join(&b'/');
        let parent = match &self.last {
            Some((known, directory)) if *known == path => directory.clone(),
            _ => {
                let parent = match self.existing(&path)? {
                    Some(directory) => directory,
                    None => self.make(parents)?,
                };
                self.last = Some((path, parent.clone()));
                parent
            }
        };
        let name = name.to_vec();
        Ok(Place { parent, name })
    }

    /// As [`Tree::place`], but nothing is made.
    pub(super) fn existing_place(&mut self, components: &[&[u8]]) -> Result<Option<Place>, Fault> {
        let Some((name, parents)) = components.split_last() else {
            return Ok(None);
        };
        let parent = match self.existing(&parents.join(&b'/')) {
            Ok(parent) => parent,
            // Nothing can be in what is not a directory.
            Err(Fault::Parent(_)) => None,
            Err(other) => return Err(other),
        };
        let name = name.to_vec();
        Ok(parent.map(|parent| Place { parent, name }))
    }

    /// To be called when something was removed: a path may now lead elsewhere.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// The directory at a path, through links inside of the tree.
    pub(super) fn existing(&self, path: &[u8]) -> Result<Option<Rc<Directory>>, Fault> {
        if path.is_empty() {
            return Ok(Some(self.root.clone()));
        }
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let fd = loop {
            match openat2(self.root.fd(), path, DIRECTORY, Mode::empty(), inside) {
                Ok(fd) => break fd,
                // Somebody renamed something, anywhere, while `..` was followed.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::NOTDIR) => return Err(Fault::Parent("is not a directory")),
                Err(Errno::LOOP) => return Err(Fault::Parent("is a link that leads nowhere")),
                Err(Errno::XDEV) => return Err(Fault::Parent("is outside of the image")),
                Err(error) => return Err(Fault::system("open its directory", error)),
            }
        };
        // Links can lead deeper than any path can say.
        let real = real_path(fd.as_fd())?;
        let Ok(inner) = real.strip_prefix(&self.root_path) else {
            return Err(Fault::Parent("is outside of the image"));
        };
        let inner = inner.as_os_str().as_bytes();
        let depth = inner.split(|&byte| byte == b'/').count();
        if depth > MAX_DEPTH || inner.len() > MAX_PATH {
            return Err(Fault::Parent("is too deep"));
        }
        Ok(Some(Rc::new(directory(fd)?)))
    }

    fn make(&self, components: &[&[u8]]) -> Result<Rc<Directory>, Fault> {
        let mut parent = self.root.clone();
        for end in 1..=components.len() {
            let path = components[..end].join(&b'/');
            parent = match self.existing(&path)? {
                Some(directory) => directory,
                None => {
                    match mkdirat(parent.fd(), components[end - 1], Mode::from_raw_mode(0o755)) {
                        Ok(()) => {}
                        Err(Errno::EXIST) => {
                            return Err(Fault::Parent("is a link that leads nowhere"));
                        }
                        Err(error) => return Err(Fault::system("make its directory", error)),
                    }
                    let made = self
                        .existing(&path)?
                        .ok_or(Fault::Parent("vanished while it was made"))?;
                    // A set-group-id directory passes both on to what is made in it.
                    fchown(made.fd(), Some(Uid::ROOT), Some(Gid::ROOT))
                        .and_then(|()| fchmod(made.fd(), Mode::from_raw_mode(0o755)))
                        .map_err(|error| Fault::system("make its directory", error))?;
                    if self.has_default_acls {
                        for name in INHERITED {
                            fremovexattr(made.fd(), name).ok();
                        }
                    }
                    made
                }
            };
        }
        Ok(parent)
    }
}

/// Opens a directory by its name, not following a link.
pub(super) fn enter(parent: &Directory, name: &[u8]) -> Result<Directory, Fault> {
    let flags = DIRECTORY | OFlags::NOFOLLOW;
    let fd = openat(parent.fd(), name, flags, Mode::empty())
        .map_err(|error| Fault::system("open a directory", error))?;
    directory(fd)
}

/// Removes whatever is at a place, with all that is in it.
pub(super) fn remove(parent: &Directory, name: &[u8]) -> Result<(), Fault> {
    match unlinkat(parent.fd(), name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(Fault::system("remove what is there", error)),
    }
    let inside = enter(parent, name)?;
    for child in names(&inside)? {
        remove(&inside, &child)?;
    }
    drop(inside);
    unlinkat(parent.fd(), name, AtFlags::REMOVEDIR)
        .map_err(|error| Fault::system("remove a directory", error))
}

/// What a directory holds.
pub(super) fn names(directory: &Directory) -> Result<Vec<Vec<u8>>, Fault> {
    let list = || {
        let mut names = Vec::new();
        for entry in Dir::read_from(directory.fd())? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        Ok(names)
    };
    list().map_err(|error| Fault::system("list a directory", error))
}

fn directory(fd: OwnedFd) -> Result<Directory, Fault> {
    let stat = fstat(&fd).map_err(|error| Fault::system("look at a directory", error))?;
    let inode = stat.st_ino;
    Ok(Directory { fd, inode })
}

/// A path of the descriptor's file that the kernel resolves without looking at any name in it;
/// for the calls that take no descriptor.
pub(super) fn descriptor_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn real_path(fd: BorrowedFd<'_>) -> Result<PathBuf, Fault> {
    let path = readlinkat(rustix::fs::CWD, descriptor_path(fd), Vec::new());
    match path {
        Ok(path) => Ok(PathBuf::from(OsStr::from_bytes(path.to_bytes()))),
        Err(Errno::NAMETOOLONG) => Err(Fault::Parent("is too deep")),
        Err(error) => Err(Fault::Io {
            action: "find out where a directory is",
            source: io::Error::from(error),
        }),
    }
}
