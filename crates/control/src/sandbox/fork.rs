//! One sandbox becomes several.

use std::sync::Arc;

use cubicle_ids::SandboxId;

use super::{Lifetime, Sandbox, Sandboxes};
use crate::{
    error::{Error, Result},
    fleet::SnapshotTaken,
};

/// Most copies made by one request.
pub const MAX_FORKS: u32 = 100;

/// Copies of a running sandbox to make.
#[derive(Debug, Clone, Copy)]
pub struct ForkSandbox {
    /// How many, 1 to [`MAX_FORKS`].
    pub count: u32,
    /// How long each is to live, measured from the moment it answers.
    pub lifetime: Lifetime,
}

/// What came of a fork.
#[derive(Debug)]
pub struct Forked {
    /// As many as were asked for, each for itself.
    pub children: Vec<Result<Arc<Sandbox>>>,
    /// How the source was frozen.
    pub taken: SnapshotTaken,
}

impl Sandboxes {
    /// Makes copies of a running sandbox, each with an id and tokens of its own. The source runs
    /// on. One copy may fail and the others not.
    pub async fn fork(&self, id: &SandboxId, request: ForkSandbox) -> Result<Forked> {
        let _ = (id, request);
        Err(Error::Unsupported {
            what: "fork".to_owned(),
        })
    }
}
