//! Which blocks a file has, and which of them it shares with others.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use crate::error::{Context as _, Result};

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
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
const MERGED: u32 = 0x1000;
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
/// Blocking: some 0.2 us for each extent.
///
/// # Errors
/// If the file cannot be opened or asked about.
pub(crate) fn usage(path: &Path) -> Result<Usage> {
    let attempt = "find out what is shared of";
    let file = File::open(path).at(attempt, path)?;
    let metadata = file.metadata().at(attempt, path)?;
    let Some(extents) = extents(&file).at(attempt, path)? else {
        let allocated = metadata.blocks() * 512;
        return Ok(Usage {
            allocated,
            own: allocated,
        });
    };
    let end = metadata.len().next_multiple_of(metadata.blksize());
    let mut usage = Usage::default();
    for extent in extents {
        // Blocks that were set aside beyond the end are given back by the kernel by itself.
        let length = if extent.flags & UNWRITTEN == 0 {
            extent.length
        } else {
            extent.length.min(end.saturating_sub(extent.logical))
        };
        usage.allocated += length;
        if extent.flags & SHARED == 0 {
            usage.own += length;
        }
    }
    Ok(usage)
}

/// The parts of two files, as `(start, end)` byte offsets in order, of which it is certain that they
/// are the same, because both files have the same blocks there or neither has any. Nothing may be
/// unwritten of either. Empty if that cannot be told.
pub(crate) fn same_parts(a: &File, b: &File) -> io::Result<Vec<(u64, u64)>> {
    let size = a.metadata()?.len();
    if b.metadata()?.len() != size {
        return Ok(Vec::new());
    }
    let (Some(first), Some(other)) = (pieces(a, size)?, pieces(b, size)?) else {
        return Ok(Vec::new());
    };
    // Blocks were not moved while both were asked.
    if pieces(a, size)?.as_ref() != Some(&first) {
        return Ok(Vec::new());
    }
    let mut same: Vec<(u64, u64)> = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (first.get(i), other.get(j)) {
        let (start, end) = (x.start.max(y.start), x.end.min(y.end));
        if start < end && x.content == y.content && x.content != Content::Opaque {
            match same.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => same.push((start, end)),
            }
        }
        i += usize::from(x.end <= y.end);
        j += usize::from(y.end <= x.end);
    }
    Ok(same)
}

/// What a part of a file consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Hole,
    /// Blocks that others have, too; where they are, less the offset in the file.
    Shared(u64),
    /// Anything else: the file's own, or not on the disk in the way that it is in the file.
    Opaque,
}

#[derive(Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
    content: Content,
}

/// All of a file, in pieces.
fn pieces(file: &File, size: u64) -> io::Result<Option<Vec<Piece>>> {
    let Some(extents) = extents(file)? else {
        return Ok(None);
    };
    let mut pieces = Vec::new();
    let mut at = 0;
    let mut push = |start: u64, end: u64, content| {
        let end = end.min(size);
        if start < end {
            pieces.push(Piece {
                start,
                end,
                content,
            });
        }
    };
    for extent in extents {
        push(at, extent.logical, Content::Hole);
        at = extent.logical + extent.length;
        let content = if extent.flags & !LAST & !MERGED == SHARED {
            Content::Shared(extent.physical.wrapping_sub(extent.logical))
        } else {
            Content::Opaque
        };
        push(extent.logical, at, content);
    }
    push(at, size, Content::Hole);
    Ok(Some(pieces))
}

/// The extents of a file; `None` if its file system does not tell.
fn extents(file: &File) -> io::Result<Option<Vec<Extent>>> {
    let mut found = Vec::new();
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
            return match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL) => Ok(None),
                _ => Err(error),
            };
        }
        let batch = &map.extents[..(map.mapped as usize).min(BATCH)];
        found.extend_from_slice(batch);
        match batch.last() {
            Some(last) if last.flags & LAST == 0 => at = last.logical + last.length,
            _ => return Ok(Some(found)),
        }
    }
}
