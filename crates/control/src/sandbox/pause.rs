//! A sandbox falls asleep.

use std::sync::Arc;

use cubicle_ids::SandboxId;

use super::{Sandbox, Sandboxes};
use crate::error::{Error, Result};
use crate::fleet::SnapshotTaken;

/// How to pause a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseSandbox {
    /// Keep its memory. Without, it boots when it is resumed.
    pub memory: bool,
    /// Refuse if the guest does not answer.
    pub require_healthy: bool,
}

impl Default for PauseSandbox {
    fn default() -> Self {
        Self {
            memory: true,
            require_healthy: false,
        }
    }
}

/// A sandbox that was paused.
#[derive(Debug, Clone)]
pub struct Paused {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// How it was frozen.
    pub taken: SnapshotTaken,
}

impl Sandboxes {
    /// Pauses a running sandbox: what it is becomes a snapshot, and its VM goes. If that fails it
    /// runs on.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it is paused already, [`Error::Busy`] while something else is done
    /// with it.
    pub async fn pause(&self, id: &SandboxId, request: PauseSandbox) -> Result<Paused> {
        let _ = (id, request);
        Err(Error::Unsupported {
            what: "pause".to_owned(),
        })
    }
}
