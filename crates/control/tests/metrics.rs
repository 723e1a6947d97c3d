//! What is counted.

mod common;

use common::{Plane, failed};
use cubicle_control::{
    fleet::memory::Step,
    sandbox::{ForkSandbox, LifecycleOptions, Lifetime, PauseSandbox},
    snapshot::CreateSnapshot,
};
use prometheus_client::{encoding::text::encode, registry::Registry};

#[tokio::test]
async fn every_freeze_and_every_restore_is_counted() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sleepy = cubicle_control::sandbox::CreateSandbox {
        lifecycle: LifecycleOptions {
            auto_pause: true,
            auto_resume: true,
            ..LifecycleOptions::default()
        },
        ..common::request("base")
    };
    let id = &plane.create(sleepy).await.id;
    plane.snapshot(id, None).await;
    plane.snapshot(id, None).await;
    plane.fleet.fail_at(Step::Freeze, failed());
    let snapshots = &plane.control.snapshots;
    assert!(
        snapshots
            .create(id, CreateSnapshot::default())
            .await
            .is_err()
    );
    let disks = PauseSandbox {
        memory: false,
        ..PauseSandbox::default()
    };
    sandboxes.pause(id, disks).await.expect("pause");
    sandboxes
        .connect(id, Lifetime::Never)
        .await
        .expect("resume");
    let now = Lifetime::For(std::time::Duration::ZERO);
    sandboxes.set_lifetime(id, now).await.expect("now");
    let asleep = || {
        sandboxes
            .get(id)
            .is_ok_and(|s| s.pause.is_some() && s.end_at.is_none())
    };
    common::eventually("the pause", asleep).await;
    sandboxes.wake(id).await.expect("wake");
    sandboxes.rollback(id, "base").await.expect("rollback");
    let copies = ForkSandbox {
        count: 3,
        lifetime: Lifetime::Never,
    };
    plane.fleet.fail_next_create(failed());
    sandboxes.fork(id, copies).await.expect("fork");

    let mut registry = Registry::default();
    plane.control.metrics.register(&mut registry);
    let mut text = String::new();
    encode(&mut text, &registry).expect("text");
    let bytes = 7 << 20;
    for line in [
        r#"sandbox_operations_total{operation="snapshot",outcome="done"} 2"#,
        r#"sandbox_operations_total{operation="snapshot",outcome="failed"} 1"#,
        r#"sandbox_operations_total{operation="pause",outcome="done"} 2"#,
        r#"sandbox_operations_total{operation="resume",outcome="done"} 2"#,
        r#"sandbox_operations_total{operation="rollback",outcome="done"} 1"#,
        r#"sandbox_operations_total{operation="fork",outcome="done"} 1"#,
        r#"sandbox_operation_duration_seconds_count{operation="snapshot"} 2"#,
        r#"freezes_total{operation="snapshot",tier="anonymous_pages"} 2"#,
        r#"freezes_total{operation="pause",tier="none"} 1"#,
        r#"freeze_duration_seconds_count{operation="fork",tier="anonymous_pages"} 1"#,
        &format!(
            r#"freeze_written_bytes_total{{operation="snapshot",tier="anonymous_pages"}} {}"#,
            2 * bytes
        ),
        &format!(
            r#"freeze_scanned_bytes_total{{operation="fork",tier="anonymous_pages"}} {}"#,
            512 << 20
        ),
        r#"fork_children_total{outcome="done"} 2"#,
        r#"fork_children_total{outcome="failed"} 1"#,
        r#"auto_pauses_total{outcome="done"} 1"#,
        "wakes_total 1",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no line `{line}` in\n{text}"
        );
    }
}
