//! A VM that runs in a QEMU process.

use std::{fs, io, os::unix::fs::OpenOptionsExt as _, path::Path, sync::OnceLock};

use async_trait::async_trait;
use cubicle_ids::SandboxId;
use serde_json::json;
use tokio::{net::UnixStream, sync::oneshot, task::JoinHandle, time::timeout};

use super::{
    CHANNEL_SOCKET, PATIENCE, blocking,
    qmp::{Command, Event, Failure, Qmp},
};
use crate::{
    ChannelStream, Vm,
    error::{Error, Result},
    maps,
    output::{self, Output},
    process::{self, Process},
    remains::Remains,
    spec::{Boot, GuestMemory, VmRecord, VmSpec, VmUsage},
};

/// Descriptor set under which QEMU is handed the file for its device state.
const SAVE_SET: u32 = 1000;

/// A running VM. Dropping it closes its connections and leaves the VM alone.
#[derive(Debug)]
pub(crate) struct QemuVm {
    record: VmRecord,
    process: Process,
    qmp: Qmp,
    memory: OnceLock<GuestMemory>,
    /// `None` for an adopted VM: what it prints went to the process that started it.
    output: Option<Output>,
    console: Option<JoinHandle<()>>,
}

impl Drop for QemuVm {
    fn drop(&mut self) {
        if let Some(console) = &self.console {
            console.abort();
        }
    }
}

impl QemuVm {
    pub(super) fn new(
        record: VmRecord,
        process: Process,
        qmp: Qmp,
        output: Option<Output>,
    ) -> Self {
        Self {
            record,
            process,
            qmp,
            memory: OnceLock::new(),
            output,
            console: None,
        }
    }

    /// Copies the console to the kernel log from now on.
    pub(super) fn keep_console(&mut self, console: UnixStream) {
        let path = VmSpec::kernel_log_path(&self.record.run_dir);
        self.console = Some(tokio::spawn(output::keep_console(console, path)));
    }

    /// Begins a conversation with a QEMU that has been running for a while.
    pub(super) async fn greet(&self, greeted: oneshot::Receiver<()>) -> Result<()> {
        let attempt = "answer on its monitor";
        let greet = async {
            greeted.await.map_err(|_| Failure::Closed)?;
            self.qmp
                .execute(&[Command::plain("qmp_capabilities")])
                .await
        };
        self.within(attempt, greet).await.map(drop)
    }

    /// What the process printed last.
    pub(crate) fn last_words(&self) -> String {
        self.output.as_ref().map(Output::tail).unwrap_or_default()
    }

    async fn execute(&self, attempt: &'static str, commands: &[Command]) -> Result<()> {
        self.within(attempt, self.qmp.execute(commands))
            .await
            .map(drop)
    }

    async fn within<T>(
        &self,
        attempt: &'static str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T> {
        let id = &self.record.id;
        match timeout(PATIENCE, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Failure::Closed)) if self.process.exit().is_some() => Err(Error::Exited {
                id: id.clone(),
                attempt,
                log: self.last_words(),
            }),
            Ok(Err(failure)) => Err(typed(failure, id, attempt)),
            Err(_) => Err(Error::Timeout {
                id: id.clone(),
                attempt,
                after: PATIENCE,
            }),
        }
    }

    fn gone(&self) -> Error {
        Error::Gone {
            id: self.record.id.clone(),
        }
    }
}

fn typed(failure: Failure, id: &SandboxId, attempt: &'static str) -> Error {
    match failure {
        Failure::Closed => Error::Exited {
            id: id.clone(),
            attempt,
            log: String::new(),
        },
        Failure::Refused { command, reason } => Error::Refused {
            id: id.clone(),
            command,
            reason,
        },
        Failure::Io(source) => Error::host("talk to QEMU", id)(source),
        Failure::Malformed(reason) => Error::Protocol {
            id: id.clone(),
            reason,
        },
    }
}

/// Waits until a process just started is loaded: a cold machine when QEMU answers at all, a
/// restored one when its device state is in and, if it is to start, its CPUs run.
pub(super) async fn until_loaded(
    id: &SandboxId,
    process: &Process,
    qmp: &Qmp,
    greeted: oneshot::Receiver<()>,
    spec: &VmSpec,
) -> Result<()> {
    let attempt = "come up";
    let loaded = async {
        let mut events = qmp.events();
        // QEMU reads these when it is ready; nothing is gained by waiting for its greeting.
        let commands = ["qmp_capabilities", "query-status", "query-migrate"].map(Command::plain);
        let answers = qmp.execute(&commands).await?;
        greeted.await.map_err(|_| Failure::Closed)?;
        let [_, status, migration] = answers.as_slice() else {
            return Err(Failure::Malformed(format!(
                "{} answers to 3 commands",
                answers.len()
            )));
        };
        if matches!(spec.boot, Boot::Cold { .. }) {
            return Ok(());
        }
        let done = if spec.start {
            status["running"] == json!(true)
        } else {
            migration["status"] == json!("completed")
        };
        if done {
            return Ok(());
        }
        // Whatever happened between the answers and now is among the events.
        loop {
            use tokio::sync::broadcast::error::RecvError;
            match events.recv().await {
                Ok(Event::Resume) if spec.start => return Ok(()),
                Ok(Event::Migration(status)) if status == "completed" && !spec.start => {
                    return Ok(());
                }
                Ok(_) => {}
                Err(RecvError::Lagged(_) | RecvError::Closed) => return Err(Failure::Closed),
            }
        }
    };
    tokio::select! {
        loaded = timeout(PATIENCE, loaded) => match loaded {
            Ok(Ok(())) => Ok(()),
            Ok(Err(failure)) => Err(typed(failure, id, attempt)),
            Err(_) => Err(Error::Timeout { id: id.clone(), attempt, after: PATIENCE }),
        },
        exit = process.exited() => {
            Err(Error::Exited { id: id.clone(), attempt, log: exit.to_string() })
        }
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn record(&self) -> VmRecord {
        self.record.clone()
    }

    async fn connect_channel(&self) -> Result<ChannelStream> {
        let socket = self.record.run_dir.join(CHANNEL_SOCKET);
        match UnixStream::connect(&socket).await {
            Ok(stream) => Ok(Box::pin(stream)),
            Err(_) if self.process.exit().is_some() => Err(self.gone()),
            // The listening socket went with the process whose end we are about to learn of.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Err(self.gone()),
            Err(error) => Err(Error::io("connect to", socket)(error)),
        }
    }

    async fn pause(&self) -> Result<()> {
        self.execute("stop", &[Command::plain("stop")]).await
    }

    async fn resume(&self) -> Result<()> {
        self.execute("run on", &[Command::plain("cont")]).await
    }

    async fn save_device_state(&self, to: &Path) -> Result<u64> {
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)
            .map_err(Error::io("create", to))?;
        let saved = async {
            let commands = [
                Command::new("add-fd", json!({ "fdset-id": SAVE_SET })),
                Command::new(
                    "xen-save-devices-state",
                    json!({ "filename": format!("/dev/fdset/{SAVE_SET}"), "live": false }),
                ),
                Command::new("remove-fd", json!({ "fdset-id": SAVE_SET })),
            ];
            let fd = std::os::fd::AsFd::as_fd(&file);
            let attempt = "save the state of its devices";
            self.within(attempt, self.qmp.execute_with_fd(&commands, Some(fd)))
                .await?;
            file.metadata()
                .map(|metadata| metadata.len())
                .map_err(Error::io("look at", to))
        };
        let saved = saved.await;
        if saved.is_err() {
            // The caller asked for a complete file or none.
            let _ = fs::remove_file(to);
        }
        saved
    }

    fn memory(&self) -> Result<GuestMemory> {
        if let Some(memory) = self.memory.get() {
            return Ok(memory.clone());
        }
        if self.process.exit().is_some() {
            return Err(self.gone());
        }
        let pid = self.record.pid;
        let memory = maps::guest_memory(pid, &self.record.memory).map_err(|reason| {
            Error::MemoryNotFound {
                id: self.record.id.clone(),
                pid,
                reason,
            }
        })?;
        Ok(self.memory.get_or_init(|| memory).clone())
    }

    fn cpu_time_us(&self) -> Result<u64> {
        let used = process::cpu_time_us(self.record.pid);
        // Read first, checked after: the pid was the VM's own if the VM runs even now.
        if self.process.exit().is_some() {
            return Err(self.gone());
        }
        used.map_err(Error::host("read what its process uses", &self.record.id))
    }

    async fn usage(&self) -> Result<VmUsage> {
        let pid = self.record.pid;
        let usage = blocking(move || {
            let (resident_bytes, private_bytes) = maps::footprint(pid)?;
            Ok(VmUsage {
                cpu_time_us: process::cpu_time_us(pid)?,
                resident_bytes,
                private_bytes,
            })
        });
        let usage: io::Result<VmUsage> = usage
            .await
            .unwrap_or_else(|reason| Err(io::Error::other(reason)));
        // Read first, checked after: the pid was the VM's own if the VM runs even now.
        if self.process.exit().is_some() {
            return Err(self.gone());
        }
        usage.map_err(Error::host("read what its process uses", &self.record.id))
    }

    async fn kill(&self) -> Result<()> {
        let remains = Remains {
            id: self.record.id.clone(),
            process: Some(self.process.clone()),
            cgroups: self.record.cgroups.clone(),
            run_dir: Some(self.record.run_dir.clone()),
        };
        remains.remove().await
    }

    async fn exited(&self) {
        self.process.exited().await;
    }
}
