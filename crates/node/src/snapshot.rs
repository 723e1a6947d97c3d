//! Snapshot and pause: a running sandbox becomes a snapshot, and goes on or not.

use std::{sync::Arc, time::Instant};

use cubicle_cow::{Contents, Manifest};
use cubicle_ids::SandboxId;

use crate::{
    error::{Error, Result},
    facts::{TakeSnapshot, Taken},
    freeze::{After, freeze, publish},
    guest::Guest,
    memory::CapturedPages,
    node::Inner,
    sandbox::{Live, Running, Sandbox, contained},
};

/// Makes a snapshot; the sandbox runs on.
pub(crate) async fn snapshot(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    running: &mut Running,
    order: TakeSnapshot,
) -> Result<Taken> {
    node.failpoints.pass("snapshot/begin").await?;
    let (taken, pages) = take(node, sandbox, running, order, After::Resume).await?;
    tracing::info!(sandbox = %sandbox.id(), snapshot = %taken.manifest.id, timings = %taken.timings, "snapshot taken");
    // From here on only what differs from this snapshot is new.
    if let Some(pages) = pages
        && let Ok(snapshot) = node.store.snapshot(&taken.manifest.id)
        && running
            .origin
            .memory
            .captured_as(&snapshot.memory_image(), pages)
            .is_ok()
    {
        running.origin.manifest = taken.manifest.clone();
        let recorded = node
            .journal
            .captured(&running.held.key, &taken.manifest)
            .await;
        if let Err(error) = recorded {
            tracing::warn!(sandbox = %sandbox.id(), %error, "after a restart the next snapshot will have an older parent");
        }
    }
    Ok(taken)
}

/// Makes a snapshot, after which the sandbox is no more; its owner takes the VM apart. If it fails
/// the sandbox runs on.
pub(crate) async fn pause(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    running: &mut Running,
    order: TakeSnapshot,
) -> Result<Taken> {
    node.failpoints.pass("pause/begin").await?;
    let (taken, _) = take(node, sandbox, running, order, After::Stop).await?;
    tracing::info!(sandbox = %sandbox.id(), snapshot = %taken.manifest.id, timings = %taken.timings, "paused");
    sandbox.stop();
    Ok(taken)
}

async fn take(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    running: &Running,
    order: TakeSnapshot,
    after: After,
) -> Result<(Taken, Option<CapturedPages>)> {
    let begun = Instant::now();
    let (id, live) = (sandbox.id(), &running.live);
    quiesce(id, live, &order).await?;
    let draft = node
        .store
        .begin_snapshot(order.snapshot.clone(), order.kind)?;
    let memory = order.memory.then_some(&running.origin.memory);
    let taking = async {
        let frozen = freeze(node, id, &live.vm, &live.disks, draft, memory, after).await?;
        let manifest = descendant(&running.origin.manifest, &order, live);
        publish(node, frozen, memory, manifest).await
    };
    let taken = contained(id, taking).await;
    if taken.is_err()
        && after == After::Stop
        && let Err(error) = live.vm.resume().await
    {
        tracing::error!(sandbox = %id, %error, "a VM does not run on after a failed pause");
    }
    let published = taken?;
    let taken = Taken {
        manifest: published.snapshot.manifest().clone(),
        timings: published.timings,
        total: begun.elapsed(),
    };
    Ok((taken, published.pages))
}

/// Has the guest write back what its file systems hold, if that is asked for. Never waits longer
/// than the order says: a guest that does not answer is frozen as it is, unless it has to be well.
async fn quiesce(id: &SandboxId, live: &Live, order: &TakeSnapshot) -> Result<()> {
    let Some(patience) = order.quiesce else {
        return Ok(());
    };
    let guest = Guest {
        id,
        link: &live.link,
    };
    let synced = tokio::time::timeout(patience, guest.sync()).await;
    let why = match synced {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error.to_string(),
        Err(_elapsed) => format!("nothing within {patience:?}"),
    };
    if order.require_healthy {
        return Err(Error::Unresponsive {
            id: id.clone(),
            why,
        });
    }
    tracing::warn!(sandbox = %id, why, "freezing a guest that could not be asked to write back");
    Ok(())
}

/// The manifest of a snapshot of a VM that came from `origin`.
fn descendant(origin: &Manifest, order: &TakeSnapshot, live: &Live) -> Manifest {
    let manifest = Manifest::new(
        order.snapshot.clone(),
        order.kind,
        origin.vm.clone(),
        origin.kernel.clone(),
    );
    let mut manifest = manifest.child_of(origin);
    manifest.labels.clone_from(&origin.labels);
    if order.memory {
        let nonce = live.identity.nonce.as_ref();
        manifest
            .guest_nonce
            .clone_from(nonce.unwrap_or(&origin.guest_nonce));
    } else {
        manifest.contents = Contents::Disks;
    }
    manifest
}
