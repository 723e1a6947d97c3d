//! A sandbox wakes up: because a client asks for it, or because of traffic.

use std::sync::Arc;

use cubicle_ids::SandboxId;

use super::{Lifetime, Sandbox, Sandboxes};
use crate::error::{Error, Result};
use crate::fleet::Phase;

/// How to resume a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeSandbox {
    /// How long it is to live from now on.
    pub lifetime: Lifetime,
    /// Whether it is paused when that is over; `None`: as before.
    pub auto_pause: Option<bool>,
}

/// A sandbox that answers.
#[derive(Debug, Clone)]
pub struct Connected {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// True if it was paused before.
    pub resumed: bool,
    /// How long each step of that took, in order; empty if it ran already, or if another request
    /// resumed it.
    pub phases: Vec<Phase>,
}

impl Sandboxes {
    /// Resumes a paused sandbox and sets its end.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it runs.
    pub async fn resume(&self, id: &SandboxId, request: ResumeSandbox) -> Result<Connected> {
        let _ = (id, request);
        Err(Error::Unsupported {
            what: "resume".to_owned(),
        })
    }

    /// Has traffic wake a sandbox: returns once it runs. Its life begins anew, as long as it was
    /// asked for at first.
    ///
    /// # Errors
    /// [`Error::Conflict`] if traffic does not wake it.
    pub async fn wake(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        let _ = (id);
        Err(Error::Unsupported {
            what: "wake".to_owned(),
        })
    }
}
