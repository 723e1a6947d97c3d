//! What `cubicle snapshot` understands.

use std::time::Duration;

use clap::{Args, Subcommand};
use cubicle_control::snapshot::SnapshotConfig;

/// How many snapshots `cubicle up` keeps, and for how long.
#[derive(Debug, Clone, Args)]
pub(crate) struct SnapshotLimits {
    /// Most snapshots that may exist at the same time
    #[arg(long, value_name = "N", default_value_t = SnapshotConfig::MAX_COUNT)]
    max_snapshots: u64,
    /// Most of the store that all snapshots together may take, in GiB [default: what fits]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    snapshot_space: Option<u64>,
    /// Seconds after which a snapshot deletes itself that was not given a lifetime [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    snapshot_ttl: Option<u32>,
}

impl SnapshotLimits {
    pub(crate) fn config(&self) -> SnapshotConfig {
        SnapshotConfig {
            max_count: Some(self.max_snapshots),
            max_own_bytes: self.snapshot_space.map(|gib| gib << 30),
            default_ttl: self.snapshot_ttl.map(|s| Duration::from_secs(s.into())),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Freeze a running sandbox for an instant, and keep what it was
    ///
    /// Prints the snapshot's id; what it cost goes to standard error. The sandbox runs on.
    Create {
        /// The sandbox
        sandbox: String,
        /// Name to find it by; the same name again replaces what it stood for
        #[arg(long)]
        name: Option<String>,
        /// Keep the disk only: sandboxes made from it boot
        #[arg(long)]
        no_memory: bool,
        /// Refuse if the sandbox's daemon does not answer
        #[arg(long)]
        require_healthy: bool,
        /// Seconds until it deletes itself [default: what the server is set to]
        #[arg(long, value_name = "SECONDS")]
        ttl: Option<u32>,
    },
    /// List snapshots
    #[command(visible_alias = "list")]
    Ls {
        /// Only those of this sandbox
        #[arg(long, value_name = "ID")]
        sandbox: Option<String>,
        /// Those that are being taken, and those that are damaged, too
        #[arg(long, short)]
        all: bool,
    },
    /// Draw which snapshot came from which
    Tree {
        /// Only those of this sandbox, and what they came from
        #[arg(long, value_name = "ID")]
        sandbox: Option<String>,
    },
    /// Show one snapshot
    Info {
        /// Its id or name
        id: String,
    },
    /// Delete snapshots, in any order; sandboxes made from them live on
    Rm {
        /// Their ids or names
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Read snapshots back and compare them with what was written
    Verify {
        /// Their ids or names
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// Verify every snapshot that there is
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}
