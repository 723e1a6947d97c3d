//! Starts VM processes: keeps a zygote of the program and has it fork them.
//!
//! What a zygote is, and how a child confines itself, is `cubicle_zygote`'s to say. Here a zygote is
//! started, in the jail and with no more privileges than it needs, is asked for children, and is
//! replaced when it has died. VMs do not depend on it: they outlive their zygote as they outlive the
//! server, and another one starts the next.

use std::{
    ffi::{CString, c_int},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::PathBuf,
    process::{Command, Stdio},
    ptr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cubicle_zygote::{MAX_DESCRIPTORS, MAX_REQUEST, NAME, READY, Reply, Request, TITLE_LEN, WARM};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    process::{Pid, PidfdFlags, pidfd_open},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    error::{Error, Result},
    jail::{self, Jail},
    output::Output,
    process::Process,
};

/// How long a zygote may take to come up, which takes 40 ms on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a zygote may do besides what anybody may: change its children's user and groups, drop their
/// capabilities, enter their network namespaces (`linux/capability.h`).
const CAPABILITIES: [c_int; 4] = [
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    8,  // CAP_SETPCAP
    21, // CAP_SYS_ADMIN
];

/// A process to start, and how confined.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// Arguments, the program's name first.
    pub(crate) arguments: Vec<CString>,
    /// Becomes standard input.
    pub(crate) input: BorrowedFd<'a>,
    /// Becomes standard output and standard error.
    pub(crate) output: BorrowedFd<'a>,
    /// Descriptors that the program inherits under their present numbers.
    pub(crate) inherit: Vec<BorrowedFd<'a>>,
    /// `None`: an empty one.
    pub(crate) network_namespace: Option<BorrowedFd<'a>>,
    /// User and group.
    pub(crate) uid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Resource limits: `RLIMIT_*` and the value of both bounds.
    pub(crate) limits: Vec<(u32, u64)>,
}

/// A step that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) step: &'static str,
    pub(crate) source: io::Error,
}

/// Starts processes of one program in one jail.
#[derive(Debug)]
pub(crate) struct Zygotes {
    program: PathBuf,
    jail: Jail,
    current: Mutex<Option<Arc<Zygote>>>,
}

impl Zygotes {
    /// Starts the first zygote. Blocks for the 40 ms that this takes.
    ///
    /// # Errors
    /// [`Error::Unusable`]: the program cannot be one.
    pub(crate) fn open(program: PathBuf, jail: Jail) -> Result<Self> {
        let zygotes = Self {
            program,
            jail,
            current: Mutex::new(None),
        };
        zygotes.current().map_err(|failure| Error::Unusable {
            binary: zygotes.program.clone(),
            reason: format!("{}: {}", failure.step, failure.source),
        })?;
        Ok(zygotes)
    }

    /// Starts a process; returns when it is confined and runs the program. Blocks for a
    /// millisecond.
    ///
    /// # Errors
    /// The step that failed; no process is left then.
    pub(crate) fn fork(&self, plan: &Plan<'_>) -> Result<Process, Failure> {
        let zygote = self.current()?;
        match zygote.fork(plan, self.jail.empty_network.as_fd()) {
            // It had died before it read the request: another one may have more luck.
            Err(failure) if is_gone(&failure.source) && failure.step == ASK => {
                self.forget(&zygote);
                self.current()?.fork(plan, self.jail.empty_network.as_fd())
            }
            forked => forked,
        }
    }

    /// The zygote that there is, or a new one.
    fn current(&self) -> Result<Arc<Zygote>, Failure> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(zygote) = &*current
            && zygote.process.exit().is_none()
        {
            return Ok(Arc::clone(zygote));
        }
        let zygote = Zygote::start(&self.program, &self.jail, true).or_else(|failure| {
            // Of all that happens before `main`, only this is not what QEMU does in any case.
            tracing::warn!(
                error = %failure.source,
                "QEMU does not register its types before its main program: VMs will each do that"
            );
            Zygote::start(&self.program, &self.jail, false)
        });
        Ok(Arc::clone(current.insert(Arc::new(zygote?))))
    }

    fn forget(&self, zygote: &Arc<Zygote>) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.take_if(|current| Arc::ptr_eq(current, zygote));
    }
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}

/// The step of a request that a zygote never saw.
const ASK: &str = "ask the zygote";

/// A program that waits to be forked. It ends when this is dropped.
#[derive(Debug)]
struct Zygote {
    requests: OwnedFd,
    process: Process,
}

impl Zygote {
    fn start(program: &PathBuf, jail: &Jail, warm: bool) -> Result<Self, Failure> {
        let failed = |step| move |source| Failure { step, source };
        let (requests, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| failed("connect to a zygote")(error.into()))?;
        let output = Output::new().map_err(failed("allocate room for a zygote's output"))?;
        let print = || output.as_fd().try_clone_to_owned().map(Stdio::from);
        let mut command = Command::new(program);
        command
            .arg0(NAME.to_string_lossy().as_ref())
            .arg(" ".repeat(TITLE_LEN))
            .stdin(Stdio::from(theirs))
            .stdout(print().map_err(failed("duplicate a descriptor"))?)
            .stderr(print().map_err(failed("duplicate a descriptor"))?)
            .env_clear()
            .env("LC_ALL", "C")
            .env("LD_PRELOAD", jail::ZYGOTE)
            // Whatever is bound now is bound once for all children.
            .env("LD_BIND_NOW", "1");
        if warm {
            command.env(WARM, "1");
        }
        let namespaces = [
            (&jail.empty_network, LinkNameSpaceType::Network),
            (&jail.ipc, LinkNameSpaceType::InterProcessCommunication),
            (&jail.mount, LinkNameSpaceType::Mount),
        ];
        let namespaces =
            namespaces.map(|(namespace, kind)| namespace.try_clone().map(|fd| (fd, kind)));
        let namespaces = namespaces.into_iter().collect::<io::Result<Vec<_>>>();
        let namespaces = namespaces.map_err(failed("duplicate a descriptor"))?;
        // SAFETY: between fork and exec, `confine` makes nothing but system calls.
        unsafe { command.pre_exec(move || confine(&namespaces)) };
        let child = command.spawn().map_err(failed("execute it"))?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let pidfd = Pid::from_raw(pid).map_or(Err(rustix::io::Errno::SRCH), |pid| {
            // Not reaped yet, so the number is still its own.
            pidfd_open(pid, PidfdFlags::empty())
        });
        let process = pidfd
            .map_err(io::Error::from)
            .and_then(|pidfd| Process::child(pid, pidfd))
            .map_err(failed("watch a zygote"))?;
        drop(command);
        let zygote = Self { requests, process };
        zygote.until_ready().map_err(|error| {
            let said = output.tail();
            let source = if said.is_empty() {
                error
            } else {
                io::Error::other(said)
            };
            failed("start a zygote of it")(source)
        })?;
        Ok(zygote)
    }

    fn until_ready(&self) -> io::Result<()> {
        let patience = rustix::time::Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
        let mut ready = [PollFd::new(&self.requests, PollFlags::IN)];
        let polled = rustix::io::retry_on_intr(|| poll(&mut ready, Some(&patience)));
        if polled? == 0 {
            let _ = self.process.kill();
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut word = [0; READY.len()];
        let (_, len) = rustix::net::recv(&self.requests, &mut word, RecvFlags::empty())?;
        if word.get(..len) == Some(READY) {
            return Ok(());
        }
        Err(io::Error::other(
            "it ended at once; it must be linked dynamically, to the GNU C library",
        ))
    }

    fn fork(&self, plan: &Plan<'_>, empty_network: BorrowedFd<'_>) -> Result<Process, Failure> {
        let failed = |step| move |source| Failure { step, source };
        let (replies, theirs) = UnixStream::pair().map_err(failed("make a connection"))?;
        let request = Request {
            uid: plan.uid,
            groups: plan.groups.clone(),
            limits: plan.limits.clone(),
            inherit: plan.inherit.iter().map(|fd| fd.as_raw_fd()).collect(),
            arguments: plan.arguments.clone(),
        };
        let mut descriptors = vec![
            theirs.as_fd(),
            plan.network_namespace.unwrap_or(empty_network),
            plan.input,
            plan.output,
        ];
        descriptors.extend(&plan.inherit);
        self.ask(&request.encode(), &descriptors)
            .map_err(failed(ASK))?;
        drop(theirs);
        let (reply, pidfd) = reply(&replies).map_err(failed("hear from the zygote"))?;
        match reply {
            Reply::Forked { pid } => {
                let pidfd = pidfd.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData));
                pidfd
                    .and_then(|pidfd| Process::grandchild(pid, pidfd, replies))
                    .map_err(failed("watch its process"))
            }
            Reply::Failed { step, errno } => {
                let (step, source) = Reply::failure(step, errno);
                Err(Failure { step, source })
            }
        }
    }

    fn ask(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if message.len() > MAX_REQUEST || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        let room = SendAncillaryMessage::ScmRights(descriptors).size();
        let mut room = vec![MaybeUninit::uninit(); room];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        let parts = [io::IoSlice::new(message)];
        rustix::io::retry_on_intr(|| {
            sendmsg(&self.requests, &parts, &mut control, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }
}

/// Reads a reply and the descriptor that may come with it.
fn reply(replies: &UnixStream) -> io::Result<(Reply, Option<OwnedFd>)> {
    let mut message = [0; Reply::LEN];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut parts = [io::IoSliceMut::new(&mut message)];
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(replies, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    if received.bytes != Reply::LEN {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let pidfd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((Reply::decode(message), pidfd))
}

/// In the process that is to become a zygote: leaves the host's namespaces and most of root's
/// privileges. Nothing but system calls.
fn confine(namespaces: &[(OwnedFd, LinkNameSpaceType)]) -> io::Result<()> {
    let check = |result: c_int| {
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    rustix::process::setsid()?;
    for (namespace, kind) in namespaces {
        move_into_link_name_space(namespace.as_fd(), Some(*kind))?;
    }
    // Ignored signals stay ignored, in the program and in its children, the C library's own too, which
    // it would not let be reset. SIGKILL and SIGSTOP refuse, as they should.
    let default = KernelSigaction::default();
    for signal in 1..=64 {
        let (set, none) = (size_of::<u64>(), ptr::null::<KernelSigaction>());
        // SAFETY: the action is valid for the call, and sets no handler.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                none,
                set,
            )
        };
    }
    // An idle VM touches little here and there of what QEMU asks huge pages for: without them it takes
    // 3 MB less, and computes no slower that could be measured. SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) })?;
    // SAFETY: takes no pointers; what is not marked already is closed by the execution.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(if marked < 0 { -1 } else { 0 })?;
    cubicle_zygote::drop_capabilities(&CAPABILITIES)
}

/// The kernel's `struct sigaction` on x86-64; the C library's differs. All zero: the default action.
#[repr(C)]
#[derive(Default)]
struct KernelSigaction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        ffi::CStr,
        fs,
        io::{Read as _, Seek as _},
        path::Path,
    };

    use super::*;
    use crate::process::Exit;

    fn zygotes(program: &str) -> Zygotes {
        assert!(
            rustix::process::geteuid().is_root(),
            "changing the user needs root"
        );
        let jail = Jail::build(Path::new(program), &[], &[]).unwrap();
        Zygotes::open(program.into(), jail).unwrap()
    }

    /// Copies its input, in an empty network.
    fn cat_plan<'a>(input: &'a impl AsFd, output: &'a impl AsFd) -> Plan<'a> {
        Plan {
            arguments: vec![c"cat".into()],
            input: input.as_fd(),
            output: output.as_fd(),
            inherit: Vec::new(),
            network_namespace: None,
            uid: 234_567,
            groups: Vec::new(),
            limits: Vec::new(),
        }
    }

    /// Runs the program to its end, as a user of its own; returns how it ended and what it printed.
    async fn run(zygotes: &Zygotes, arguments: &[&CStr]) -> Result<(Exit, String), Failure> {
        let input = fs::File::open("/dev/null").unwrap();
        let mut output = tempfile::tempfile().unwrap();
        let plan = Plan {
            arguments: arguments.iter().map(|&argument| argument.into()).collect(),
            input: input.as_fd(),
            output: output.as_fd(),
            inherit: vec![input.as_fd()],
            network_namespace: None,
            uid: 234_567,
            groups: vec![234_568],
            limits: vec![(libc::RLIMIT_NOFILE, 33)],
        };
        let process = zygotes.fork(&plan)?;
        let exit = process.exited().await;
        let mut text = String::new();
        output.rewind().unwrap();
        output.read_to_string(&mut text).unwrap();
        Ok((exit, text))
    }

    #[tokio::test]
    async fn a_process_is_what_the_plan_says() {
        let cat = zygotes("/bin/cat");
        let files = [c"/bin/cat", c"/proc/self/status", c"/proc/self/limits"];
        let (exit, status) = run(&cat, &files).await.unwrap();
        assert_eq!(exit, Exit::Code(0));
        let line = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}"))
                .trim()
        };
        assert_eq!(line("Name:"), "cat");
        assert_eq!(line("Uid:"), ["234567"; 4].join("\t"));
        assert_eq!(line("Groups:"), "234568");
        let none = "0".repeat(16);
        for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(line(capabilities), none, "{capabilities}");
        }
        assert_eq!(line("NoNewPrivs:"), "1");
        // Rust's runtime ignores SIGPIPE; what we start must not inherit that.
        assert_eq!((line("SigIgn:"), line("SigBlk:")), (&*none, &*none));
        assert!(line("Max open files").starts_with("33 "));
        // `THP_enabled` of /proc/PID/status; Linux 5.0 and later.
        assert_eq!(line("THP_enabled:"), "0");
        let own = fs::read_to_string("/proc/self/status").unwrap();
        assert!(own.contains("THP_enabled:\t1"), "we keep our huge pages");

        // What `ps` shows, and what strays are known by: the child's own arguments.
        let (_, title) = run(&cat, &[c"/bin/cat", c"/proc/self/cmdline"])
            .await
            .unwrap();
        assert_eq!(title.trim_end_matches('\0'), "/bin/cat\0/proc/self/cmdline");
        let (exit, said) = run(&cat, &[c"/bin/cat", c"/nonexistent"]).await.unwrap();
        assert_eq!(exit, Exit::Code(1));
        assert!(said.contains("No such file"), "{said}");
    }

    #[tokio::test]
    async fn a_process_gets_the_descriptors_and_variables_that_it_is_given() {
        let (_, variables) = run(&zygotes("/usr/bin/env"), &[c"env"]).await.unwrap();
        assert_eq!(variables, "LC_ALL=C\n");
        let ls = zygotes("/bin/ls");
        let (_, listed) = run(&ls, &[c"ls", c"/proc/self/fd"]).await.unwrap();
        // The standard streams, what was inherited, and the directory that is listed.
        assert_eq!(listed.lines().count(), 5, "{listed}");
    }

    /// Numbers are the server's, and may be any, those under which the zygote received what it was sent
    /// among them.
    #[tokio::test]
    async fn inherited_numbers_may_be_any() {
        let cat = zygotes("/bin/cat");
        let null = fs::File::open("/dev/null").unwrap();
        let request = Request {
            uid: 234_567,
            groups: Vec::new(),
            limits: Vec::new(),
            inherit: (3..30).collect(),
            arguments: vec![c"cat".into()],
        };
        let (replies, theirs) = UnixStream::pair().unwrap();
        let own = [theirs.as_fd(), cat.jail.empty_network.as_fd()];
        let rest = vec![null.as_fd(); 2 + request.inherit.len()];
        let zygote = cat.current().unwrap();
        zygote
            .ask(&request.encode(), &[&own[..], &rest].concat())
            .unwrap();
        let (reply, _) = reply(&replies).unwrap();
        assert!(matches!(reply, Reply::Forked { .. }), "{reply:?}");
    }

    #[tokio::test]
    async fn a_step_that_fails_is_named_and_leaves_no_process() {
        let cat = zygotes("/bin/cat");
        let file = fs::File::open("/dev/null").unwrap();
        let plan = Plan {
            network_namespace: Some(file.as_fd()),
            ..cat_plan(&file, &file)
        };
        let failure = cat.fork(&plan).unwrap_err();
        assert_eq!(failure.step, "enter its network namespace");
        assert_eq!(failure.source.raw_os_error(), Some(libc::EINVAL));
        let zygote = cat.current().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", zygote.process.pid());
        assert_eq!(fs::read_to_string(children).unwrap(), "");
    }

    #[tokio::test]
    async fn a_zygote_that_died_is_replaced_and_its_children_live() {
        let cat = zygotes("/bin/cat");
        let (stdin, writer) = io::pipe().unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        let plan = cat_plan(&stdin, &null);
        let child = cat.fork(&plan).unwrap();
        let first = cat.current().unwrap();
        first.process.kill().unwrap();
        assert_eq!(first.process.exited().await, Exit::Signal(libc::SIGKILL));
        let (exit, _) = run(&cat, &[c"cat", c"/dev/null"]).await.unwrap();
        assert_eq!(exit, Exit::Code(0));
        assert_eq!(child.exit(), None);
        drop(writer);
        // Its parent is not there any more to tell how it ended.
        assert_eq!(child.exited().await, Exit::Unknown);
        // A zygote ends with whom it serves.
        let second = cat.current().unwrap().process.clone();
        drop((cat, first));
        assert_eq!(second.exited().await, Exit::Code(0));
    }

    #[test]
    fn a_program_that_cannot_be_one_says_so() {
        let script = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempfile()
            .unwrap();
        fs::write(script.path(), "not a program").unwrap();
        let path = script.into_temp_path();
        let jail = Jail::build(&path, &[], &[]).unwrap();
        let error = Zygotes::open(path.to_path_buf(), jail).unwrap_err();
        assert!(error.to_string().contains("execute it"), "{error}");
    }
}
