//! The part of [`Fleet`](super::Fleet) that freezes: what is asked for, what comes of it, and what
//! the store has.

use std::time::Duration;

use cubicle_ids::{SandboxId, SnapshotId};
use time::OffsetDateTime;

use super::Phase;

/// A sandbox to freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeOrder {
    /// The sandbox.
    pub id: SandboxId,
    /// What the snapshot is to be called; chosen by the caller, so that it can own it beforehand.
    pub snapshot: SnapshotId,
    /// What it is for.
    pub kind: FreezeKind,
    /// False: its disks only; whatever is restored from it boots.
    pub memory: bool,
    /// Ask the guest to write out its caches first, and wait this long for it at most.
    pub quiesce: Option<Duration>,
    /// Refuse with [`FleetError::Unresponsive`](super::FleetError::Unresponsive) if the guest does
    /// not answer.
    pub require_healthy: bool,
}

/// What a snapshot is taken for. The kind decides who may delete it, never how it is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FreezeKind {
    /// A user asked for it.
    User,
    /// It holds a paused sandbox.
    Pause,
    /// It lives as long as one operation of the server, such as a fork.
    Temporary,
    /// It is a layer of templates, and [`SnapshotKind::Template`].
    Template,
}

/// A sandbox was frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotTaken {
    /// The snapshot, as it was ordered.
    pub snapshot: SnapshotId,
    /// How its memory was found: `full`, `anonymous_pages`, `soft_dirty`, or `none` if it holds
    /// disks only.
    pub tier: &'static str,
    /// Memory that was looked at, in bytes.
    pub bytes_scanned: u64,
    /// Memory that had changed, in bytes.
    pub bytes_dirty: u64,
    /// What was written to the store, in bytes.
    pub bytes_written: u64,
    /// How long the guest stood still.
    pub frozen: Duration,
    /// How long each step took, in order.
    pub phases: Vec<Phase>,
    /// The snapshot whose memory image this one is written on top of, if any.
    pub parent: Option<SnapshotId>,
}

/// A snapshot that the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFact {
    /// The snapshot.
    pub id: SnapshotId,
    /// Why it exists.
    pub kind: SnapshotKind,
    /// What it descends from directly.
    pub parent: Option<SnapshotId>,
    /// Everything that it descends from, nearest first.
    pub lineage: Vec<SnapshotId>,
    /// When it was published.
    pub created_at: OffsetDateTime,
    /// What its files say they hold, in bytes: memory and disks, holes included.
    pub logical_bytes: u64,
    /// What deleting it would free, in bytes.
    pub own_bytes: u64,
    /// Whether it survives a power failure.
    pub durable: bool,
    /// Why it cannot be restored, if it cannot.
    pub failure: Option<String>,
    /// False: it holds disks only.
    pub memory: bool,
    /// Memory of its sandboxes.
    pub memory_mib: u32,
    /// CPUs of its sandboxes.
    pub cpus: u32,
    /// Size of their root disk.
    pub disk_mib: u32,
}

/// Why a snapshot exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotKind {
    /// Templates are made of it.
    Template,
    /// It was taken of a sandbox.
    Frozen(FreezeKind),
}
