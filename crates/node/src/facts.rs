//! What a node is asked for and what it tells.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use cubicle_cow::{Manifest, SnapshotKind};
use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use cubicle_protocol::guest_api::Mount;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::freeze::FreezeTimings;

/// A sandbox to be made.
#[derive(Debug, Clone)]
pub struct CreateSandbox {
    /// Its id, chosen by the caller; it may not have been used on this node by a sandbox that still
    /// exists.
    pub id: SandboxId,
    /// What it is made from.
    pub snapshot: SnapshotId,
    /// The template that it counts as, for the guest's environment.
    pub template: Option<TemplateId>,
    /// Environment of every process that is started in it.
    pub env_vars: BTreeMap<String, String>,
    /// User of programs that are started without one. `None`: the node's default.
    pub default_user: Option<String>,
    /// Working directory of programs that are started without one. `None`: the user's home.
    pub default_workdir: Option<String>,
    /// Name servers. Empty: the node's default.
    pub dns_servers: Vec<Ipv4Addr>,
    /// What requests to the guest daemon must present; none means that they need nothing.
    pub access_token: Option<String>,
    /// What it may reach. `None`: what the slot pool allows by default.
    pub egress: Option<cubicle_net::EgressPolicy>,
    /// Bounds on the VM's process; `None`: what its shape calls for.
    pub limits: Option<cubicle_vmm::Limits>,
    /// The generation that this sandbox had last, 0 for a new one. Its next VM has a higher one.
    pub last_generation: u64,
    /// What to boot if the snapshot holds disks only.
    pub kernel: Option<BootFiles>,
    /// Directories of this machine that it has mounted, each with its root: these and no others,
    /// whatever the snapshot had.
    pub mounts: Vec<Mount>,
}

/// What a VM without a memory image is booted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Initial file system with the guest daemon.
    pub initramfs: PathBuf,
}

impl CreateSandbox {
    /// A sandbox with a fresh id, no environment, no token and default bounds.
    #[must_use]
    pub fn new(snapshot: SnapshotId) -> Self {
        Self {
            id: SandboxId::generate(),
            snapshot,
            template: None,
            env_vars: BTreeMap::new(),
            default_user: None,
            default_workdir: None,
            dns_servers: Vec::new(),
            access_token: None,
            egress: None,
            limits: None,
            last_generation: 0,
            kernel: None,
            mounts: Vec::new(),
        }
    }
}

/// A snapshot to be taken of a running sandbox.
#[derive(Debug, Clone)]
pub struct TakeSnapshot {
    /// Its id, chosen by the caller.
    pub snapshot: SnapshotId,
    /// Why it is taken.
    pub kind: SnapshotKind,
    /// Whether memory and devices are part of it, or the disks only.
    pub memory: bool,
    /// How long the guest is given to write back what its file systems hold; `None`: it isn't asked.
    pub quiesce: Option<Duration>,
    /// Refuse to freeze a guest that does not do that in time.
    pub require_healthy: bool,
}

impl TakeSnapshot {
    /// A whole snapshot with a fresh id, of which the guest notices nothing.
    #[must_use]
    pub fn new(kind: SnapshotKind) -> Self {
        Self {
            snapshot: SnapshotId::generate(),
            kind,
            memory: true,
            quiesce: None,
            require_healthy: false,
        }
    }
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct Taken {
    /// What it says about itself.
    pub manifest: Arc<Manifest>,
    /// How long each part of it took.
    pub timings: FreezeTimings,
    /// From the request until it could be restored.
    pub total: Duration,
}

/// A sandbox that was made and has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Its first generation.
    pub generation: u64,
    /// Its size.
    pub shape: Shape,
    /// How long each part of making it took.
    pub timings: PhaseTimings,
}

/// The size of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u32,
    /// Size of the root disk, in MiB.
    pub disk_mib: u64,
}

/// How long each phase of a create took. Phases overlap, so they add up to more than `total`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PhaseTimings {
    /// Taking a network slot and setting its egress policy.
    pub slot: Duration,
    /// Cloning the snapshot's disks.
    pub volume: Duration,
    /// Taking over a spare that was waiting; zero if there was none.
    pub claim: Duration,
    /// Starting the VM's process with the snapshot loaded.
    pub launch: Duration,
    /// From then until the guest answered on its channel.
    pub channel: Duration,
    /// Telling the guest who it is.
    pub init: Duration,
    /// Journal writes that the caller had to wait for.
    pub journal: Duration,
    /// From the request until the sandbox was handed out.
    pub total: Duration,
}

impl PhaseTimings {
    /// Name and duration of each phase, in the order in which they begin; `restore` is `launch` and
    /// `channel` in one, from the start of the VM's process until its guest answered; `total` last.
    #[must_use]
    pub fn phases(&self) -> [(&'static str, Duration); 9] {
        [
            ("slot", self.slot),
            ("volume", self.volume),
            ("claim", self.claim),
            ("launch", self.launch),
            ("channel", self.channel),
            ("restore", self.launch + self.channel),
            ("init", self.init),
            ("journal", self.journal),
            ("total", self.total),
        ]
    }
}

impl fmt::Display for PhaseTimings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (name, took)) in self.phases().into_iter().enumerate() {
            let gap = if n == 0 { "" } else { " " };
            write!(f, "{gap}{name}={:.1}ms", took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

/// What came of a kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillOutcome {
    /// The sandbox was there; nothing of it is left.
    Killed,
    /// There was no such sandbox.
    NotFound,
}

/// Where a sandbox is in its life on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// It is being made.
    Creating,
    /// It runs and answers.
    Running,
    /// It is being taken apart.
    Removing,
}

/// One sandbox that is on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxFact {
    /// Its id.
    pub id: SandboxId,
    /// Where it is in its life.
    pub state: SandboxState,
    /// What it was made from.
    pub snapshot: SnapshotId,
    /// Its size.
    pub shape: Shape,
    /// When its making began.
    pub started_at: OffsetDateTime,
    /// Counts its VMs: 1 when it is made, one more with each VM that takes the place of the last.
    pub generation: u64,
}

/// Something that happened on the node without being asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEvent {
    /// A VM ended by itself: the guest powered off, or its process died. The node has removed
    /// what was left of it.
    Exited {
        /// Its sandbox.
        id: SandboxId,
        /// The generation that ended.
        generation: u64,
    },
}

/// What was found and done when the node opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdoptionReport {
    /// Sandboxes whose VM lived on and answers.
    pub adopted: Vec<SandboxId>,
    /// Sandboxes that were running when the node was last open and are gone, and why.
    pub lost: Vec<(SandboxId, String)>,
    /// Sandboxes that had not been handed out yet, or were being removed: cleaned up.
    pub unfinished: Vec<SandboxId>,
    /// Template builds that had not ended: undone. These are the snapshots that they would have
    /// become.
    pub unfinished_builds: Vec<SnapshotId>,
    /// VMs that no row of the journal named: killed.
    pub swept_vms: usize,
    /// Run directories of VMs that no sandbox owned: removed.
    pub swept_run_dirs: usize,
    /// Volumes that no sandbox owned: removed.
    pub swept_volumes: usize,
    /// Network slots that no sandbox owned: removed.
    pub swept_slots: usize,
    /// Rows of the journal that could not be read: discarded.
    pub damaged_rows: usize,
}

/// What a sandbox uses. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SandboxMetrics {
    /// When it was measured, in milliseconds since the Unix epoch.
    pub timestamp_ms: u64,
    /// Number of virtual CPUs.
    pub cpu_count: u32,
    /// How busy they are as the guest sees it; 100 is one of them fully.
    pub cpu_used_pct: f64,
    /// Memory that the guest has.
    pub mem_total: u64,
    /// Memory that its processes use.
    pub mem_used: u64,
    /// Memory that holds its page cache.
    pub mem_cache: u64,
    /// Size of its root file system.
    pub disk_total: u64,
    /// Used part of its root file system.
    pub disk_used: u64,
    /// CPU time of the VM's process since it started, in microseconds.
    pub host_cpu_time_us: u64,
    /// Memory of the host that this sandbox alone occupies: what killing it frees.
    pub host_private: u64,
    /// Memory of the host that it has mapped, shared pages included.
    pub host_resident: u64,
}

/// How full the node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// Sandboxes that are being made.
    pub creating: usize,
    /// Sandboxes that run.
    pub running: usize,
    /// Sandboxes that are being taken apart.
    pub removing: usize,
    /// Most sandboxes that may be here.
    pub max_sandboxes: usize,
    /// CPUs promised to sandboxes.
    pub cpus_promised: u64,
    /// Memory promised to sandboxes, in MiB.
    pub memory_promised_mib: u64,
    /// Most memory that may be promised, in MiB.
    pub memory_budget_mib: u64,
    /// Network slots.
    pub slots: SlotCounts,
    /// VMs that wait for sandboxes.
    pub spares: SpareCounts,
}

/// How many VMs wait for sandboxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpareCounts {
    /// Ready to be claimed.
    pub ready: usize,
    /// Most that there may be.
    pub max: usize,
    /// VMs of sandboxes that were paused a moment ago, for their resume; as many there may be besides.
    pub asleep: usize,
}

/// How many network slots there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Ready to be taken.
    pub ready: usize,
    /// Held by sandboxes.
    pub used: usize,
}
