//! Whatever is asked for, in whatever order, at once or one after the other, with whatever
//! failures in between: what is in memory, what is on record, and what the fleet has agree.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{Plane, Remains, eventually, failed, request};
use cubicle_control::{
    Error,
    fleet::{FreezeKind, memory::Step},
    lifecycle::State,
    sandbox::{
        CreateSandbox, ForkSandbox, LifecycleOptions, Lifetime, PauseSandbox, Sandbox, Sandboxes,
    },
    snapshot::{CreateSnapshot, SnapshotQuery, SnapshotState, Snapshots},
};
use cubicle_ids::{SandboxId, SnapshotId};
use proptest::prelude::*;

const MINUTE: Lifetime = Lifetime::For(Duration::from_secs(60));

/// One thing to ask for. Numbers pick one of what there is at that moment.
#[derive(Debug, Clone)]
enum Ask {
    Create { auto_pause: bool },
    CreateFrom { snapshot: usize },
    Kill { sandbox: usize },
    Pause { sandbox: usize, memory: bool },
    Connect { sandbox: usize },
    Wake { sandbox: usize },
    TimeIsUp { sandbox: usize },
    Snapshot { sandbox: usize, named: bool },
    Rollback { sandbox: usize, snapshot: usize },
    Fork { sandbox: usize, count: u32 },
    Delete { snapshot: usize },
    Crash { sandbox: usize },
    Fail { step: Step },
    Slow { step: Step },
    Restart,
}

fn ask() -> impl Strategy<Value = Ask> {
    let pick = || 0usize..8;
    let step = || prop::sample::select(&Step::ALL[..]);
    prop_oneof![
        3 => any::<bool>().prop_map(|auto_pause| Ask::Create { auto_pause }),
        2 => pick().prop_map(|snapshot| Ask::CreateFrom { snapshot }),
        2 => pick().prop_map(|sandbox| Ask::Kill { sandbox }),
        4 => (pick(), any::<bool>()).prop_map(|(sandbox, memory)| Ask::Pause { sandbox, memory }),
        4 => pick().prop_map(|sandbox| Ask::Connect { sandbox }),
        2 => pick().prop_map(|sandbox| Ask::Wake { sandbox }),
        1 => pick().prop_map(|sandbox| Ask::TimeIsUp { sandbox }),
        4 => (pick(), any::<bool>()).prop_map(|(sandbox, named)| Ask::Snapshot { sandbox, named }),
        4 => (pick(), pick()).prop_map(|(sandbox, snapshot)| Ask::Rollback { sandbox, snapshot }),
        2 => (pick(), 1u32..4).prop_map(|(sandbox, count)| Ask::Fork { sandbox, count }),
        2 => pick().prop_map(|snapshot| Ask::Delete { snapshot }),
        1 => pick().prop_map(|sandbox| Ask::Crash { sandbox }),
        4 => step().prop_map(|step| Ask::Fail { step }),
        1 => step().prop_map(|step| Ask::Slow { step }),
        1 => Just(Ask::Restart),
    ]
}

/// Does one thing. Whether it succeeds is not the question here.
async fn perform(ask: Ask, sandboxes: Sandboxes, snapshots: Snapshots) {
    let sandbox = |n: usize| {
        let mut ids = sandboxes.ids_in_memory();
        ids.sort();
        (!ids.is_empty()).then(|| ids[n % ids.len()].clone())
    };
    let snapshot = async |n: usize| {
        let page = snapshots.list(&SnapshotQuery::default()).await;
        let items = page.expect("list").items;
        (!items.is_empty()).then(|| items[n % items.len()].reference())
    };
    match ask {
        Ask::Create { auto_pause } => {
            let lifecycle = LifecycleOptions {
                auto_pause,
                auto_resume: auto_pause,
                ..LifecycleOptions::default()
            };
            let order = CreateSandbox {
                lifecycle,
                ..request("base")
            };
            let _ = sandboxes.create(order).await;
        }
        Ask::CreateFrom { snapshot: n } => {
            if let Some(reference) = snapshot(n).await {
                let _ = sandboxes.create(request(&reference)).await;
            }
        }
        Ask::Snapshot { sandbox: n, named } => {
            let order = CreateSnapshot {
                name: named.then(|| "named".to_owned()),
                ..CreateSnapshot::default()
            };
            if let Some(id) = sandbox(n) {
                let _ = snapshots.create(&id, order).await;
            }
        }
        Ask::Delete { snapshot: n } => {
            if let Some(reference) = snapshot(n).await {
                let _ = snapshots.delete(&reference).await;
            }
        }
        Ask::Rollback {
            sandbox: n,
            snapshot: m,
        } => {
            let reference = snapshot(m).await.unwrap_or_else(|| "base".to_owned());
            if let Some(id) = sandbox(n) {
                let _ = sandboxes.rollback(&id, &reference).await;
            }
        }
        Ask::Kill { sandbox: n } => {
            if let Some(id) = sandbox(n) {
                let killed = sandboxes.kill(&id).await;
                assert!(
                    matches!(killed, Ok(()) | Err(Error::SandboxNotFound { .. })),
                    "a kill always works: {killed:?}"
                );
            }
        }
        Ask::Pause { sandbox: n, memory } => {
            let order = PauseSandbox {
                memory,
                require_healthy: false,
            };
            if let Some(id) = sandbox(n) {
                let _ = sandboxes.pause(&id, order).await;
            }
        }
        Ask::Connect { sandbox: n } => {
            if let Some(id) = sandbox(n) {
                let _ = sandboxes.connect(&id, MINUTE).await;
            }
        }
        Ask::Wake { sandbox: n } => {
            if let Some(id) = sandbox(n) {
                let _ = sandboxes.wake(&id).await;
            }
        }
        Ask::TimeIsUp { sandbox: n } => {
            if let Some(id) = sandbox(n) {
                let now = Lifetime::For(Duration::ZERO);
                let _ = sandboxes.set_lifetime(&id, now).await;
            }
        }
        Ask::Fork { sandbox: n, count } => {
            let order = ForkSandbox {
                count,
                lifetime: MINUTE,
            };
            if let Some(id) = sandbox(n) {
                let _ = sandboxes.fork(&id, order).await;
            }
        }
        Ask::Crash { .. } | Ask::Fail { .. } | Ask::Slow { .. } | Ask::Restart => {
            unreachable!("the fleet's, or the server's")
        }
    }
}

/// Everything that there is, by id.
fn by_id(plane: &Plane) -> BTreeMap<SandboxId, Sandbox> {
    let all = plane.control.sandboxes.all();
    all.iter()
        .map(|sandbox| (sandbox.id.clone(), Sandbox::clone(sandbox)))
        .collect()
}

/// Waits until nothing is under way any more, and compares memory with the fleet.
async fn agree(plane: &Plane) {
    let sandboxes = &plane.control.sandboxes;
    plane.fleet.behave();
    let at_rest = |sandbox: &Sandbox| {
        let over = sandbox.is_expired(time::OffsetDateTime::now_utc());
        matches!(sandbox.state, State::Running | State::Paused) && !over
    };
    eventually("rest", || {
        let all = sandboxes.all();
        all.len() == sandboxes.ids_in_memory().len() && all.iter().all(|s| at_rest(s))
    })
    .await;
    let running = || -> BTreeMap<_, _> {
        let all = by_id(plane).into_values();
        all.filter(|s| s.state == State::Running)
            .map(|s| (s.id, Some(s.generation)))
            .collect()
    };
    let vms = || -> BTreeMap<_, _> {
        let alive = plane.fleet.alive().into_iter();
        alive
            .map(|id| (id.clone(), plane.fleet.generation_of(&id)))
            .collect()
    };
    // News of a crash may still be under way.
    for _ in 0..1000 {
        if vms() == running() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(vms(), running(), "every VM belongs to a sandbox that runs");
    let all = by_id(plane);
    let paused: BTreeSet<_> = all
        .values()
        .filter_map(|s| s.pause.as_ref().map(|pause| pause.snapshot.clone()))
        .collect();
    for sandbox in all.values() {
        assert_eq!(sandbox.pause.is_some(), sandbox.state == State::Paused);
        assert_eq!(sandbox.rollback_to, None);
    }
    let set = |kind| plane.of_kind(kind).into_iter().collect::<BTreeSet<_>>();
    eventually("the end of pauses", || set(FreezeKind::Pause) == paused).await;
    let temporary = || set(FreezeKind::Temporary);
    eventually("the end of forks", || temporary().is_empty()).await;

    let query = SnapshotQuery {
        states: SnapshotState::ALL.to_vec(),
        ..SnapshotQuery::default()
    };
    let mut listed = BTreeSet::new();
    for _ in 0..200 {
        let page = plane.control.snapshots.list(&query).await.expect("list");
        assert_eq!(page.next, None, "few enough for a page");
        let items = page.items;
        listed = items
            .iter()
            .filter(|s| s.state != SnapshotState::Deleted)
            .map(|s| s.id.clone())
            .collect();
        let busy =
            |s: SnapshotState| matches!(s, SnapshotState::Publishing | SnapshotState::Deleting);
        if !items.iter().any(|s| busy(s.state)) && set(FreezeKind::User) == listed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(set(FreezeKind::User), listed, "every snapshot has a row");
    let ends = all.values().filter(|s| s.end_at.is_some()).count();
    // What crashed may still be on its way out.
    let timers = || sandboxes.in_memory() == (all.len(), ends);
    eventually("that every end has a timer", timers).await;
}

async fn run(asks: Vec<(Ask, bool)>) {
    let mut plane = Plane::with(|config| {
        config.sandboxes.auto_pause_patience = Duration::from_millis(1);
    })
    .await;
    let mut tasks = tokio::task::JoinSet::new();
    for (ask, wait) in asks {
        match ask {
            Ask::Fail { step } => plane.fleet.fail_at(step, failed()),
            Ask::Slow { step } => plane.fleet.takes(step, Duration::from_millis(3)),
            Ask::Crash { sandbox } => {
                let mut alive = plane.fleet.alive();
                alive.sort();
                if !alive.is_empty() {
                    plane.fleet.crash(&alive[sandbox % alive.len()]);
                }
            }
            Ask::Restart => {
                while let Some(ended) = tasks.join_next().await {
                    ended.expect("no panic");
                }
                plane = plane.restart(|_| ()).await;
            }
            ask => {
                let (sandboxes, snapshots) = (
                    plane.control.sandboxes.clone(),
                    plane.control.snapshots.clone(),
                );
                tasks.spawn(perform(ask, sandboxes, snapshots));
                if wait {
                    while let Some(ended) = tasks.join_next().await {
                        ended.expect("no panic");
                    }
                } else {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no panic");
    }
    agree(&plane).await;
    let before = by_id(&plane);
    let plane = plane.restart(|_| ()).await;
    assert_eq!(
        by_id(&plane),
        before,
        "what is on record is what was in memory"
    );
    let report = &plane.reconciled;
    assert_eq!(
        (report.kept, report.lost, report.strays),
        (before.len(), 0, 0)
    );
    assert_eq!((report.stray_snapshots, report.failed_snapshots), (0, 0));
    agree(&plane).await;
    for id in before.keys() {
        plane.control.sandboxes.kill(id).await.expect("kill");
    }
    plane.silence().await;
}

/// What was promised to clients, and what they asked to be taken away.
#[derive(Debug, Default)]
struct Ledger {
    sandboxes: BTreeSet<SandboxId>,
    snapshots: BTreeSet<SnapshotId>,
    paused: BTreeSet<SandboxId>,
    /// Those that somebody wanted to be awake, before or after they were paused.
    woken: BTreeSet<SandboxId>,
    given_up: BTreeSet<String>,
}

type SharedLedger = Arc<Mutex<Ledger>>;

/// Does one thing to a random sandbox, and notes what was promised before anything else is done.
async fn promise(ask: Ask, sandboxes: Sandboxes, snapshots: Snapshots, ledger: SharedLedger) {
    let note = || ledger.lock().expect("no panic while it is held");
    let pick = |n: usize| {
        let known: Vec<_> = note().sandboxes.iter().cloned().collect();
        (!known.is_empty()).then(|| known[n % known.len()].clone())
    };
    match ask {
        Ask::Create { .. } => {
            if let Ok(made) = sandboxes.create(request("base")).await {
                note().sandboxes.insert(made.sandbox.id.clone());
            }
        }
        Ask::Kill { sandbox } | Ask::Crash { sandbox } => {
            if let Some(id) = pick(sandbox) {
                note().given_up.insert(id.to_string());
                let _ = sandboxes.kill(&id).await;
            }
        }
        Ask::Snapshot { sandbox, .. } => {
            if let Some(id) = pick(sandbox)
                && let Ok(made) = snapshots.create(&id, CreateSnapshot::default()).await
            {
                note().snapshots.insert(made.snapshot.id);
            }
        }
        Ask::Delete { snapshot } => {
            let known: Vec<_> = note().snapshots.iter().cloned().collect();
            if !known.is_empty() {
                let id = known[snapshot % known.len()].to_string();
                note().given_up.insert(id.clone());
                let _ = snapshots.delete(&id).await;
            }
        }
        Ask::Pause { sandbox, .. } => {
            if let Some(id) = pick(sandbox)
                && sandboxes.pause(&id, PauseSandbox::default()).await.is_ok()
            {
                note().paused.insert(id);
            }
        }
        Ask::Connect { sandbox } | Ask::Wake { sandbox } => {
            if let Some(id) = pick(sandbox) {
                note().woken.insert(id.clone());
                let _ = sandboxes.connect(&id, MINUTE).await;
            }
        }
        Ask::Rollback { sandbox, .. } => {
            if let Some(id) = pick(sandbox) {
                let _ = sandboxes.rollback(&id, "base").await;
            }
        }
        Ask::Fork { sandbox, count } => {
            let order = ForkSandbox {
                count,
                lifetime: MINUTE,
            };
            if let Some(id) = pick(sandbox)
                && let Ok(forked) = sandboxes.fork(&id, order).await
            {
                let born = forked.children.into_iter().flatten();
                note().sandboxes.extend(born.map(|child| child.id.clone()));
            }
        }
        _ => {}
    }
}

/// Asks for all of it at once and kills the server after a while.
fn run_until_killed(asks: Vec<Ask>, after: Duration) -> (Remains, Ledger) {
    let runtime = runtime();
    let ledger = SharedLedger::default();
    let remains = runtime.block_on(async {
        let plane = Plane::new().await;
        for step in Step::ALL {
            plane.fleet.takes(step, Duration::from_millis(2));
        }
        for ask in asks {
            let (sandboxes, snapshots) = (
                plane.control.sandboxes.clone(),
                plane.control.snapshots.clone(),
            );
            tokio::spawn(promise(ask, sandboxes, snapshots, Arc::clone(&ledger)));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(after).await;
        plane.remains()
    });
    drop(runtime);
    let ledger = std::mem::take(&mut *ledger.lock().expect("nobody holds it"));
    // A statement that was under way ends in a thread of its own.
    std::thread::sleep(Duration::from_millis(20));
    (remains, ledger)
}

async fn promises_are_kept(plane: &Plane, ledger: &Ledger) {
    let all = by_id(plane);
    let kept = |id: &str| !ledger.given_up.contains(id);
    for id in ledger.sandboxes.iter().filter(|id| kept(id.as_str())) {
        assert!(all.contains_key(id), "sandbox {id} was promised");
    }
    let asleep = ledger.paused.difference(&ledger.woken);
    for id in asleep.filter(|id| kept(id.as_str())) {
        assert_eq!(all[id].state, State::Paused, "{id} was paused");
    }
    for id in ledger.snapshots.iter().filter(|id| kept(id.as_str())) {
        let found = plane.control.snapshots.get(id.as_str()).await;
        assert_eq!(found.expect("it was promised").state, SnapshotState::Ready);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 30,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn memory_record_and_fleet_agree(asks in prop::collection::vec((ask(), any::<bool>()), 1..60)) {
        runtime().block_on(run(asks));
    }

    #[test]
    fn a_server_that_is_killed_keeps_its_promises_and_nothing_else(
        asks in prop::collection::vec(ask(), 1..40),
        after in 0u64..15,
    ) {
        let (remains, ledger) = run_until_killed(asks, Duration::from_millis(after));
        runtime().block_on(async {
            let plane = remains.start().await;
            promises_are_kept(&plane, &ledger).await;
            agree(&plane).await;
            promises_are_kept(&plane, &ledger).await;
        });
    }
}
