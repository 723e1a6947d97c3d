use std::{
    fs,
    io::{self, IoSlice},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    task::{Context, Poll, ready},
};

use cubicle_protocol::CHANNEL_PORT_NAME;
use rustix::{
    event::{Timespec, epoll},
    fs::{Mode, OFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::fds;

/// The guest's end of the virtio-serial port.
///
/// While nobody is connected on the host's side a read gives 0 bytes, a write blocks, and `poll`
/// reports a hang-up that is over once somebody connects. A runtime that takes a hang-up for final,
/// as tokio's does, would spin on that. So the port is watched, edge-triggered, by an epoll instance
/// of its own, and the runtime watches that instance, which never hangs up.
///
/// One task at a time may use a port, for both directions.
#[derive(Debug)]
pub struct Port {
    port: OwnedFd,
    events: AsyncFd<OwnedFd>,
    read_waits: bool,
    write_waits: bool,
}

impl Port {
    /// The device node of the channel, if the port is there and the kernel has been told its name.
    ///
    /// # Errors
    /// What the kernel said when the ports could not be listed.
    pub fn find() -> io::Result<Option<PathBuf>> {
        let ports = match fs::read_dir("/sys/class/virtio-ports") {
            Ok(ports) => ports,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        for port in ports {
            let port = port?;
            // A port has no name until the host has said it.
            let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
            if name.trim_end() == CHANNEL_PORT_NAME {
                return Ok(Some(Path::new("/dev").join(port.file_name())));
            }
        }
        Ok(None)
    }

    /// Opens the port. Must be done once and kept: only one may have it open, and a port that was
    /// closed in between loses what the host has sent.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn open(path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }

    /// Watches an open port, or whatever else reads and writes like one. Needs a runtime.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(port: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&port, true)?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &port, epoll::EventData::new_u64(0), flags)?;
        let events = fds::watch(events, Interest::READABLE)?;
        Ok(Self {
            port,
            events,
            read_waits: false,
            write_waits: false,
        })
    }

    /// Reads what is there. 0 bytes, the host being away, is waited out.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::read(&self.port, &mut *buf) {
                Ok(0) | Err(Errno::AGAIN) => {
                    self.read_waits = true;
                    ready!(self.poll_event(cx))?;
                }
                Ok(read) => {
                    self.read_waits = false;
                    return Poll::Ready(Ok(read));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Reads more without waiting. 0: there is nothing at the moment.
    pub(super) fn try_read(&mut self, buf: &mut [u8]) -> usize {
        // What fails here fails again in `poll_read`, which reports it.
        rustix::io::read(&self.port, buf).unwrap_or(0)
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::writev(&self.port, bufs) {
                // A socket in the port's place whose other end is gone: as good as away.
                Err(Errno::AGAIN | Errno::PIPE) => {
                    self.write_waits = true;
                    ready!(self.poll_event(cx))?;
                }
                Ok(written) => {
                    self.write_waits = false;
                    return Poll::Ready(Ok(written));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Waits for an event that has not been seen: after it, both directions are to be tried again.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.events.poll_read_ready(cx))?;
            // Before the instance is asked, so that an event after the question is not missed.
            ready.clear_ready();
            let mut found = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }];
            let at_once = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let seen = match epoll::wait(self.events.as_fd(), &mut found[..], Some(&at_once)) {
                Ok(seen) => seen,
                Err(Errno::INTR) => 0,
                Err(error) => return Poll::Ready(Err(error.into())),
            };
            if seen > 0 {
                // The event may be for the direction that isn't being tried right now.
                if self.read_waits && self.write_waits {
                    cx.waker().wake_by_ref();
                }
                return Poll::Ready(Ok(()));
            }
        }
    }
}
