//! Create: a snapshot becomes a new sandbox.

use std::{sync::Arc, time::Instant};

use cubicle_cow::Snapshot;
use cubicle_ids::SandboxId;
use cubicle_protocol::guest_api::InitRequest;
use futures::FutureExt as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    facts::{CreateSandbox, Created, SandboxState, Shape},
    holdings::Holdings,
    journal::{self, Key},
    link::Identity,
    node::Inner,
    restore::{Restore, claim_or_restore},
    sandbox::{Made, Sandbox, check_stop, own_new},
    shares,
};

/// Makes a sandbox. The work is done by a task of its own: when the caller goes away, the sandbox
/// does, too, in good order.
pub(crate) async fn create(node: &Arc<Inner>, order: CreateSandbox) -> Result<Created> {
    let begun = Instant::now();
    let snapshot = node.store.snapshot(&order.snapshot)?;
    let key = Key {
        sandbox: order.id.clone(),
        generation: order.last_generation + 1,
    };
    wait_for_predecessor(node, &order).await?;
    let (sandbox, letters) = Sandbox::new(
        key.clone(),
        order.snapshot.clone(),
        shape_of(&snapshot),
        journal::now(),
    );
    node.registry.admit(sandbox.clone())?;

    let (reply, made) = oneshot::channel();
    let held = Holdings::new(key);
    let task = {
        let (node, sandbox) = (node.clone(), sandbox.clone());
        own_new(
            node.clone(),
            sandbox.clone(),
            letters,
            held,
            reply,
            move |held, stop| {
                async move { make(&node, &sandbox, snapshot, order, begun, held, stop).await }
                    .boxed()
            },
        )
    };
    node.tasks.spawn(task);
    made.await.unwrap_or(Err(Error::Closed))
}

/// A sandbox that was paused a moment ago may still be on its way out.
async fn wait_for_predecessor(node: &Inner, order: &CreateSandbox) -> Result<()> {
    if order.last_generation == 0 {
        return Ok(());
    }
    match node.registry.get(&order.id) {
        Ok(old) if old.state() == Some(SandboxState::Removing) => {
            old.gone(node.config.deadlines.kill).await
        }
        _ => Ok(()),
    }
}

async fn make(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    snapshot: Snapshot,
    order: CreateSandbox,
    begun: Instant,
    held: &mut Holdings,
    stop: &CancellationToken,
) -> Made {
    let _creating = node.spares.create_begins();
    let generation = held.key.generation;
    shares::check(&order.mounts).await?;
    let order = Restore {
        serves: Some((sandbox.id(), generation)),
        snapshot: &snapshot,
        identity: identity(node, &snapshot, &order, generation),
        egress: order.egress,
        limits: order.limits,
        kernel: order.kernel,
        started_at: sandbox.started_at(),
    };
    let restored = claim_or_restore(node, order, held, stop).await?;
    let mut timings = restored.timings;

    check_stop(sandbox.id(), stop)?;
    let committing = Instant::now();
    node.failpoints.pass("create/commit").await?;
    let serves = (sandbox.id(), generation);
    let told = &restored.live.identity;
    node.journal
        .running(&held.key, serves, told, journal::now())
        .await?;
    timings.journal += committing.elapsed();
    timings.total = begun.elapsed();
    tracing::info!(sandbox = %sandbox.id(), snapshot = %snapshot.id(), %timings, "created");
    let created = Created {
        generation,
        shape: sandbox.shape(),
        timings,
    };
    Ok((Arc::new(restored.live), restored.origin, created))
}

/// What the guest of a sandbox's VM is told.
pub(crate) fn identity(
    node: &Inner,
    snapshot: &Snapshot,
    order: &CreateSandbox,
    generation: u64,
) -> Identity {
    let manifest = snapshot.manifest();
    let user = order.default_user.clone();
    let nonce = (!manifest.guest_nonce.is_empty()).then(|| manifest.guest_nonce.clone());
    Identity {
        init: InitRequest {
            env_vars: order.env_vars.clone(),
            access_token: order.access_token.clone(),
            default_user: Some(user.unwrap_or_else(|| node.config.guest.user.clone())),
            default_workdir: order.default_workdir.clone(),
            sandbox_id: Some(order.id.clone()),
            template_id: order.template.clone(),
            hostname: Some(order.id.to_string()),
            machine_id: Some(machine_id(&order.id)),
            dns_servers: if order.dns_servers.is_empty() {
                node.config.guest.dns_servers.clone()
            } else {
                order.dns_servers.clone()
            },
            generation: Some(generation),
            nonce: Some(random_hex()),
            mounts: Some(order.mounts.clone()),
            ..InitRequest::default()
        },
        restored: nonce.map(|nonce| (snapshot.id().clone(), nonce)),
    }
}

/// The machine id of a sandbox: always the same for one, whichever snapshot its VM was restored
/// from, and another for every other.
fn machine_id(id: &SandboxId) -> String {
    let digest = Sha256::new()
        .chain_update("cubicle machine id\0")
        .chain_update(id.as_str())
        .finalize();
    hex::encode(&digest[..16])
}

/// 128 random bits as 32 lower-case hexadecimal digits.
pub(crate) fn random_hex() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

pub(crate) fn shape_of(snapshot: &Snapshot) -> Shape {
    let manifest = snapshot.manifest();
    Shape {
        cpus: manifest.vm.cpus,
        memory_mib: manifest.vm.memory_mib,
        disk_mib: manifest.disks.first().map_or(0, |disk| disk.size >> 20),
    }
}
