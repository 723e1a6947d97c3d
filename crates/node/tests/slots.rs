//! Sandboxes without a processor but with everything else: the hypervisor is the one in memory, the
//! network slots and the disks are the machine's. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::{path::Path, sync::Arc, time::Duration};

use cubicle_cow::DiskShape;
use cubicle_ids::SnapshotId;
use cubicle_image::Progress;
use cubicle_net::EgressPolicy;
use cubicle_node::{
    CreateSandbox, Error, ImageSource, KillOutcome, Node, TemplateBuild, TemplateImage,
};
use cubicle_vmm::fake::{Behaviour, Fake, Step};
use futures::{StreamExt as _, stream};
use support::{Machine, assert_clean};

async fn template(node: &Node, dir: &Path) -> SnapshotId {
    let file = |name: &str| {
        let path = dir.join(name);
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        path
    };
    let image = TemplateImage {
        kernel: file("vmlinux"),
        initramfs: file("initramfs"),
        kernel_fingerprint: "k".to_owned(),
        rootfs: file("rootfs"),
        rootfs_fingerprint: "r".to_owned(),
    };
    let build = TemplateBuild {
        snapshot: SnapshotId::generate(),
        template: None,
        source: ImageSource::Ready(image),
        cpus: 1,
        memory_mib: 64,
        warm_up: Vec::new(),
        settle: std::time::Duration::ZERO,
    };
    let built = node
        .build_template(build, Progress::silent())
        .await
        .unwrap();
    let manifest = node
        .store()
        .snapshot(&built.snapshot)
        .unwrap()
        .manifest()
        .clone();
    let disk = DiskShape {
        size: 1 << 20,
        read_only: false,
    };
    assert_eq!(
        (manifest.disks.as_slice(), manifest.vm.memory_mib),
        (&[disk][..], 64)
    );
    built.snapshot
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_disks_and_vms_all_come_back() {
    let machine = Machine::new(true);
    let fake = Fake::new();
    let mut config = machine.config();
    // Some guests here never answer.
    config.deadlines.answer = Duration::from_secs(2);
    let (node, _) = machine.open_with(Arc::new(fake.clone()), config).await;
    let snapshot = template(&node, machine.path()).await;

    let cycles: u32 = 200;
    stream::iter(0..cycles)
        .for_each_concurrent(8, |n| {
            let (node, mut order) = (node.clone(), CreateSandbox::new(snapshot.clone()));
            order.egress = (n % 2 == 0).then(EgressPolicy::deny_all);
            async move {
                let id = order.id.clone();
                node.create(order).await.unwrap();
                assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
            }
        })
        .await;
    let failing = [Step::Launch, Step::Connect].map(Behaviour::failing);
    let refusing = Behaviour {
        refuses_init: true,
        ..Behaviour::default()
    };
    for behaviour in failing.into_iter().chain([refusing]) {
        let what = format!("{behaviour:?}");
        fake.behave(behaviour);
        for _ in 0..3 {
            let error = node
                .create(CreateSandbox::new(snapshot.clone()))
                .await
                .unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Vm(_) | Error::Unanswered { .. } | Error::Init { .. }
                ),
                "{what}: {error}"
            );
        }
    }
    fake.behave(Behaviour::default());

    let order = CreateSandbox::new(snapshot.clone());
    let id = order.id.clone();
    node.create(order).await.unwrap();
    for policy in [EgressPolicy::deny_all(), EgressPolicy::allow_all()] {
        node.set_egress(&id, policy).await.unwrap();
    }
    node.kill(&id).await.unwrap();
    let gone = node.set_egress(&id, EgressPolicy::deny_all()).await;
    assert!(matches!(gone, Err(Error::NotFound { .. })));

    let capacity = node.capacity();
    assert_eq!((capacity.slots.used, capacity.memory_promised_mib), (0, 0));
    let counts = fake.counts();
    assert_eq!((counts.running, counts.connections, counts.died), (0, 0, 0));
    // Those of the cycles, those that refused to be anybody, the template's and its proof's.
    assert_eq!(counts.launched, counts.killed);
    assert!(counts.launched >= u64::from(cycles) + 5, "{counts:?}");

    node.shutdown().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_clean(&machine);
}
