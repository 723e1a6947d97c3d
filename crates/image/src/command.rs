//! Programs of the host that do part of the work, started without a shell and never left behind.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::unix::pipe,
    process::{Child, Command},
};

use crate::error::{During as _, Error, Result};

/// How many of the last lines of output an error quotes.
const TAIL_LINES: usize = 12;

/// One run of a program, as part of a purpose that an error can name.
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
    purpose: &'static str,
    known_as: &'static str,
    isolated: bool,
    clean: bool,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    directory: Option<PathBuf>,
    log: Option<PathBuf>,
}

impl Program {
    /// A run of `name`, which the Debian package `package` has, "to `purpose`".
    pub(crate) fn new(name: &'static str, package: &'static str, purpose: &'static str) -> Program {
        Program {
            name,
            package,
            purpose,
            known_as: name,
            isolated: false,
            clean: false,
            args: Vec::new(),
            env: Vec::new(),
            directory: None,
            log: None,
        }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Program {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Program {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Program {
        self.env.push((name, value.as_ref().to_owned()));
        self
    }

    pub(crate) fn directory(mut self, path: &Path) -> Program {
        self.directory = Some(path.to_owned());
        self
    }

    /// Appends all output to a file.
    pub(crate) fn log(mut self, path: &Path) -> Program {
        self.log = Some(path.to_owned());
        self
    }

    /// What an error calls the program, where what is started is only what starts it.
    pub(crate) fn known_as(mut self, name: &'static str) -> Program {
        self.known_as = name;
        self
    }

    /// Passes nothing of this process's environment on.
    pub(crate) fn clean(mut self) -> Program {
        self.clean = true;
        self
    }

    /// Gives the program a mount and a process namespace of its own: whatever it mounts or starts,
    /// daemons included, is gone when it is.
    pub(crate) fn isolated(mut self) -> Program {
        self.isolated = true;
        self
    }

    /// Runs to the end and hands each line of output, standard error included, to `on_line`.
    pub(crate) async fn run(self, mut on_line: impl FnMut(&str)) -> Result<()> {
        let mut log = match &self.log {
            Some(path) => {
                let open = fs_err::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path);
                Some(open.during("open the log of a build")?)
            }
            None => None,
        };
        let (reader, writer) = io::pipe().during("make a pipe")?;
        let second = writer.try_clone().during("duplicate a pipe")?;
        let mut group = self.spawn(Stdio::from(writer), Stdio::from(second))?;
        let reader = pipe::Receiver::from_owned_fd(reader.into()).during("read a pipe")?;

        let mut reader = BufReader::new(reader);
        let mut tail = VecDeque::with_capacity(TAIL_LINES);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .await
            .during("read a program's output")?
            > 0
        {
            if let Some(log) = &mut log {
                log.write_all(&line).during("write the log of a build")?;
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            on_line(text);
            if !text.is_empty() {
                if tail.len() == TAIL_LINES {
                    tail.pop_front();
                }
                tail.push_back(text.to_owned());
            }
            line.clear();
        }
        let status = group.wait().await.during(self.purpose)?;
        self.check(status, || tail.into_iter().collect::<Vec<_>>().join("\n"))
    }

    /// Runs to the end and returns what it wrote to standard output.
    pub(crate) async fn output(self) -> Result<String> {
        let mut group = self.spawn(Stdio::piped(), Stdio::piped())?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (stdout, stderr) = (group.child.stdout.take(), group.child.stderr.take());
        let read_out = async {
            match stdout {
                Some(mut stdout) => stdout.read_to_end(&mut out).await,
                None => Ok(0),
            }
        };
        let read_err = async {
            match stderr {
                Some(mut stderr) => stderr.read_to_end(&mut err).await,
                None => Ok(0),
            }
        };
        tokio::try_join!(read_out, read_err).during("read a program's output")?;
        let status = group.wait().await.during(self.purpose)?;
        self.check(status, || {
            String::from_utf8_lossy(&err).trim_end().to_owned()
        })?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    fn spawn(&self, stdout: Stdio, stderr: Stdio) -> Result<ProcessGroup> {
        let mut command = if self.isolated {
            let mut unshare = Command::new("unshare");
            unshare.args(["--mount", "--propagation", "private"]);
            unshare.args(["--pid", "--fork", "--kill-child=SIGKILL", "--", self.name]);
            unshare
        } else {
            Command::new(self.name)
        };
        if self.clean {
            command.env_clear();
        }
        command
            .args(&self.args)
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        match command.spawn() {
            Ok(child) => Ok(ProcessGroup {
                child,
                running: true,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.missing()),
            Err(source) => Err(Error::Io {
                action: format!("start `{}`", self.name),
                source,
            }),
        }
    }

    fn missing(&self) -> Error {
        Error::ProgramMissing {
            purpose: self.purpose,
            program: self.name,
            package: self.package,
        }
    }

    fn check(&self, status: ExitStatus, tail: impl FnOnce() -> String) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        // `unshare` says with 127 that it did not find the program; so does what it starts for one
        // that is its business alone.
        let own_name = self.known_as == self.name;
        if self.isolated && own_name && status.code() == Some(127) {
            return Err(self.missing());
        }
        Err(Error::Program {
            purpose: self.purpose,
            program: self.known_as,
            status,
            tail: tail(),
            log: self.log.clone(),
        })
    }
}

/// A child and all that it started in its process group; killed together when dropped early.
struct ProcessGroup {
    child: Child,
    running: bool,
}

impl ProcessGroup {
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        self.running = false;
        Ok(status)
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if !self.running {
            return;
        }
        // Until it has been waited for, the child's id, and so the group's, cannot be reused.
        let id = self
            .child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        if let Some(group) = id {
            kill_process_group(group, Signal::KILL).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn lines_of_both_streams_arrive_and_failure_quotes_them() {
        let mut lines = Vec::new();
        let error = Program::new("sh", "dash", "greet")
            .args(["-c", "echo one; echo two >&2; exit 3"])
            .run(|line| lines.push(line.to_owned()))
            .await
            .unwrap_err();
        assert_eq!(lines, ["one", "two"]);
        let message = error.to_string();
        assert!(
            message.starts_with("cannot greet: `sh` ended with exit status: 3"),
            "{message}"
        );
        assert!(message.ends_with("one\ntwo"), "{message}");
    }

    #[tokio::test]
    async fn a_missing_program_names_its_package() {
        let error = Program::new("no-such-program", "some-package", "try")
            .output()
            .await;
        let message = error.unwrap_err().to_string();
        assert!(
            message.contains("install the package `some-package`"),
            "{message}"
        );
    }

    #[tokio::test]
    async fn dropping_a_run_kills_grandchildren() {
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; wait", pid_file.display());
        let run = Program::new("sh", "dash", "sleep")
            .args(["-c", &script])
            .run(|_| ());
        let stopped = tokio::time::timeout(Duration::from_millis(500), run).await;
        assert!(
            stopped.is_err(),
            "the run was still going on when it was dropped"
        );
        let pid = fs_err::read_to_string(&pid_file).unwrap().trim().to_owned();
        let gone = || match fs_err::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        for _ in 0..100 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("process {pid} is still there");
    }
}
