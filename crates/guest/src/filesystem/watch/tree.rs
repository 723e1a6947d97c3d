//! One directory and, if asked for, everything below it.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};

use super::{MAX_BATCH, MAX_EVENTS, WatchError, WatchOptions};
use crate::{
    access::{Accounts, State},
    filesystem::entry,
    proto::filesystem::{EventType, FilesystemEvent},
};

/// What is asked of the kernel for each directory.
const MASK: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// A watched directory and the events that nobody has fetched yet.
///
/// New directories are watched as soon as their creation is read. What appeared in them before that
/// is found by looking, and reported as created; the kernel's own report of the same, if there is
/// one, is then dropped.
#[derive(Debug)]
pub(in crate::filesystem) struct Tree {
    inotify: Arc<OwnedFd>,
    root: PathBuf,
    options: WatchOptions,
    state: Arc<State>,
    /// The watched directories by watch descriptor, relative to the root.
    directories: HashMap<i32, PathBuf>,
    /// Directories that left their place, by the cookie under which they may arrive at another.
    departed: HashMap<u32, PathBuf>,
    /// What was found by looking while the kernel's report of it may still be queued.
    announced: HashSet<PathBuf>,
    events: Vec<FilesystemEvent>,
    lost: bool,
}

impl Tree {
    pub(super) fn open(
        root: PathBuf,
        options: WatchOptions,
        state: Arc<State>,
    ) -> Result<Self, WatchError> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let inotify = inotify.map_err(|errno| match errno {
            Errno::MFILE => WatchError::TooMany,
            errno => WatchError::Io {
                path: root.clone(),
                source: errno.into(),
            },
        })?;
        let mut tree = Self {
            inotify: Arc::new(inotify),
            root,
            options,
            state,
            directories: HashMap::new(),
            departed: HashMap::new(),
            announced: HashSet::new(),
            events: Vec::new(),
            lost: false,
        };
        let root = inotify::add_watch(&tree.inotify, &tree.root, MASK)
            .map_err(|errno| tree.io_error(errno.into()))?;
        tree.directories.insert(root, PathBuf::new());
        if options.recursive {
            tree.enter(Path::new(""), false)?;
        }
        Ok(tree)
    }

    /// A descriptor that becomes readable when there is something to read.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.inotify.try_clone()
    }

    /// Reads what the kernel has queued; true if that was all.
    pub(super) fn read(&mut self) -> Result<bool, WatchError> {
        let inotify = Arc::clone(&self.inotify);
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&*inotify, &mut buffer);
        let mut accounts = None;
        // A batch ends only where the buffer does: what is in it is gone from the kernel's queue.
        for read in 0.. {
            if read >= MAX_BATCH && reader.is_buffer_empty() {
                return Ok(false);
            }
            match reader.next() {
                Ok(event) => {
                    let name = event
                        .file_name()
                        .map(|name| OsStr::from_bytes(name.to_bytes()));
                    let (watch, what, cookie) = (event.wd(), event.events(), event.cookie());
                    self.handle(&mut accounts, watch, what, cookie, name.map(Path::new))
                        // The events behind this one in the buffer go with it.
                        .inspect_err(|_| self.lost = true)?;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(self.io_error(errno.into())),
            }
        }
        self.announced.clear();
        for path in std::mem::take(&mut self.departed).into_values() {
            self.forget(&path);
        }
        Ok(true)
    }

    /// Hands out the events read so far.
    ///
    /// # Errors
    /// [`WatchError::Lost`], once, if some are missing.
    pub(super) fn take(&mut self) -> Result<Vec<FilesystemEvent>, WatchError> {
        let events = std::mem::take(&mut self.events);
        if std::mem::take(&mut self.lost) {
            return Err(WatchError::Lost(self.root.clone()));
        }
        Ok(events)
    }

    fn handle(
        &mut self,
        accounts: &mut Option<Accounts>,
        watch: i32,
        what: ReadFlags,
        cookie: u32,
        name: Option<&Path>,
    ) -> Result<(), WatchError> {
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.lost = true;
            // Directories may have appeared unseen.
            return if self.options.recursive {
                self.enter(Path::new(""), false)
            } else {
                Ok(())
            };
        }
        if what.contains(ReadFlags::IGNORED) {
            self.directories.remove(&watch);
            return Ok(());
        }
        let Some(directory) = self.directories.get(&watch) else {
            return Ok(());
        };
        let Some(name) = name else {
            // Of a directory below the root, its parent says the same.
            if directory.as_os_str().is_empty() {
                self.report(accounts, Path::new("."), what);
            }
            return Ok(());
        };
        let path = directory.join(name);
        let is_directory = what.contains(ReadFlags::ISDIR) && self.options.recursive;
        let was_announced = self.announced.remove(&path);
        if what.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            if was_announced {
                return Ok(());
            }
            self.report(accounts, &path, what);
            if is_directory {
                let moved = self.departed.remove(&cookie);
                if !moved.is_some_and(|from| self.relocate(&from, &path)) && self.add(&path)? {
                    self.enter(&path, true)?;
                }
            }
            return Ok(());
        }
        self.report(accounts, &path, what);
        if what.contains(ReadFlags::MOVED_FROM) && is_directory {
            self.departed.insert(cookie, path);
        } else if was_announced && what.intersects(ReadFlags::MODIFY | ReadFlags::ATTRIB) {
            self.announced.insert(path);
        }
        Ok(())
    }

    /// Watches every directory below `from`; with `announce`, reports everything there as created.
    fn enter(&mut self, from: &Path, announce: bool) -> Result<(), WatchError> {
        let mut accounts = None;
        let mut directories = vec![from.to_owned()];
        while let Some(directory) = directories.pop() {
            // What cannot be read is gone, or will be reported when it can.
            let Ok(entries) = std::fs::read_dir(self.root.join(&directory)) else {
                continue;
            };
            for entry in entries.flatten() {
                let path = directory.join(entry.file_name());
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                if announce && self.announced.insert(path.clone()) {
                    self.report(&mut accounts, &path, ReadFlags::CREATE);
                    let written =
                        kind.is_file() && entry.metadata().is_ok_and(|found| found.len() > 0);
                    if written {
                        self.report(&mut accounts, &path, ReadFlags::MODIFY);
                    }
                }
                if kind.is_dir() && self.add(&path)? {
                    directories.push(path);
                }
            }
        }
        Ok(())
    }

    /// Watches one directory; false if it is gone or something else by now.
    fn add(&mut self, path: &Path) -> Result<bool, WatchError> {
        let flags = MASK | WatchFlags::DONT_FOLLOW;
        match inotify::add_watch(&self.inotify, self.root.join(path), flags) {
            Ok(watch) => {
                self.directories.insert(watch, path.to_owned());
                Ok(true)
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(false),
            Err(Errno::NOSPC) => Err(WatchError::TooLarge(self.root.clone())),
            Err(errno) => Err(self.io_error(errno.into())),
        }
    }

    /// Gives the watched directories at and below `from` their new paths; false if there is none.
    fn relocate(&mut self, from: &Path, to: &Path) -> bool {
        let mut found = false;
        for directory in self.directories.values_mut() {
            if let Ok(rest) = directory.strip_prefix(from) {
                // Joining nothing would append a slash.
                *directory = if rest.as_os_str().is_empty() {
                    to.to_owned()
                } else {
                    to.join(rest)
                };
                found = true;
            }
        }
        found
    }

    /// Ends the watches at and below a directory that has left the tree.
    fn forget(&mut self, path: &Path) {
        let inotify = &self.inotify;
        self.directories.retain(|&watch, directory| {
            let leaves = directory.starts_with(path);
            if leaves {
                // It fails for one that has ended by itself.
                let _ = inotify::remove_watch(inotify, watch);
            }
            !leaves
        });
    }

    fn report(&mut self, accounts: &mut Option<Accounts>, path: &Path, what: ReadFlags) {
        let kinds = [
            (
                ReadFlags::CREATE.union(ReadFlags::MOVED_TO),
                EventType::EVENT_TYPE_CREATE,
                true,
            ),
            (
                ReadFlags::MOVED_FROM.union(ReadFlags::MOVE_SELF),
                EventType::EVENT_TYPE_RENAME,
                false,
            ),
            (ReadFlags::ATTRIB, EventType::EVENT_TYPE_CHMOD, true),
            (ReadFlags::MODIFY, EventType::EVENT_TYPE_WRITE, true),
            (
                ReadFlags::DELETE.union(ReadFlags::DELETE_SELF),
                EventType::EVENT_TYPE_REMOVE,
                false,
            ),
        ];
        for (flags, kind, stays) in kinds {
            if !what.intersects(flags) {
                continue;
            }
            if self.events.len() >= MAX_EVENTS {
                self.events = Vec::new();
                self.lost = true;
            }
            // An entry at the path of something that left would be another one.
            let entry = (stays && self.options.include_entry).then(|| {
                let accounts =
                    accounts.get_or_insert_with(|| self.state.accounts().unwrap_or_default());
                entry::describe(&self.root.join(path), accounts).ok()
            });
            self.events.push(FilesystemEvent {
                name: path.to_string_lossy().into_owned(),
                r#type: kind.into(),
                entry: entry.flatten().into(),
                ..FilesystemEvent::default()
            });
        }
    }

    pub(super) fn io_error(&self, source: io::Error) -> WatchError {
        WatchError::Io {
            path: self.root.clone(),
            source,
        }
    }
}
