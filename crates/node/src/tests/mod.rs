//! Whole lives of sandboxes on a node whose VMs are in memory and whose store is real.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::Progress;
use futures::{StreamExt as _, stream};
use tokio::runtime::{Builder, Runtime};

use crate::{
    CreateSandbox, Error, Failure, KillOutcome, Node, NodeEvent, SandboxState, empty_body,
    testing::Machine,
};

mod mixed;
mod restart;
pub(crate) mod shares;
mod snapshots;
mod spares;

/// Every step of a create, in the order of their beginnings.
const CREATE_STEPS: [&str; 8] = [
    "create/journal",
    "create/slot",
    "create/volume",
    "create/launch",
    "create/record",
    "create/channel",
    "create/init",
    "create/commit",
];

/// Every step of a removal.
const KILL_STEPS: [&str; 4] = ["kill/vm", "kill/slot", "kill/volume", "kill/journal"];

/// Every step of a template build that is not a create's.
const BUILD_STEPS: [&str; 15] = [
    "build/journal",
    "build/slot",
    "build/volume",
    "build/launch",
    "build/answer",
    "build/health",
    "build/warm-up",
    "freeze/pause",
    "freeze/device",
    "freeze/disks",
    "freeze/memory",
    "build/kill",
    "publish/memory",
    "publish/rename",
    // The proof.
    "create/launch",
];

async fn template(node: &Node, machine: &Machine) -> SnapshotId {
    node.build_template(machine.template(), Progress::silent())
        .await
        .unwrap()
        .snapshot
}

async fn get(node: &Node, id: &SandboxId, path: &'static str) -> crate::Result<http::StatusCode> {
    let request = http::Request::get(path).body(empty_body()).unwrap();
    Ok(node.request(id, request).await?.status())
}

/// Asserts that no sandbox has left anything.
async fn assert_clean(node: &Node, machine: &Machine) {
    assert_eq!(machine.remains(), Vec::<String>::new());
    assert_eq!(node.sandboxes(), []);
    let capacity = node.capacity();
    assert_eq!(
        (capacity.cpus_promised, capacity.memory_promised_mib),
        (0, 0)
    );
    assert_eq!(capacity.slots.used, 0);
    assert_eq!(node.inner.journal.rows().await.unwrap().len(), 0);
    assert_eq!(node.inner.journal.builds().await.unwrap(), []);
}

/// Waits for work that goes on behind the caller's back.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The same of what is removed behind the caller's back, its row last.
async fn nothing_left(node: &Node, machine: &Machine) {
    until("all is given back", || machine.remains().is_empty()).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !node.inner.journal.rows().await.unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "a row stays");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_clean(node, machine).await;
}

async fn end(node: Node, machine: &Machine) {
    node.failpoints().disarm();
    node.shutdown().await.unwrap();
    assert_eq!(machine.remains(), Vec::<String>::new());
    node.store().clone().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_lives_and_dies() {
    let machine = Machine::new();
    let (node, report) = machine.open().await;
    assert_eq!(report, Default::default());
    let snapshot = template(&node, &machine).await;
    assert_clean(&node, &machine).await;

    let order = CreateSandbox {
        env_vars: [("A".to_owned(), "b".to_owned())].into(),
        access_token: Some("secret".to_owned()),
        ..CreateSandbox::new(snapshot.clone())
    };
    let id = order.id.clone();
    let created = node.create(order).await.unwrap();
    assert_eq!((created.generation, node.generation(&id)), (1, Some(1)));
    assert!(created.timings.total >= created.timings.launch + created.timings.init);

    let fact = node.sandbox(&id).unwrap();
    assert_eq!(
        (fact.state, &fact.snapshot),
        (SandboxState::Running, &snapshot)
    );
    assert_eq!(node.sandboxes(), [fact]);
    assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    assert!(matches!(
        node.connect(&id, 8).await,
        Err(Error::PortClosed { port: 8, .. })
    ));
    let metrics = node.metrics(&id).await.unwrap();
    assert_eq!(
        (metrics.cpu_count, metrics.mem_total, metrics.host_private),
        (2, 100, 2)
    );

    let init = machine
        .hypervisor
        .vm(&id)
        .guest
        .inits
        .lock()
        .unwrap()
        .pop()
        .unwrap();
    assert_eq!(init.sandbox_id.as_ref(), Some(&id));
    assert_eq!(init.hostname.as_deref(), Some(id.as_str()));
    assert_eq!(init.access_token.as_deref(), Some("secret"));
    assert_eq!(init.env_vars["A"], "b");
    assert_eq!(init.machine_id.unwrap().len(), 32);
    assert!(init.entropy.is_some() && init.timestamp.is_some());

    let again = CreateSandbox {
        id: id.clone(),
        ..CreateSandbox::new(snapshot)
    };
    assert!(matches!(
        node.create(again).await,
        Err(Error::Exists { .. })
    ));
    assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
    assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::NotFound);
    assert!(matches!(
        get(&node, &id, "/health").await,
        Err(Error::NotFound { .. })
    ));
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_come_and_go_and_leave_nothing() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    stream::iter(0..2000)
        .for_each_concurrent(32, |n| {
            let (node, order) = (node.clone(), CreateSandbox::new(snapshot.clone()));
            async move {
                let id = order.id.clone();
                node.create(order).await.unwrap();
                if n % 10 == 0 {
                    get(&node, &id, "/health").await.unwrap();
                }
                assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
            }
        })
        .await;
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_fails_at_any_step_leaves_nothing() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    for step in CREATE_STEPS {
        for failure in [Failure::Error, Failure::Panic] {
            let before = node.failpoints().passes(step);
            node.failpoints().arm(step, failure);
            let error = node
                .create(CreateSandbox::new(snapshot.clone()))
                .await
                .unwrap_err();
            match failure {
                Failure::Panic => assert!(matches!(error, Error::Panic { .. }), "{step}: {error}"),
                _ => assert!(
                    matches!(error, Error::Injected { step: s } if s == step),
                    "{error}"
                ),
            }
            assert_eq!(
                node.failpoints().passes(step),
                before + 1,
                "{step} is not passed once"
            );
            assert_clean(&node, &machine).await;
            node.failpoints().disarm();
        }
    }
    machine.hypervisor.refuse.store(true, SeqCst);
    node.create(CreateSandbox::new(snapshot.clone()))
        .await
        .unwrap_err();
    machine.hypervisor.refuse.store(false, SeqCst);
    machine.hypervisor.behaviour.refuse_init.store(true, SeqCst);
    let error = node
        .create(CreateSandbox::new(snapshot.clone()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Init { .. }), "{error}");
    machine
        .hypervisor
        .behaviour
        .refuse_init
        .store(false, SeqCst);
    assert_clean(&node, &machine).await;

    node.create(CreateSandbox::new(snapshot)).await.unwrap();
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_overtakes_a_create_at_any_step() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    for step in CREATE_STEPS {
        node.failpoints()
            .arm(step, Failure::Delay(Duration::from_millis(30)));
        let before = node.failpoints().passes(step);
        let order = CreateSandbox::new(snapshot.clone());
        let id = order.id.clone();
        let create = tokio::spawn({
            let node = node.clone();
            async move { node.create(order).await }
        });
        until(step, || node.failpoints().passes(step) > before).await;
        let (one, other) = tokio::join!(node.kill(&id), node.kill(&id));
        assert_eq!(
            (one.unwrap(), other.unwrap()),
            (KillOutcome::Killed, KillOutcome::Killed)
        );
        let created = create.await.unwrap();
        // At the last step the create may have won; the kill came right after it then.
        assert!(
            matches!(created, Err(Error::Killed { .. })) || step == "create/commit",
            "{step}: {created:?}"
        );
        assert_clean(&node, &machine).await;
        node.failpoints().disarm();
    }
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_creator_went_away_is_removed() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    for step in CREATE_STEPS {
        node.failpoints()
            .arm(step, Failure::Delay(Duration::from_millis(30)));
        let before = node.failpoints().passes(step);
        tokio::select! {
            created = node.create(CreateSandbox::new(snapshot.clone())) => {
                panic!("{step} was not waited for: {created:?}")
            }
            () = until(step, || node.failpoints().passes(step) > before) => {}
        }
        until("the sandbox is gone", || node.sandboxes().is_empty()).await;
        assert_clean(&node, &machine).await;
        node.failpoints().disarm();
    }
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_fails_is_tried_until_it_succeeds() {
    let machine = Machine::new();
    let mut config = machine.config();
    config.deadlines.kill = Duration::from_millis(100);
    let (node, _) = machine.open_with(config).await;
    let snapshot = template(&node, &machine).await;
    for step in KILL_STEPS {
        for failure in [Failure::Error, Failure::Panic] {
            let order = CreateSandbox::new(snapshot.clone());
            let id = order.id.clone();
            node.create(order).await.unwrap();
            node.failpoints().arm(step, failure);
            let error = node.kill(&id).await.unwrap_err();
            assert!(
                matches!(&error, Error::KillTimeout { last, .. } if last.contains(step)),
                "{error}"
            );
            assert_eq!(node.sandbox(&id).unwrap().state, SandboxState::Removing);
            assert!(matches!(
                get(&node, &id, "/x").await,
                Err(Error::NotFound { .. })
            ));
            node.failpoints().disarm();
            until("it is gone", || node.sandbox(&id).is_none()).await;
            assert_clean(&node, &machine).await;
        }
    }
    let order = CreateSandbox::new(snapshot);
    let id = order.id.clone();
    node.create(order).await.unwrap();
    machine.hypervisor.immortal.store(2, SeqCst);
    // Whether this kill still sees the end depends on how busy the machine is.
    let killed = node.kill(&id).await;
    assert!(
        matches!(
            killed,
            Ok(KillOutcome::Killed) | Err(Error::KillTimeout { .. })
        ),
        "{killed:?}"
    );
    until("it is gone", || node.sandbox(&id).is_none()).await;
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_ends_by_itself_is_told_and_cleaned_up() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let order = CreateSandbox::new(template(&node, &machine).await);
    let id = order.id.clone();
    node.create(order).await.unwrap();
    let mut events = node.events();
    machine.hypervisor.vm(&id).power_off();
    let event = events.recv().await.unwrap();
    assert_eq!(
        event,
        NodeEvent::Exited {
            id: id.clone(),
            generation: 1
        }
    );
    assert_clean(&node, &machine).await;
    assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::NotFound);
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_room_for_as_many_as_configured_and_room_comes_back() {
    let machine = Machine::new();
    let mut config = machine.config();
    config.limits.max_sandboxes = 3;
    config.limits.memory_budget_mib = 2 * u64::from(crate::testing::MEMORY_MIB);
    let (node, _) = machine.open_with(config.clone()).await;
    let snapshot = template(&node, &machine).await;
    let create = || node.create(CreateSandbox::new(snapshot.clone()));
    // At the same time, so that a check apart from the reservation would let too many in.
    let outcomes = futures::future::join_all((0..8).map(|_| create())).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 2);
    for error in outcomes.into_iter().filter_map(Result::err) {
        assert!(
            error.is_capacity() && matches!(error, Error::OutOfMemory { .. }),
            "{error}"
        );
    }
    let id = node.sandboxes()[0].id.clone();
    node.kill(&id).await.unwrap();
    create().await.unwrap();
    end(node, &machine).await;

    config.limits.memory_budget_mib = u64::MAX / 2;
    config.limits.memory_reserve_mib = 0;
    let (node, _) = machine.open_with(config.clone()).await;
    let create = || node.create(CreateSandbox::new(snapshot.clone()));
    for _ in 0..3 {
        create().await.unwrap();
    }
    assert!(matches!(
        create().await,
        Err(Error::TooManySandboxes { limit: 3 })
    ));
    end(node, &machine).await;

    config.limits.memory_reserve_mib = u64::MAX;
    let (node, _) = machine.open_with(config).await;
    let error = node
        .create(CreateSandbox::new(snapshot.clone()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::HostMemory { .. }) && error.is_capacity(),
        "{error}"
    );
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_fails_at_any_step_leaves_neither_resources_nor_a_snapshot() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    for step in BUILD_STEPS {
        for failure in [Failure::Error, Failure::Panic] {
            node.failpoints().arm(step, failure);
            let before = node.failpoints().passes(step);
            let built = node
                .build_template(machine.template(), Progress::silent())
                .await;
            assert!(built.is_err(), "{step}");
            assert!(
                node.failpoints().passes(step) > before,
                "{step} is not passed"
            );
            node.failpoints().disarm();
            assert_clean(&node, &machine).await;
            assert_eq!(node.store().list().len(), 0, "{step}");
        }
    }
    // A caller that goes away.
    for step in BUILD_STEPS {
        node.failpoints()
            .arm(step, Failure::Delay(Duration::from_millis(30)));
        let before = node.failpoints().passes(step);
        tokio::select! {
            built = node.build_template(machine.template(), Progress::silent()) => {
                panic!("{step} was not waited for: {built:?}")
            }
            () = until(step, || node.failpoints().passes(step) > before) => {}
        }
        until("the build is undone", || node.inner.tasks.is_empty()).await;
        node.failpoints().disarm();
        assert_clean(&node, &machine).await;
        assert_eq!(node.store().list().len(), 0, "{step}");
    }
    template(&node, &machine).await;
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_ends_everything_also_what_is_under_way() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    node.create(CreateSandbox::new(snapshot.clone()))
        .await
        .unwrap();
    node.failpoints()
        .arm("create/launch", Failure::Delay(Duration::from_millis(50)));
    node.failpoints()
        .arm("build/warm-up", Failure::Delay(Duration::from_millis(50)));
    let begin = |step: &'static str| {
        let node = node.clone();
        async move { until(step, || node.failpoints().passes(step) > 2).await }
    };
    let create = tokio::spawn({
        let (node, order) = (node.clone(), CreateSandbox::new(snapshot.clone()));
        async move { node.create(order).await }
    });
    let build = tokio::spawn({
        let (node, build) = (node.clone(), machine.template());
        async move { node.build_template(build, Progress::silent()).await }
    });
    tokio::join!(begin("create/launch"), begin("build/warm-up"));
    node.shutdown().await.unwrap();
    assert!(matches!(create.await.unwrap(), Err(Error::Killed { .. })));
    assert!(build.await.unwrap().is_err());
    assert_eq!(machine.remains(), Vec::<String>::new());
    assert!(matches!(
        node.create(CreateSandbox::new(snapshot)).await,
        Err(Error::Closed)
    ));
    node.store().clone().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_do_not_share_a_directory() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let again = Node::open(
        machine.config(),
        machine.hypervisor.clone(),
        node.store().clone(),
        None,
    )
    .await;
    assert!(matches!(again, Err(Error::Locked { .. })));
    end(node, &machine).await;
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}
