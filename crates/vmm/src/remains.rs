//! Everything that exists on the host for one VM, and its removal.

use std::{io, path::PathBuf, time::Duration};

use cubicle_ids::SandboxId;

use crate::{
    cgroup,
    error::{Error, Result},
    process::Process,
};

/// A process that was sent SIGKILL is gone in milliseconds, unless it is stuck in a device driver.
const DEATH: Duration = Duration::from_secs(10);

/// Process, cgroup and run directory of a VM.
///
/// Dropping this does nothing: the VM lives on. See [`Launching`] for one that is not wanted yet.
#[derive(Debug, Clone)]
pub(crate) struct Remains {
    pub(crate) id: SandboxId,
    /// `None`: known to be gone.
    pub(crate) process: Option<Process>,
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) run_dir: Option<PathBuf>,
}

impl Remains {
    /// Kills the process, waits until it is gone, and removes the rest. What is gone already is
    /// no error.
    pub(crate) async fn remove(&self) -> Result<()> {
        if let Some(process) = &self.process {
            process
                .kill()
                .map_err(Error::host("send SIGKILL", &self.id))?;
            tokio::time::timeout(DEATH, process.exited())
                .await
                .map_err(|_| Error::Timeout {
                    id: self.id.clone(),
                    attempt: "die from SIGKILL",
                    after: DEATH,
                })?;
        }
        cgroup::remove(&self.cgroups).await?;
        let Some(run_dir) = &self.run_dir else {
            return Ok(());
        };
        match tokio::fs::remove_dir_all(run_dir).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", run_dir)(error))
            }
            _ => Ok(()),
        }
    }
}

/// A VM on its way: removed again unless it arrives.
#[derive(Debug)]
pub(crate) struct Launching(Option<Remains>);

impl Launching {
    pub(crate) fn new(id: SandboxId) -> Self {
        Self(Some(Remains {
            id,
            process: None,
            cgroups: Vec::new(),
            run_dir: None,
        }))
    }

    pub(crate) fn add_run_dir(&mut self, run_dir: PathBuf) {
        if let Some(remains) = &mut self.0 {
            remains.run_dir = Some(run_dir);
        }
    }

    pub(crate) fn add_process(&mut self, process: Process) {
        if let Some(remains) = &mut self.0 {
            remains.process = Some(process);
        }
    }

    pub(crate) fn add_cgroups(&mut self, cgroups: Vec<PathBuf>) {
        if let Some(remains) = &mut self.0 {
            remains.cgroups = cgroups;
        }
    }

    /// It arrived, and is no longer removed.
    pub(crate) fn arrived(mut self) {
        self.0 = None;
    }

    /// Removes it now and says how that went.
    pub(crate) async fn abandon(mut self) -> Result<()> {
        match self.0.take() {
            Some(remains) => remains.remove().await,
            None => Ok(()),
        }
    }
}

impl Drop for Launching {
    fn drop(&mut self) {
        let Some(remains) = self.0.take() else { return };
        // The launch was cancelled. The process is sent its signal here and now; waiting for its
        // end and removing the rest is left to the runtime, if there still is one.
        if let Some(process) = &remains.process {
            let _ = process.kill();
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = remains.remove().await {
                    tracing::warn!(%error, "a cancelled launch left something behind");
                }
            });
        }
    }
}
