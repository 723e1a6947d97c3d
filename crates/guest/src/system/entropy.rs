//! Fresh randomness for the kernel.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    sync::OnceLock,
};

/// `struct rand_pool_info` of linux/random.h with room for 32 bytes.
#[repr(C)]
struct PoolInfo {
    /// In bits.
    entropy_count: libc::c_int,
    /// In bytes.
    buf_size: libc::c_int,
    buf: [u8; LEN],
}

/// How much is mixed in, in bytes.
const LEN: usize = 32;

/// `_IOW('R', 0x03, int[2])`: mix in and credit.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// `_IO('R', 0x07)`: make the generator take a new key from the pool now.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Mixes secret bits into the kernel's pool and gives its generator a new key, so that two machines
/// with one memory image go apart at once.
///
/// # Errors
/// Whatever the kernel says; it lets only root do this.
pub(super) fn mix(secret: &[u8; LEN]) -> io::Result<()> {
    let device = device()?;
    let info = PoolInfo {
        // Both fit: they are 256 and 32.
        entropy_count: (LEN * 8) as libc::c_int,
        buf_size: LEN as libc::c_int,
        buf: *secret,
    };
    // SAFETY: RNDADDENTROPY reads a `rand_pool_info` and the `buf_size` bytes behind its header,
    // which is what `info` is; it is not changed and outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    reseed(device)
}

/// The generator. It stays open, also in snapshots: a restored guest, which runs every part of its
/// code for the first time, has a tenth less to do until it can say that it is there.
fn device() -> io::Result<&'static File> {
    static DEVICE: OnceLock<File> = OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(device);
    }
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    Ok(DEVICE.get_or_init(|| device))
}

fn reseed(device: &File) -> io::Result<()> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_what_it_is_given() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        mix(&[7; LEN]).unwrap();
    }

    #[test]
    fn the_header_is_what_the_kernel_reads() {
        assert_eq!(std::mem::offset_of!(PoolInfo, buf), 8);
        assert_eq!(size_of::<PoolInfo>(), 8 + LEN);
    }
}
