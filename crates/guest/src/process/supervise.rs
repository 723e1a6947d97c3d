use std::{
    future::pending,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    buffer::spare_capacity,
    process::{Signal, WaitId, WaitIdOptions},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep_until,
};

use super::{
    output::{End, ExitStatus, Source},
    running::Process,
};
use crate::fds;

/// How long output is still followed after the process itself has ended, while something that it
/// started holds its files open. What it wrote itself arrives whole in any case.
const LINGER: Duration = Duration::from_millis(200);

/// Largest piece of output from a pipe and from a terminal, in bytes.
const PIPE_CHUNK: usize = 32 << 10;
const TERMINAL_CHUNK: usize = 16 << 10;

/// The daemon's end of a file that the process writes to.
pub(super) struct Reader {
    source: Source,
    fd: AsyncFd<OwnedFd>,
}

impl Reader {
    pub(super) fn new(source: Source, fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            source,
            fd: fds::watch(fd, Interest::READABLE)?,
        })
    }

    /// What was written; `None` once nobody has the other end open.
    async fn read(&self) -> Option<Vec<u8>> {
        let chunk = match self.source {
            Source::Terminal => TERMINAL_CHUNK,
            Source::Stdout | Source::Stderr => PIPE_CHUNK,
        };
        loop {
            let mut ready = self.fd.readable().await.ok()?;
            let mut bytes = Vec::with_capacity(chunk);
            let read = ready.try_io(|fd| Ok(rustix::io::read(fd, spare_capacity(&mut bytes))?));
            match read {
                Ok(Ok(0)) => return None,
                Ok(Ok(_)) => return Some(bytes),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // A terminal that nobody has open any more says EIO.
                Ok(Err(_)) => return None,
                Err(_not_yet) => {}
            }
        }
    }

    /// How many bytes can be read at once.
    fn waiting(&self) -> u64 {
        rustix::io::ioctl_fionread(self.fd.get_ref()).unwrap_or(0)
    }
}

/// The files of one process, each until its end.
struct Readers(Vec<Reader>);

impl Readers {
    /// The next piece from any of them; `None` if none is left.
    async fn read(&mut self) -> Option<(Source, Vec<u8>)> {
        loop {
            let (at, read) = match &self.0[..] {
                [] => return None,
                [only] => (0, only.read().await),
                [first, second, ..] => tokio::select! {
                    read = first.read() => (0, read),
                    read = second.read() => (1, read),
                },
            };
            match read {
                Some(bytes) => return Some((self.0[at].source, bytes)),
                None => drop(self.0.remove(at)),
            }
        }
    }

    fn waiting(&self) -> u64 {
        self.0.iter().map(Reader::waiting).sum()
    }
}

/// Reads what the process writes until it has ended, kills it when its time is over, and collects
/// it. Returns how it ended, before anybody was told.
pub(super) async fn supervise(
    process: &Arc<Process>,
    pidfd: AsyncFd<OwnedFd>,
    readers: Vec<Reader>,
    deadline: Option<Instant>,
) -> ExitStatus {
    let mut readers = Readers(readers);
    let mut timed_out = false;
    loop {
        tokio::select! {
            biased;
            exited = pidfd.readable() => {
                drop(exited);
                break;
            }
            () = passed(deadline), if !timed_out => {
                timed_out = true;
                // Fails only if the process is already gone.
                let _ = process.signal(Signal::KILL);
            }
            () = relay(process, &mut readers), if !readers.0.is_empty() => {}
        }
    }

    // Everything that the process itself wrote is in its pipes by now.
    let mut owed = readers.waiting();
    let until = Instant::now() + LINGER;
    while !readers.0.is_empty() {
        tokio::select! {
            biased;
            read = readers.read() => {
                // Matched here and not above: a refused pattern would wait for the other branch.
                let Some((source, bytes)) = read else { break };
                owed = owed.saturating_sub(bytes.len() as u64);
                process.output.push(source, bytes);
                if owed == 0 && Instant::now() >= until {
                    break;
                }
                // The end waits for slow followers, as the process did.
                process.output.room().await;
            }
            () = passed(Some(until)), if owed == 0 => break,
        }
    }

    // From here to `finish` nothing may be awaited, see `Process::signal`.
    let status = collect(&pidfd);
    process.output.finish(End { status, timed_out });
    if !readers.0.is_empty() {
        // What the process left behind still writes: a closed pipe would kill it.
        tokio::spawn(async move { while readers.read().await.is_some() {} });
    }
    status
}

/// Hands one piece of output on, when there is room for it.
async fn relay(process: &Process, readers: &mut Readers) {
    process.output.room().await;
    if let Some((source, bytes)) = readers.read().await {
        process.output.push(source, bytes);
    }
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// The exit status of a process that has ended.
fn collect(pidfd: &AsyncFd<OwnedFd>) -> ExitStatus {
    let options = WaitIdOptions::EXITED;
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options) {
            Ok(Some(status)) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => ExitStatus::Exited(code),
                    (None, Some(signal)) => ExitStatus::Signalled {
                        signal,
                        core_dumped: status.dumped(),
                    },
                    (None, None) => ExitStatus::Exited(-1),
                };
            }
            Err(rustix::io::Errno::INTR) => {}
            // It has ended, and nobody else collects the daemon's children.
            Ok(None) | Err(_) => return ExitStatus::Exited(-1),
        }
    }
}
