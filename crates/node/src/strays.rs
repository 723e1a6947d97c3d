//! VM processes that nobody knows: started moments before a crash, so that no row of the journal
//! names them.
//!
//! A run directory is made before the process and removed after it, and its name begins with the
//! sandbox's id; the id is an argument of the process, as its name. Ids are random, so the two
//! together cannot mean a process of another node, and the user id rules out everything that is no
//! VM at all.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use cubicle_vmm::VM_UID_BASE;

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

/// Kills every VM process that is named after one of `sandboxes` and whose pid is not in `known`;
/// returns how many there were. Blocking.
pub(crate) fn kill_strays(sandboxes: &HashSet<String>, known: &[i32]) -> Result<usize> {
    let mut killed = 0;
    if sandboxes.is_empty() {
        return Ok(killed);
    }
    for entry in fs::read_dir("/proc").map_err(Error::io("list", "/proc"))? {
        let entry = entry.map_err(Error::io("list", "/proc"))?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if known.contains(&pid) || !is_stray(pid, sandboxes) {
            continue;
        }
        let cgroups = cgroup_dirs(pid);
        if kill(pid, sandboxes).map_err(Error::io("kill the process", entry.path()))? {
            tracing::warn!(pid, "killed a VM process that no sandbox owned");
            killed += 1;
        }
        for dir in cgroups {
            remove_empty(&dir);
        }
    }
    Ok(killed)
}

fn is_stray(pid: i32, sandboxes: &HashSet<String>) -> bool {
    let is_vm = || {
        // Not the owner of /proc/PID, which is root for a process that changed its user.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        let uid: u32 = uids.split_whitespace().next()?.parse().ok()?;
        Some(uid >= VM_UID_BASE)
    };
    let is_named = || {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
        Some(arguments.any(|argument| {
            std::str::from_utf8(argument).is_ok_and(|argument| sandboxes.contains(argument))
        }))
    };
    is_vm() == Some(true) && is_named() == Some(true)
}

/// `false`: it was gone already.
fn kill(pid: i32, sandboxes: &HashSet<String>) -> io::Result<bool> {
    let Some(raw) = Pid::from_raw(pid) else {
        return Ok(false);
    };
    let process = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    // The descriptor is of whoever has the pid now; only then is it worth a second look.
    if !is_stray(pid, sandboxes) {
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
        os::unix::process::CommandExt as _,
        process::{Child, Command, Stdio},
    };

    use cubicle_ids::SandboxId;

    use super::*;

    /// A process of that user and name, without children, which could be taken for it while they
    /// start.
    fn waiting(uid: u32, name: &str) -> Child {
        let mut command = Command::new("sh");
        command
            .args(["-c", "read _", name])
            .stdin(Stdio::piped())
            .uid(uid);
        command.spawn().unwrap()
    }

    #[test]
    fn only_a_vms_process_with_the_right_name_that_is_unknown_is_killed() {
        assert!(
            rustix::process::getuid().is_root(),
            "giving a process another user needs root"
        );
        let ids = [SandboxId::generate(), SandboxId::generate()].map(|id| id.to_string());
        let sandboxes = HashSet::from(ids.clone());
        let mut stray = waiting(VM_UID_BASE + 7, &ids[0]);
        let known = waiting(VM_UID_BASE + 8, &ids[1]);
        let other = waiting(VM_UID_BASE + 9, SandboxId::generate().as_str());
        let person = waiting(65_534, &ids[0]);
        let pid = |child: &Child| i32::try_from(child.id()).unwrap();
        // They have not changed their user or become the shell yet.
        while !(is_stray(pid(&stray), &sandboxes) && is_stray(pid(&known), &sandboxes)) {
            std::thread::sleep(Duration::from_millis(1));
        }

        assert_eq!(kill_strays(&sandboxes, &[pid(&known)]).unwrap(), 1);
        assert!(!stray.wait().unwrap().success());
        assert_eq!(kill_strays(&sandboxes, &[pid(&known)]).unwrap(), 0);
        for mut child in [known, other, person] {
            assert!(child.try_wait().unwrap().is_none(), "still runs");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
