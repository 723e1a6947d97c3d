//! What control knows about snapshots.

use std::time::Duration;

use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    fleet::{SnapshotFact, SnapshotTaken},
    sandbox::PauseMode,
    template::DEFAULT_TAG,
};

/// A sandbox's past, to make sandboxes from or to go back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Names it, for ever.
    pub id: SnapshotId,
    /// What a person calls it. Several may have one name; the newest of them is meant by it.
    pub name: Option<String>,
    /// The tag that belongs to the name.
    pub tag: String,
    /// What stands for it where a client wants a build.
    pub build: Uuid,
    /// The sandbox it was taken of.
    pub sandbox: SandboxId,
    /// The template which that sandbox was made from.
    pub template: TemplateId,
    /// The snapshot that it descends from directly; it may have been deleted since.
    pub parent: Option<SnapshotId>,
    /// How far it is.
    pub state: SnapshotState,
    /// Why it failed, if it did.
    pub reason: Option<String>,
    /// What it holds.
    pub mode: PauseMode,
    /// When it was asked for.
    pub created_at: OffsetDateTime,
    /// When its state last changed.
    pub updated_at: OffsetDateTime,
    /// When it deletes itself; `None`: never.
    pub expires_at: Option<OffsetDateTime>,
    /// CPUs of its sandboxes.
    pub cpu_count: u32,
    /// Memory of its sandboxes.
    pub memory_mib: u32,
    /// Size of their root disk.
    pub disk_mib: u32,
    /// Version of the guest daemon in it.
    pub envd_version: String,
    /// How it was taken; `None` while it is being taken, or if the server was stopped meanwhile.
    pub report: Option<Report>,
    /// What the store says of it; `None` if it does not say.
    pub stored: Option<Stored>,
}

impl Snapshot {
    /// How clients name it: its id with the default tag, as for any build of a template.
    #[must_use]
    pub fn reference(&self) -> String {
        format!("{}:{DEFAULT_TAG}", self.id)
    }

    /// Its names for people, as `name:tag`.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let name = self.name.iter();
        name.map(|name| format!("{name}:{}", self.tag)).collect()
    }
}

/// How far a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotState {
    /// It is being taken.
    Publishing,
    /// It can be used.
    Ready,
    /// It is damaged.
    Failed,
    /// It is being deleted. For everyone outside, it is gone already.
    Deleting,
    /// It is gone; what is left is its place between its parent and its children.
    Deleted,
}

impl SnapshotState {
    /// Every state, in the order of a life.
    pub const ALL: [Self; 5] = [
        Self::Publishing,
        Self::Ready,
        Self::Failed,
        Self::Deleting,
        Self::Deleted,
    ];

    /// The word on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Publishing => "publishing",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

/// How a snapshot was taken. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// How its memory was found: `full`, `anonymous_pages`, `soft_dirty` or `none`.
    pub tier: String,
    /// Memory that was looked at.
    pub bytes_scanned: u64,
    /// Memory that had changed.
    pub bytes_dirty: u64,
    /// What was written to the store.
    pub bytes_written: u64,
    /// How long the guest stood still.
    pub frozen: Duration,
}

impl From<&SnapshotTaken> for Report {
    fn from(taken: &SnapshotTaken) -> Self {
        Self {
            tier: taken.tier.to_owned(),
            bytes_scanned: taken.bytes_scanned,
            bytes_dirty: taken.bytes_dirty,
            bytes_written: taken.bytes_written,
            frozen: taken.frozen,
        }
    }
}

/// What the store says of a snapshot. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// What its files say they hold: memory and disks, holes included.
    pub logical_bytes: u64,
    /// What deleting it would free.
    pub own_bytes: u64,
    /// Whether it survives a power failure.
    pub durable: bool,
}

impl From<&SnapshotFact> for Stored {
    fn from(fact: &SnapshotFact) -> Self {
        Self {
            logical_bytes: fact.logical_bytes,
            own_bytes: fact.own_bytes,
            durable: fact.durable,
        }
    }
}
