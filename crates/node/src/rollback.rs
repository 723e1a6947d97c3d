//! Rollback: an older snapshot takes the place of a running VM.
//!
//! Blue and green: the snapshot is restored beside the running VM, in a slot and on volumes of its
//! own. Only once its guest has answered does it become the sandbox's VM, by one write of the
//! journal and one change of stage; then the old one goes. Whatever fails before that, the old VM
//! has noticed nothing.

use std::{sync::Arc, time::Instant};

use crate::{
    create::identity,
    error::Result,
    facts::{CreateSandbox, Created},
    holdings::Holdings,
    journal::{self, Key},
    node::Inner,
    restore::{Restore, claim_or_restore},
    sandbox::{Running, Sandbox, check_stop, contained},
    shares,
};

/// Restores `order.snapshot` and makes it what `running` is.
pub(crate) async fn rollback(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    running: &mut Running,
    order: CreateSandbox,
) -> Result<Created> {
    let begun = Instant::now();
    node.failpoints.pass("rollback/begin").await?;
    let _creating = node.spares.create_begins();
    let snapshot = node.store.snapshot(&order.snapshot)?;
    shares::check(&order.mounts).await?;
    let generation = running.next_generation;
    running.next_generation += 1;
    let mut held = Holdings::new(Key {
        sandbox: sandbox.id().clone(),
        generation,
    });
    let restoring = Restore {
        serves: Some((sandbox.id(), generation)),
        snapshot: &snapshot,
        identity: identity(node, &snapshot, &order, generation),
        egress: order.egress,
        limits: order.limits,
        kernel: order.kernel,
        started_at: journal::now(),
    };
    let switched = async {
        let restored = claim_or_restore(node, restoring, &mut held, sandbox.stopping()).await?;
        check_stop(sandbox.id(), sandbox.stopping())?;
        node.failpoints.pass("rollback/switch").await?;
        let serves = (sandbox.id(), generation);
        let told = &restored.live.identity;
        node.journal
            .supersede(&running.held.key, &held.key, serves, told)
            .await?;
        Ok(restored)
    };
    let restored = match contained(sandbox.id(), switched).await {
        Ok(restored) => restored,
        Err(error) => {
            if held.release(node).await.is_err() {
                held.release_later(node);
            }
            return Err(error);
        }
    };
    let live = Arc::new(restored.live);
    sandbox.set_running(&live);
    let old = std::mem::replace(running, Running::new(live, restored.origin, held));
    // Whoever still talks to it is told at once.
    old.live.link.close();
    old.held.release_later(node);
    let mut timings = restored.timings;
    timings.total = begun.elapsed();
    tracing::info!(sandbox = %sandbox.id(), snapshot = %snapshot.id(), generation, %timings, "rolled back");
    Ok(Created {
        generation,
        shape: sandbox.shape(),
        timings,
    })
}
