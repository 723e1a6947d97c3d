use std::{
    convert::Infallible,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    ptr,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal, WaitOptions},
    system::{RebootCommand, reboot},
};

use super::{Error, console::say};
use crate::daemon;

/// A daemon that ran for less than this is started again only after that long.
const SETTLED: Duration = Duration::from_millis(500);
/// How long programs have to end on a shutdown.
const GRACE: Duration = Duration::from_secs(2);

/// Signals that ask the first process to shut down, whoever's custom they are.
const SHUTDOWN: [libc::c_int; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPWR,
];

/// Keeps the daemon running, collects orphans, and shuts down when asked to.
///
/// Returns only if it can do none of that.
pub(super) fn supervise(port: Option<OwnedFd>) -> Error {
    let signals = Signals::block();
    loop {
        let started = Instant::now();
        let daemon = match start_daemon(port.as_ref(), &signals) {
            Ok(daemon) => daemon,
            Err(error) => return error,
        };
        if wait_for(daemon, &signals) == Request::ShutDown {
            shut_down(daemon);
        }
        let ran = started.elapsed();
        say(&format!(
            "the daemon ended after {} s: starting it again",
            ran.as_secs()
        ));
        if ran < SETTLED {
            std::thread::sleep(SETTLED - ran);
        }
    }
}

#[derive(PartialEq, Eq)]
enum Request {
    Restart,
    ShutDown,
}

/// Collects every process that ends, until it is the daemon or somebody asks for the end.
fn wait_for(daemon: Pid, signals: &Signals) -> Request {
    loop {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, _))) if pid == daemon => return Request::Restart,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        if signals.wait() != libc::SIGCHLD {
            return Request::ShutDown;
        }
    }
}

/// Forks the daemon. It goes on in this program's memory: nothing is loaded twice.
fn start_daemon(port: Option<&OwnedFd>, signals: &Signals) -> Result<Pid, Error> {
    // SAFETY: this process has one thread, so that the child is in no undefined state.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        let source = io::Error::last_os_error();
        return Err(Error::Process {
            what: "fork the daemon",
            source,
        });
    }
    if let Some(pid) = Pid::from_raw(pid) {
        return Ok(pid);
    }
    signals.unblock();
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"cubicle-guest");
    // The last one to die when memory runs out; what it starts gives this up.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        say(&format!(
            "cannot protect the daemon from running out of memory: {error}"
        ));
    }
    let port = port.map(OwnedFd::try_clone).transpose();
    let port = port.unwrap_or_else(|error| {
        say(&format!("cannot hand the channel to the daemon: {error}"));
        None
    });
    let result: Result<Infallible, daemon::Error> = daemon::run(port);
    let Err(error) = result;
    say(&format!("the daemon failed: {error}"));
    std::process::exit(1)
}

/// Ends every program, writes everything to disk, and turns the machine off.
fn shut_down(daemon: Pid) -> ! {
    // The daemon first: it would report the ends of all others.
    let _ = rustix::process::kill_process(daemon, Signal::KILL);
    signal_all(libc::SIGTERM);
    let until = Instant::now() + GRACE;
    while Instant::now() < until {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            // There is no way to wait for a child with a limit but signals, and none is worth it
            // at the end of everything.
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    signal_all(libc::SIGKILL);
    while rustix::process::wait(WaitOptions::empty()).is_ok() {}
    power_off()
}

fn signal_all(signal: libc::c_int) {
    // SAFETY: sends a signal to every process but this one, which is the first.
    unsafe {
        libc::kill(-1, signal);
    }
}

/// Writes everything to disk and turns the machine off.
pub(super) fn power_off() -> ! {
    rustix::fs::sync();
    // The disk must not need a recovery the next time, whatever still has it open.
    let read_only = rustix::mount::MountFlags::RDONLY;
    let _ = rustix::mount::mount_remount("/", read_only, "");
    let _ = reboot(RebootCommand::PowerOff);
    // A machine without a way to be turned off: the emulator takes a restart for the end, too.
    let _ = reboot(RebootCommand::Restart);
    // The kernel panics when the first process exits.
    std::process::exit(1)
}

/// The signals that the first process waits for, blocked so that none gets lost.
struct Signals {
    set: libc::sigset_t,
}

impl Signals {
    fn block() -> Self {
        let mut set = MaybeUninit::uninit();
        // SAFETY: `sigemptyset` initialises the set, the others use it.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SHUTDOWN.into_iter().chain([libc::SIGCHLD]) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            set.assume_init()
        };
        let signals = Self { set };
        signals.mask(libc::SIG_BLOCK);
        signals
    }

    /// Waits for one of them.
    fn wait(&self) -> libc::c_int {
        loop {
            // SAFETY: the set is initialised; information about the signal is not wanted.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.set, ptr::null_mut()) };
            if signal > 0 {
                return signal;
            }
        }
    }

    fn unblock(&self) {
        self.mask(libc::SIG_UNBLOCK);
    }

    fn mask(&self, how: libc::c_int) {
        // SAFETY: the set is initialised; the earlier mask is not wanted.
        unsafe {
            libc::sigprocmask(how, &raw const self.set, ptr::null_mut());
        }
    }
}
