//! How much of a file is its own, and how much it shares with others.

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

use crate::error::{Context as _, Result};

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    _reserved64: [u64; 2],
    flags: u32,
    _reserved: [u32; 3],
}

/// Extents asked for at a time.
const BATCH: usize = 512;

/// `struct fiemap` of linux/fiemap.h, with room for the extents that follow it.
#[repr(C)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    _reserved: u32,
    extents: [Extent; BATCH],
}

/// `FS_IOC_FIEMAP`, `_IOWR('f', 11, struct fiemap)`; the size is that of the header alone.
const FIEMAP: libc::c_ulong = libc::_IOWR::<[u64; 4]>(b'f' as u32, 11);
const LAST: u32 = 0x1;
const UNWRITTEN: u32 = 0x800;
const SHARED: u32 = 0x2000;

const _: () = assert!(size_of::<Extent>() == 56 && size_of::<Map>() == 32 + BATCH * 56);

/// Bytes of a file that take space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// All of them.
    pub(crate) allocated: u64,
    /// Those that no other file shares: what its deletion would give back.
    pub(crate) own: u64,
}

/// What a file takes. Where the file system cannot tell extents, everything is the file's own.
/// Blocking: 0.2 us for each extent.
///
/// # Errors
/// If the file cannot be opened or asked about.
pub(crate) fn usage(path: &Path) -> Result<Usage> {
    use std::os::unix::fs::MetadataExt as _;
    let attempt = "find out what is shared of";
    let file = File::open(path).at(attempt, path)?;
    let mut usage = Usage::default();
    let mut at = 0;
    let mut map = Box::new(Map {
        start: 0,
        length: 0,
        flags: 0,
        mapped: 0,
        count: BATCH as u32,
        _reserved: 0,
        extents: [Extent::default(); BATCH],
    });
    loop {
        map.start = at;
        map.length = u64::MAX - at;
        map.mapped = 0;
        // SAFETY: the argument is laid out as the kernel expects, with room for `count` extents.
        if unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut *map) } != 0 {
            let error = io::Error::last_os_error();
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL)
            ) {
                let allocated = file.metadata().at(attempt, path)?.blocks() * 512;
                return Ok(Usage {
                    allocated,
                    own: allocated,
                });
            }
            return Err(error).at(attempt, path);
        }
        let found = &map.extents[..(map.mapped as usize).min(BATCH)];
        let Some(last) = found.last() else {
            return Ok(usage);
        };
        // Blocks set aside and never written hold nothing, but they take space all the same; only
        // what lies beyond the end of the file does not count: the kernel frees it by itself.
        let size = file.metadata().at(attempt, path)?.len();
        for extent in found {
            let kept = if extent.flags & UNWRITTEN == 0 {
                extent.length
            } else {
                extent
                    .length
                    .min(size.next_multiple_of(4096).saturating_sub(extent.logical))
            };
            usage.allocated += kept;
            if extent.flags & SHARED == 0 {
                usage.own += kept;
            }
        }
        at = last.logical + last.length;
        if last.flags & LAST != 0 {
            return Ok(usage);
        }
    }
}
