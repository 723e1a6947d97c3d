//! Making and growing XFS file systems.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::Path,
    process::{Command, Stdio},
};

use super::loopdev::SECTOR;
use crate::error::{Context as _, Error, Result};

const PROGRAM: &str = "mkfs.xfs";

/// `struct xfs_fsop_geom_v1` of xfs_fs.h; what is not used here has no name.
#[repr(C)]
#[derive(Default)]
struct Geometry {
    block_size: u32,
    _sizes: [u32; 6],
    inode_percent: u32,
    _data_blocks: u64,
    _rest: [u64; 9],
}

/// `struct xfs_growfs_data` of xfs_fs.h.
#[repr(C)]
struct GrowArgument {
    blocks: u64,
    inode_percent: u32,
}

const XFS_IOC_FSGEOMETRY_V1: libc::c_ulong = libc::_IOR::<Geometry>(b'X' as u32, 100);
const XFS_IOC_FSGROWFSDATA: libc::c_ulong = libc::_IOW::<GrowArgument>(b'X' as u32, 110);

/// Makes a file system with reflinks in `image`, which has its size already. The one process that
/// this crate starts, once in the life of a store.
pub(super) fn make(image: &Path) -> Result<()> {
    let failed = |detail: String| Error::Program {
        program: PROGRAM,
        path: image.to_owned(),
        detail,
    };
    let output = Command::new(PROGRAM)
        .args([
            "-q",
            "-m",
            "reflink=1",
            "-s",
            &format!("size={SECTOR}"),
            "-L",
            "cubicle",
        ])
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failed("it is not installed (package xfsprogs)".to_owned()),
            _ => failed(error.to_string()),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("{}: {}", output.status, said.trim())))
}

/// Extends the mounted file system at `path` to `size` bytes of its device.
pub(super) fn grow(path: &Path, size: u64) -> Result<()> {
    let attempt = "grow the file system at";
    let root = File::open(path).at("open", path)?;
    let check = |outcome: libc::c_int| match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).at(attempt, path),
    };
    let mut geometry = Geometry::default();
    // SAFETY: the request writes one `struct xfs_fsop_geom_v1`, which has the size of `Geometry`.
    check(unsafe { libc::ioctl(root.as_raw_fd(), XFS_IOC_FSGEOMETRY_V1, &raw mut geometry) })?;
    let argument = GrowArgument {
        blocks: size / u64::from(geometry.block_size),
        inode_percent: geometry.inode_percent,
    };
    // SAFETY: the request reads one `struct xfs_growfs_data`, which `GrowArgument` is laid out as.
    check(unsafe { libc::ioctl(root.as_raw_fd(), XFS_IOC_FSGROWFSDATA, &raw const argument) })
}

const _: () = assert!(size_of::<Geometry>() == 112 && size_of::<GrowArgument>() == 16);
