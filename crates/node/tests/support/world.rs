//! A node with a template of the default image, and what is done to its sandboxes.

use std::{sync::Arc, time::Duration};

use cubicle_cow::SnapshotKind;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::Progress;
use cubicle_node::{
    CreateSandbox, ImageSource, Node, NodeConfig, TakeSnapshot, TemplateBuild, WarmUp,
};
use cubicle_vmm::qemu::{Qemu, QemuConfig};
use tokio::sync::OnceCell;

use super::{Machine, assert_clean, image, run};

pub async fn hypervisor() -> Arc<Qemu> {
    static QEMU: OnceCell<Arc<Qemu>> = OnceCell::const_new();
    QEMU.get_or_init(async || Arc::new(Qemu::open(QemuConfig::default()).await.unwrap()))
        .await
        .clone()
}

/// A node with one template.
pub async fn world(config: impl FnOnce(&mut NodeConfig)) -> (Machine, Node, SnapshotId) {
    world_on(Machine::new(true), config).await
}

/// The same on a machine that was chosen.
pub async fn world_on(
    machine: Machine,
    config: impl FnOnce(&mut NodeConfig),
) -> (Machine, Node, SnapshotId) {
    let mut wanted = machine.config();
    config(&mut wanted);
    let (node, _) = machine.open_with(hypervisor().await, wanted).await;
    let build = TemplateBuild {
        snapshot: SnapshotId::generate(),
        template: None,
        source: ImageSource::Ready(image().await),
        cpus: 1,
        memory_mib: 512,
        warm_up: WarmUp::usual("user"),
        settle: Duration::ZERO,
    };
    let built = node
        .build_template(build, Progress::silent())
        .await
        .unwrap();
    (machine, node, built.snapshot)
}

pub async fn end(machine: Machine, node: Node) {
    node.shutdown().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_clean(&machine);
}

pub async fn create(node: &Node, snapshot: &SnapshotId) -> SandboxId {
    let order = CreateSandbox::new(snapshot.clone());
    let id = order.id.clone();
    node.create(order).await.unwrap();
    id
}

pub async fn snapshot(node: &Node, id: &SandboxId) -> SnapshotId {
    let order = TakeSnapshot::new(SnapshotKind::User);
    let taken = node.snapshot(id, order).await.unwrap();
    taken.manifest.id.clone()
}

pub fn back(id: &SandboxId, snapshot: &SnapshotId) -> CreateSandbox {
    CreateSandbox {
        id: id.clone(),
        ..CreateSandbox::new(snapshot.clone())
    }
}

pub async fn python(node: &Node, id: &SandboxId, script: &str) -> String {
    run(node, id, &["/usr/bin/python3", "-c", script])
        .await
        .trim()
        .to_owned()
}
