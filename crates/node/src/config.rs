//! How a node is set up.

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use cubicle_cow::memory::TierChoice;

use crate::error::{Error, Result};

/// What a node needs to know before it opens.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Where the journal is kept; survives a reboot.
    pub data_dir: PathBuf,
    /// Where VMs have their sockets; a tmpfs. Its path must be short (see
    /// [`cubicle_vmm::VmSpec::MAX_RUN_DIR`]).
    pub run_dir: PathBuf,
    /// How much may be on the node at once.
    pub limits: NodeLimits,
    /// How many VMs wait for sandboxes to come; none unless it is said.
    pub spares: SparePolicy,
    /// How the memory that a VM has written is found.
    pub memory_tier: TierChoice,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// What guests are told about the outside.
    pub guest: GuestDefaults,
}

impl NodeConfig {
    /// The defaults for these directories on this machine.
    ///
    /// # Errors
    /// If the host does not tell how much memory it has.
    pub fn new(data_dir: impl Into<PathBuf>, run_dir: impl Into<PathBuf>) -> Result<Self> {
        Ok(Self {
            data_dir: data_dir.into(),
            run_dir: run_dir.into(),
            limits: NodeLimits::for_host()?,
            spares: SparePolicy::NONE,
            memory_tier: TierChoice::default(),
            deadlines: Deadlines::default(),
            guest: GuestDefaults::default(),
        })
    }
}

/// How much may be on the node at once. Reserved when a create begins, so that concurrent creates
/// cannot overrun it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeLimits {
    /// Most sandboxes, including those that are being made or removed.
    pub max_sandboxes: usize,
    /// Sum of the guest memory that sandboxes may come to use, in MiB. Guests share what they did
    /// not write, so more than the host has is reasonable.
    pub memory_budget_mib: u64,
    /// Below this much available memory on the host, in MiB, no sandbox is made.
    pub memory_reserve_mib: u64,
}

impl NodeLimits {
    /// Times the host's memory that is promised to guests: an idle sandbox writes about a tenth of
    /// its memory, and [`NodeLimits::memory_reserve_mib`] stops what goes wrong with that.
    pub const OVERCOMMIT: u64 = 4;

    /// Limits that suit this host.
    ///
    /// # Errors
    /// If `/proc/meminfo` cannot be read.
    pub fn for_host() -> Result<Self> {
        let total = meminfo_mib("MemTotal:")?;
        Ok(Self {
            max_sandboxes: 1000,
            memory_budget_mib: total * Self::OVERCOMMIT,
            memory_reserve_mib: (total / 20).clamp(256, 4096),
        })
    }
}

/// How many VMs wait, restored, for sandboxes to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparePolicy {
    /// Most spares of all snapshots together; 0 makes none. An idle one takes some 25 MB.
    pub max: usize,
    /// How long after the last create from a snapshot its last spare is kept.
    pub idle: Duration,
    /// How long a sandbox that was paused keeps its VM, stopped, for a resume that comes soon; at most
    /// [`max`](Self::max) do, each with the memory that it had written.
    pub asleep: Duration,
}

impl SparePolicy {
    /// No spares.
    pub const NONE: Self = Self {
        max: 0,
        idle: Duration::ZERO,
        asleep: Duration::ZERO,
    };

    /// Two for each of the host's CPUs: more are not made faster than they are claimed.
    #[must_use]
    pub fn for_host() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            max: 2 * cpus,
            idle: Duration::from_secs(600),
            asleep: Duration::from_secs(60),
        }
    }
}

/// How long things may take before they count as failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// From a restored VM's start until its guest has taken on its identity.
    pub answer: Duration,
    /// From a cold VM's start until its guest has taken on its identity. Software emulation on a
    /// busy machine is slow.
    pub boot: Duration,
    /// Each program that is run to prepare a template.
    pub warm_up: Duration,
    /// How long a kill waits for everything to be gone.
    pub kill: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(20),
            boot: Duration::from_secs(120),
            warm_up: Duration::from_secs(120),
            kill: Duration::from_secs(30),
        }
    }
}

/// What every guest is told unless its sandbox says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDefaults {
    /// User of requests that name none.
    pub user: String,
    /// Name servers. Empty: the guest keeps what its image says.
    pub dns_servers: Vec<Ipv4Addr>,
}

impl Default for GuestDefaults {
    fn default() -> Self {
        Self {
            user: "user".to_owned(),
            dns_servers: vec![Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(8, 8, 8, 8)],
        }
    }
}

/// A value of `/proc/meminfo`, in MiB.
pub(crate) fn meminfo_mib(name: &'static str) -> Result<u64> {
    const PATH: &str = "/proc/meminfo";
    let failed = Error::io("read", PATH);
    let text = match std::fs::read_to_string(PATH) {
        Ok(text) => text,
        Err(source) => return Err(failed(source)),
    };
    text.lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse()
                .ok()
        })
        .map(|kib: u64| kib / 1024)
        .ok_or_else(|| failed(std::io::Error::other(format!("it has no line {name}"))))
}
