use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use rustix::{
    process::{Pid, Signal},
    termios::Winsize,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Mutex,
};

use super::{
    Error,
    output::{Output, Subscriber},
};
use crate::{fds, proto::process::ProcessConfig};

/// One process that was started here, while it runs and for a while after.
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    pub(super) output: Arc<Output>,
    input: Input,
}

/// What can be written to. One writer at a time, so that two pieces never mix.
enum Input {
    /// `None`: closed, or never open.
    Stdin(Mutex<Option<AsyncFd<OwnedFd>>>),
    Terminal(Mutex<AsyncFd<OwnedFd>>),
}

impl Process {
    /// Registers the daemon's ends of the input with the runtime.
    pub(super) fn new(
        pid: u32,
        config: ProcessConfig,
        tag: Option<String>,
        stdin: Option<OwnedFd>,
        terminal: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let writable = |fd| fds::watch(fd, Interest::WRITABLE);
        let input = match terminal {
            Some(terminal) => Input::Terminal(Mutex::new(writable(terminal)?)),
            None => Input::Stdin(Mutex::new(stdin.map(writable).transpose()?)),
        };
        Ok(Self {
            pid,
            config,
            tag,
            output: Arc::default(),
            input,
        })
    }

    pub(super) fn is_running(&self) -> bool {
        self.output.end().is_none()
    }

    pub(super) fn subscribe(&self) -> Subscriber {
        self.output.subscribe()
    }

    /// Writes all of `bytes` to standard input; waits while the process doesn't read.
    pub(super) async fn write_stdin(&self, bytes: &[u8]) -> Result<(), Error> {
        let Input::Stdin(stdin) = &self.input else {
            return Err(Error::NoStdin(self.pid));
        };
        let stdin = stdin.lock().await;
        let stdin = stdin.as_ref().ok_or(Error::NoStdin(self.pid))?;
        self.write(stdin, bytes).await
    }

    /// Types `bytes` into the terminal.
    pub(super) async fn write_terminal(&self, bytes: &[u8]) -> Result<(), Error> {
        let Input::Terminal(terminal) = &self.input else {
            return Err(Error::NoTerminal(self.pid));
        };
        self.write(&*terminal.lock().await, bytes).await
    }

    async fn write(&self, fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let written = fd
                .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
                .await
                .map_err(self.failed("write to"))?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Lets the process read the end of its standard input. Closing twice is no error.
    pub(super) async fn close_stdin(&self) -> Result<(), Error> {
        match &self.input {
            Input::Stdin(stdin) => {
                stdin.lock().await.take();
                Ok(())
            }
            Input::Terminal(_) => Err(Error::IsTerminal(self.pid)),
        }
    }

    pub(super) async fn resize(&self, size: Winsize) -> Result<(), Error> {
        let Input::Terminal(terminal) = &self.input else {
            return Err(Error::NoTerminal(self.pid));
        };
        rustix::termios::tcsetwinsize(terminal.lock().await.as_fd(), size)
            .map_err(|error| self.failed("resize the terminal of")(error.into()))
    }

    /// Signals the process and whatever it started that didn't leave its process group.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), Error> {
        // The supervisor collects a process and marks its end without a break between the two, so
        // that the pid of one that is running here can be nobody else's.
        if !self.is_running() {
            return Err(Error::NoPid(self.pid));
        }
        let group = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let group = group.ok_or(Error::NoPid(self.pid))?;
        rustix::process::kill_process_group(group, signal)
            .map_err(|error| self.failed("signal")(error.into()))
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> Error {
        let pid = self.pid;
        move |source| Error::Act { what, pid, source }
    }
}
