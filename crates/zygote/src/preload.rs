//! Inside the program: takes its entry's place, waits, and lets forked children pass.
//!
//! The C library calls `main` through `__libc_start_main`, which this replaces; and it is told of fork
//! handlers through `__register_atfork`, which this replaces too, since QEMU's handler starts a thread
//! and a child has to be confined before it has two.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use crate::{
    Ending, MAX_DESCRIPTORS, MAX_REQUEST, NAME, READY, Reply, Request, WARM,
    confine::{self, FORK, READ, RUN, Received, check},
    thrift,
};

type Main = extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) -> c_int;
type Hook = extern "C" fn();
type Handler = Option<Hook>;

/// The program's own.
static MAIN: OnceLock<Main> = OnceLock::new();

/// The socket that requests come from.
const REQUESTS: RawFd = 0;

/// Replaces the function of the C library that runs a program: has it run [`wait`] instead of `main`.
///
/// # Safety
/// Called by the program's entry code only, with what the C library's function takes.
#[cfg_attr(feature = "preload", unsafe(no_mangle))]
unsafe extern "C" fn __libc_start_main(
    main: Main,
    argc: c_int,
    argv: *mut *mut c_char,
    init: *mut c_void,
    fini: *mut c_void,
    rtld_fini: *mut c_void,
    stack_end: *mut c_void,
) -> c_int {
    type Start = unsafe extern "C" fn(
        Main,
        c_int,
        *mut *mut c_char,
        *mut c_void,
        *mut c_void,
        *mut c_void,
        *mut c_void,
    ) -> c_int;
    MAIN.get_or_init(|| main);
    // SAFETY: the name is a C string.
    let start = unsafe { libc::dlsym(libc::RTLD_NEXT, c"__libc_start_main".as_ptr()) };
    if start.is_null() {
        std::process::abort();
    }
    // SAFETY: the C library's function of that name has this type.
    let start: Start = unsafe { std::mem::transmute(start) };
    // SAFETY: what we were called with is passed on.
    unsafe { start(wait, argc, argv, init, fini, rtld_fini, stack_end) }
}

/// Fork handlers that were registered before the program ran, in order.
#[derive(Clone, Copy)]
struct ForkHandlers {
    prepare: Handler,
    parent: Handler,
    child: Handler,
}

static FORK_HANDLERS: Mutex<Vec<ForkHandlers>> = Mutex::new(Vec::new());

fn fork_handlers() -> MutexGuard<'static, Vec<ForkHandlers>> {
    FORK_HANDLERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Replaces what `pthread_atfork` calls: handlers are kept here, and the C library knows of none.
/// The program, once it runs, does not fork: its system call filter forbids it.
#[cfg_attr(feature = "preload", unsafe(no_mangle))]
extern "C" fn __register_atfork(
    prepare: Handler,
    parent: Handler,
    child: Handler,
    _module: *mut c_void,
) -> c_int {
    fork_handlers().push(ForkHandlers {
        prepare,
        parent,
        child,
    });
    0
}

/// What runs in the place of `main`: serves requests until the socket is closed.
extern "C" fn wait(argc: c_int, argv: *mut *mut c_char, _environment: *mut *mut c_char) -> c_int {
    // SAFETY: the C library passes as many arguments as it says.
    let title = unsafe { Title::of(argc, argv) };
    match prepare().and_then(|signals| serve(&signals, &title)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}: {error}", NAME.to_string_lossy());
            1
        }
    }
}

/// Sets the process up; returns a descriptor that tells of children that ended.
fn prepare() -> io::Result<OwnedFd> {
    let warm = std::env::var_os(WARM).is_some();
    for name in ["LD_PRELOAD", "LD_BIND_NOW", WARM] {
        // SAFETY: one thread reads and writes the environment.
        unsafe { std::env::remove_var(name) };
    }
    // SAFETY: the name is a C string.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, NAME.as_ptr()) })?;
    // Each running child costs a descriptor.
    let mut files = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit is a valid place for the result.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut files) })?;
    files.rlim_cur = files.rlim_max;
    // SAFETY: the limit is valid for the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files) })?;
    if warm {
        thrift::register_types();
    }
    // SAFETY: an all-zero `sigset_t` is a valid place for a set.
    let mut children: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for all three calls.
    let signals = unsafe {
        libc::sigemptyset(&raw mut children);
        libc::sigaddset(&raw mut children, libc::SIGCHLD);
        check(libc::sigprocmask(
            libc::SIG_BLOCK,
            &raw const children,
            ptr::null_mut(),
        ))?;
        libc::signalfd(
            -1,
            &raw const children,
            libc::SFD_NONBLOCK | libc::SFD_CLOEXEC,
        )
    };
    check(signals)?;
    // SAFETY: it was just opened and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(signals) })
}

/// Answers requests, until there can be no more.
fn serve(signals: &OwnedFd, title: &Title) -> io::Result<()> {
    // SAFETY: the bytes are valid for the call.
    let sent = unsafe {
        libc::send(
            REQUESTS,
            READY.as_ptr().cast(),
            READY.len(),
            libc::MSG_NOSIGNAL,
        )
    };
    check(if sent < 0 { -1 } else { 0 })?;
    let mut running: Vec<(i32, OwnedFd)> = Vec::new();
    let mut message = vec![0_u8; MAX_REQUEST];
    loop {
        let mut ready = [REQUESTS, signals.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: the array is valid for the call.
        let polled = unsafe { libc::poll(ready.as_mut_ptr(), 2, -1) };
        if polled < 0 {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            }
        }
        if ready[1].revents != 0 {
            reap(signals, &mut running);
        }
        if ready[0].revents != 0 {
            let Some((len, mut descriptors)) = receive(&mut message)? else {
                return Ok(());
            };
            if descriptors.is_empty() {
                continue;
            }
            let replies = descriptors.remove(0);
            match fork(&message[..len], &descriptors, title) {
                Ok((pid, pidfd)) => {
                    reply(&replies, Reply::Forked { pid }, Some(&pidfd));
                    running.push((pid, replies));
                }
                Err((step, error)) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
                    reply(&replies, Reply::Failed { step, errno }, None);
                }
            }
        }
    }
}

/// Reaps all children that have ended, and tells those who asked for them.
fn reap(signals: &OwnedFd, running: &mut Vec<(i32, OwnedFd)>) {
    // Signals of a kind do not queue: all of them are one, and say that somebody ended.
    let mut told = [0_u8; size_of::<libc::signalfd_siginfo>()];
    // SAFETY: the buffer is valid for the call.
    unsafe { libc::read(signals.as_raw_fd(), told.as_mut_ptr().cast(), told.len()) };
    loop {
        let mut status = 0;
        // SAFETY: the status is a valid place for the result.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
        if let Some(at) = running.iter().position(|(running, _)| *running == pid) {
            let (_, replies) = running.swap_remove(at);
            let status = Ending::encode(status);
            // Whoever asked may be gone by now. SAFETY: the bytes are valid for the call.
            unsafe {
                let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
                libc::send(
                    replies.as_raw_fd(),
                    status.as_ptr().cast(),
                    status.len(),
                    flags,
                );
            }
        }
    }
}

/// The next message's length and descriptors; `None` when the other end is closed.
fn receive(message: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut part = libc::iovec {
        iov_base: message.as_mut_ptr().cast(),
        iov_len: message.len(),
    };
    // In words, so that the headers in it are aligned.
    let mut control = [0_u64; 8 + MAX_DESCRIPTORS * size_of::<RawFd>() / size_of::<u64>()];
    // SAFETY: an all-zero header is a valid one: of no parts.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: everything that the header points to outlives the call.
    let len = unsafe { libc::recvmsg(REQUESTS, &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let Ok(len) = usize::try_from(len) else {
        return Err(io::Error::last_os_error());
    };
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled in the header and what it points to; descriptors in it are new
    // and nobody else's.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(control) = at.as_ref() {
            if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(at).cast::<RawFd>();
                let len = control.cmsg_len - libc::CMSG_LEN(0) as usize;
                for index in 0..len / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok((len > 0).then_some((len, descriptors)))
}

fn reply(replies: &OwnedFd, reply: Reply, pidfd: Option<&OwnedFd>) {
    let mut message = reply.encode();
    let mut part = libc::iovec {
        iov_base: message.as_mut_ptr().cast(),
        iov_len: message.len(),
    };
    let mut control = [0_u64; 4];
    // SAFETY: an all-zero header is a valid one: of no parts.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if let Some(pidfd) = pidfd {
        const LEN: u32 = size_of::<RawFd>() as u32;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes with a number.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(LEN) } as usize;
        // SAFETY: the buffer has room for one header with one descriptor, so the first exists.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(LEN) as usize;
            libc::CMSG_DATA(first)
                .cast::<RawFd>()
                .write_unaligned(pidfd.as_raw_fd());
        }
    }
    // Whoever asked may be gone: its child goes on like those of a server that was killed.
    // SAFETY: everything that the header points to outlives the call.
    unsafe {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        libc::sendmsg(replies.as_raw_fd(), &raw const header, flags);
    }
}

/// Forks a child and waits until it is confined. Returns its pid and a pidfd.
fn fork(
    message: &[u8],
    descriptors: &[OwnedFd],
    title: &Title,
) -> Result<(i32, OwnedFd), (u32, io::Error)> {
    let request = Request::decode(message).filter(|request| {
        descriptors.len() + 1 == Request::OWN_DESCRIPTORS + request.inherit.len()
    });
    let request = request.ok_or((READ, io::Error::from_raw_os_error(libc::EBADMSG)))?;
    let (mut ours, theirs) = io::pipe().map_err(|error| (FORK, error))?;
    let handlers = fork_handlers().clone();
    handlers
        .iter()
        .rev()
        .filter_map(|these| these.prepare)
        .for_each(|prepare| prepare());
    // SAFETY: the C library's fork leaves its own state, of its allocator above all, whole in the
    // child; the program's own is what its handlers are for.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        become_program(request, descriptors, title, theirs.as_raw_fd(), &handlers);
    }
    let failure = io::Error::last_os_error();
    handlers
        .iter()
        .filter_map(|these| these.parent)
        .for_each(|parent| parent());
    if pid < 0 {
        return Err((FORK, failure));
    }
    drop(theirs);
    let mut report = [0; 8];
    let [a, b, c, d, e, f, g, h] = match io::Read::read_exact(&mut ours, &mut report) {
        Ok(()) => report,
        // It died without a word.
        Err(_) => [0; 8],
    };
    let (step, errno) = (
        u32::from_ne_bytes([a, b, c, d]),
        i32::from_ne_bytes([e, f, g, h]),
    );
    // SAFETY: takes no pointers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = c_int::try_from(pidfd).unwrap_or(-1);
    if step == RUN && pidfd >= 0 {
        // SAFETY: it was just opened and is nobody else's.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        return Ok((pid, pidfd));
    }
    // SAFETY: the child is ours and not reaped, so the number is still its own.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, ptr::null_mut(), 0);
    }
    let errno = if errno == 0 { libc::ECHILD } else { errno };
    Err((step, io::Error::from_raw_os_error(errno)))
}

fn tell(report: RawFd, words: [u32; 2]) {
    let [[a, b, c, d], [e, f, g, h]] = words.map(u32::to_ne_bytes);
    let bytes = [a, b, c, d, e, f, g, h];
    // SAFETY: the bytes are valid for the call.
    unsafe { libc::write(report, bytes.as_ptr().cast(), bytes.len()) };
}

/// In the child: confines it, tells the zygote, and runs the program. Never returns, so that nothing
/// is dropped that the zygote owns: a descriptor's number may be one of the program's by now.
fn become_program(
    request: Request,
    descriptors: &[OwnedFd],
    title: &Title,
    report: RawFd,
    handlers: &[ForkHandlers],
) -> ! {
    let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let (own, inherit) = numbers.split_at(Request::OWN_DESCRIPTORS - 1);
    let received = Received {
        network_namespace: own[0],
        input: own[1],
        output: own[2],
        inherit,
        report,
    };
    title.write(&request);
    match confine::enter(&request, &received) {
        Ok(report) => {
            tell(report, [RUN, 0]);
            // SAFETY: that number is a copy that `enter` made for us.
            unsafe { libc::close(report) };
        }
        Err((step, error)) => {
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
            tell(report, [step, errno.unsigned_abs()]);
            // SAFETY: takes no pointers; does not run what the program does at its exit.
            unsafe { libc::_exit(127) };
        }
    }
    handlers
        .iter()
        .filter_map(|these| these.child)
        .for_each(|child| child());
    let Some(main) = MAIN.get() else {
        std::process::abort()
    };
    // The program may keep its arguments, and write to them, as long as it runs.
    let arguments = request.arguments.into_iter().map(CString::into_raw);
    let mut arguments: Vec<*mut c_char> = arguments.collect();
    let count = c_int::try_from(arguments.len()).unwrap_or(c_int::MAX);
    arguments.push(ptr::null_mut());
    unsafe extern "C" {
        static mut environ: *mut *mut c_char;
    }
    // SAFETY: only this thread touches the environment.
    let environment = unsafe { environ };
    std::process::exit(main(count, arguments.leak().as_mut_ptr(), environment))
}

/// Where the kernel reads a process's arguments from, for `ps` and for who looks for a VM's process.
struct Title {
    area: *mut u8,
    len: usize,
}

impl Title {
    /// # Safety
    /// The arguments must be those that the process was executed with, which lie one after the other.
    unsafe fn of(argc: c_int, argv: *mut *mut c_char) -> Self {
        let count = usize::try_from(argc).unwrap_or(0);
        let mut len = 0;
        for index in 0..count {
            // SAFETY: there are `argc` arguments.
            len += unsafe { CStr::from_ptr(*argv.add(index)) }
                .to_bytes_with_nul()
                .len();
        }
        // SAFETY: an executed program has at least its name, if an empty one.
        let area = unsafe { (*argv).cast() };
        Self { area, len }
    }

    /// Names this process after the program and its first arguments, as far as there is room.
    fn write(&self, request: &Request) {
        let mut title: Vec<u8> = Vec::with_capacity(self.len);
        for argument in &request.arguments {
            let argument = argument.to_bytes_with_nul();
            if title.len() + argument.len() > self.len {
                break;
            }
            title.extend(argument);
        }
        title.resize(self.len, 0);
        // SAFETY: that much memory is there, is writable, and nobody reads it as strings any more.
        unsafe { ptr::copy_nonoverlapping(title.as_ptr(), self.area, self.len) };
        let program = request.arguments[0].as_bytes();
        let base = program
            .rsplit(|byte| *byte == b'/')
            .next()
            .unwrap_or(program);
        if let Ok(name) = CString::new(base) {
            // SAFETY: the name is a C string; the kernel takes 15 bytes of it.
            unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
        }
    }
}
