//! Snapshot and pause: a running sandbox becomes a snapshot, and goes on or not.

use std::{sync::Arc, time::Instant};

use cubicle_cow::{Contents, Manifest};

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
    descend(node, sandbox, running, &taken, pages).await;
    Ok(taken)
}

/// Makes a snapshot, after which the sandbox is no more; its owner takes the VM apart or keeps it for
/// a while. If it fails the sandbox runs on.
pub(crate) async fn pause(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    running: &mut Running,
    order: TakeSnapshot,
) -> Result<Taken> {
    node.failpoints.pass("pause/begin").await?;
    let (taken, pages) = take(node, sandbox, running, order, After::Stop).await?;
    tracing::info!(sandbox = %sandbox.id(), snapshot = %taken.manifest.id, timings = %taken.timings, "paused");
    // Of one that is being killed nothing is to be kept.
    let killed = sandbox.stopping().is_cancelled();
    sandbox.stop();
    if descend(node, sandbox, running, &taken, pages).await && !killed {
        running.paused_as = Some(taken.manifest.id.clone());
    }
    Ok(taken)
}

/// From here on only what differs from this snapshot is new. False: the VM's next snapshot will be
/// compared with an older one, or this one has no memory.
async fn descend(
    node: &Inner,
    sandbox: &Sandbox,
    running: &mut Running,
    taken: &Taken,
    pages: Option<CapturedPages>,
) -> bool {
    let Some(pages) = pages else { return false };
    let Ok(snapshot) = node.store.snapshot(&taken.manifest.id) else {
        return false;
    };
    let image = snapshot.memory_image();
    if running.origin.memory.captured_as(&image, pages).is_err() {
        return false;
    }
    running.origin.manifest = taken.manifest.clone();
    let recorded = node
        .journal
        .captured(&running.held.key, &taken.manifest)
        .await;
    if let Err(error) = recorded {
        tracing::warn!(sandbox = %sandbox.id(), %error, "after a restart the next snapshot will have an older parent");
    }
    true
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
    let guest = Guest {
        id,
        link: &live.link,
    };
    quiesce(&guest, &order).await?;
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
async fn quiesce(guest: &Guest<'_>, order: &TakeSnapshot) -> Result<()> {
    let Some(patience) = order.quiesce else {
        return Ok(());
    };
    let id = guest.id;
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
