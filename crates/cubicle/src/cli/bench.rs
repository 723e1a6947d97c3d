//! What `cubicle bench` understands.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Create sandboxes, run `true` in each, kill them; print how long each phase took
    Create(BenchCreate),
    /// Take snapshots of running sandboxes, and create sandboxes from them
    ///
    /// A part of the sandbox's memory is written before each, in /dev/shm: what a snapshot costs
    /// depends on how much has changed.
    Snapshot(BenchMatrix),
    /// Clone a running sandbox into as many copies as `--concurrency` says
    Clone(BenchMatrix),
    /// Roll running sandboxes back to a snapshot
    Rollback(BenchMatrix),
    /// Pause sandboxes and resume them
    Pause(BenchMatrix),
    /// Print a page in Markdown from reports of these, saved with --json
    Page {
        /// The reports, in the order of the page
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct BenchCreate {
    /// How many sandboxes to create
    #[arg(short = 'n', long, default_value_t = 30)]
    pub(crate) count: usize,
    /// How many at the same time
    #[arg(short = 'c', long, default_value_t = 1)]
    pub(crate) concurrency: usize,
    /// How many to create before, uncounted
    #[arg(long, default_value_t = 3)]
    pub(crate) warm_up: usize,
    /// Template to create them from
    #[arg(long, default_value = "base")]
    pub(crate) template: String,
}

/// Every combination of a size and a concurrency is measured.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchMatrix {
    /// How many times to measure each combination, at least
    #[arg(short = 'n', long, default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) count: u32,
    /// MB of memory that the sandbox writes before each; what does not fit is left out
    #[arg(
        long,
        value_name = "MB,...",
        value_delimiter = ',',
        default_value = "0,10,50,100,200,500"
    )]
    pub(crate) dirty: Vec<u32>,
    /// How many at the same time
    #[arg(short = 'c', long, value_name = "N,...", value_delimiter = ',', default_value = "1,5,10",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) concurrency: Vec<u32>,
    /// How many times to do it before, uncounted
    #[arg(long, default_value_t = 2)]
    pub(crate) warm_up: u32,
    /// Template of the sandboxes
    #[arg(long, default_value = "base")]
    pub(crate) template: String,
    /// Do not measure what else is installed and does the same
    #[arg(long)]
    pub(crate) no_peers: bool,
}
