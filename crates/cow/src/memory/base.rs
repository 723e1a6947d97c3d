//! The image that captured pages are laid over.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use super::{PageSums, Source};
use crate::error::{Context as _, Error, Result};

/// What captured pages are laid over, to make a whole image.
#[derive(Debug, Clone, Copy, Default)]
pub enum Base<'a> {
    /// Nothing: what was not captured is zero. For a VM that booted cold.
    #[default]
    Zeros,
    /// The image at this path.
    Path(&'a Path),
    /// An image that is open already, and may have been deleted since.
    File(&'a File),
    /// The image of the last capture, open, and hashes of the pages that it was given then.
    Last(&'a File, &'a PageSums),
}

impl<'a> From<Option<&'a Path>> for Base<'a> {
    fn from(path: Option<&'a Path>) -> Self {
        path.map_or(Self::Zeros, Self::Path)
    }
}

impl<'a> From<&'a Path> for Base<'a> {
    fn from(path: &'a Path) -> Self {
        Self::Path(path)
    }
}

impl<'a> From<&'a File> for Base<'a> {
    fn from(file: &'a File) -> Self {
        Self::File(file)
    }
}

impl<'a> Base<'a> {
    /// What is known of the image without reading it.
    pub(super) fn sums(self) -> Option<&'a PageSums> {
        match self {
            Self::Last(_, sums) => Some(sums),
            _ => None,
        }
    }

    /// The image, opened for the caller alone, and a name of it for messages.
    pub(super) fn open(self) -> Result<Option<(File, PathBuf)>> {
        match self {
            Self::Zeros => Ok(None),
            Self::Path(path) => {
                let file = File::open(path).at("open the base image", path)?;
                Ok(Some((file, path.to_owned())))
            }
            Self::File(file) | Self::Last(file, _) => {
                use std::os::fd::AsRawFd as _;
                let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                // Opened anew and not duplicated: a duplicate would share the file position.
                let own = File::open(&link).at("open the base image", &link)?;
                Ok(Some((own, std::fs::read_link(&link).unwrap_or(link))))
            }
        }
    }
}

/// Opens the image that a VM was started from, by way of the VM's own mapping of it: that works
/// however long ago the image was deleted, and after this program was restarted. Needs
/// `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
///
/// # Errors
/// [`Error::Memory`] if the process is gone, or no file is mapped at that address from its beginning.
pub fn started_from(source: &Source) -> Result<File> {
    find(source).map_err(|error| Error::Memory {
        attempt: "open the image mapped as memory",
        pid: source.pid,
        source: error,
    })
}

fn find(source: &Source) -> io::Result<File> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", source.pid))?;
    let start = format!("{:x}-", source.address);
    // `start-end permissions offset device inode path` (proc_pid_maps(5)); starts have leading zeros
    // to eight digits, which no address of a 64-bit process needs.
    let not_there = || io::Error::new(io::ErrorKind::NotFound, "no image is mapped there");
    let line = maps
        .lines()
        .find(|line| line.starts_with(&start))
        .ok_or_else(not_there)?;
    let mut words = line.split_ascii_whitespace();
    let (range, offset, inode) = (words.next(), words.nth(1), words.nth(1));
    let is_beginning = offset.is_some_and(|offset| offset.bytes().all(|digit| digit == b'0'));
    match range {
        Some(range) if is_beginning && inode != Some("0") => {
            File::open(format!("/proc/{}/map_files/{range}", source.pid))
        }
        _ => Err(not_there()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    #[test]
    fn the_image_of_a_mapping_is_found_after_its_deletion() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.img");
        std::fs::write(&path, vec![5; 3 * 4096]).unwrap();
        let file = File::open(&path).unwrap();
        let map = |offset| {
            // SAFETY: a fresh private mapping, unmapped below.
            unsafe {
                let protection = ProtFlags::READ | ProtFlags::WRITE;
                let hint = std::ptr::null_mut();
                mmap(hint, 4096, protection, MapFlags::PRIVATE, &file, offset).unwrap()
            }
        };
        let (start, later) = (map(0), map(4096));
        let at = |address: *mut std::ffi::c_void| Source {
            pid: std::process::id(),
            address: address as u64,
            len: 4096,
        };
        std::fs::remove_file(&path).unwrap();
        let found = started_from(&at(start)).unwrap();
        assert_eq!(
            found.metadata().unwrap().ino(),
            file.metadata().unwrap().ino()
        );
        assert_eq!(found.metadata().unwrap().len(), 3 * 4096);
        let error = started_from(&at(later)).unwrap_err();
        assert!(error.to_string().contains("no image is mapped"), "{error}");
        // SAFETY: the mappings made above, used no more.
        unsafe {
            munmap(start, 4096).unwrap();
            munmap(later, 4096).unwrap();
        }
        assert!(started_from(&at(start)).is_err());
    }
}
