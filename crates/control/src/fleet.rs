//! What control asks of the machines.
//!
//! [`Fleet`] is the whole of it: one node today, a scheduler over many later. Facts live below this
//! line, intent above it.

mod build;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
mod snapshot;

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use async_trait::async_trait;
use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::{broadcast, mpsc};

use crate::{template::Origin, volume::Mount};

pub use self::build::{
    BuildOrder, BuildStep, Command, CopyFiles, Ended, OriginFacts, Output, Program, Source,
};
pub use self::snapshot::{FreezeKind, FreezeOrder, SnapshotFact, SnapshotKind, SnapshotTaken};

/// The machines that run VMs.
#[async_trait]
pub trait Fleet: Send + Sync + 'static {
    /// Restores a snapshot as a new sandbox; returns once its guest has answered.
    async fn create(&self, order: CreateOrder) -> Result<Created, FleetError>;
    /// Ends a sandbox and releases everything of it. Returns false if there was none. Must be safe
    /// to call at any time, also while the sandbox is being created.
    async fn kill(&self, id: &SandboxId) -> Result<bool, FleetError>;
    /// The sandboxes that exist.
    async fn sandboxes(&self) -> Result<Vec<Fact>, FleetError>;
    /// The life a sandbox is in, or `None` if there is no VM of it.
    fn generation(&self, id: &SandboxId) -> Option<u64>;
    /// CPU time that a sandbox's VM has used since it was started, or `None` if there is none. Costs
    /// next to nothing, unlike [`usage`](Self::usage), and does not wake the guest.
    fn cpu_time(&self, id: &SandboxId) -> Option<Duration>;
    /// What a sandbox uses right now, as its guest sees it.
    async fn usage(&self, id: &SandboxId) -> Result<Usage, FleetError>;
    /// What a sandbox takes of its host right now.
    async fn host_usage(&self, id: &SandboxId) -> Result<HostUsage, FleetError>;
    /// How long the image that an order is built from takes to boot, until its guest answers.
    /// Boots it once and keeps nothing.
    async fn measure_boot(&self, order: BuildOrder) -> Result<Duration, FleetError>;
    /// Looks at what a template is to begin with, and fetches what that takes. Never asked about
    /// templates.
    async fn origin(
        &self,
        origin: &Origin,
        progress: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<OriginFacts, FleetError>;
    /// Cold boots an image, waits until its guest answers, and publishes it as `order.snapshot`.
    async fn build(
        &self,
        order: BuildOrder,
        progress: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<(), FleetError>;
    /// Runs a program in a sandbox until it ends. When the caller goes away, it runs on.
    async fn run(
        &self,
        id: &SandboxId,
        program: Program,
        output: mpsc::UnboundedSender<Output>,
    ) -> Result<Ended, FleetError>;
    /// Puts files into a sandbox.
    async fn copy_files(&self, id: &SandboxId, files: CopyFiles) -> Result<(), FleetError>;
    /// Whether something listens on a port of a sandbox's localhost; with a path, whether that is
    /// answered with a status below 400.
    async fn probe(
        &self,
        id: &SandboxId,
        port: u16,
        path: Option<&str>,
    ) -> Result<bool, FleetError>;
    /// Deletes a snapshot. Sandboxes made from it run on. False: there was none.
    async fn delete_snapshot(&self, id: &SnapshotId) -> Result<bool, FleetError>;
    /// Freezes a running sandbox and publishes it as `order.snapshot`; the sandbox runs on.
    async fn snapshot(&self, _order: FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        Err(FleetError::unsupported("a snapshot of a sandbox"))
    }
    /// The same, and its VM is gone afterwards. If it fails the sandbox runs on.
    async fn pause(&self, _order: FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        Err(FleetError::unsupported("pausing a sandbox"))
    }
    /// Restores a paused sandbox's snapshot under its own id, in a life after `last_generation`.
    /// If it fails there is no VM and the snapshot is untouched.
    async fn resume(
        &self,
        _order: CreateOrder,
        _last_generation: u64,
    ) -> Result<Created, FleetError> {
        Err(FleetError::unsupported("resuming a sandbox"))
    }
    /// Restores `order.snapshot` beside the running VM of `order.id`, switches over once it
    /// answered, and drops the old one. On any error the old VM runs on.
    async fn rollback(&self, _order: CreateOrder) -> Result<Created, FleetError> {
        Err(FleetError::unsupported("rolling a sandbox back"))
    }
    /// Replaces what a running sandbox may reach, at once and for connections that exist, too. If
    /// it fails, what held before holds.
    async fn set_network(
        &self,
        _id: &SandboxId,
        _network: &NetworkOptions,
    ) -> Result<(), FleetError> {
        Err(FleetError::unsupported("changing a sandbox's network"))
    }
    /// Every snapshot that the store has.
    async fn snapshots(&self) -> Result<Vec<SnapshotFact>, FleetError> {
        Err(FleetError::unsupported(
            "listing the snapshots of the store",
        ))
    }
    /// Reads a snapshot and compares it with its checksums. [`FleetError::Damaged`] if they differ.
    async fn verify_snapshot(&self, _id: &SnapshotId) -> Result<(), FleetError> {
        Err(FleetError::unsupported("verifying a snapshot"))
    }
    /// What happens without being asked for, from now on.
    fn events(&self) -> broadcast::Receiver<FleetEvent>;
    /// The machines and how full they are.
    async fn machines(&self) -> Result<Vec<Machine>, FleetError>;
}

/// A shared fleet.
pub type SharedFleet = Arc<dyn Fleet>;

/// Why the machines refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FleetError {
    /// There is no VM of this sandbox.
    #[error("sandbox {id} has no VM")]
    NoSandbox {
        /// The sandbox.
        id: SandboxId,
    },
    /// The snapshot to restore does not exist.
    #[error("snapshot {id} does not exist on the node")]
    NoSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
    /// No machine has room for one more sandbox.
    #[error("no room for another sandbox: {why}")]
    Capacity {
        /// What ran out.
        why: String,
    },
    /// The machine is doing something else with this sandbox.
    #[error("sandbox {id} is busy with another operation")]
    Busy {
        /// The sandbox.
        id: SandboxId,
    },
    /// The guest does not answer, and the caller wants nothing to happen then.
    #[error("the guest of sandbox {id} does not answer")]
    Unresponsive {
        /// The sandbox.
        id: SandboxId,
    },
    /// The snapshot's files are not what was published.
    #[error("snapshot {id} is damaged: {reason}")]
    Damaged {
        /// The snapshot.
        id: SnapshotId,
        /// What is wrong with it.
        reason: String,
    },
    /// The machines cannot do this at all.
    #[error("{what} is not supported by this server")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// It did not work this time.
    #[error("cannot {doing}: {why}")]
    Failed {
        /// What was attempted, with the id.
        doing: String,
        /// Why it failed, with all causes.
        why: String,
    },
}

impl FleetError {
    fn unsupported(what: &str) -> Self {
        Self::Unsupported {
            what: what.to_owned(),
        }
    }
}

/// A sandbox to restore: a new one, or one that exists already in another life.
#[derive(Debug, Clone)]
pub struct CreateOrder {
    /// Its id, chosen by the caller.
    pub id: SandboxId,
    /// What to restore.
    pub snapshot: SnapshotId,
    /// The template it counts as, for the guest's environment.
    pub template: TemplateId,
    /// Environment of every process that is started in it.
    pub env_vars: Vec<(String, String)>,
    /// User of programs that are started without one. `None`: the machine's own choice.
    pub user: Option<String>,
    /// Working directory of programs that are started without one. `None`: the user's home.
    pub workdir: Option<String>,
    /// Name servers. Empty: the machine's own choice.
    pub dns: Vec<Ipv4Addr>,
    /// What clients of its guest daemon must present.
    pub envd_token: String,
    /// What it may reach.
    pub network: NetworkOptions,
    /// Nobody will want another like it: nothing is to be made ready for that.
    pub transient: bool,
    /// What it has mounted: this and nothing else, whatever the snapshot had.
    pub mounts: Vec<Mount>,
}

/// A sandbox that answers.
#[derive(Debug, Clone)]
pub struct Created {
    /// The life it is in.
    pub generation: u64,
    /// How long each step took, in order.
    pub phases: Vec<Phase>,
}

/// One step of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phase {
    /// A word: letters, digits and `_`.
    pub name: &'static str,
    /// How long it took.
    pub took: Duration,
}

/// A sandbox that exists on a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// The sandbox.
    pub id: SandboxId,
    /// The life it is in.
    pub generation: u64,
}

/// Something that nobody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FleetEvent {
    /// A VM ended by itself.
    Exited {
        /// Its sandbox.
        id: SandboxId,
        /// The life that ended.
        generation: u64,
    },
}

/// What a sandbox uses. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// CPUs it has.
    pub cpu_count: u32,
    /// How busy they are, 100 = one of them fully.
    pub cpu_used_pct: f64,
    /// Memory that its processes use.
    pub mem_used: u64,
    /// Memory it has.
    pub mem_total: u64,
    /// Memory that holds its page cache.
    pub mem_cache: u64,
    /// Used part of its root file system.
    pub disk_used: u64,
    /// Size of its root file system.
    pub disk_total: u64,
}

/// What a sandbox takes of its host. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostUsage {
    /// CPU time of its VM's process since it was started, in microseconds.
    pub cpu_time_us: u64,
    /// Memory that only its VM has: what killing it frees.
    pub private_bytes: u64,
    /// Memory that its VM has mapped, shared with others or not.
    pub resident_bytes: u64,
}

/// How grave a line of a log is. Ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// For who looks closely.
    Debug,
    /// What happened.
    Info,
    /// What may become a problem.
    Warn,
    /// What is one.
    Error,
}

impl Level {
    /// The word on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Debug, Self::Info, Self::Warn, Self::Error]
            .into_iter()
            .find(|level| level.as_str() == word)
    }
}

/// What a sandbox may reach and who may reach it. As stored; an absent value is the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkOptions {
    /// `Some(false)`: nothing outside but what [`Self::allow_out`] lists.
    pub allow_internet: Option<bool>,
    /// Destinations that are allowed whatever else is said.
    pub allow_out: Vec<Ipv4Net>,
    /// Destinations that are refused.
    pub deny_out: Vec<Ipv4Net>,
    /// `Some(false)`: requests to its ports need its traffic token.
    pub allow_public_traffic: Option<bool>,
    /// What its servers are told as `Host`; `${PORT}` stands for the port.
    pub mask_request_host: Option<String>,
}

/// One machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name.
    pub id: String,
    /// Its address for people.
    pub address: Ipv4Addr,
    /// CPUs it has, in thousandths.
    pub cpu_milli: u64,
    /// CPUs promised to sandboxes, in thousandths.
    pub cpu_milli_used: u64,
    /// Memory it has.
    pub memory_mib: u64,
    /// Memory promised to sandboxes.
    pub memory_mib_used: u64,
    /// Sandboxes it has room for.
    pub slots: u32,
    /// Sandboxes on it.
    pub slots_used: u32,
    /// Network slots that wait ready-made.
    pub slots_ready: u32,
    /// VMs that were restored before anybody asked for them.
    pub spares: u32,
    /// VMs of sandboxes that were paused a moment ago, kept for their resume.
    pub spares_asleep: u32,
    /// Memory that both take, in bytes.
    pub spares_bytes: u64,
    /// The hypervisor and its accelerator, for people.
    pub hypervisor: String,
    /// Model of its processor.
    pub cpu_model: String,
    /// Release of its kernel.
    pub kernel: String,
    /// When it last reported.
    pub heartbeat: OffsetDateTime,
}
