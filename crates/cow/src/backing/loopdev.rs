//! Loop devices by ioctl (loop(4), linux/loop.h).

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use crate::error::{Context as _, Error, Result};

const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Major number of loop devices (Documentation/admin-guide/devices.txt).
const MAJOR: u32 = 7;
/// Sector size of the device: what direct I/O needs on disks with large sectors, too.
pub(super) const SECTOR: u32 = 4096;
/// Between asking for a free device and taking it, another process may have taken it.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Status {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Status,
    reserved: [u64; 8],
}

impl Status {
    const ZERO: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };

    /// Whether the device bypasses the page cache of the file system below.
    pub(super) fn direct_io(&self) -> bool {
        self.flags & LO_FLAGS_DIRECT_IO != 0
    }

    /// Whether `file` is what the device shows.
    pub(super) fn is_of(&self, file: &File) -> bool {
        file.metadata()
            .is_ok_and(|file| (file.dev(), file.ino()) == (self.device, self.inode))
    }
}

/// A loop device with a file attached. The device is set to detach with its last user, and this
/// value is one: drop it after mounting.
pub(super) struct Attached {
    path: PathBuf,
    _device: File,
}

impl Attached {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// What the device shows; `None` if nothing, or if it cannot be asked.
pub(super) fn status(device: &Path) -> Option<Status> {
    let device = File::open(device).ok()?;
    let mut status = Status::ZERO;
    // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`, which `Status` is laid out as.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut status) };
    (outcome == 0).then_some(status)
}

/// Attaches `image` to a loop device, or finds the one it is attached to already (by a process in
/// another mount namespace, or one that was killed before it mounted).
pub(super) fn attach(image: &Path) -> Result<Attached> {
    let backing = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(image)
        .or_else(|error| match error.raw_os_error() {
            // A file system that knows no direct I/O; the device falls back as well.
            Some(libc::EINVAL) => File::options().read(true).write(true).open(image),
            _ => Err(error),
        })
        .at("open the image", image)?;
    if let Some(attached) = find(&backing)? {
        return Ok(attached);
    }
    let control_path = Path::new("/dev/loop-control");
    let control = File::options()
        .read(true)
        .write(true)
        .open(control_path)
        .at("open", control_path)?;
    for _ in 0..ATTEMPTS {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a device number or an error.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let number = u32::try_from(number)
            .map_err(|_| io::Error::last_os_error())
            .at("find a free loop device with", control_path)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open_device(&path, number)?;
        match configure(&device, &backing) {
            Ok(()) => {
                return Ok(Attached {
                    path,
                    _device: device,
                });
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error).at("attach the image to", &path),
        }
    }
    Err(Error::Io {
        attempt: "find a free loop device with",
        path: control_path.to_owned(),
        source: io::ErrorKind::ResourceBusy.into(),
    })
}

fn find(backing: &File) -> Result<Option<Attached>> {
    let dev = Path::new("/dev");
    for entry in std::fs::read_dir(dev).at("list", dev)? {
        let path = entry.at("list", dev)?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let numbered = name
            .strip_prefix("loop")
            .is_some_and(|n| n.parse::<u32>().is_ok());
        if numbered && status(&path).is_some_and(|status| status.is_of(backing)) {
            let device = File::options()
                .read(true)
                .write(true)
                .open(&path)
                .at("open", &path)?;
            // Asked again while held open: it may have gone between the two.
            if status(&path).is_some_and(|status| status.is_of(backing)) {
                return Ok(Some(Attached {
                    path,
                    _device: device,
                }));
            }
        }
    }
    Ok(None)
}

/// Opens the device, and makes its node where /dev is not kept by the kernel (in a container).
fn open_device(path: &Path, number: u32) -> Result<File> {
    let open = || File::options().read(true).write(true).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(
                CWD,
                path,
                FileType::BlockDevice,
                mode,
                makedev(MAJOR, number),
            )
            .at("make the node of the loop device", path)?;
            open().at("open", path)
        }
        outcome => outcome.at("open", path),
    }
}

fn configure(device: &File, backing: &File) -> io::Result<()> {
    let mut config = Config {
        fd: u32::try_from(backing.as_raw_fd()).unwrap_or(u32::MAX),
        block_size: SECTOR,
        info: Status {
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            ..Status::ZERO
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `Config` is laid out as; the
    // descriptor in it is open for the whole call.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw mut config) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes the device as large as its file has become.
pub(super) fn refresh_size(path: &Path) -> Result<()> {
    let device = File::options()
        .read(true)
        .write(true)
        .open(path)
        .at("open", path)?;
    // SAFETY: LOOP_SET_CAPACITY takes no argument.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).at("resize", path)
    }
}

const _: () = assert!(size_of::<Status>() == 232 && size_of::<Config>() == 304);
