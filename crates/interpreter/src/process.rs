//! A kernel's process: started in a group of its own, killed with that group, collected.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{io::AsyncReadExt as _, net::unix::pipe, process::Command, sync::watch};

/// How much of what a kernel prints past its channels is kept, in bytes, to say why it ended.
const TAIL: usize = 4096;

/// A running kernel's process. Dropping it kills it, and what it started in its group.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    ended: watch::Receiver<Option<String>>,
    tail: Arc<Mutex<VecDeque<u8>>>,
    record: PathBuf,
}

impl Process {
    /// Starts a program, and writes down at `record` that it was started.
    pub(crate) fn start(
        program: &Path,
        arguments: &[String],
        environment: &BTreeMap<String, String>,
        cwd: &Path,
        record: PathBuf,
    ) -> io::Result<Self> {
        let (output, input) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let mut child = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(environment)
            .current_dir(cwd)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(input.try_clone()?)
            .stderr(input)
            .spawn()?;
        let gone = || io::Error::other("it has no process id");
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.and_then(Pid::from_raw).ok_or_else(gone)?;
        give_up_protection(pid);

        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (end, ended) = watch::channel(None);
        tokio::spawn(async move {
            let how = match child.wait().await {
                Ok(status) => describe(status),
                Err(error) => error.to_string(),
            };
            end.send_replace(Some(how));
        });
        let process = Self {
            pid,
            ended,
            tail: Arc::clone(&tail),
            record,
        };
        tokio::spawn(keep_tail(output, tail));
        fs::write(&process.record, identity(pid).unwrap_or_default())?;
        Ok(process)
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&self) -> Option<String> {
        self.ended.borrow().clone()
    }

    /// Waits for its end.
    pub(crate) async fn end(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(how) => how.clone().unwrap_or_default(),
            Err(_) => "it was lost".to_owned(),
        }
    }

    /// Sends a signal to it and what it started.
    pub(crate) fn signal(&self, signal: Signal) {
        // Its number is nobody else's until its end has been noticed.
        if self.ended.borrow().is_none() {
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// The last that it printed past its channels.
    pub(crate) fn said(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        match String::from_utf8_lossy(&bytes).trim() {
            "" => "it said nothing".to_owned(),
            said => said.to_owned(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _ = fs::remove_file(&self.record);
    }
}

/// Kills what an earlier life of the daemon started and could not end, and forgets it.
pub(crate) fn sweep(records: &Path) {
    for entry in fs::read_dir(records).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "pid")
            && let Ok(record) = fs::read_to_string(&path)
            && let Some(pid) = record.split(' ').next().and_then(|pid| pid.parse().ok())
            && let Some(pid) = Pid::from_raw(pid)
            && identity(pid).is_some_and(|identity| identity == record)
        {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = fs::remove_file(path);
    }
}

/// A process, told from others that have had or will have its number: by when it was started.
fn identity(pid: Pid) -> Option<String> {
    let pid = pid.as_raw_nonzero();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): field 22, of which the second ends with the last parenthesis.
    let started = stat.rsplit_once(") ")?.1.split(' ').nth(19)?;
    Some(format!("{pid} {started}"))
}

/// The daemon is the last to die when memory runs out; a kernel is not.
fn give_up_protection(pid: Pid) {
    let _ = fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero()), "0");
}

async fn keep_tail(output: OwnedFd, tail: Arc<Mutex<VecDeque<u8>>>) {
    let receiver = rustix::io::ioctl_fionbio(&output, true)
        .map_err(io::Error::from)
        .and_then(|()| pipe::Receiver::from_owned_fd(output));
    let Ok(mut receiver) = receiver else { return };
    let mut chunk = [0; 1024];
    while let Ok(read @ 1..) = receiver.read(&mut chunk).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&chunk[..read]);
        let surplus = tail.len().saturating_sub(TAIL);
        tail.drain(..surplus);
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it exited with {code}"),
        // Whoever runs out of memory is killed with this one.
        (None, Some(9)) => "it was killed by signal 9, perhaps for want of memory".to_owned(),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn start(directory: &Path, script: &str) -> Process {
        let arguments = ["-c".to_owned(), script.to_owned()];
        let record = directory.join("x.pid");
        Process::start(
            Path::new("/bin/sh"),
            &arguments,
            &BTreeMap::new(),
            directory,
            record,
        )
        .unwrap()
    }

    #[tokio::test]
    async fn its_end_and_its_last_words_are_known() {
        let directory = tempfile::tempdir().unwrap();
        let process = start(directory.path(), "pwd; echo why >&2; exit 3");
        assert_eq!(process.end().await, "it exited with 3");
        assert_eq!(process.ended().as_deref(), Some("it exited with 3"));
        let expected = format!("{}\nwhy", directory.path().display());
        while process.said() != expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(process);
        assert!(!directory.path().join("x.pid").exists());
    }

    #[tokio::test]
    async fn what_it_started_ends_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let process = start(directory.path(), "sleep 1000 & echo $! > child; wait");
        let child = directory.path().join("child");
        let child = loop {
            match fs::read_to_string(&child) {
                Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        drop(process);
        // An orphan may stay as a zombie where nobody collects it.
        let runs = || match fs::read_to_string(format!("/proc/{child}/stat")) {
            Ok(stat) => !stat.contains(") Z "),
            Err(_) => false,
        };
        while runs() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_sweep_kills_what_was_left_and_nobody_else() {
        let directory = tempfile::tempdir().unwrap();
        let process = start(directory.path(), "sleep 1000");
        let record = directory.path().join("x.pid");
        let pid = process.pid.as_raw_nonzero();
        let own = fs::read_to_string(&record).unwrap();

        fs::write(&record, format!("{pid} 1")).unwrap();
        sweep(directory.path());
        assert!(!record.exists());
        assert_eq!(process.ended(), None);

        fs::write(&record, own).unwrap();
        sweep(directory.path());
        assert!(process.end().await.contains("signal 9"));
    }
}
