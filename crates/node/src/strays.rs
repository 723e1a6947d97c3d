//! VM processes that nobody knows: started moments before a crash, so that no row of the journal
//! names them.
//!
//! A VM's process writes its output to a file in its run directory, so its standard output tells
//! whose it is. That holds for any driver, needs no file of pids, and cannot mistake a process of
//! another node on the same machine for one of ours.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::error::{Error, Result};

/// How long a killed process may take to be gone.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Name of the directory that the drivers put control groups into.
const CGROUP_PARENT: &str = "cubicle";

/// Kills every process whose standard output lies below `vms` and whose pid is not in `known`;
/// returns how many there were. Blocking.
pub(crate) fn kill_strays(vms: &Path, known: &[i32]) -> Result<usize> {
    let mut killed = 0;
    for entry in fs::read_dir("/proc").map_err(Error::io("list", "/proc"))? {
        let entry = entry.map_err(Error::io("list", "/proc"))?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if known.contains(&pid) || !is_ours(pid, vms) {
            continue;
        }
        let cgroups = cgroup_dirs(pid);
        if kill(pid, vms).map_err(Error::io("kill the process", entry.path()))? {
            tracing::warn!(pid, "killed a VM process that no sandbox owned");
            killed += 1;
        }
        for dir in cgroups {
            remove_empty(&dir);
        }
    }
    Ok(killed)
}

fn is_ours(pid: i32, vms: &Path) -> bool {
    [1, 2].into_iter().any(|fd| {
        fs::read_link(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|file| file.starts_with(vms))
    })
}

/// `false`: it was gone already.
fn kill(pid: i32, vms: &Path) -> io::Result<bool> {
    let Some(raw) = Pid::from_raw(pid) else {
        return Ok(false);
    };
    let process = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    // The descriptor is of whoever has the pid now; only then is it worth a second look.
    if !is_ours(pid, vms) {
        return Ok(false);
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) => {}
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    }
    let mut ends = [PollFd::new(&process, PollFlags::IN)];
    if poll(&mut ends, Some(&PATIENCE))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(true)
}

/// The control groups that hold only VMs and that this process is in.
fn cgroup_dirs(pid: i32) -> Vec<PathBuf> {
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let (mounts, memberships) = (
        read("/proc/mounts".into()),
        read(format!("/proc/{pid}/cgroup")),
    );
    let mut dirs = Vec::new();
    for group in memberships
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
    {
        let group = Path::new(group.trim_start_matches('/'));
        if group
            .parent()
            .and_then(Path::file_name)
            .is_none_or(|name| name != CGROUP_PARENT)
        {
            continue;
        }
        for mount in mounts.lines() {
            let mut fields = mount.split(' ').skip(1);
            if let (Some(at), Some("cgroup" | "cgroup2")) = (fields.next(), fields.next()) {
                dirs.push(Path::new(at).join(group));
            }
        }
    }
    dirs
}

/// The kernel lets go of a group a moment after its last process has become a zombie.
fn remove_empty(dir: &Path) {
    for _ in 0..50 {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(2));
            }
            _ => return,
        }
    }
    tracing::warn!(dir = %dir.display(), "a control group stays busy");
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn only_a_process_that_writes_into_the_directory_and_is_unknown_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let start = |name: &str| {
            let log = dir.path().join(name);
            fs::create_dir_all(log.parent().unwrap()).unwrap();
            let log = File::create(log).unwrap();
            Command::new("sleep")
                .arg("60")
                .stdout(log)
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut stray = start("vms/a/log");
        let mut known = start("vms/b/log");
        let mut other = start("vms2/log");
        let pid = |child: &std::process::Child| i32::try_from(child.id()).unwrap();

        assert_eq!(
            kill_strays(&dir.path().join("vms"), &[pid(&known)]).unwrap(),
            1
        );
        assert!(!stray.wait().unwrap().success());
        for child in [&mut known, &mut other] {
            assert!(child.try_wait().unwrap().is_none(), "still runs");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(kill_strays(&dir.path().join("vms"), &[]).unwrap(), 0);
    }
}
