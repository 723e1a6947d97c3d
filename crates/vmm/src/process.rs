//! Processes by descriptor: a pidfd never means a stranger that got a reused pid.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::Arc,
};

use cubicle_zygote::Ending;
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitIdOptions, WaitIdStatus},
};
use tokio::{
    io::{AsyncReadExt as _, Interest, unix::AsyncFd},
    sync::watch,
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It was not our child, so only its end is known.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            // The one signal that a system call filter sends is worth a name.
            Self::Signal(signal) if *signal == libc::SIGSYS => {
                write!(f, "signal {signal}: a forbidden system call")
            }
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

/// A process that is watched until it ends; if it is our child, it is reaped then.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pid: i32,
    start_time: u64,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Watches a child of ours just spawned. On failure it is killed and reaped.
    ///
    /// # Errors
    /// When /proc does not tell its start time or the descriptor cannot be watched.
    pub(crate) fn child(pid: i32, pidfd: OwnedFd) -> io::Result<Self> {
        let child = ChildGuard(Some(pidfd.try_clone()?));
        // It may have ended already, but is there until it is reaped.
        let stat = stat(pid)?.ok_or(io::ErrorKind::NotFound)?;
        let process = Self::watch(pid, stat.start_time, pidfd, None)?;
        child.keep();
        Ok(process)
    }

    /// Watches a process that a child of ours started, which says on `replies` how it ended once it
    /// has reaped it. On failure it is killed.
    ///
    /// # Errors
    /// When /proc does not tell its start time or the descriptor cannot be watched.
    pub(crate) fn grandchild(pid: i32, pidfd: OwnedFd, replies: UnixStream) -> io::Result<Self> {
        let watched = || {
            replies.set_nonblocking(true)?;
            let replies = tokio::net::UnixStream::from_std(replies)?;
            // Its parent may have reaped it already; its start time is of no use then.
            let start_time = stat(pid)?.map_or(0, |stat| stat.start_time);
            Self::watch(pid, start_time, pidfd.try_clone()?, Some(replies))
        };
        watched().inspect_err(|_| {
            let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
        })
    }

    /// Finds the process that has this pid and was started at this time; `None` if it is gone.
    ///
    /// # Errors
    /// When the host does not tell.
    pub(crate) fn find(pid: i32, started: u64) -> io::Result<Option<Self>> {
        let Some(raw) = Pid::from_raw(pid) else {
            return Ok(None);
        };
        let pidfd = match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Compared after opening: whatever has the pid now is what the descriptor means.
        match start_time(pid)? {
            Some(now) if now == started => Self::watch(pid, started, pidfd, None).map(Some),
            _ => Ok(None),
        }
    }

    /// `told_by`: who reaps it, if we do not.
    fn watch(
        pid: i32,
        start_time: u64,
        pidfd: OwnedFd,
        told_by: Option<tokio::net::UnixStream>,
    ) -> io::Result<Self> {
        let pidfd = Arc::new(pidfd);
        let (ended, exit) = watch::channel(None);
        let shared = SharedFd(Arc::clone(&pidfd));
        // SAFETY: the descriptor is owned through the `Arc` inside, never replaced, and closed
        // only after `watched` is gone.
        let watched = unsafe { AsyncFd::register_with_interest(shared, Interest::READABLE) }?;
        tokio::spawn(async move {
            // A pidfd becomes readable when the process has ended. Waiting can only fail when the
            // runtime shuts down, and then nobody is left to tell.
            if watched.readable().await.is_ok() {
                ended.send_replace(Some(match told_by {
                    Some(mut replies) => ending(&mut replies).await,
                    None => reap(watched.get_ref().0.as_fd()),
                }));
            }
        });
        Ok(Self {
            pid,
            start_time,
            pidfd,
            exit,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// How the process ended; `None` while it runs.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end of the process.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The watching task went away with its runtime: wait for ever rather than lie.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Sends SIGKILL. A process that has ended is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// `AsyncFd` wants to own what it watches; this shares it.
struct SharedFd(Arc<OwnedFd>);

impl AsRawFd for SharedFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

fn reap(pidfd: std::os::fd::BorrowedFd<'_>) -> Exit {
    let id = rustix::process::WaitId::PidFd(pidfd);
    match rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(Some(status)) => describe(&status),
        // Not our child (adopted): whoever is its parent reaps it.
        Ok(None) | Err(_) => Exit::Unknown,
    }
}

/// What its parent says of a process that has ended. It has reaped it by then.
async fn ending(replies: &mut tokio::net::UnixStream) -> Exit {
    let mut status = [0; Ending::LEN];
    match replies.read_exact(&mut status).await {
        Ok(_) => match Ending::decode(status) {
            Ending::Code(code) => Exit::Code(code),
            Ending::Signal(signal) => Exit::Signal(signal),
        },
        // The parent is gone, and whoever inherited the process reaps it.
        Err(_) => Exit::Unknown,
    }
}

fn describe(status: &WaitIdStatus) -> Exit {
    if let Some(code) = status.exit_status() {
        Exit::Code(code)
    } else if let Some(signal) = status.terminating_signal() {
        Exit::Signal(signal)
    } else {
        Exit::Unknown
    }
}

/// A child that nobody watches yet: killed and reaped when dropped.
struct ChildGuard(Option<OwnedFd>);

impl ChildGuard {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.0 {
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
            let id = rustix::process::WaitId::PidFd(pidfd.as_fd());
            let _ = rustix::process::waitid(id, WaitIdOptions::EXITED);
        }
    }
}

/// What /proc/PID/stat tells, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// It has ended and waits to be reaped.
    ended: bool,
    /// In clock ticks since boot.
    start_time: u64,
}

/// `None`: there is no such process.
fn stat(pid: i32) -> io::Result<Option<Stat>> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    match fs::read_to_string(path) {
        Ok(stat) => parse_stat(&stat).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The program name, field 2, may hold spaces and parentheses: fields are counted from the last
/// `)`. State is field 3, the start time field 22.
fn parse_stat(stat: &str) -> io::Result<Stat> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/PID/stat");
    let (_, fields) = stat.rsplit_once(')').ok_or_else(invalid)?;
    let mut fields = fields.split_ascii_whitespace();
    let ended = matches!(fields.next().ok_or_else(invalid)?, "Z" | "X" | "x");
    let start_time = fields
        .nth(18)
        .and_then(|field| field.parse().ok())
        .ok_or_else(invalid)?;
    Ok(Stat { ended, start_time })
}

/// When a process was started, in clock ticks since boot; `None` if it is gone or a zombie.
fn start_time(pid: i32) -> io::Result<Option<u64>> {
    Ok(stat(pid)?
        .filter(|stat| !stat.ended)
        .map(|stat| stat.start_time))
}

/// Identifies this boot of the host: pids and start times mean nothing after another.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// CPU time of a whole process, user and system, in microseconds.
pub(crate) fn cpu_time_us(pid: i32) -> io::Result<u64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is a valid place for the result.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1000)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_cannot_shift_the_fields() {
        let tail = "0 ".repeat(18);
        let stat = format!("7 (a) S ) Z) S {tail}4242 0 0");
        assert_eq!(
            parse_stat(&stat).unwrap(),
            Stat {
                ended: false,
                start_time: 4242
            }
        );
        let zombie = format!("7 (a) Z {tail}4242 0 0");
        assert!(parse_stat(&zombie).unwrap().ended);
        assert!(parse_stat("7 (a) S 1 2").is_err());
    }

    #[test]
    fn own_start_time_is_found_and_a_free_pid_is_gone() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(own).unwrap().is_some());
        assert_eq!(start_time(i32::MAX).unwrap(), None);
        assert!(cpu_time_us(own).is_ok());
    }

    #[test]
    #[allow(
        clippy::zombie_processes,
        reason = "that there is none is what is tested"
    )]
    fn a_child_that_nobody_watches_is_reaped() {
        let child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let raw = Pid::from_raw(pid).unwrap();
        let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).unwrap();
        // Outside of a runtime, a process cannot be watched.
        let outcome = std::panic::catch_unwind(|| Process::child(pid, pidfd));
        assert!(!matches!(outcome, Ok(Ok(_))));
        assert_eq!(stat(pid).unwrap(), None);
    }

    #[tokio::test]
    async fn only_the_process_with_that_start_time_is_found() {
        let mut child = tokio::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let started = start_time(pid).unwrap().unwrap();
        assert!(Process::find(pid, started + 1).unwrap().is_none());
        let found = Process::find(pid, started).unwrap().unwrap();
        assert_eq!(found.exit(), None);
        found.kill().unwrap();
        found.exited().await;
        assert!(found.exit().is_some());
        // Killing what has ended is no error, and a reaped process is not found again.
        found.kill().unwrap();
        let _ = child.wait().await;
        assert!(Process::find(pid, started).unwrap().is_none());
    }
}
