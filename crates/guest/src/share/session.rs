//! One mounted share: takes the kernel's requests from its device and answers them.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use cubicle_protocol::share::{MAX_DATA, MAX_IN_FLIGHT};
use rustix::io::Errno;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{
    abi::{self, Body, Request, feature, opcode},
    decode::Work,
    directory::Directory,
    queue::Queue,
    table::Table,
};
use crate::fds;

/// How long the kernel believes what it was told of a name or a file, in seconds. Others change
/// the same directory: the host, and other sandboxes.
pub(super) const VALID: u64 = 1;

/// What the kernel may still believe after so long is out of date in any case.
const SURELY_INVALID: Duration = Duration::from_secs(VALID + 1);

/// Pages in one read or write, each of 4 KiB.
const MAX_PAGES: u16 = (MAX_DATA / 4096) as u16;

/// Reads ahead and writes of mapped pages that the kernel may have under way.
const MAX_BACKGROUND: u16 = 16;

/// A request's answer: the body of the reply.
pub(super) type Answered = Result<Bytes, Errno>;

/// A share's file system.
#[derive(Debug)]
pub(super) struct Session {
    device: AsyncFd<OwnedFd>,
    pub(super) queue: Arc<Queue>,
    pub(super) table: Mutex<Table>,
    pub(super) directories: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<Directory>>>>,
    /// Whom everything belongs to.
    pub(super) owner: (u32, u32),
}

impl Session {
    /// Answers on `device`, which is about to be mounted, from now on.
    pub(super) fn start(device: OwnedFd, owner: (u32, u32)) -> io::Result<Arc<Self>> {
        let session = Arc::new(Self {
            device: fds::watch(device, Interest::READABLE)?,
            queue: Queue::new(),
            table: Mutex::new(Table::new()),
            directories: Mutex::default(),
            owner,
        });
        tokio::spawn({
            let session = Arc::clone(&session);
            async move {
                let error = session.serve().await;
                tracing::debug!(%error, "a share is no longer mounted");
                session.queue.close();
            }
        });
        Ok(session)
    }

    /// Makes the kernel ask again for everything that it may still believe to know: time does not
    /// pass in a sandbox that is paused, but it does outside.
    pub(super) fn refresh(&self) {
        let recent = self.table().told_within(SURELY_INVALID);
        for node in recent {
            self.invalidate(node);
        }
    }

    /// The kernel's attributes of `node` are out of date. Doesn't wait for anything.
    pub(super) fn invalidate(&self, node: u64) {
        let message = abi::attributes_are_stale(node);
        // The kernel may have dropped the node meanwhile, which is as good.
        let _ = rustix::io::write(&self.device, &message);
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves until the file system is unmounted.
    async fn serve(self: &Arc<Self>) -> Errno {
        let mut buffer = vec![0; MAX_DATA + abi::MAX_ARGUMENTS];
        let in_flight = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
        loop {
            let Ok(place) = Arc::clone(&in_flight).acquire_owned().await else {
                return Errno::IO;
            };
            let len = match self.read(&mut buffer).await {
                Ok(len) => len,
                Err(errno) => return errno,
            };
            match Request::parse(&buffer[..len]) {
                Some(request) => self.take(request, place),
                None => tracing::warn!(len, "the kernel sent what is no request"),
            }
        }
    }

    async fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match rustix::io::read(&self.device, &mut *buffer) {
                Err(Errno::AGAIN) => match self.device.readable().await {
                    Ok(mut ready) => {
                        // Only if there is still nothing: a request may have come meanwhile.
                        let read = ready.try_io(|fd| Ok(rustix::io::read(fd, &mut *buffer)?));
                        match read {
                            Ok(Ok(len)) => return Ok(len),
                            Ok(Err(error)) => {
                                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                                if !is_passing(errno) {
                                    return Err(errno);
                                }
                            }
                            Err(_would_block) => {}
                        }
                    }
                    Err(_) => return Err(Errno::IO),
                },
                Err(errno) if is_passing(errno) => {}
                result => return result,
            }
        }
    }

    /// Answers at once, or in a task of its own if the host is needed.
    fn take(self: &Arc<Self>, request: Request<'_>, place: OwnedSemaphorePermit) {
        let unique = request.unique;
        match request.opcode {
            opcode::INIT => self.reply(unique, init(request)),
            opcode::DESTROY => self.reply(unique, Ok(Bytes::new())),
            // These three want no reply.
            opcode::INTERRUPT => {
                let mut arguments = request.arguments;
                if let Some(unique) = arguments.u64() {
                    self.queue.interrupt(unique);
                }
            }
            opcode::FORGET => {
                let mut arguments = request.arguments;
                if let Some(lookups) = arguments.u64() {
                    self.table().forget(request.node, lookups);
                }
            }
            opcode::BATCH_FORGET => {
                let mut arguments = request.arguments;
                let Some(count) = arguments.u32() else { return };
                let _ = arguments.skip(4);
                let mut table = self.table();
                for _ in 0..count {
                    let (Some(node), Some(lookups)) = (arguments.u64(), arguments.u64()) else {
                        break;
                    };
                    table.forget(node, lookups);
                }
            }
            _ => match Work::decode(request) {
                Some(work) => {
                    let session = Arc::clone(self);
                    tokio::spawn(async move {
                        let answered = work.run(&session, unique).await;
                        session.reply(unique, answered);
                        drop(place);
                    });
                }
                None => self.reply(unique, Err(Errno::NOSYS)),
            },
        }
    }

    fn reply(&self, unique: u64, answered: Answered) {
        let outcome = answered.as_ref().map(Bytes::len).map_err(|errno| *errno);
        let header = abi::reply_header(unique, outcome);
        let body = answered.unwrap_or_default();
        let parts = [IoSlice::new(&header), IoSlice::new(&body)];
        match rustix::io::writev(&self.device, &parts) {
            // NOENT: nobody waits for it any more. NODEV: nor for anything else.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(errno) => tracing::warn!(%errno, unique, "the kernel did not take a reply"),
        }
    }
}

/// Whether the next read may succeed: a request was taken back, or a signal came.
fn is_passing(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::INTR)
}

/// Agrees with the kernel on what both can do.
fn init(request: Request<'_>) -> Answered {
    let mut arguments = request.arguments;
    let mut next = || arguments.u32().ok_or(Errno::PROTO);
    let (major, minor, read_ahead, flags) = (next()?, next()?, next()?, next()?);
    let mut body = Body::new();
    body.u32(abi::MAJOR);
    if major != abi::MAJOR {
        // The kernel asks again, or gives up.
        body.u32(abi::MINOR).zeros(56);
        return Ok(body.into());
    }
    body.u32(minor.min(abi::MINOR))
        .u32(read_ahead.min(MAX_DATA as u32))
        .u32(flags & feature::WANTED)
        .u16(MAX_BACKGROUND)
        .u16(MAX_BACKGROUND * 3 / 4)
        .u32(MAX_DATA as u32)
        .u32(1) // granularity of times, in nanoseconds
        .u16(MAX_PAGES)
        .zeros(34);
    Ok(body.into())
}
