//! Real VMs: QEMU, the real guest daemon, real disks and networks. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::{sync::Arc, time::Instant};

use cubicle_ids::SnapshotId;
use cubicle_image::Progress;
use cubicle_node::{
    CreateSandbox, ImageSource, KillOutcome, Node, SandboxState, TemplateBuild, WarmUp, empty_body,
};
use cubicle_vmm::qemu::{Qemu, QemuConfig};
use support::{Machine, assert_clean, image};

async fn hypervisor() -> Arc<Qemu> {
    Arc::new(Qemu::open(QemuConfig::default()).await.unwrap())
}

async fn template(node: &Node) -> SnapshotId {
    let build = TemplateBuild {
        snapshot: SnapshotId::generate(),
        template: None,
        source: ImageSource::Ready(image().await),
        cpus: 1,
        memory_mib: 512,
        warm_up: WarmUp::usual("user"),
    };
    let built = node
        .build_template(build, Progress::silent())
        .await
        .unwrap();
    eprintln!(
        "boot {:?} warm-up {:?} {} | {}",
        built.boot, built.warm_up, built.freeze, built.proof
    );
    built.snapshot
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_is_built_and_sandboxes_are_made_from_it() {
    tracing_subscriber::fmt()
        .with_test_writer()
        .with_env_filter("info,cubicle_node=debug")
        .init();
    let machine = Machine::new(true);
    let (node, report) = machine.open(hypervisor().await).await;
    assert_eq!(report, Default::default());
    let snapshot = template(&node).await;

    for _ in 0..10 {
        let order = CreateSandbox::new(snapshot.clone());
        let id = order.id.clone();
        let begun = Instant::now();
        let created = node.create(order).await.unwrap();
        eprintln!("create {:?}: {}", begun.elapsed(), created.timings);
        let usage = node.usage(&id).await.unwrap();
        eprintln!("private {} KiB", usage.private_bytes >> 10);
        assert_eq!(node.sandbox(&id).unwrap().state, SandboxState::Running);
        let request = http::Request::get("/health").body(empty_body()).unwrap();
        assert_eq!(node.request(&id, request).await.unwrap().status(), 204);
        let metrics = node.metrics(&id).await.unwrap();
        eprintln!("{metrics:?}");
        let begun = Instant::now();
        assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
        eprintln!("kill {:?}", begun.elapsed());
    }
    node.shutdown().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_clean(&machine);
}
