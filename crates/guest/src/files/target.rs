//! The file that an upload writes.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown},
};

use super::{Destination, Error, Written};
use crate::filesystem::{Metadata, ensure_directories};

/// A file that is being written from its beginning. Dropped before it is [finished](Self::finish),
/// it removes the file if it had created it.
#[derive(Debug)]
pub(super) struct Target {
    file: File,
    destination: Destination,
    created: bool,
    finished: bool,
}

impl Target {
    /// Opens the file for a new content, makes what is missing, and gives all that to the user.
    ///
    /// # Errors
    /// [`Error::IsDirectory`], [`Error::NotRegular`], [`Error::NoSpace`], [`Error::Io`].
    pub(super) fn open(destination: Destination) -> Result<Self, Error> {
        Self::open_as(destination, true)
    }

    /// The same, but an existing file keeps its content until it is overwritten.
    pub(super) fn open_untruncated(destination: Destination) -> Result<Self, Error> {
        Self::open_as(destination, false)
    }

    fn open_as(destination: Destination, truncate: bool) -> Result<Self, Error> {
        let Destination { path, user } = &destination;
        if let Some(parent) = path.parent() {
            ensure_directories(parent, user).map_err(Error::io("create directory", parent))?;
        }
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(Error::IsDirectory(path.clone())),
            Ok(found) if !found.is_file() => return Err(Error::NotRegular(path.clone())),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("look at", path)(error)),
        }
        let mut options = OpenOptions::new();
        options.write(true).mode(0o644).custom_flags(libc::O_NOCTTY);
        let (file, created) = match options.clone().create_new(true).open(path) {
            Ok(file) => (file, true),
            // The path may also be a link to a file that isn't there yet.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let file = options.create(true).truncate(truncate).open(path);
                (file.map_err(Error::io("open", path))?, false)
            }
            Err(error) => return Err(Error::io("create", path)(error)),
        };
        let target = Self {
            file,
            destination,
            created,
            finished: false,
        };
        let Destination { path, user } = &target.destination;
        let found = target.file.metadata().map_err(Error::io("look at", path))?;
        if created || (found.uid(), found.gid()) != (user.uid, user.gid) {
            fchown(&target.file, Some(user.uid), Some(user.gid))
                .map_err(Error::io("change the owner of", path))?;
        }
        Ok(target)
    }

    /// The file itself.
    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Appends to the content.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all(bytes)
            .map_err(Error::io("write", &self.destination.path))
    }

    /// Ends the file and gives it exactly that metadata.
    pub(super) fn finish(mut self, metadata: &Metadata) -> Result<Written, Error> {
        let path = &self.destination.path;
        metadata
            .write(&self.file)
            .map_err(Error::io("write the metadata of", path))?;
        self.finished = true;
        Ok(Written::describe(path))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.finished || !self.created {
            return;
        }
        // Somebody may have put another file there.
        let path = &self.destination.path;
        if let (Ok(ours), Ok(found)) = (self.file.metadata(), std::fs::symlink_metadata(path))
            && (ours.dev(), ours.ino()) == (found.dev(), found.ino())
        {
            // What fails here has failed before, and that is what gets reported.
            let _ = std::fs::remove_file(path);
        }
    }
}
