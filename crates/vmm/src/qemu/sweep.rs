//! Finds VMs that nobody knows of any more.
//!
//! A crash between the start of a process and the record of it would leave a VM running for ever.
//! So every VM process carries the path of its run directory in its environment: it is there from
//! the process's first instant and needs no file that could be lost.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use cubicle_ids::SandboxId;

use super::blocking;
use crate::{
    cgroup,
    error::{Error, Result},
    process::{self, Process},
    remains::Remains,
    spec::VmRecord,
};

/// Environment variable of VM processes: their run directory.
pub(super) const RUN_DIR_VARIABLE: &str = "CUBICLE_VM_RUN_DIR";

/// A VM process that was found.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    pid: i32,
    start_time: u64,
    run_dir: PathBuf,
    /// What it was started with as its name.
    id: Option<SandboxId>,
}

/// See [`Hypervisor::sweep`](crate::Hypervisor::sweep).
pub(super) async fn sweep(run_root: &Path, keep: &[VmRecord]) -> Result<Vec<SandboxId>> {
    let failed = |attempt| Error::io(attempt, run_root);
    let found = blocking(find).await;
    let found = found
        .unwrap_or_else(|reason| Err(io::Error::other(reason)))
        .map_err(failed("look for VM processes below"))?;
    let mut killed = Vec::new();
    for Found {
        pid,
        start_time,
        run_dir,
        id,
    } in found
    {
        let wanted = keep
            .iter()
            .any(|record| record.pid == pid && record.start_time == start_time);
        let Some(id) = id else { continue };
        if wanted || run_dir.parent() != Some(run_root) {
            continue;
        }
        let process =
            Process::find(pid, start_time).map_err(Error::host("look for its process", &id))?;
        let cgroups = cgroup::paths_of(id.as_str());
        let run_dir = Some(run_dir);
        Remains {
            id: id.clone(),
            process,
            cgroups,
            run_dir,
        }
        .remove()
        .await?;
        killed.push(id);
    }
    // What is left now belongs to a VM that is kept, or to none.
    let mut entries = match tokio::fs::read_dir(run_root).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(killed),
        entries => entries.map_err(failed("list"))?,
    };
    while let Some(entry) = entries.next_entry().await.map_err(failed("list"))? {
        let path = entry.path();
        if keep.iter().all(|record| record.run_dir != path) && path.is_dir() {
            tokio::fs::remove_dir_all(&path)
                .await
                .map_err(Error::io("remove", &path))?;
        }
    }
    Ok(killed)
}

/// All VM processes of this host.
fn find() -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        let Ok(environment) = fs::read(entry.path().join("environ")) else {
            continue;
        };
        let Some(run_dir) = run_dir_in(&environment) else {
            continue;
        };
        let Some(start_time) = process::start_time(pid)? else {
            continue;
        };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        found.push(Found {
            pid,
            start_time,
            run_dir,
            id: name_in(&arguments),
        });
    }
    Ok(found)
}

fn run_dir_in(environment: &[u8]) -> Option<PathBuf> {
    let value = |variable: &[u8]| {
        let value = variable
            .strip_prefix(RUN_DIR_VARIABLE.as_bytes())?
            .strip_prefix(b"=")?;
        Some(PathBuf::from(OsStr::from_bytes(value)))
    };
    environment.split(|byte| *byte == 0).find_map(value)
}

fn name_in(arguments: &[u8]) -> Option<SandboxId> {
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.find(|argument| *argument == b"-name")?;
    std::str::from_utf8(arguments.next()?).ok()?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_process_tells_its_directory_and_name() {
        let environment = b"LC_ALL=C\0CUBICLE_VM_RUN_DIR=/run/cubicle/vm/i0\0";
        assert_eq!(
            run_dir_in(environment),
            Some(PathBuf::from("/run/cubicle/vm/i0"))
        );
        assert_eq!(run_dir_in(b"CUBICLE_VM_RUN_DIRS=/x\0"), None);
        let id = name_in(b"/usr/bin/qemu\0-name\0i0abc\0-display\0none\0");
        assert_eq!(id, Some("i0abc".parse().unwrap()));
        assert_eq!(name_in(b"/usr/bin/qemu\0-name\0../x\0"), None);
        assert_eq!(name_in(b"sh\0-name"), None);
    }
}
