use std::{io, path::PathBuf};

use connectrpc::{ConnectError, ErrorCode};

use crate::access;

/// Why a call about a process failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field that the call cannot do without is absent.
    #[error("the request names no {0}")]
    Missing(&'static str),
    /// A text that goes to the kernel holds a zero byte, or a variable's name an `=`.
    #[error("{what} {text:?} cannot be passed to a program")]
    BadText {
        /// `command`, `argument`, `environment variable` or `cwd`.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// The user could not be found.
    #[error(transparent)]
    Access(#[from] access::Error),
    /// The working directory isn't there.
    #[error("cwd '{}' does not exist", .0.display())]
    NoCwd(PathBuf),
    /// The working directory is a file.
    #[error("cwd '{}' is not a directory", .0.display())]
    CwdNotDirectory(PathBuf),
    /// The pipes or the terminal of the program could not be made.
    #[error("cannot make {what} for '{cmd}': {source}")]
    Stdio {
        /// `a pipe`, `a terminal` and the like.
        what: &'static str,
        /// The program.
        cmd: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program could not be started.
    #[error("cannot start '{cmd}': {step}: {source}")]
    Spawn {
        /// The program.
        cmd: String,
        /// What the new process could not do.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No process has this pid, or none that still runs.
    #[error("process with pid {0} not found")]
    NoPid(u32),
    /// No process has this tag, or none that still runs.
    #[error("process with tag '{0}' not found")]
    NoTag(String),
    /// Its standard input was never open or has been closed.
    #[error("stdin of process {0} is not open")]
    NoStdin(u32),
    /// It doesn't run in a terminal.
    #[error("process {0} has no terminal")]
    NoTerminal(u32),
    /// It runs in a terminal, which has no end.
    #[error("process {0} has a terminal: send Ctrl-D (0x04) as input instead of closing stdin")]
    IsTerminal(u32),
    /// A signal that isn't SIGTERM or SIGKILL.
    #[error("signal {0} cannot be sent")]
    BadSignal(i32),
    /// What the call wanted of a running process failed.
    #[error("cannot {what} process {pid}: {source}")]
    Act {
        /// `write to`, `signal`, `resize the terminal of`.
        what: &'static str,
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The call's time is over.
    #[error("the deadline of process {0} has passed")]
    Deadline(u32),
}

impl From<Error> for ConnectError {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Access(access::Error::ReadAccounts { .. }) => ErrorCode::Internal,
            Error::Access(_) => ErrorCode::Unauthenticated,
            Error::Missing(_)
            | Error::BadText { .. }
            | Error::NoCwd(_)
            | Error::CwdNotDirectory(_)
            | Error::BadSignal(_) => ErrorCode::InvalidArgument,
            Error::Spawn { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorCode::NotFound,
                io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock => {
                    ErrorCode::ResourceExhausted
                }
                _ => ErrorCode::InvalidArgument,
            },
            Error::Stdio { .. } => ErrorCode::ResourceExhausted,
            Error::NoPid(_) | Error::NoTag(_) => ErrorCode::NotFound,
            Error::NoStdin(_) | Error::NoTerminal(_) | Error::IsTerminal(_) => {
                ErrorCode::FailedPrecondition
            }
            Error::Act { .. } => ErrorCode::Internal,
            Error::Deadline(_) => ErrorCode::DeadlineExceeded,
        };
        Self::new(code, error.to_string())
    }
}
