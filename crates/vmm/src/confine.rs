//! Starts a program as a confined process: own session, user, namespaces and limits, no
//! capability, no way to gain one, and only the descriptors it was given.
//!
//! The child is made the way `vfork` does it: it borrows our address space while its parent's
//! thread waits, so its cost does not depend on how large the server is, and between `clone` and
//! `execve` it does nothing but system calls on data prepared beforehand. Re-executing our own
//! binary as a launcher would make all of this ordinary code, but takes 2 ms longer, of the 20 ms
//! that QEMU needs to come up (`cargo bench -p cubicle-vmm` measures both), and would make every
//! program that uses this crate answer to a hidden argument.

use std::{
    ffi::{CString, c_char, c_int, c_long, c_uint, c_void},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
};

/// What to start, and how confined.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// Path of the program, as seen from `mount_namespace`.
    pub(crate) program: CString,
    /// Arguments, the program's name first.
    pub(crate) arguments: Vec<CString>,
    /// Becomes standard input.
    pub(crate) input: BorrowedFd<'a>,
    /// Becomes standard output and standard error.
    pub(crate) output: BorrowedFd<'a>,
    /// Descriptors that the program inherits under their present numbers.
    pub(crate) inherit: Vec<BorrowedFd<'a>>,
    /// Root and current directory are those of this namespace.
    pub(crate) mount_namespace: BorrowedFd<'a>,
    pub(crate) network_namespace: BorrowedFd<'a>,
    pub(crate) ipc_namespace: BorrowedFd<'a>,
    /// User and group.
    pub(crate) uid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Resource limits: `RLIMIT_*` and the value of both bounds.
    pub(crate) limits: Vec<(c_uint, u64)>,
}

/// A step that failed in the child.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) step: &'static str,
    pub(crate) source: io::Error,
}

/// Steps of the child; the index of the one being done is told to the parent.
const STEPS: [&str; 13] = [
    "clone",
    "start a session",
    "redirect the standard streams",
    "reset signal handlers",
    "enter its network namespace",
    "enter its IPC namespace",
    "enter its root",
    "set resource limits",
    "close inherited descriptors",
    "drop capabilities",
    "change its user",
    "forbid new privileges",
    "execute the program",
];

/// Room for the child's few frames.
const STACK_LEN: usize = 64 * 1024;

/// Highest capability number the kernel may know; unknown ones are refused, which ends the loop.
const LAST_CAPABILITY: c_long = 63;

/// All that the child reads, laid out so that it needs neither allocation nor lock.
struct Prepared {
    program: *const c_char,
    arguments: Vec<*const c_char>,
    environment: [*const c_char; 2],
    input: RawFd,
    output: RawFd,
    inherit: Vec<RawFd>,
    /// Gaps between inherited descriptors, both ends included.
    close: Vec<(c_uint, c_uint)>,
    mount_namespace: RawFd,
    network_namespace: RawFd,
    ipc_namespace: RawFd,
    uid: u32,
    groups: Vec<u32>,
    limits: Vec<(c_uint, libc::rlimit)>,
    /// The child's signal mask on entry to the program: empty.
    no_signals: libc::sigset_t,
    /// Written by the child: index into [`STEPS`] and error number.
    step: AtomicI32,
    error: AtomicI32,
}

/// A child's pid and a descriptor of it.
pub(crate) type Child = (i32, OwnedFd);

/// Starts the program; returns when it executes.
///
/// # Errors
/// The step that failed; no process is left then.
pub(crate) fn spawn(plan: &Plan<'_>) -> Result<Child, Failure> {
    let mut arguments: Vec<*const c_char> = plan.arguments.iter().map(|a| a.as_ptr()).collect();
    arguments.push(ptr::null());
    let inherit: Vec<RawFd> = plan.inherit.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: an all-zero `sigset_t` is a valid value, and the empty set on Linux.
    let no_signals = unsafe { std::mem::zeroed() };
    let prepared = Prepared {
        program: plan.program.as_ptr(),
        arguments,
        environment: [c"LC_ALL=C".as_ptr(), ptr::null()],
        input: plan.input.as_raw_fd(),
        output: plan.output.as_raw_fd(),
        close: gaps(&inherit),
        inherit,
        mount_namespace: plan.mount_namespace.as_raw_fd(),
        network_namespace: plan.network_namespace.as_raw_fd(),
        ipc_namespace: plan.ipc_namespace.as_raw_fd(),
        uid: plan.uid,
        groups: plan.groups.clone(),
        limits: plan
            .limits
            .iter()
            .map(|(what, value)| {
                (
                    *what,
                    libc::rlimit {
                        rlim_cur: *value,
                        rlim_max: *value,
                    },
                )
            })
            .collect(),
        no_signals,
        step: AtomicI32::new(0),
        error: AtomicI32::new(0),
    };
    let mut stack = vec![0_u128; STACK_LEN / size_of::<u128>()];
    let mut pidfd: c_int = -1;
    // One at a time, or one would take for our own state what the other's child did to it.
    static BORROWING: Mutex<()> = Mutex::new(());
    let borrowing = BORROWING.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: `sigset_t` as above; `sigfillset` and `pthread_sigmask` get valid pointers. Signals
    // are blocked so that no handler of ours runs in the child, on memory that is also ours.
    let (pid, error) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        // Changing user makes a process undumpable, and with it everyone in its address space.
        let dumpable = libc::prctl(libc::PR_GET_DUMPABLE);
        // The program inherits this from the address space that it is started in. An idle VM touches
        // little here and there of what QEMU asks huge pages for: without them it takes 3 MB less,
        // and computes no slower that could be measured.
        let huge_pages = libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0;
        if huge_pages {
            libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
        }
        let pid = libc::clone(
            child,
            stack.as_mut_ptr_range().end.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
            (&raw const prepared).cast_mut().cast::<c_void>(),
            &raw mut pidfd,
        );
        let error = io::Error::last_os_error();
        if huge_pages {
            libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0);
        }
        if dumpable == 1 {
            libc::prctl(libc::PR_SET_DUMPABLE, 1);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        (pid, error)
    };
    drop(borrowing);
    drop(stack);
    if pid < 0 {
        return Err(Failure {
            step: STEPS[0],
            source: error,
        });
    }
    // SAFETY: the kernel stored a descriptor there that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // With CLONE_VFORK the child has executed the program or ended by now.
    let error = prepared.error.load(Ordering::Acquire);
    if error == 0 {
        return Ok((pid, pidfd));
    }
    let id = rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd));
    let _ = rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED);
    let step = usize::try_from(prepared.step.load(Ordering::Acquire)).unwrap_or(0);
    Err(Failure {
        step: STEPS[step.min(STEPS.len() - 1)],
        source: io::Error::from_raw_os_error(error),
    })
}

/// Ranges of descriptors above the standard streams that are not inherited.
fn gaps(inherit: &[RawFd]) -> Vec<(c_uint, c_uint)> {
    let mut keep: Vec<c_uint> = inherit.iter().map(|fd| fd.unsigned_abs()).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut gaps = Vec::with_capacity(keep.len() + 1);
    let mut next = 3;
    for fd in keep {
        if fd > next {
            gaps.push((next, fd - 1));
        }
        next = next.max(fd + 1);
    }
    gaps.push((next, c_uint::MAX));
    gaps
}

/// Runs in the child, on memory shared with the waiting parent: system calls only. The C
/// library's `setuid` and its like must not be used, as they change every thread of "the process".
extern "C" fn child(argument: *mut c_void) -> c_int {
    // SAFETY: the parent passes a `Prepared` and waits until this process executes or ends.
    let prepared = unsafe { &*argument.cast::<Prepared>() };
    // SAFETY: every pointer in `prepared` is valid while the parent waits.
    unsafe {
        enter(prepared);
        libc::syscall(libc::SYS_exit_group, 127);
    }
    127
}

/// Goes through the steps; returns only when one failed, having told which and why.
unsafe fn enter(prepared: &Prepared) {
    let at = |step: i32| prepared.step.store(step, Ordering::Release);
    // Tells whether a call failed, having noted why.
    let failed = |result: c_long| {
        if result >= 0 {
            return false;
        }
        // SAFETY: the location of this thread's error number is always valid.
        prepared
            .error
            .store(unsafe { *libc::__errno_location() }, Ordering::Release);
        true
    };
    // SAFETY: raw system calls with valid arguments; pointers come from `prepared`.
    unsafe {
        at(1);
        if failed(libc::syscall(libc::SYS_setsid)) {
            return;
        }
        at(2);
        for (from, to) in [
            (prepared.input, 0),
            (prepared.output, 1),
            (prepared.output, 2),
        ] {
            if failed(libc::syscall(libc::SYS_dup2, from, to)) {
                return;
            }
        }
        at(3);
        // Ignored signals stay ignored across execve, so all are reset. SIGKILL and SIGSTOP
        // refuse, as they should.
        let default = KernelSigaction {
            handler: libc::SIG_DFL,
            flags: 0,
            restorer: 0,
            mask: 0,
        };
        for signal in 1..=64 {
            let none = ptr::null::<c_void>();
            let set = size_of::<u64>();
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                none,
                set,
            );
        }
        for (step, namespace, kind) in [
            (4, prepared.network_namespace, libc::CLONE_NEWNET),
            (5, prepared.ipc_namespace, libc::CLONE_NEWIPC),
            (6, prepared.mount_namespace, libc::CLONE_NEWNS),
        ] {
            at(step);
            if failed(libc::syscall(libc::SYS_setns, namespace, kind)) {
                return;
            }
        }
        at(7);
        for (what, limit) in &prepared.limits {
            let none = ptr::null::<c_void>();
            if failed(libc::syscall(
                libc::SYS_prlimit64,
                0,
                *what,
                &raw const *limit,
                none,
            )) {
                return;
            }
        }
        at(8);
        for (first, last) in &prepared.close {
            if failed(libc::syscall(libc::SYS_close_range, *first, *last, 0)) {
                return;
            }
        }
        for fd in &prepared.inherit {
            if failed(libc::syscall(libc::SYS_fcntl, *fd, libc::F_SETFD, 0)) {
                return;
            }
        }
        at(9);
        for capability in 0..=LAST_CAPABILITY {
            if libc::syscall(libc::SYS_prctl, libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                // Past the last that this kernel knows; the first one always exists.
                if capability == 0 {
                    failed(-1);
                    return;
                }
                break;
            }
        }
        let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
        if failed(libc::syscall(
            libc::SYS_prctl,
            libc::PR_CAP_AMBIENT,
            clear,
            0,
            0,
            0,
        )) {
            return;
        }
        at(10);
        let uid = prepared.uid;
        let groups = &prepared.groups;
        if failed(libc::syscall(
            libc::SYS_setgroups,
            groups.len(),
            groups.as_ptr(),
        )) || failed(libc::syscall(libc::SYS_setresgid, uid, uid, uid))
            || failed(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
        {
            return;
        }
        // Leaving uid 0 dropped what was effective and permitted, not what is inheritable.
        let header = CapabilityHeader {
            version: 0x2008_0522,
            pid: 0,
        };
        let nothing = [CapabilityData {
            effective: 0,
            permitted: 0,
            inheritable: 0,
        }; 2];
        if failed(libc::syscall(
            libc::SYS_capset,
            &raw const header,
            nothing.as_ptr(),
        )) {
            return;
        }
        at(11);
        if failed(libc::syscall(
            libc::SYS_prctl,
            libc::PR_SET_NO_NEW_PRIVS,
            1,
            0,
            0,
            0,
        )) {
            return;
        }
        at(12);
        let (set, none) = (&raw const prepared.no_signals, ptr::null::<c_void>());
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            set,
            none,
            size_of::<u64>(),
        );
        failed(libc::syscall(
            libc::SYS_execve,
            prepared.program,
            prepared.arguments.as_ptr(),
            prepared.environment.as_ptr(),
        ));
    }
}

/// The kernel's `struct sigaction` on x86-64; the C library's differs.
#[repr(C)]
struct KernelSigaction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// `struct __user_cap_header_struct`; the version is `_LINUX_CAPABILITY_VERSION_3`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        ffi::CStr,
        io::{Read as _, Seek as _},
        os::fd::AsFd as _,
    };

    use super::*;

    #[test]
    fn everything_but_what_is_inherited_is_closed() {
        assert_eq!(gaps(&[]), [(3, c_uint::MAX)]);
        assert_eq!(gaps(&[5, 3, 4]), [(6, c_uint::MAX)]);
        assert_eq!(gaps(&[9, 4, 9]), [(3, 3), (5, 8), (10, c_uint::MAX)]);
    }

    fn own_namespace(kind: &str) -> OwnedFd {
        std::fs::File::open(format!("/proc/self/ns/{kind}"))
            .unwrap()
            .into()
    }

    /// Starts a program in our own namespaces, as a user of its own; returns what it printed.
    fn run(program: &CStr, arguments: &[&CStr]) -> Result<String, Failure> {
        assert!(
            rustix::process::geteuid().is_root(),
            "changing the user needs root"
        );
        let (input, output) = (
            std::fs::File::open("/dev/null").unwrap(),
            tempfile::tempfile().unwrap(),
        );
        let (mount, network, ipc) = (
            own_namespace("mnt"),
            own_namespace("net"),
            own_namespace("ipc"),
        );
        let plan = Plan {
            program: program.to_owned(),
            arguments: std::iter::once(&program)
                .chain(arguments)
                .map(|&a| a.to_owned())
                .collect(),
            input: input.as_fd(),
            output: output.as_fd(),
            inherit: vec![input.as_fd()],
            mount_namespace: mount.as_fd(),
            network_namespace: network.as_fd(),
            ipc_namespace: ipc.as_fd(),
            uid: 234_567,
            groups: vec![234_568],
            limits: vec![(libc::RLIMIT_NOFILE, 33)],
        };
        let (_, pidfd) = spawn(&plan)?;
        let id = rustix::process::WaitId::PidFd(pidfd.as_fd());
        let status = rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED);
        assert_eq!(status.unwrap().unwrap().exit_status(), Some(0));
        let mut text = String::new();
        let mut output = output;
        output.rewind().unwrap();
        output.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    /// One test, as what it sees of this process is true only while no other test spawns.
    #[test]
    fn a_program_is_what_the_plan_says() {
        let before = dumpable();
        let status = run(c"/bin/cat", &[c"/proc/self/status", c"/proc/self/limits"]).unwrap();
        let line = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}"))
                .trim()
                .to_owned()
        };
        assert_eq!(line("Uid:"), ["234567"; 4].join("\t"));
        assert_eq!(line("Groups:"), "234568");
        assert_eq!(
            (line("CapBnd:"), line("CapEff:")),
            ("0".repeat(16), "0".repeat(16))
        );
        // Rust's runtime ignores SIGPIPE; what we start must not inherit that.
        assert_eq!(
            (line("SigIgn:"), line("SigBlk:")),
            ("0".repeat(16), "0".repeat(16))
        );
        assert!(line("Max open files").starts_with("33 "));
        // `THP_enabled` of /proc/PID/status; Linux 5.0 and later.
        assert_eq!(line("THP_enabled:"), "0");
        assert_eq!(dumpable(), before, "we can still be traced and dumped");
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(own.contains("THP_enabled:\t1"), "we keep our huge pages");
        let variables = run(c"/usr/bin/env", &[]).unwrap();
        assert_eq!(variables, "LC_ALL=C\n");
        let descriptors = run(c"/bin/ls", &[c"/proc/self/fd"]).unwrap();
        // The standard streams, what was inherited, and the directory that is listed.
        assert_eq!(descriptors.lines().count(), 5, "{descriptors}");

        let failure = run(c"/nonexistent", &[]).unwrap_err();
        assert_eq!(failure.step, "execute the program");
        assert_eq!(failure.source.kind(), io::ErrorKind::NotFound);
    }

    fn dumpable() -> i32 {
        // SAFETY: reads a number.
        unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }
    }
}
