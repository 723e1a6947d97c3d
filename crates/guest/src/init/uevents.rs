use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
        recv, socket_with,
    },
};

use super::Error;

/// Multicast group of the kernel's own events.
const KERNEL: u32 = 1;

/// The kernel's announcements of devices. What they say is not read: an event means "look again".
pub(super) struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    pub(super) fn open() -> Result<Self, Error> {
        let open = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let kind = Some(KOBJECT_UEVENT);
            let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, kind)?;
            bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(Error::Uevents)?,
        })
    }

    /// Waits for an event, or for all that have come since the last call. False: none until then.
    pub(super) fn wait(&mut self, until: Instant) -> Result<bool, Error> {
        loop {
            let mut seen = false;
            loop {
                let mut event = [0_u8; 4096];
                match recv(&self.socket, &mut event[..], RecvFlags::empty()) {
                    // An overrun lost some, which is all the same.
                    Ok(_) | Err(Errno::NOBUFS) => seen = true,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(Error::Uevents(error.into())),
                }
            }
            if seen {
                return Ok(true);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let left = Timespec::try_from(left).ok();
            let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Uevents(error.into())),
            }
        }
    }
}
