use std::{
    ffi::CString,
    fmt,
    fs::{self, File},
    io::{self, Write as _},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use cubicle_protocol::share::{Kind, RelativePath, Time};
use rustix::{
    fs::{
        AtFlags, CWD, Gid, Mode, OFlags, RawDir, RenameFlags, Stat, Uid, chmodat, chownat, fchmod,
        fchown, fstat, mkdirat, openat, readlinkat, renameat, renameat_with, statat, unlinkat,
    },
    io::Errno,
};

use crate::{
    root::{Place, Root, proc_path, reopen},
    space::Space,
    status::{self, permissions},
};

/// Most entries that one listing has.
pub const MAX_LISTED: usize = 100_000;

/// Modes of what is made by somebody who does not say any.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// Room for entries as the kernel gives them, in bytes.
const LISTING: usize = 32 << 10;

/// A directory of the host for those who ask from outside of any sandbox: a tree of files that are
/// read and written whole. It holds to the crate's first two invariants as a share does. Everything
/// blocks.
#[derive(Debug)]
pub struct Contents {
    root: Root,
    /// Whom new files are given to unless somebody else is named.
    owner: (u32, u32),
}

/// Something in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where it is.
    pub path: RelativePath,
    /// What it is.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// The part of `rwxrwxrwx`.
    pub mode: u32,
    /// Owner, on the host: sandboxes see another one.
    pub uid: u32,
    /// Group, on the host.
    pub gid: u32,
    /// When it was last read.
    pub accessed: Time,
    /// When its content last changed.
    pub modified: Time,
    /// When anything of it last changed.
    pub changed: Time,
    /// Where a symbolic link leads, in the sandboxes that follow it.
    pub target: Option<Vec<u8>>,
}

/// Owner and mode of something. What is `None` stays as it is; what is new belongs to the owner of
/// the tree, and everybody may read it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Owner, on the host.
    pub uid: Option<u32>,
    /// Group, on the host.
    pub gid: Option<u32>,
    /// Permissions; other bits are taken away.
    pub mode: Option<u32>,
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Nothing has that path.
    #[error("not found")]
    NotFound,
    /// Something has that path.
    #[error("exists already")]
    Exists,
    /// It, or something on the way to it, is a file.
    #[error("is no directory, or leads through a file")]
    NotADirectory,
    /// A file was wanted.
    #[error("is a directory")]
    IsADirectory,
    /// It is a symbolic link, a device, a socket or a pipe.
    #[error("is neither a file nor a directory")]
    NeitherFileNorDirectory,
    /// Links mean something in sandboxes only.
    #[error("leads through a symbolic link, which is followed in sandboxes only")]
    ThroughLink,
    /// The top cannot be replaced or removed.
    #[error("is the root")]
    IsRoot,
    /// More than [`MAX_LISTED`].
    #[error("has more than {MAX_LISTED} entries below it; list less of it")]
    TooMany,
    /// What the disk has left is the host's.
    #[error("there is not enough space on the disk")]
    Full,
    /// The kernel said something else.
    #[error("{0}")]
    Other(io::Error),
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::NOTDIR => Self::NotADirectory,
            Errno::ISDIR => Self::IsADirectory,
            // From `Root`: a link was in the way.
            Errno::STALE => Self::ThroughLink,
            // From `Root`: the top is in no directory of ours.
            Errno::BUSY => Self::IsRoot,
            Errno::NOSPC | Errno::DQUOT => Self::Full,
            errno => Self::Other(errno.into()),
        }
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(errno) => errno.into(),
            None => Self::Other(error),
        }
    }
}

type Result<T> = std::result::Result<T, Problem>;

impl Contents {
    /// The tree below `directory`, which is held from here on, whatever is done to its path.
    ///
    /// # Errors
    /// The directory is not there, or is none.
    pub fn open(directory: &Path) -> Result<Self> {
        let root = Root::open(directory)?;
        let stat = fstat(&root)?;
        Ok(Self {
            root,
            owner: (stat.st_uid, stat.st_gid),
        })
    }

    /// What is at a path.
    ///
    /// # Errors
    /// [`Problem`].
    pub fn item(&self, path: &RelativePath) -> Result<Item> {
        let found = self.root.find(path)?;
        let item = item(path.clone(), &fstat(&found)?, || {
            readlinkat(&found, "", vec![])
        });
        Ok(item?)
    }

    /// What is in a directory, and in those in it as far as `depth` allows: 1 is the directory
    /// itself. In the order of the paths.
    ///
    /// # Errors
    /// [`Problem`]. What goes away meanwhile is no problem.
    pub fn list(&self, path: &RelativePath, depth: u32) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        let mut todo = vec![(path.clone(), 1)];
        let mut buffer = vec![MaybeUninit::uninit(); LISTING];
        while let Some((path, level)) = todo.pop() {
            let directory = match self.root.directory(&path) {
                Ok(directory) => directory,
                // It was one a moment ago, or is a mount of the host's.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::STALE | Errno::XDEV) if level > 1 => {
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            let mut listing = RawDir::new(&directory, &mut buffer);
            while let Some(entry) = listing.next() {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let path = path.join(name).map_err(|_| Errno::NAMETOOLONG)?;
                let item = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
                    .and_then(|stat| item(path, &stat, || readlinkat(&directory, name, vec![])));
                match item {
                    Ok(item) => {
                        if item.kind == Kind::Directory && level < depth {
                            todo.push((item.path.clone(), level + 1));
                        }
                        items.push(item);
                    }
                    // Removed or replaced meanwhile.
                    Err(Errno::NOENT | Errno::INVAL) => {}
                    Err(errno) => return Err(errno.into()),
                }
                if items.len() > MAX_LISTED {
                    return Err(Problem::TooMany);
                }
            }
        }
        items.sort_unstable_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
        Ok(items)
    }

    /// Makes a directory; with `parents` those above it that are missing, too, and then it is no
    /// problem if all are there.
    ///
    /// # Errors
    /// [`Problem`].
    pub fn make_directory(
        &self,
        path: &RelativePath,
        attributes: Attributes,
        parents: bool,
    ) -> Result<Item> {
        let bytes = path.as_bytes();
        let ends = (0..bytes.len()).filter(|&end| bytes.get(end) == Some(&b'/'));
        for end in ends.filter(|_| parents) {
            let above = bytes.get(..end).unwrap_or_default().to_vec();
            let above = RelativePath::new(above).map_err(|_| Errno::INVAL)?;
            match self.make_one(&above, attributes) {
                Ok(()) | Err(Problem::Exists) => {}
                Err(problem) => return Err(problem),
            }
        }
        match self.make_one(path, attributes) {
            Err(Problem::Exists | Problem::IsRoot) if parents => {
                let there = self.item(path)?;
                match there.kind {
                    Kind::Directory => Ok(there),
                    _ => Err(Problem::Exists),
                }
            }
            Err(Problem::IsRoot) => Err(Problem::Exists),
            made => made.and_then(|()| self.item(path)),
        }
    }

    fn make_one(&self, path: &RelativePath, attributes: Attributes) -> Result<()> {
        let place = self.root.place(path)?;
        mkdirat(&place.parent, place.name, Mode::RWXU)?;
        let made = place.directory()?;
        self.dress(&made, attributes, DIRECTORY_MODE)
    }

    /// Gives what was just made its owner and mode.
    fn dress(&self, made: &OwnedFd, attributes: Attributes, mode: u32) -> Result<()> {
        let uid = attributes.uid.unwrap_or(self.owner.0);
        let gid = attributes.gid.unwrap_or(self.owner.1);
        let stat = fstat(made)?;
        if (stat.st_uid, stat.st_gid) != (uid, gid) {
            fchown(made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        fchmod(made, permissions(attributes.mode.unwrap_or(mode)))?;
        Ok(())
    }

    /// Changes owner and mode of what is at a path.
    ///
    /// # Errors
    /// [`Problem`].
    pub fn change(&self, path: &RelativePath, attributes: Attributes) -> Result<Item> {
        let found = self.root.find(path)?;
        let kind = status::kind(&fstat(&found)?);
        if !matches!(kind, Kind::File | Kind::Directory) {
            return Err(Problem::NeitherFileNorDirectory);
        }
        let uid = attributes.uid.map(Uid::from_raw);
        let gid = attributes.gid.map(Gid::from_raw);
        if uid.is_some() || gid.is_some() {
            chownat(&found, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = attributes.mode {
            chmodat(CWD, proc_path(&found), permissions(mode), AtFlags::empty())?;
        }
        Ok(item(path.clone(), &fstat(&found)?, no_link)?)
    }

    /// Removes what is at a path. A directory is moved to `trash` with all that is in it, for the
    /// caller to get rid of; whether that was so.
    ///
    /// # Errors
    /// [`Problem`].
    pub fn remove(&self, path: &RelativePath, trash: &Path) -> Result<bool> {
        let place = self.root.place(path)?;
        match unlinkat(&place.parent, place.name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {
                renameat(&place.parent, place.name, CWD, trash)?;
                Ok(true)
            }
            removed => Ok(removed.map(|()| false)?),
        }
    }

    /// Opens a file to read it.
    ///
    /// # Errors
    /// [`Problem`].
    pub fn read(&self, path: &RelativePath) -> Result<File> {
        let found = self.root.find(path)?;
        match status::kind(&fstat(&found)?) {
            Kind::File => Ok(reopen(&found, OFlags::RDONLY)?.into()),
            Kind::Directory => Err(Problem::IsADirectory),
            // Opening a device does things, and opening a pipe waits for somebody.
            _ => Err(Problem::NeitherFileNorDirectory),
        }
    }

    /// Begins to write a file, which appears whole when [`Upload::finish`] is called. Until then it
    /// is at `draft`, a path on the same file system. With `replace` it takes the place of a file
    /// that is there, and its owner and mode unless others are named.
    ///
    /// # Errors
    /// [`Problem`]: what is there and in the way already.
    pub fn write(
        &self,
        path: &RelativePath,
        attributes: Attributes,
        replace: bool,
        draft: PathBuf,
    ) -> Result<Upload> {
        let Place { parent, name } = self.root.place(path).map_err(|errno| match errno {
            Errno::BUSY => Problem::IsADirectory,
            errno => errno.into(),
        })?;
        let mut attributes = attributes;
        match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
            Ok(stat) => match status::kind(&stat) {
                Kind::Directory => return Err(Problem::IsADirectory),
                _ if !replace => return Err(Problem::Exists),
                Kind::File => {
                    attributes.uid.get_or_insert(stat.st_uid);
                    attributes.gid.get_or_insert(stat.st_gid);
                    attributes.mode.get_or_insert(stat.st_mode);
                }
                _ => {}
            },
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = openat(CWD, &draft, flags, Mode::RUSR | Mode::WUSR)?;
        let draft = Draft(draft);
        self.dress(&fd, attributes, FILE_MODE)?;
        Ok(Upload {
            file: fd.into(),
            draft,
            parent,
            path: path.clone(),
            replace,
            space: Space::default(),
        })
    }
}

/// A file that is being written. Dropped, it leaves nothing.
#[derive(Debug)]
pub struct Upload {
    file: File,
    draft: Draft,
    parent: OwnedFd,
    path: RelativePath,
    replace: bool,
    space: Space,
}

impl Upload {
    /// Writes the next piece.
    ///
    /// # Errors
    /// [`Problem`], [`Problem::Full`] above all.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.space.take(&self.file, data.len() as u64)?;
        Ok(self.file.write_all(data)?)
    }

    /// Puts the file where it belongs, once it is safely on the disk.
    ///
    /// # Errors
    /// [`Problem`]: what has come in the way meanwhile.
    pub fn finish(self) -> Result<Item> {
        self.file.sync_data()?;
        let (_, name) = self.path.split().ok_or(Problem::IsRoot)?;
        let flags = match self.replace {
            true => RenameFlags::empty(),
            false => RenameFlags::NOREPLACE,
        };
        renameat_with(CWD, &self.draft.0, &self.parent, name, flags)?;
        Ok(item(self.path.clone(), &fstat(&self.file)?, no_link)?)
    }
}

/// A file that is removed unless it was moved.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "an unfinished upload stays");
            }
            _ => {}
        }
    }
}

impl fmt::Debug for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `target` is asked where a link leads, if it is one.
fn item(
    path: RelativePath,
    stat: &Stat,
    target: impl FnOnce() -> rustix::io::Result<CString>,
) -> rustix::io::Result<Item> {
    let kind = status::kind(stat);
    let target = match kind {
        Kind::Symlink => Some(target()?.into_bytes()),
        _ => None,
    };
    Ok(Item {
        path,
        kind,
        size: stat.st_size.unsigned_abs(),
        mode: permissions(stat.st_mode).bits(),
        uid: stat.st_uid,
        gid: stat.st_gid,
        accessed: status::time(stat.st_atime, stat.st_atime_nsec),
        modified: status::time(stat.st_mtime, stat.st_mtime_nsec),
        changed: status::time(stat.st_ctime, stat.st_ctime_nsec),
        target,
    })
}

/// For what is known to be no link.
fn no_link() -> rustix::io::Result<CString> {
    Err(Errno::INVAL)
}
