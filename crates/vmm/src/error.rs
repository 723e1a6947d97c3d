//! What can go wrong with a VM, and what was attempted when it did.

use std::{io, path::PathBuf, time::Duration};

use cubicle_ids::SandboxId;

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be used.
    #[error("could not {attempt} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: `open`, `create`, `remove`.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host refused a call made for a VM.
    #[error("could not {attempt} for VM {id}: {source}")]
    Host {
        /// What was attempted, as a verb phrase: `send a command to QEMU`.
        attempt: &'static str,
        /// For which VM.
        id: SandboxId,
        /// Why not.
        source: io::Error,
    },
    /// The spec asks for what no VM can be.
    #[error("VM {id} cannot be started: {reason}")]
    InvalidSpec {
        /// Which VM.
        id: SandboxId,
        /// What is wrong with it.
        reason: String,
    },
    /// The QEMU program is not usable.
    #[error("cannot use {} as hypervisor: {reason}", binary.display())]
    Unusable {
        /// The program.
        binary: PathBuf,
        /// Why not, and what to do about it.
        reason: String,
    },
    /// A step of starting the VM's confined process failed.
    #[error("could not start the process of VM {id}: {step}: {source}")]
    Spawn {
        /// Which VM.
        id: SandboxId,
        /// The step.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The VM's process ended while something was asked of it.
    #[error(
        "the process of VM {id} ended while it should {attempt}{}",
        describe(log)
    )]
    Exited {
        /// Which VM.
        id: SandboxId,
        /// What it should have done, as a verb phrase.
        attempt: &'static str,
        /// Last lines that the process printed; empty if it printed nothing.
        log: String,
    },
    /// The VM's process did not answer in time.
    #[error("VM {id} did not {attempt} within {after:?}")]
    Timeout {
        /// Which VM.
        id: SandboxId,
        /// What it should have done, as a verb phrase.
        attempt: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command} for VM {id}: {reason}")]
    Refused {
        /// Which VM.
        id: SandboxId,
        /// The QMP command.
        command: &'static str,
        /// QEMU's description.
        reason: String,
    },
    /// QEMU said something that is not QMP.
    #[error("QEMU of VM {id} broke the monitor protocol: {reason}")]
    Protocol {
        /// Which VM.
        id: SandboxId,
        /// What was wrong.
        reason: String,
    },
    /// The mapping of guest memory is not where it should be.
    #[error("could not find the memory of VM {id} in process {pid}: {reason}")]
    MemoryNotFound {
        /// Which VM.
        id: SandboxId,
        /// Its process.
        pid: i32,
        /// What is missing.
        reason: String,
    },
    /// The VM is no longer there.
    #[error("VM {id} no longer runs")]
    Gone {
        /// Which VM.
        id: SandboxId,
    },
    /// A failure that a test asked the `fake` driver for.
    #[error("VM {id} was told to fail to {attempt}")]
    Injected {
        /// Which VM.
        id: SandboxId,
        /// What it was told to fail at.
        attempt: &'static str,
    },
}

fn describe(log: &str) -> String {
    let log = log.trim();
    if log.is_empty() {
        String::new()
    } else {
        format!("; it printed: {log}")
    }
}

impl Error {
    pub(crate) fn io(
        attempt: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            attempt,
            path,
            source,
        }
    }

    pub(crate) fn host(attempt: &'static str, id: &SandboxId) -> impl FnOnce(io::Error) -> Self {
        let id = id.clone();
        move |source| Self::Host {
            attempt,
            id,
            source,
        }
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
