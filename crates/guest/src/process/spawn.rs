//! Starts a program without copying the daemon.
//!
//! `fork` would make every page of the daemon copy-on-write, for a process that is about to replace
//! its memory anyway; in a sandbox each such page is one more that a snapshot carries. So the child
//! shares the daemon's memory (`CLONE_VM | CLONE_VFORK`), runs on a stack of its own, and the daemon
//! waits until it has called `execve`. The child makes system calls and nothing else: it allocates
//! nothing, takes no lock, and leaves nothing behind but the reason why it failed.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr,
};

/// Everything that the child needs, made before it exists.
pub(super) struct Plan<'a> {
    /// Paths to try, in order: the first that is a program is run.
    pub(super) candidates: Vec<CString>,
    /// Arguments, beginning with the program's name.
    pub(super) argv: Vec<CString>,
    /// Environment, each `NAME=value`.
    pub(super) envp: Vec<CString>,
    /// Working directory.
    pub(super) cwd: CString,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// All groups, the primary one among them.
    pub(super) groups: Vec<u32>,
    /// Standard input, output and error; none of them below 3.
    pub(super) stdio: [BorrowedFd<'a>; 3],
    /// Whether standard input is a terminal that the child takes as its controlling one.
    pub(super) terminal: bool,
}

/// A child that runs, or has run and not been waited for.
pub(super) struct Child {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
}

/// What the child could not do.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) step: &'static str,
    pub(super) source: io::Error,
}

/// Size of the child's stack, in bytes. It makes a handful of calls of a few hundred bytes each;
/// pages that it doesn't reach are never touched.
const STACK_SIZE: usize = 64 << 10;

/// Written by the child into the daemon's memory when it fails.
struct Outcome {
    failure: Option<(&'static str, c_int)>,
}

/// What the child is handed. All pointers outlive it: the daemon's thread sleeps until it is gone.
struct Shared<'a> {
    plan: &'a Plan<'a>,
    argv: &'a [*const c_char],
    envp: &'a [*const c_char],
    outcome: *mut Outcome,
}

/// Starts the program in a session of its own. It has been executed when this returns.
pub(super) fn spawn(plan: &Plan<'_>) -> Result<Child, Failure> {
    let fail = |step| move |source| Failure { step, source };
    debug_assert!(plan.stdio.iter().all(|fd| fd.as_raw_fd() > 2));

    let argv = null_terminated(&plan.argv);
    let envp = null_terminated(&plan.envp);
    let mut outcome = Outcome { failure: None };
    let mut shared = Shared {
        plan,
        argv: &argv,
        envp: &envp,
        outcome: ptr::from_mut(&mut outcome),
    };
    let mut stack: Vec<u8> = Vec::with_capacity(STACK_SIZE);
    let spare = stack.spare_capacity_mut();
    // The stack grows down from its end, which the ABI wants aligned.
    let top = spare.as_mut_ptr_range().end.cast::<c_void>();
    let top = top.map_addr(|address| address & !0xf);

    let mut pidfd: c_int = -1;
    let mut everything = empty_set();
    let mut before = empty_set();
    // SAFETY: both sets are initialised and live; blocking signals has no other effect. No handler
    // of the daemon may run in the child, on memory that both share.
    unsafe {
        libc::sigfillset(&raw mut everything);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const everything, &raw mut before);
    }
    // SAFETY: `run_child` gets a valid `Shared` and a stack of its own, large enough for it, that
    // nothing else uses. CLONE_VFORK suspends this thread until the child has executed its program
    // or exited, so everything borrowed outlives its use. `pidfd` is where CLONE_PIDFD stores.
    let pid = unsafe {
        libc::clone(
            run_child,
            top,
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
            ptr::from_mut(&mut shared).cast(),
            &raw mut pidfd,
        )
    };
    let cloned = if pid < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(pid.unsigned_abs())
    };
    // SAFETY: restores the mask saved above.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
    }
    let pid = cloned.map_err(fail("create the process"))?;
    // SAFETY: clone succeeded with CLONE_PIDFD, so this is a fresh descriptor that nobody owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    if let Some((step, errno)) = outcome.failure {
        // It has exited already: this collects it at once.
        let _ = rustix::process::waitid(
            rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)),
            rustix::process::WaitIdOptions::EXITED,
        );
        return Err(Failure {
            step,
            source: io::Error::from_raw_os_error(errno),
        });
    }
    Ok(Child { pid, pidfd })
}

fn null_terminated(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|text| text.as_ptr())
        .chain([ptr::null()])
        .collect()
}

fn empty_set() -> libc::sigset_t {
    // SAFETY: sigset_t is a plain array of integers, for which zeros are valid: the empty set.
    unsafe { std::mem::zeroed() }
}

extern "C" fn run_child(argument: *mut c_void) -> c_int {
    // SAFETY: `argument` is the `Shared` that `spawn` made and keeps until this process is gone.
    let shared = unsafe { &*argument.cast::<Shared<'_>>() };
    // SAFETY: this is the child of `spawn`.
    let (step, errno) = unsafe { become_program(shared) };
    // SAFETY: the daemon's thread doesn't look at the outcome before this process is gone.
    unsafe {
        (*shared.outcome).failure = Some((step, errno));
        libc::_exit(127)
    }
}

/// Turns this process into the program. Returns only what went wrong.
///
/// # Safety
/// Must run in the child of [`spawn`], which shares the daemon's memory and nothing else.
unsafe fn become_program(shared: &Shared<'_>) -> (&'static str, c_int) {
    let plan = shared.plan;
    // System calls only, where glibc's wrappers would do more: `setuid` and its kin there change
    // every thread of what they believe to be this process. That is the daemon.
    // SAFETY: every pointer passed is valid for the call; descriptors are this process's own copy.
    unsafe {
        // The kernel's own form of "default, no flags, empty mask": glibc's call refuses the
        // signals that it keeps to itself, which may be ignored here all the same.
        let default = [0_u64; 4];
        for signal in 1..=64 {
            // Fails for SIGKILL and SIGSTOP.
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
        }
        if libc::setsid() < 0 {
            return ("make a session", errno());
        }
        for (fd, target) in plan.stdio.iter().zip(0..) {
            if libc::dup2(fd.as_raw_fd(), target) < 0 {
                return ("set up standard input and output", errno());
            }
        }
        if plan.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return ("take the terminal", errno());
        }
        // Nothing below needs another descriptor, and the program must not get one.
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        unprotect_from_oom();
        if libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr()) < 0 {
            return ("set groups", errno());
        }
        if libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid) < 0 {
            return ("set the group", errno());
        }
        if libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) < 0 {
            return ("set the user", errno());
        }
        if libc::chdir(plan.cwd.as_ptr()) < 0 {
            return ("enter the working directory", errno());
        }
        libc::umask(0o022);
        let nothing = empty_set();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const nothing, ptr::null_mut());
        let mut reason = libc::ENOENT;
        for candidate in &plan.candidates {
            libc::execve(
                candidate.as_ptr(),
                shared.argv.as_ptr(),
                shared.envp.as_ptr(),
            );
            match errno() {
                // Not there: the next directory of the path may have it.
                libc::ENOENT | libc::ENOTDIR => {}
                // Nor may this one be run; if no other can, say that rather than "not found".
                libc::EACCES => reason = libc::EACCES,
                other => return ("execute", other),
            }
        }
        ("execute", reason)
    }
}

/// The daemon is the last thing to die when memory runs out; what it starts is not.
unsafe fn unprotect_from_oom() {
    const FILE: &CStr = c"/proc/self/oom_score_adj";
    // SAFETY: as for `become_program`. A system without /proc protects nobody in the first place.
    unsafe {
        let fd = libc::open(FILE.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
    }
}

fn errno() -> c_int {
    // SAFETY: the location is that of the daemon's sleeping thread, valid and used by no one else.
    unsafe { *libc::__errno_location() }
}
