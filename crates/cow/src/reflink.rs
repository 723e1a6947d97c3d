//! Files that share blocks: `FICLONE`, and the full copy that replaces it only when asked for.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use rustix::{
    fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek},
    io::Errno,
};

use crate::error::{Context as _, Result};

/// How a file system duplicates a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// Blocks are shared and copied when written: time and space independent of the file's size.
    Reflink,
    /// Only by copying the data; the reason is what the probe was told.
    Copy {
        /// Why blocks cannot be shared here, for a person to read.
        reason: String,
    },
}

impl Support {
    /// Whether duplicates share blocks.
    #[must_use]
    pub fn is_reflink(&self) -> bool {
        matches!(self, Self::Reflink)
    }
}

/// Finds out by cloning a temporary file in `dir`. Leaves nothing behind.
///
/// # Errors
/// If `dir` cannot be written.
pub fn probe(dir: &Path) -> Result<Support> {
    let from = dir.join(format!(".reflink-probe-{}", std::process::id()));
    let to = from.with_extension("clone");
    let outcome = (|| {
        let _ = std::fs::remove_file(&from);
        let _ = std::fs::remove_file(&to);
        // One block of data: an empty file clones on some file systems that cannot share blocks.
        std::fs::write(&from, [1_u8; 4096]).at("write a probe in", dir)?;
        let source = File::open(&from).at("open the probe", &from)?;
        let target = create_new(&to)?;
        match ioctl_ficlone(&target, &source) {
            Ok(()) => Ok(Support::Reflink),
            Err(errno) if cannot_share(errno) => Ok(Support::Copy {
                reason: io::Error::from(errno).to_string(),
            }),
            Err(errno) => Err(errno).at("clone the probe", &from),
        }
    })();
    let _ = std::fs::remove_file(&from);
    let _ = std::fs::remove_file(&to);
    outcome
}

/// Errors of `FICLONE` that mean "not here", not "not now" (ioctl_ficlonerange(2)).
fn cannot_share(errno: Errno) -> bool {
    [
        Errno::OPNOTSUPP,
        Errno::NOTTY,
        Errno::NOSYS,
        Errno::INVAL,
        Errno::XDEV,
        Errno::PERM,
    ]
    .contains(&errno)
}

pub(crate) fn create_new(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .at("create", path)
}

/// Makes `to` share all blocks of `from`. Blocking; tens of microseconds, plus the time to write
/// out what is dirty of `from` in the page cache.
///
/// # Errors
/// If `to` exists, or the two are not on one file system with reflinks; `to` is then not there.
pub fn clone_file(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).at("open", from)?;
    let target = create_new(to)?;
    clone_into(&source, &target, from).inspect_err(|_| {
        let _ = std::fs::remove_file(to);
    })
}

pub(crate) fn clone_into(source: &File, target: &File, from: &Path) -> Result<()> {
    ioctl_ficlone(target, source).at("share the blocks of", from)
}

/// Asks that of blocks that this file shares only those be allocated anew that are written. XFS
/// allocates 128 KiB around each otherwise, in the hope that those are written next: right for a
/// disk, and wrong for a file that is changed once, in hundreds of places. They are given back
/// minutes later. A file system that cannot do this is none that needs it.
pub(crate) fn allocate_sparingly(file: &File) {
    use std::os::fd::AsRawFd as _;
    const FS_IOC_FSGETXATTR: libc::Ioctl = libc::_IOR::<Attributes>(b'X' as u32, 31);
    const FS_IOC_FSSETXATTR: libc::Ioctl = libc::_IOW::<Attributes>(b'X' as u32, 32);
    const FS_XFLAG_COWEXTSIZE: u32 = 0x1_0000;
    /// `struct fsxattr` of `linux/fs.h`.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        flags: u32,
        extent_size: u32,
        extents: u32,
        project: u32,
        cow_extent_size: u32,
        padding: [u8; 8],
    }
    let mut attributes = Attributes::default();
    // SAFETY: the calls read and write this structure, which is as the kernel defines it, and the
    // descriptor is open.
    unsafe {
        if libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) == 0 {
            attributes.flags |= FS_XFLAG_COWEXTSIZE;
            // In bytes: a multiple of the block size, of which this is the usual one.
            attributes.cow_extent_size = 4096;
            libc::ioctl(file.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes);
        }
    }
}

/// Copies the data of `from` to the new file `to` and leaves its holes holes. Returns the number
/// of bytes copied. Blocking, for as long as the data takes.
///
/// # Errors
/// If `to` exists or the data cannot be copied; `to` is then not there.
pub fn copy_file(from: &Path, to: &Path) -> Result<u64> {
    let source = File::open(from).at("open", from)?;
    let target = create_new(to)?;
    copy_into(&source, &target, from, to).inspect_err(|_| {
        let _ = std::fs::remove_file(to);
    })
}

pub(crate) fn copy_into(source: &File, target: &File, from: &Path, to: &Path) -> Result<u64> {
    let size = source.metadata().at("read the size of", from)?.len();
    ftruncate(target, size).at("set the size of", to)?;
    let mut copied = 0;
    for extent in DataExtents::new(source, size) {
        let (start, end) = extent.at("find the data of", from)?;
        let (mut read_at, mut write_at) = (start, start);
        while read_at < end {
            let want = usize::try_from(end - read_at).unwrap_or(usize::MAX);
            let moved = match copy_file_range(
                source,
                Some(&mut read_at),
                target,
                Some(&mut write_at),
                want,
            ) {
                Err(Errno::INTR) => continue,
                // Refused between some pairs of file systems.
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    copy_through_memory(source, target, read_at, end).at("copy", from)?;
                    copied += end - read_at;
                    break;
                }
                moved => moved.at("copy", from)?,
            };
            if moved == 0 {
                break; // The file was cut short meanwhile; its size has been taken over.
            }
            copied += moved as u64;
        }
    }
    Ok(copied)
}

fn copy_through_memory(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let want = buffer
            .len()
            .min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let got = source.read_at(&mut buffer[..want], at)?;
        if got == 0 {
            break;
        }
        target.write_all_at(&buffer[..got], at)?;
        at += got as u64;
    }
    Ok(())
}

/// Duplicates `from` the way `support` says: shared blocks, or a full copy.
///
/// # Errors
/// As [`clone_file`] and [`copy_file`].
pub fn duplicate(support: &Support, from: &Path, to: &Path) -> Result<()> {
    match support {
        Support::Reflink => clone_file(from, to),
        Support::Copy { .. } => copy_file(from, to).map(drop),
    }
}

/// The parts of a file that are not holes, as `(start, end)` byte offsets in order.
pub(crate) struct DataExtents<'a> {
    file: &'a File,
    at: u64,
    size: u64,
}

impl<'a> DataExtents<'a> {
    pub(crate) fn new(file: &'a File, size: u64) -> Self {
        Self { file, at: 0, size }
    }

    /// Goes on at `at`, which is not before where it is now.
    pub(crate) fn skip_to(&mut self, at: u64) {
        self.at = self.at.max(at);
    }
}

impl Iterator for DataExtents<'_> {
    type Item = rustix::io::Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.size {
            return None;
        }
        let found = match seek(self.file, SeekFrom::Data(self.at)) {
            Err(Errno::NXIO) => Ok(None), // Only a hole is left.
            Err(Errno::INVAL) => Ok(Some((self.at, self.size))), // No idea of holes: all data.
            Err(errno) => Err(errno),
            Ok(start) => seek(self.file, SeekFrom::Hole(start)).map(|end| Some((start, end))),
        };
        match found {
            Ok(None) => {
                self.at = self.size;
                None
            }
            Ok(Some((start, end))) => {
                let end = end.min(self.size);
                self.at = end;
                (start < end).then_some(Ok((start, end)))
            }
            Err(errno) => {
                self.at = self.size;
                Some(Err(errno))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn a_copy_keeps_data_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 4096], 1 << 20).unwrap();
        file.write_all_at(b"tail", (64 << 20) - 4).unwrap();
        let copied = copy_file(&from, &to).unwrap();
        assert!(copied <= 16 << 10, "{copied} bytes copied of three blocks");
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(
            std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20,
            "the holes were filled"
        );
        assert!(
            copy_file(&from, &to).is_err(),
            "an existing file is never overwritten"
        );
        assert_eq!(
            std::fs::metadata(&to).unwrap().len(),
            64 << 20,
            "nor removed"
        );
    }

    #[test]
    fn a_refused_clone_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        std::fs::write(&from, [1; 4096]).unwrap();
        let to = Path::new("/dev/shm").join(format!("cubicle-refused-{}", std::process::id()));
        assert!(
            clone_file(&from, &to).is_err(),
            "blocks cannot be shared across file systems"
        );
        assert!(!to.exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let _ = probe(dir.path()).unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "the probe cleans up"
        );
    }
}
