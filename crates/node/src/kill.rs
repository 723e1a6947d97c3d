//! Kill: legal in every state, and it always works.

use cubicle_ids::SandboxId;

use crate::{
    error::{Error, Result},
    facts::KillOutcome,
    node::Inner,
};

/// Asks a sandbox's owner to take it apart and waits until nothing is left of it. Two kills at once
/// both succeed; so does a kill of what is already being removed.
pub(crate) async fn kill(node: &Inner, id: &SandboxId) -> Result<KillOutcome> {
    let sandbox = match node.registry.get(id) {
        Ok(sandbox) => sandbox,
        Err(Error::NotFound { .. }) => return Ok(KillOutcome::NotFound),
        Err(other) => return Err(other),
    };
    sandbox.stop();
    sandbox.gone(node.config.deadlines.kill).await?;
    Ok(KillOutcome::Killed)
}
