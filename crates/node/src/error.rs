//! What can go wrong on a node, and what was attempted when it did.

use std::{path::PathBuf, time::Duration};

use cubicle_ids::{SandboxId, SnapshotId};

/// Everything that fails in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No sandbox on this node has that id, or it is being removed.
    #[error("there is no sandbox {id} on this node")]
    NotFound {
        /// The id that was asked for.
        id: SandboxId,
    },
    /// A sandbox with that id is here already.
    #[error("the sandbox {id} exists already")]
    Exists {
        /// The id that was to be used again.
        id: SandboxId,
    },
    /// The sandbox is there but does not run yet.
    #[error("the sandbox {id} is still being created")]
    NotReady {
        /// Which sandbox.
        id: SandboxId,
    },
    /// The sandbox was killed while it was being made, or while it was being used.
    #[error("the sandbox {id} was killed")]
    Killed {
        /// Which sandbox.
        id: SandboxId,
    },
    /// Another snapshot, pause or rollback of the sandbox is under way.
    #[error("another operation on the sandbox {id} is under way")]
    Busy {
        /// Which sandbox.
        id: SandboxId,
    },
    /// The guest does not answer, and was to be well.
    #[error("the guest of the sandbox {id} does not answer: {why}")]
    Unresponsive {
        /// Which sandbox.
        id: SandboxId,
        /// What came instead of an answer.
        why: String,
    },
    /// The snapshot holds disks only, and nobody said what to boot.
    #[error("the snapshot {snapshot} holds no memory, and there is no kernel to boot it with")]
    NoKernel {
        /// Which snapshot.
        snapshot: SnapshotId,
    },
    /// The node holds as many sandboxes as it may.
    #[error("this node already holds {limit} sandboxes, which is its limit")]
    TooManySandboxes {
        /// The limit in force.
        limit: usize,
    },
    /// The node has no memory left for a sandbox of that size.
    #[error(
        "a sandbox of {needed_mib} MiB does not fit: {used_mib} of {budget_mib} MiB are promised to others"
    )]
    OutOfMemory {
        /// What the sandbox may come to use, in MiB.
        needed_mib: u64,
        /// What the other sandboxes may come to use, in MiB.
        used_mib: u64,
        /// What all sandboxes together may use, in MiB.
        budget_mib: u64,
    },
    /// The host is short of memory now, whatever was promised.
    #[error(
        "the host has {available_mib} MiB of memory left and keeps {reserve_mib} MiB of it free"
    )]
    HostMemory {
        /// `MemAvailable`, in MiB.
        available_mib: u64,
        /// What must stay available, in MiB.
        reserve_mib: u64,
    },
    /// The snapshot is of another machine than this node can make.
    #[error("the snapshot {snapshot} is of a machine {theirs}, and this node makes {ours}")]
    WrongMachine {
        /// Which snapshot.
        snapshot: SnapshotId,
        /// The machine that it is of.
        theirs: String,
        /// The machine that VMs have here.
        ours: String,
    },
    /// Nothing in the sandbox listens on that port.
    #[error("nothing listens on port {port} in the sandbox {id}")]
    PortClosed {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: u16,
    },
    /// The guest would not open a tunnel, for another reason than a closed port.
    #[error("the sandbox {id} refused a tunnel to port {port} with status {status}")]
    Tunnel {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: u16,
        /// What it answered.
        status: http::StatusCode,
    },
    /// The guest did not answer on its channel in time.
    #[error("the sandbox {id} did not answer within {after:?}{}", describe(last))]
    Unanswered {
        /// Which sandbox.
        id: SandboxId,
        /// How long it was given.
        after: Duration,
        /// Why the last attempt failed; empty if nothing came at all.
        last: String,
    },
    /// The connection to the guest broke while a request was under way.
    #[error("the connection to the sandbox {id} broke: {source}")]
    Broken {
        /// Which sandbox.
        id: SandboxId,
        /// How.
        source: hyper::Error,
    },
    /// The handshake on the guest's channel failed.
    #[error("could not begin a connection to the sandbox {id}: {source}")]
    Handshake {
        /// Which sandbox.
        id: SandboxId,
        /// Why not.
        source: cubicle_protocol::channel::Error,
    },
    /// The guest refused to become the sandbox that it was told to be.
    #[error("the guest of the sandbox {id} refused its identity: {message}")]
    Init {
        /// Which sandbox.
        id: SandboxId,
        /// Why, shortened.
        message: String,
    },
    /// Something else was restored than was asked for.
    #[error("the VM of the sandbox {id} does not hold the memory of the snapshot {snapshot}")]
    WrongMemory {
        /// Which sandbox.
        id: SandboxId,
        /// The snapshot whose memory it should hold.
        snapshot: SnapshotId,
    },
    /// The guest answered a host's call with something that cannot be read.
    #[error("the sandbox {id} answered {call} with {reason}")]
    GuestAnswer {
        /// Which sandbox.
        id: SandboxId,
        /// The call: `GET /metrics`.
        call: &'static str,
        /// What was wrong with the answer.
        reason: String,
    },
    /// A program could not be run to its end in a sandbox.
    #[error("cannot run {program} in the sandbox {id}: {reason}")]
    Program {
        /// Which sandbox.
        id: SandboxId,
        /// What was run.
        program: String,
        /// Why that did not work.
        reason: String,
    },
    /// A sandbox lacks a program.
    #[error("there is no {program}: {reason}")]
    NoProgram {
        /// What was to be run.
        program: String,
        /// What the guest said.
        reason: String,
    },
    /// Files could not be copied into a sandbox.
    #[error("cannot copy {src} to {dest} in the sandbox {id}: {reason}")]
    Copy {
        /// Which sandbox.
        id: SandboxId,
        /// What was copied.
        src: String,
        /// Where to.
        dest: String,
        /// Why that did not work.
        reason: String,
    },
    /// A program that prepares a template failed in the guest.
    #[error("{program} failed while the template was prepared: {reason}")]
    WarmUp {
        /// What was run.
        program: String,
        /// Why it failed.
        reason: String,
    },
    /// The sandbox's end takes longer than anyone should wait; it goes on being removed.
    #[error(
        "the sandbox {id} is not gone after {after:?} and goes on being removed{}",
        describe(last)
    )]
    KillTimeout {
        /// Which sandbox.
        id: SandboxId,
        /// How long the caller waited.
        after: Duration,
        /// What failed last.
        last: String,
    },
    /// A task of the node ended by a panic; what it held was released.
    #[error("a bug ended the creation of the sandbox {id}: {message}")]
    Panic {
        /// Which sandbox.
        id: SandboxId,
        /// The panic's message.
        message: String,
    },
    /// A test made this step fail.
    #[error("told to fail at {step}")]
    Injected {
        /// The step.
        step: &'static str,
    },
    /// The node is being closed.
    #[error("the node is shutting down")]
    Closed,
    /// Another process owns this node's data.
    #[error("the node's data in {} is in use by another process", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A file or directory could not be used.
    #[error("could not {attempt} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb phrase.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The journal could not be read or written.
    #[error("could not {attempt} in the node's journal: {source}")]
    Journal {
        /// What was attempted, as a verb phrase.
        attempt: &'static str,
        /// What SQLite said.
        source: sqlx::Error,
    },
    /// The journal's schema could not be brought up to date.
    #[error("could not migrate the node's journal {}: {source}", path.display())]
    Migrate {
        /// The journal's file.
        path: PathBuf,
        /// Which migration failed and why.
        source: sqlx::migrate::MigrateError,
    },
    /// A row of the journal is not what this program writes.
    #[error("the journal's row of the sandbox {sandbox} is damaged: {reason}")]
    JournalRow {
        /// The row's sandbox, as it stands there.
        sandbox: String,
        /// What is wrong.
        reason: String,
    },
    /// A VM failed.
    #[error(transparent)]
    Vm(#[from] cubicle_vmm::Error),
    /// The store of snapshots and volumes failed.
    #[error(transparent)]
    Store(#[from] cubicle_cow::Error),
    /// An image could not be made.
    #[error(transparent)]
    Image(#[from] cubicle_image::Error),
    /// A directory that a sandbox is to have mounted cannot be used.
    #[error(transparent)]
    Share(#[from] cubicle_share::Error),
    /// The sandbox's network failed.
    #[error(transparent)]
    Network(#[from] cubicle_net::Error),
}

fn describe(last: &str) -> String {
    if last.is_empty() {
        String::new()
    } else {
        format!("; the last attempt failed: {last}")
    }
}

impl Error {
    /// Whether the reason is that this node has no room, so that the same call may succeed on
    /// another node or later.
    #[must_use]
    pub fn is_capacity(&self) -> bool {
        match self {
            Self::TooManySandboxes { .. } | Self::OutOfMemory { .. } | Self::HostMemory { .. } => {
                true
            }
            Self::Store(error) => error.is_disk_full(),
            _ => false,
        }
    }

    /// Whether the reason is that the sandbox (or snapshot) does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. }
                | Self::Killed { .. }
                | Self::Vm(cubicle_vmm::Error::Gone { .. })
                | Self::Store(cubicle_cow::Error::NotFound(_))
        )
    }

    pub(crate) fn io(
        attempt: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            attempt,
            path,
            source,
        }
    }
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
