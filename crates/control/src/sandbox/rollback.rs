//! A sandbox goes back to its past.

use std::sync::Arc;

use cubicle_ids::{SandboxId, SnapshotId};

use super::{Sandbox, Sandboxes};
use crate::error::{Error, Result};
use crate::fleet::Phase;

/// A sandbox that was rolled back.
#[derive(Debug, Clone)]
pub struct RolledBack {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// What it went back to.
    pub snapshot: SnapshotId,
    /// How long each step took, in order.
    pub phases: Vec<Phase>,
}

impl Sandboxes {
    /// Takes a running sandbox back to a snapshot: one of its own, or one that it descends from.
    /// It keeps its id, tokens, metadata and end. If it fails the sandbox runs on as it was.
    pub async fn rollback(&self, id: &SandboxId, snapshot: &str) -> Result<RolledBack> {
        let _ = (id, snapshot);
        Err(Error::Unsupported {
            what: "rollback".to_owned(),
        })
    }
}
