//! Snapshots, pauses and rollbacks of running sandboxes.

use cubicle_cow::SnapshotKind;

use super::*;
use crate::TakeSnapshot;

/// Every step of freezing and publishing, in the order of their beginnings.
const TAKE_STEPS: [&str; 6] = [
    "freeze/pause",
    "freeze/device",
    "freeze/disks",
    "freeze/memory",
    "publish/memory",
    "publish/rename",
];

async fn sandbox(node: &Node, snapshot: &SnapshotId) -> SandboxId {
    let order = CreateSandbox::new(snapshot.clone());
    let id = order.id.clone();
    node.create(order).await.unwrap();
    id
}

/// The order that makes `id` what `snapshot` holds.
fn back(id: &SandboxId, snapshot: &SnapshotId) -> CreateSandbox {
    CreateSandbox {
        id: id.clone(),
        access_token: Some("token".to_owned()),
        ..CreateSandbox::new(snapshot.clone())
    }
}

fn user() -> TakeSnapshot {
    TakeSnapshot::new(SnapshotKind::User)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_captured_again_and_again_and_runs_on() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    let id = sandbox(&node, &template).await;
    let mut parents = vec![template.clone()];
    for _ in 0..3 {
        let taken = node.snapshot(&id, user()).await.unwrap();
        let manifest = &taken.manifest;
        assert_eq!(manifest.parent.as_ref(), parents.first());
        assert_eq!(manifest.lineage, parents, "all ancestors, nearest first");
        assert_eq!(manifest.kind, SnapshotKind::User);
        assert!(taken.timings.frozen > Duration::ZERO && taken.total > taken.timings.frozen);
        parents.insert(0, manifest.id.clone());
        assert_eq!(node.generation(&id), Some(1));
        assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    }
    // A snapshot is what it is whatever becomes of its ancestors and of its source.
    node.store().delete(&parents[1]).await.unwrap();
    node.store().delete(&template).await.unwrap();
    node.kill(&id).await.unwrap();
    let clone = sandbox(&node, &parents[0]).await;
    let taken = node.snapshot(&clone, user()).await.unwrap();
    assert_eq!(taken.manifest.lineage, parents);
    node.kill(&clone).await.unwrap();
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_sandbox_is_a_snapshot_and_comes_back_as_its_next_generation() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    let id = sandbox(&node, &template).await;
    for generation in 1..4 {
        assert_eq!(node.generation(&id), Some(generation));
        let order = TakeSnapshot::new(SnapshotKind::Pause);
        let taken = node.pause(&id, order).await.unwrap();
        assert_eq!(node.generation(&id), None);
        assert!(matches!(
            get(&node, &id, "/health").await,
            Err(Error::NotFound { .. })
        ));
        // At once: it may still be on its way out.
        let order = CreateSandbox {
            last_generation: generation,
            ..back(&id, &taken.manifest.id)
        };
        let created = node.create(order).await.unwrap();
        assert_eq!(created.generation, generation + 1);
    }
    let told = machine.hypervisor.vm(&id).guest.inits.lock().unwrap().pop();
    assert_eq!(told.unwrap().machine_id.unwrap().len(), 32);
    node.kill(&id).await.unwrap();
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_replaces_the_vm_and_keeps_the_sandbox() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    let id = sandbox(&node, &template).await;
    let first = machine.hypervisor.vm(&id);
    let machine_id = first.guest.inits.lock().unwrap()[0].machine_id.clone();
    let taken = node.snapshot(&id, user()).await.unwrap();

    // A request that is under way when the VM changes is told so at once.
    let waiting = tokio::spawn({
        let (node, id) = (node.clone(), id.clone());
        async move { get(&node, &id, "/never").await }
    });
    until("the request is under way", || {
        first.connections.load(SeqCst) == 1
    })
    .await;
    let created = node.rollback(back(&id, &taken.manifest.id)).await.unwrap();
    assert_eq!((created.generation, node.generation(&id)), (2, Some(2)));
    assert!(waiting.await.unwrap().is_err());
    assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    until("the old VM is gone", || machine.hypervisor.alive() == 1).await;
    let told = machine.hypervisor.vm(&id).guest.inits.lock().unwrap().pop();
    assert_eq!(
        told.unwrap().machine_id,
        machine_id,
        "still the same machine"
    );

    // To an ancestor that it did not make itself, and on from there.
    assert_eq!(
        node.rollback(back(&id, &template))
            .await
            .unwrap()
            .generation,
        3
    );
    let next = node.snapshot(&id, user()).await.unwrap();
    assert_eq!(next.manifest.lineage, [template]);
    node.kill(&id).await.unwrap();
    nothing_left(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_operation_at_a_time_and_a_kill_at_any_time() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    for step in TAKE_STEPS {
        let id = sandbox(&node, &template).await;
        node.failpoints()
            .arm(step, Failure::Delay(Duration::from_millis(50)));
        let before = node.failpoints().passes(step);
        let taking = tokio::spawn({
            let (node, id) = (node.clone(), id.clone());
            async move { node.snapshot(&id, user()).await }
        });
        until(step, || node.failpoints().passes(step) > before).await;
        assert!(matches!(
            node.snapshot(&id, user()).await,
            Err(Error::Busy { .. })
        ));
        assert!(matches!(
            node.rollback(back(&id, &template)).await,
            Err(Error::Busy { .. })
        ));
        assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
        // It was seen through all the same.
        taking.await.unwrap().unwrap();
        node.failpoints().disarm();
        assert_clean(&node, &machine).await;
    }
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_the_sandbox_runs_on_as_if_nothing_had_been_asked() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    let id = sandbox(&node, &template).await;
    let vm = machine.hypervisor.vm(&id);
    let snapshots = node.store().list().len();
    for failure in [Failure::Error, Failure::Panic] {
        for step in TAKE_STEPS.into_iter().chain(["snapshot/begin"]) {
            node.failpoints().arm(step, failure);
            node.snapshot(&id, user()).await.unwrap_err();
            node.failpoints().disarm();
        }
        for step in TAKE_STEPS.into_iter().chain(["pause/begin"]) {
            node.failpoints().arm(step, failure);
            let order = TakeSnapshot::new(SnapshotKind::Pause);
            node.pause(&id, order).await.unwrap_err();
            node.failpoints().disarm();
        }
        let steps = CREATE_STEPS
            .into_iter()
            .filter(|step| *step != "create/commit");
        for step in steps.chain(["rollback/begin", "rollback/switch"]) {
            node.failpoints().arm(step, failure);
            node.rollback(back(&id, &template)).await.unwrap_err();
            node.failpoints().disarm();
            until("the new VM is gone", || machine.hypervisor.alive() == 1).await;
        }
    }
    machine.hypervisor.behaviour.refuse_init.store(true, SeqCst);
    let error = node.rollback(back(&id, &template)).await.unwrap_err();
    assert!(matches!(error, Error::Init { .. }), "{error}");
    let unknown = back(&id, &SnapshotId::generate());
    assert!(node.rollback(unknown).await.unwrap_err().is_not_found());

    assert_eq!(node.generation(&id), Some(1));
    assert_eq!(
        vm.connections.load(SeqCst),
        1,
        "nor was its channel disturbed"
    );
    assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    assert_eq!(node.store().list().len(), snapshots);
    assert!(!vm.is_stopped(), "every freeze ended");
    node.kill(&id).await.unwrap();
    nothing_left(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_answer_is_frozen_unless_it_has_to_be_well() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    let id = sandbox(&node, &template).await;
    let guest = &machine.hypervisor.vm(&id).guest;
    guest.silent_sync.store(true, SeqCst);
    let order = TakeSnapshot {
        quiesce: Some(Duration::from_millis(20)),
        ..user()
    };
    let strict = TakeSnapshot {
        require_healthy: true,
        snapshot: SnapshotId::generate(),
        ..order.clone()
    };
    let refused = node.snapshot(&id, strict.clone()).await.unwrap_err();
    assert!(matches!(refused, Error::Unresponsive { .. }), "{refused}");
    node.snapshot(&id, order).await.unwrap();
    guest.silent_sync.store(false, SeqCst);
    node.snapshot(&id, strict).await.unwrap();
    end(node, &machine).await;
}

/// What an operation leaves when the process dies in it, and what the next one makes of it. The
/// first node's runtime is torn down in the middle of the step, as `kill -9` would.
#[test]
fn a_crash_at_any_step_leaves_the_sandbox_alive_and_nothing_else() {
    let runtime = || {
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    };
    let machine = Machine::new();
    let template = runtime().block_on(async {
        let (node, _) = machine.open().await;
        let template = template(&node, &machine).await;
        end(node, &machine).await;
        template
    });
    let rolling = CREATE_STEPS
        .into_iter()
        .filter(|step| *step != "create/commit");
    let rolling = rolling.chain(["rollback/begin", "rollback/switch"]);
    let steps = TAKE_STEPS
        .into_iter()
        .chain(["snapshot/begin"])
        .map(|step| ("snapshot", step))
        .chain(
            TAKE_STEPS
                .into_iter()
                .chain(["pause/begin"])
                .map(|step| ("pause", step)),
        )
        .chain(rolling.map(|step| ("rollback", step)));
    for (operation, step) in steps {
        let first = runtime();
        let id = first.block_on(async {
            let (node, _) = machine.open().await;
            let id = sandbox(&node, &template).await;
            node.failpoints()
                .arm(step, Failure::Delay(Duration::from_secs(3600)));
            let before = node.failpoints().passes(step);
            let (task, victim, to) = (node.clone(), id.clone(), template.clone());
            tokio::spawn(async move {
                match operation {
                    "snapshot" => drop(task.snapshot(&victim, user()).await),
                    "pause" => {
                        let order = TakeSnapshot::new(SnapshotKind::Pause);
                        drop(task.pause(&victim, order).await);
                    }
                    _ => drop(task.rollback(back(&victim, &to)).await),
                }
            });
            until(step, || node.failpoints().passes(step) > before).await;
            id
        });
        first.shutdown_timeout(Duration::from_secs(10));

        runtime().block_on(async {
            let (node, report) = machine.open().await;
            let told = format!("{operation} at {step}: {report:?}");
            assert_eq!(report.adopted, std::slice::from_ref(&id), "{told}");
            assert_eq!(node.generation(&id), Some(1), "{told}");
            assert_eq!(get(&node, &id, "/health").await.unwrap(), 204, "{told}");
            assert!(!machine.hypervisor.vm(&id).is_stopped(), "{told}");
            assert_eq!(machine.hypervisor.alive(), 1, "{told}");
            assert_eq!(node.store().list().len(), 1, "{told}");
            // And it can be done again.
            let taken = node.snapshot(&id, user()).await.unwrap();
            node.rollback(back(&id, &taken.manifest.id)).await.unwrap();
            node.delete_snapshot(&taken.manifest.id).await.unwrap();
            node.kill(&id).await.unwrap();
            until("all is given back", || machine.remains().is_empty()).await;
            end(node, &machine).await;
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_loses_nothing() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let template = template(&node, &machine).await;
    let id = sandbox(&node, &template).await;
    let store = machine.path().join("data/store");
    let before = std::fs::read_dir(store.join("snapshots")).unwrap().count();
    // Files of ever smaller pieces, until not even one of those fits.
    let ballast = store.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    for piece in [1 << 20, 4096, 512] {
        while std::io::Write::write_all(&mut file, &vec![1; piece]).is_ok() {}
    }
    file.sync_all().ok();
    let error = node.snapshot(&id, user()).await.unwrap_err();
    assert!(error.is_capacity(), "{error}");
    let order = TakeSnapshot::new(SnapshotKind::Pause);
    let error = node.pause(&id, order).await.unwrap_err();
    assert!(error.is_capacity(), "{error}");
    assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    assert!(!machine.hypervisor.vm(&id).is_stopped());
    assert_eq!(
        std::fs::read_dir(store.join("snapshots")).unwrap().count(),
        before
    );
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    let taken = node.snapshot(&id, user()).await.unwrap();
    node.rollback(back(&id, &taken.manifest.id)).await.unwrap();
    node.kill(&id).await.unwrap();
    until("all is given back", || machine.remains().is_empty()).await;
    end(node, &machine).await;
}
