use std::{
    collections::BTreeMap,
    ffi::CString,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    time::Instant,
};

use rustix::{
    fs::{Mode, OFlags},
    pipe::PipeFlags,
    pty::OpenptFlags,
    termios::Winsize,
};

use super::{
    Error,
    output::Source,
    spawn::{self, Child, Plan},
};
use crate::{
    access::{State, User},
    proto::process::ProcessConfig,
};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_TERM: &str = "xterm-256color";

/// What a program's standard input, output and error are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stdio {
    /// Pipes for output and error; for input one, too, or nothing to read.
    Pipes { stdin: bool },
    /// One terminal for all three.
    Terminal(Winsize),
}

/// What is to be started.
pub(super) struct Launch<'a> {
    pub(super) config: &'a ProcessConfig,
    pub(super) stdio: Stdio,
    /// Name of the user that the request names, if any.
    pub(super) user: Option<&'a str>,
    /// When it is to be killed, if it still runs.
    pub(super) deadline: Option<Instant>,
}

/// A program that has just been started, and the daemon's ends of its files.
pub(super) struct Launched {
    pub(super) child: Child,
    pub(super) stdin: Option<OwnedFd>,
    pub(super) terminal: Option<OwnedFd>,
    pub(super) outputs: Vec<(Source, OwnedFd)>,
}

impl Launch<'_> {
    pub(super) fn start(&self, state: &State) -> Result<Launched, Error> {
        let user = state.user(self.user)?;
        let groups = state.accounts()?.groups_of(&user);
        let settings = state.settings();
        let cwd = self.working_directory(&user, settings.default_workdir.as_deref())?;
        let environment = self.environment(&user, settings.environment(), &cwd);
        let search = environment.get("PATH").map_or(DEFAULT_PATH, String::as_str);
        let files = Files::open(self, &user)?;
        let cmd = shell_of(&self.config.cmd);
        let plan = Plan {
            candidates: candidates(cmd, search)?,
            argv: std::iter::once(cmd)
                .chain(self.config.args.iter().map(String::as_str))
                .map(|text| c_string("argument", text))
                .collect::<Result<_, _>>()?,
            envp: environment
                .iter()
                .map(|(name, value)| variable(name, value))
                .collect::<Result<_, _>>()?,
            cwd: c_string("cwd", &cwd.to_string_lossy())?,
            uid: user.uid,
            gid: user.gid,
            groups,
            stdio: [
                files.child[0].as_fd(),
                files.child[1].as_fd(),
                files.child[2].as_fd(),
            ],
            terminal: matches!(self.stdio, Stdio::Terminal(_)),
        };
        let child = spawn::spawn(&plan).map_err(|failure| Error::Spawn {
            cmd: cmd.to_owned(),
            step: failure.step,
            source: failure.source,
        })?;
        let Files {
            stdin,
            terminal,
            outputs,
            ..
        } = files;
        Ok(Launched {
            child,
            stdin,
            terminal,
            outputs,
        })
    }

    /// Where the program starts. A directory that the request names must exist; one that is only
    /// the default may be missing, as a home directory often is.
    fn working_directory(&self, user: &User, default: Option<&Path>) -> Result<PathBuf, Error> {
        let wanted = self.config.cwd.as_deref().filter(|cwd| !cwd.is_empty());
        let Some(wanted) = wanted else {
            let default = default.map_or(user.home.clone(), |dir| user.home.join(dir));
            return Ok(if default.is_dir() {
                default
            } else {
                PathBuf::from("/")
            });
        };
        let path = match wanted.strip_prefix('~') {
            Some("") => user.home.clone(),
            Some(rest) if rest.starts_with('/') => user.home.join(rest.trim_start_matches('/')),
            _ => user.home.join(wanted),
        };
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => Ok(path),
            Ok(_) => Err(Error::CwdNotDirectory(path)),
            Err(_) => Err(Error::NoCwd(path)),
        }
    }

    /// What a login would set, under what the sandbox sets, under what the request sets.
    fn environment(
        &self,
        user: &User,
        sandbox: BTreeMap<String, String>,
        cwd: &Path,
    ) -> BTreeMap<String, String> {
        let mut environment: BTreeMap<String, String> = [
            ("PATH", DEFAULT_PATH.into()),
            ("HOME", user.home.to_string_lossy()),
            ("USER", user.name.as_str().into()),
            ("LOGNAME", user.name.as_str().into()),
            ("SHELL", user.shell.to_string_lossy()),
            ("PWD", cwd.to_string_lossy()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.into_owned()))
        .collect();
        if let Stdio::Terminal(_) = self.stdio {
            environment.insert("TERM".to_owned(), DEFAULT_TERM.to_owned());
        }
        environment.extend(sandbox);
        let own = self
            .config
            .envs
            .iter()
            .map(|(name, value)| (name.clone(), value.clone()));
        environment.extend(own);
        environment
    }
}

/// Both ends of a program's files.
struct Files {
    /// The program's standard input, output and error.
    child: [OwnedFd; 3],
    stdin: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
    outputs: Vec<(Source, OwnedFd)>,
}

impl Files {
    fn open(launch: &Launch<'_>, user: &User) -> Result<Self, Error> {
        let fail = |what| {
            move |error: rustix::io::Errno| Error::Stdio {
                what,
                cmd: launch.config.cmd.clone(),
                source: error.into(),
            }
        };
        match launch.stdio {
            Stdio::Pipes { stdin } => {
                let (input, stdin) = if stdin {
                    let (read, write) = pipe().map_err(fail("a pipe"))?;
                    (read, Some(nonblocking(write).map_err(fail("a pipe"))?))
                } else {
                    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                    let null = rustix::fs::open("/dev/null", flags, Mode::empty());
                    (null.map_err(fail("an empty input"))?, None)
                };
                let (stdout, output) = pipe().map_err(fail("a pipe"))?;
                let (stderr, error) = pipe().map_err(fail("a pipe"))?;
                let stdout = nonblocking(stdout).map_err(fail("a pipe"))?;
                let stderr = nonblocking(stderr).map_err(fail("a pipe"))?;
                Ok(Self {
                    child: [input, output, error],
                    stdin,
                    terminal: None,
                    outputs: vec![(Source::Stdout, stdout), (Source::Stderr, stderr)],
                })
            }
            Stdio::Terminal(size) => {
                let (ours, theirs) = terminal(size, user.uid).map_err(fail("a terminal"))?;
                let dup = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
                let output = dup(&theirs).map_err(fail("a terminal"))?;
                let error = dup(&theirs).map_err(fail("a terminal"))?;
                let source = dup(&ours).map_err(fail("a terminal"))?;
                Ok(Self {
                    child: [theirs, output, error],
                    stdin: None,
                    terminal: Some(ours),
                    outputs: vec![(Source::Terminal, source)],
                })
            }
        }
    }
}

fn pipe() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
}

fn nonblocking(fd: OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

/// The daemon's and the program's end of a new terminal, which belongs to the user.
fn terminal(size: Winsize, uid: u32) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    rustix::termios::tcsetwinsize(&theirs, size)?;
    rustix::fs::fchown(&theirs, Some(rustix::fs::Uid::from_raw(uid)), None)?;
    Ok((nonblocking(ours)?, theirs))
}

/// The program, or the shell that an image has which has no bash. E2B's clients run every command by
/// `/bin/bash -l -c`, and ask for `/bin/bash -i -l` in a terminal; both mean a shell.
fn shell_of(cmd: &str) -> &str {
    const BASH: &str = "/bin/bash";
    const SH: &str = "/bin/sh";
    let is_there = |path| Path::new(path).exists();
    if cmd == BASH && !is_there(BASH) && is_there(SH) {
        return SH;
    }
    cmd
}

/// Where the program may be: at its path if it is one, else in each directory of `search`.
fn candidates(cmd: &str, search: &str) -> Result<Vec<CString>, Error> {
    if cmd.is_empty() {
        return Err(Error::Missing("command"));
    }
    if cmd.contains('/') {
        return Ok(vec![c_string("command", cmd)?]);
    }
    search
        .split(':')
        // An empty entry would mean the working directory, which nobody who writes one means.
        .filter(|dir| !dir.is_empty())
        .map(|dir| c_string("command", &format!("{dir}/{cmd}")))
        .collect()
}

fn variable(name: &str, value: &str) -> Result<CString, Error> {
    let what = "environment variable";
    if name.is_empty() || name.contains('=') {
        return Err(Error::BadText {
            what,
            text: name.to_owned(),
        });
    }
    c_string(what, &format!("{name}={value}"))
}

fn c_string(what: &'static str, text: &str) -> Result<CString, Error> {
    CString::new(std::ffi::OsStr::new(text).as_bytes()).map_err(|_| Error::BadText {
        what,
        text: text.to_owned(),
    })
}
