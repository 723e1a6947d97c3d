//! Whole lives of sandboxes on a node whose VMs are in memory and whose store is real.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::Progress;
use futures::{StreamExt as _, stream};
use proptest::prelude::*;
use tokio::runtime::{Builder, Runtime};

use crate::{
    CreateSandbox, Error, Failure, KillOutcome, Node, NodeEvent, SandboxState, empty_body,
    testing::Machine,
};

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
    assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_nodes_sandboxes_are_adopted_under_the_same_generation() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    let orders: Vec<_> = (0..4)
        .map(|_| CreateSandbox::new(snapshot.clone()))
        .collect();
    let ids: Vec<_> = orders.iter().map(|order| order.id.clone()).collect();
    for order in orders {
        node.create(order).await.unwrap();
    }
    let before = node.sandboxes();
    node.detach().await.unwrap();
    node.store().clone().close().await;
    drop(node);

    assert_eq!(machine.hypervisor.alive(), 4);
    machine.hypervisor.vm(&ids[3]).power_off();
    let (node, mut report) = machine.open().await;
    report.adopted.sort();
    let mut want = ids[..3].to_vec();
    want.sort();
    assert_eq!(report.adopted, want);
    assert!(matches!(&report.lost[..], [(id, why)] if *id == ids[3] && why.contains("no longer")));
    assert_eq!(node.sandboxes(), before[..3], "facts are what they were");
    for id in &ids[..3] {
        assert_eq!(node.generation(id), Some(1));
        assert_eq!(get(&node, id, "/health").await.unwrap(), 204);
    }
    assert_eq!(node.kill(&ids[0]).await.unwrap(), KillOutcome::Killed);
    let mut events = node.events();
    machine.hypervisor.vm(&ids[1]).power_off();
    assert!(
        matches!(events.recv().await, Ok(NodeEvent::Exited { .. })),
        "watched as before"
    );
    assert_eq!(node.capacity().running, 1);
    end(node, &machine).await;
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// What a step leaves when the process dies in it, and what the next one makes of it. The first
/// node's runtime is torn down in the middle of the step, as `kill -9` would.
#[test]
fn a_crash_at_any_step_leaves_nothing_that_the_next_start_does_not_find() {
    let machine = Machine::new();
    let snapshot = runtime().block_on(async {
        let (node, _) = machine.open().await;
        let snapshot = template(&node, &machine).await;
        end(node, &machine).await;
        snapshot
    });
    let long = Failure::Delay(Duration::from_secs(3600));
    for step in CREATE_STEPS
        .into_iter()
        .chain(KILL_STEPS)
        .chain(BUILD_STEPS)
    {
        let first = runtime();
        let survivor = first.block_on(async {
            let (node, _) = machine.open().await;
            let survivor = CreateSandbox::new(snapshot.clone());
            let (id, victim) = (survivor.id.clone(), CreateSandbox::new(snapshot.clone()));
            node.create(survivor).await.unwrap();
            if step.starts_with("kill/") {
                node.create(victim.clone()).await.unwrap();
            }
            node.failpoints().arm(step, long);
            let before = node.failpoints().passes(step);
            let (task, build) = (node.clone(), machine.template());
            tokio::spawn(async move {
                match step.split_once('/').unwrap().0 {
                    "create" => drop(task.create(victim).await),
                    "kill" => drop(task.kill(&victim.id).await),
                    _ => drop(task.build_template(build, Progress::silent()).await),
                }
            });
            until(step, || node.failpoints().passes(step) > before).await;
            id
        });
        first.shutdown_timeout(Duration::from_secs(10));

        runtime().block_on(async {
            let (node, report) = machine.open().await;
            assert_eq!(report.adopted, [survivor.clone()], "{step}: {report:?}");
            assert_eq!(report.lost, [], "{step}");
            assert_eq!(get(&node, &survivor, "/health").await.unwrap(), 204);
            assert_eq!(node.sandboxes().len(), 1);
            node.kill(&survivor).await.unwrap();
            assert_eq!(machine.hypervisor.alive(), 0, "{step}");
            assert_clean(&node, &machine).await;
            assert_eq!(node.store().list().len(), 1, "{step}");
            end(node, &machine).await;
        });
    }
}

#[derive(Debug, Clone)]
enum Op {
    Create(usize),
    Abandon(usize, u64),
    Kill(usize),
    PowerOff(usize),
    Sever(usize),
    Ask(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0..4_usize;
    prop_oneof![
        3 => who.clone().prop_map(Op::Create),
        1 => (who.clone(), 0..3000_u64).prop_map(|(who, us)| Op::Abandon(who, us)),
        3 => who.clone().prop_map(Op::Kill),
        1 => who.clone().prop_map(Op::PowerOff),
        1 => who.clone().prop_map(Op::Sever),
        2 => who.prop_map(Op::Ask),
    ]
}

async fn apply(node: &Node, machine: &Machine, snapshot: &SnapshotId, ids: &[SandboxId], op: Op) {
    let order = |who: usize| CreateSandbox {
        id: ids[who].clone(),
        ..CreateSandbox::new(snapshot.clone())
    };
    let vm = |who: usize| {
        let alive = node
            .inner
            .registry
            .get(&ids[who])
            .and_then(|sandbox| sandbox.live());
        alive.ok().map(|_| machine.hypervisor.find(&ids[who]))
    };
    match op {
        Op::Create(who) => match node.create(order(who)).await {
            Ok(_) | Err(Error::Exists { .. } | Error::Killed { .. }) => {}
            // The VM was powered off or its daemon died before it had answered.
            Err(Error::Broken { .. } | Error::Unanswered { .. } | Error::Vm(_)) => {}
            Err(error) => panic!("create: {error}"),
        },
        Op::Abandon(who, us) => {
            tokio::time::timeout(Duration::from_micros(us), node.create(order(who)))
                .await
                .ok();
        }
        Op::Kill(who) => {
            node.kill(&ids[who]).await.unwrap();
        }
        Op::PowerOff(who) => {
            if let Some(vm) = vm(who).flatten() {
                vm.power_off();
            }
        }
        Op::Sever(who) => {
            if let Some(vm) = vm(who).flatten() {
                vm.sever();
            }
        }
        Op::Ask(who) => {
            let asked =
                tokio::time::timeout(Duration::from_secs(20), get(node, &ids[who], "/health"));
            match asked.await.expect("every request ends") {
                Ok(status) => assert_eq!(status, 204),
                Err(error) => assert!(
                    matches!(
                        error,
                        Error::NotFound { .. }
                            | Error::NotReady { .. }
                            | Error::Killed { .. }
                            | Error::Broken { .. }
                    ),
                    "{error}"
                ),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is done to a few sandboxes at the same time: everything ends, and once all are
    /// killed nothing is left.
    #[test]
    fn any_mix_of_operations_ends_clean(
        lanes in prop::collection::vec(prop::collection::vec(op(), 1..12), 1..6),
    ) {
        let machine = Arc::new(Machine::new());
        runtime().block_on(async {
            let (node, _) = machine.open().await;
            let snapshot = template(&node, &machine).await;
            let ids: Arc<Vec<_>> = Arc::new((0..4).map(|_| SandboxId::generate()).collect());
            let lanes = lanes.into_iter().map(|lane| {
                let (node, machine) = (node.clone(), machine.clone());
                let (snapshot, ids) = (snapshot.clone(), ids.clone());
                tokio::spawn(async move {
                    for op in lane {
                        apply(&node, &machine, &snapshot, &ids, op).await;
                    }
                })
            });
            for lane in lanes.collect::<Vec<_>>() {
                lane.await.unwrap();
            }
            for id in ids.iter() {
                node.kill(id).await.unwrap();
            }
            assert_clean(&node, &machine).await;
            end(node, &machine).await;
        });
    }
}
