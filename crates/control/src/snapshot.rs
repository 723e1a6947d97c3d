//! Snapshots: the past of sandboxes, named, listed, checked and deleted.
//!
//! A snapshot is to its users what a template is: its id or name is accepted wherever a template's
//! is. Its place among the others (which one descends from which) outlives it; its files do not.
//!
//! A name may be given to several snapshots, as a template may be built several times. It stands
//! for the newest of them; the others keep it for lists, and their ids.

mod model;
mod query;

use std::time::Duration;

use cubicle_ids::SandboxId;

pub use self::{
    model::{Report, Snapshot, SnapshotState, Stored},
    query::{SnapshotCursor, SnapshotPage, SnapshotQuery, TreeNode, TreeWhat},
};
use crate::{
    error::{Error, Result},
    fleet::SnapshotTaken,
    sandbox::Sandboxes,
};

/// How many snapshots there may be, and for how long.
#[derive(Debug, Clone)]
pub struct SnapshotConfig {
    /// Most snapshots of users; `None`: any number.
    pub max_count: Option<u64>,
    /// Most bytes that all of them together may take of the store; `None`: what fits.
    pub max_own_bytes: Option<u64>,
    /// How long those live that are not given a lifetime; `None`: until they are deleted.
    pub default_ttl: Option<Duration>,
    /// How long a guest may take to write out its caches before it is frozen anyway.
    pub quiesce: Option<Duration>,
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            max_count: Some(10_000),
            max_own_bytes: None,
            default_ttl: None,
            quiesce: None,
        }
    }
}

/// A snapshot to take.
#[derive(Debug, Clone)]
pub struct CreateSnapshot {
    /// `name` or `name:tag`; a name that exists stands for the new one from then on.
    pub name: Option<String>,
    /// False: its disks only; sandboxes that are made from it boot.
    pub memory: bool,
    /// Refuse if the guest does not answer.
    pub require_healthy: bool,
    /// How long it is to live; `None`: as long as the server is set to keep one.
    pub ttl: Option<Duration>,
}

impl Default for CreateSnapshot {
    fn default() -> Self {
        Self {
            name: None,
            memory: true,
            require_healthy: false,
            ttl: None,
        }
    }
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct SnapshotCreation {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// How that went.
    pub taken: SnapshotTaken,
}

/// What snapshots take, all of them together. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotUsage {
    /// Snapshots of users.
    pub count: u64,
    /// What deleting each of them would free, added up.
    pub own_bytes: u64,
    /// What they hold, holes included.
    pub logical_bytes: u64,
    /// Most snapshots, if there is a bound.
    pub max_count: Option<u64>,
    /// Most of [`Self::own_bytes`], if there is a bound.
    pub max_own_bytes: Option<u64>,
}

/// The snapshots of this server. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    sandboxes: Sandboxes,
}

impl Snapshots {
    /// Opens.
    pub(crate) fn new(sandboxes: Sandboxes) -> Self {
        Self { sandboxes }
    }
    /// Takes a snapshot of a running sandbox, which runs on.
    pub async fn create(
        &self,
        sandbox: &SandboxId,
        request: CreateSnapshot,
    ) -> Result<SnapshotCreation> {
        let _ = (&self.sandboxes, sandbox, request);
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
    /// A page of snapshots, newest first.
    pub async fn list(&self, query: &SnapshotQuery) -> Result<SnapshotPage> {
        let _ = (query);
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
    /// The snapshot that an id, a name or `name:tag` stands for.
    pub async fn get(&self, reference: &str) -> Result<Snapshot> {
        let _ = (reference);
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
    /// How snapshots descend from each other, those of one sandbox or all. One tree for each
    /// snapshot that descends from none.
    pub async fn tree(&self, sandbox: Option<&SandboxId>) -> Result<Vec<TreeNode>> {
        let _ = (sandbox);
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
    /// Deletes a snapshot by its id, or all that have a name (with a tag). What was made from them
    /// runs on, and what descends from them stays.
    pub async fn delete(&self, reference: &str) -> Result<()> {
        let _ = (reference);
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
    /// Reads a snapshot's files and compares them with their checksums. One that is damaged is
    /// marked as failed.
    ///
    /// # Errors
    /// [`Error::SnapshotUnusable`] if it is damaged.
    pub async fn verify(&self, reference: &str) -> Result<Snapshot> {
        let _ = (reference);
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
    /// What all snapshots take.
    pub async fn usage(&self) -> Result<SnapshotUsage> {
        let _ = (());
        Err(Error::Unsupported {
            what: "snapshot".to_owned(),
        })
    }
}
