//! The guest's end of a slot: a tap whose only descriptor is handed to the VM.
//!
//! The tap is not persistent: it exists as long as somebody holds its descriptor, so it goes with
//! the VM, together with every packet still queued on it, and its existence tells after a
//! restart whether a slot is in use. It has no owner: only a process with `CAP_NET_ADMIN` could
//! attach to it, and a VM's process has no capability.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use crate::{Error, Result, SlotIndex, address::TAP};

const DEVICE: &str = "/dev/net/tun";

/// Makes a slot's tap in the calling thread's namespace. Frames carry a virtio header in front of
/// them, as QEMU's `-netdev tap,fd=` wants for offloads.
pub(crate) fn create(index: SlotIndex) -> Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(Error::file("open", DEVICE))?;
    // SAFETY: all zeroes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open, and `TUNSETIFF` reads and writes one `ifreq`, which lives
    // until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result == 0 {
        return Ok(file.into());
    }
    let error = io::Error::last_os_error();
    Err(if error.raw_os_error() == Some(libc::EBUSY) {
        Error::TapAttached { index }
    } else {
        Error::system(format!("make the tap of network slot {index}"))(error)
    })
}
