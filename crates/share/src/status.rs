//! What files are, in the words of the protocol.

use cubicle_protocol::share::{Kind, Moment, Status, Time};
use rustix::{
    fs::{FileType, Mode, Stat, Timespec, UTIME_NOW, UTIME_OMIT},
    io::Errno,
};

/// The part of `rwxrwxrwx` in a mode. What makes a program run as somebody else is not in it.
const PERMISSIONS: u32 = 0o777;

/// What the guest is told of a file. `root_device` is the device of the share's root.
pub(crate) fn status(stat: &Stat, root_device: u64) -> Status {
    Status {
        inode: inode(stat, root_device),
        kind: kind(stat),
        permissions: (stat.st_mode & PERMISSIONS) as u16,
        links: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        size: stat.st_size.unsigned_abs(),
        blocks: stat.st_blocks.unsigned_abs(),
        accessed: time(stat.st_atime, stat.st_atime_nsec),
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
        changed: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}

/// A mode with nothing but permissions in it.
pub(crate) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & PERMISSIONS)
}

pub(crate) fn kind(stat: &Stat) -> Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Other,
    }
}

/// One number for a file. Subvolumes of Btrfs are devices of their own without being mounts, and
/// use the same inode numbers.
pub(crate) fn inode(stat: &Stat, root_device: u64) -> u64 {
    // 0 means "any file" in the protocol, and no file system uses it.
    stat.st_ino ^ (stat.st_dev ^ root_device).rotate_right(24)
}

pub(crate) fn time(seconds: i64, nanos: u64) -> Time {
    Time {
        seconds,
        nanos: u32::try_from(nanos).unwrap_or(0),
    }
}

/// A time as `utimensat` takes it; `None` leaves the time alone.
pub(crate) fn timespec(moment: Option<Moment>) -> rustix::io::Result<Timespec> {
    let (tv_sec, tv_nsec) = match moment {
        None => (0, UTIME_OMIT),
        Some(Moment::Now) => (0, UTIME_NOW),
        Some(Moment::At(time)) if time.nanos < 1_000_000_000 => {
            (time.seconds, i64::from(time.nanos))
        }
        Some(Moment::At(_)) => return Err(Errno::INVAL),
    };
    Ok(Timespec { tv_sec, tv_nsec })
}
