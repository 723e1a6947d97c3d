//! What a forked child does to itself before it becomes a VM: own session, user, network namespace
//! and limits, no capability, no way to gain one, and only the descriptors it was given.

use std::{
    ffi::{c_int, c_uint},
    io,
    os::fd::RawFd,
    ptr,
};

use crate::Request;

/// Steps between a request and a running program, in order. The last is its own.
pub const STEPS: [&str; 12] = [
    "read the request",
    "fork",
    "start a session",
    "take over its descriptors",
    "enter its network namespace",
    "set resource limits",
    "close inherited descriptors",
    "drop capabilities",
    "change its user",
    "forbid new privileges",
    "unblock signals",
    "run the program",
];

/// Indices into [`STEPS`] that others than [`enter`] fail at.
pub(crate) const READ: u32 = 0;
pub(crate) const FORK: u32 = 1;
pub(crate) const RUN: u32 = 11;

/// Highest capability number the kernel may know; unknown ones are refused, which ends the loop.
const LAST_CAPABILITY: c_int = 63;

/// The descriptors of a request, as they were received.
pub(crate) struct Received<'a> {
    pub(crate) network_namespace: RawFd,
    pub(crate) input: RawFd,
    pub(crate) output: RawFd,
    /// As many as [`Request::inherit`].
    pub(crate) inherit: &'a [RawFd],
    /// Where the child reports; stays open, under the number that [`enter`] returns.
    pub(crate) report: RawFd,
}

/// Confines the process, which must have no other thread: much of what is changed here is a
/// thread's own. Returns the new number of the report's descriptor.
///
/// # Errors
/// The index of the step that failed. The process is of no use then.
pub(crate) fn enter(request: &Request, received: &Received<'_>) -> Result<RawFd, (u32, io::Error)> {
    let mut step = 2;
    let mut at = |result: io::Result<()>| {
        let tried = step;
        step += 1;
        result.map_err(|error| (tried, error))
    };
    // SAFETY: takes no pointers.
    at(check(unsafe { libc::setsid() }))?;
    let placed = place(request, received);
    let (network_namespace, report) = *placed.as_ref().unwrap_or(&(-1, -1));
    at(placed.map(drop))?;
    // SAFETY: takes no pointers.
    at(check(unsafe {
        libc::setns(network_namespace, libc::CLONE_NEWNET)
    }))?;
    at(request
        .limits
        .iter()
        .try_for_each(|&(what, value)| limit(what, value)))?;
    at(close_all_but(&request.inherit, report))?;
    at(drop_capabilities(&[]).and_then(|()| clear_ambient_set()))?;
    at(change_user(request.uid, &request.groups))?;
    // SAFETY: takes no pointers.
    at(check(unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    }))?;
    at(unblock_signals())?;
    Ok(report)
}

pub(crate) fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the received descriptors their numbers. They are moved above all of those first, lest one
/// be replaced before it has moved or is used. Returns where the network namespace and the report
/// are now.
fn place(request: &Request, received: &Received<'_>) -> io::Result<(RawFd, RawFd)> {
    let above = request
        .inherit
        .iter()
        .max()
        .map_or(3, |&last| last.max(2) + 1);
    let aside = |fd: RawFd| {
        // SAFETY: takes no pointers.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD, above) };
        check(copy).map(|()| copy)
    };
    let (input, output) = (aside(received.input)?, aside(received.output)?);
    let mut moves = vec![(input, 0), (output, 1), (output, 2)];
    for (&fd, &number) in received.inherit.iter().zip(&request.inherit) {
        moves.push((aside(fd)?, number));
    }
    let network_namespace = aside(received.network_namespace)?;
    let report = aside(received.report)?;
    for (from, to) in moves {
        // SAFETY: takes no pointers; the new descriptor survives no execution that is not asked for.
        check(unsafe { libc::dup2(from, to) })?;
    }
    Ok((network_namespace, report))
}

fn limit(what: c_uint, value: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    // SAFETY: the limit is valid for the call.
    check(unsafe { libc::prlimit(0, what, &raw const limit, ptr::null_mut()) })
}

fn close_all_but(inherit: &[RawFd], report: RawFd) -> io::Result<()> {
    let keep = inherit.iter().chain([&report]).map(|fd| fd.unsigned_abs());
    for (first, last) in gaps(keep.collect()) {
        // SAFETY: takes no pointers. What is closed is not used again: this process is about to run
        // another program, which was handed the rest.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        check(if closed < 0 { -1 } else { 0 })?;
    }
    Ok(())
}

/// Ranges of descriptors above the standard streams that are not among `keep`.
fn gaps(mut keep: Vec<c_uint>) -> Vec<(c_uint, c_uint)> {
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

/// Gives up all capabilities but these for what this process executes: drops them from its bounding set.
/// Nothing but system calls, so that it may run between a fork and an execution.
///
/// # Errors
/// What the kernel says; it lets only who has `CAP_SETPCAP` do this.
pub fn drop_capabilities(keep: &[c_int]) -> io::Result<()> {
    for capability in (0..=LAST_CAPABILITY).filter(|capability| !keep.contains(capability)) {
        // SAFETY: takes no pointers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        // Past the last that this kernel knows; the first one always exists.
        if dropped < 0 && capability > 0 {
            break;
        }
        check(dropped)?;
    }
    Ok(())
}

fn clear_ambient_set() -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    })
}

fn change_user(uid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: the list is valid for the call.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::setresgid(uid, uid, uid) })?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::setresuid(uid, uid, uid) })?;
    // Leaving uid 0 dropped what was effective and permitted, not what is inheritable.
    let header = CapabilityHeader {
        version: 0x2008_0522,
        pid: 0,
    };
    let nothing = [CapabilityData::default(); 2];
    // SAFETY: both are valid for the call and of the shape that this version has.
    let cleared = unsafe { libc::syscall(libc::SYS_capset, &raw const header, nothing.as_ptr()) };
    check(if cleared < 0 { -1 } else { 0 })?;
    // Changing user has closed /proc/self to the process itself, where it reopens what it was given.
    // Nobody else is this user, and core dumps are off.
    // SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })
}

fn unblock_signals() -> io::Result<()> {
    // SAFETY: an all-zero `sigset_t` is a valid value, and the empty set on Linux.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for the call.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) })
}

/// `struct __user_cap_header_struct`; the version is `_LINUX_CAPABILITY_VERSION_3`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_what_is_inherited_is_closed() {
        assert_eq!(gaps(vec![]), [(3, c_uint::MAX)]);
        assert_eq!(gaps(vec![5, 3, 4]), [(6, c_uint::MAX)]);
        let apart = [(3, 3), (5, 8), (10, c_uint::MAX)];
        assert_eq!(gaps(vec![9, 4, 9]), apart);
    }

    #[test]
    fn every_step_has_its_name() {
        assert_eq!(STEPS[READ as usize], "read the request");
        assert_eq!(STEPS[FORK as usize], "fork");
        assert_eq!(STEPS.len() - 1, RUN as usize);
        // As many as there are between them in `enter`.
        assert_eq!(STEPS[FORK as usize + 1..RUN as usize].len(), 9);
    }
}
