//! Create: a snapshot becomes a new sandbox.

use std::{sync::Arc, time::Instant};

use cubicle_cow::Snapshot;
use cubicle_protocol::guest_api::InitRequest;
use futures::FutureExt as _;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    facts::{CreateSandbox, Created, Shape},
    holdings::Holdings,
    journal::{self, Key},
    link::Identity,
    node::Inner,
    restore::{Restore, restore},
    sandbox::{Live, Sandbox, check_stop, own_new},
};

/// Generation of a new sandbox's first VM.
const FIRST_GENERATION: u64 = 1;

/// Makes a sandbox. The work is done by a task of its own: when the caller goes away, the sandbox
/// does, too, in good order.
pub(crate) async fn create(node: &Arc<Inner>, order: CreateSandbox) -> Result<Created> {
    let begun = Instant::now();
    let snapshot = node.store.snapshot(&order.snapshot)?;
    let shape = shape_of(&snapshot);
    let key = Key {
        sandbox: order.id.clone(),
        generation: FIRST_GENERATION,
    };
    let sandbox = Arc::new(Sandbox::new(
        key,
        order.snapshot.clone(),
        shape,
        journal::now(),
    ));
    node.registry.admit(sandbox.clone())?;

    let (reply, made) = oneshot::channel();
    let task = {
        let (node, sandbox) = (node.clone(), sandbox.clone());
        own_new(node.clone(), sandbox.clone(), reply, move |held, stop| {
            async move { make(&node, &sandbox, snapshot, order, begun, held, stop).await }.boxed()
        })
    };
    node.tasks.spawn(task);
    made.await.unwrap_or(Err(Error::Closed))
}

async fn make(
    node: &Arc<Inner>,
    sandbox: &Sandbox,
    snapshot: Snapshot,
    order: CreateSandbox,
    begun: Instant,
    held: &mut Holdings,
    stop: &CancellationToken,
) -> Result<(Arc<Live>, Created)> {
    let identity = identity(node, sandbox, &snapshot, &order);
    let restored = restore(
        node,
        Restore {
            key: sandbox.key().clone(),
            snapshot: &snapshot,
            identity,
            egress: order.egress,
            limits: order.limits,
            started_at: sandbox.started_at(),
        },
        held,
        stop,
    )
    .await?;
    let mut timings = restored.timings;

    check_stop(sandbox.id(), stop)?;
    let committing = Instant::now();
    node.failpoints.pass("create/commit").await?;
    node.journal.running(sandbox.key(), journal::now()).await?;
    timings.journal += committing.elapsed();
    timings.total = begun.elapsed();
    tracing::info!(sandbox = %sandbox.id(), snapshot = %snapshot.id(), %timings, "created");
    let created = Created {
        generation: sandbox.key().generation,
        shape: sandbox.shape(),
        timings,
    };
    Ok((restored.live, created))
}

/// What the new sandbox's guest is told.
fn identity(
    node: &Inner,
    sandbox: &Sandbox,
    snapshot: &Snapshot,
    order: &CreateSandbox,
) -> Identity {
    let manifest = snapshot.manifest();
    let nonce = (!manifest.guest_nonce.is_empty()).then(|| manifest.guest_nonce.clone());
    Identity {
        init: InitRequest {
            env_vars: order.env_vars.clone(),
            access_token: order.access_token.clone(),
            default_user: Some(node.config.guest.user.clone()),
            sandbox_id: Some(order.id.clone()),
            template_id: order.template.clone(),
            hostname: Some(order.id.to_string()),
            machine_id: Some(random_hex()),
            dns_servers: node.config.guest.dns_servers.clone(),
            generation: Some(sandbox.key().generation),
            nonce: Some(random_hex()),
            ..InitRequest::default()
        },
        restored: nonce.map(|nonce| (snapshot.id().clone(), nonce)),
    }
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
