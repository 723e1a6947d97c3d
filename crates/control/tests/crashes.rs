//! The server is killed in the middle of something, and started again.
//!
//! Each server lives in a runtime of its own, which is dropped while an operation hangs at a step
//! of the fleet: nothing of it runs on, nothing cleans up. What was asked for then has happened or
//! it has not, and nothing is left over.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::time::Duration;

use common::{Plane, Remains, eventually, request};
use cubicle_control::{
    fleet::{FreezeKind, memory::Step},
    lifecycle::State,
    sandbox::{CreateSandbox, ForkSandbox, Lifetime, PauseMode, PauseSandbox, Sandbox},
    snapshot::{CreateSnapshot, SnapshotQuery, SnapshotState},
};

const MINUTE: Lifetime = Lifetime::For(Duration::from_secs(60));

/// What to do with a sandbox.
#[derive(Debug, Clone, Copy)]
enum Ask {
    Pause,
    Resume,
    Snapshot,
    Fork,
    Rollback,
    Kill,
    KillPaused,
    Delete,
}

/// What is left of a sandbox, and what it was.
struct Crashed {
    before: Sandbox,
    remains: Remains,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
}

/// Makes a sandbox with a snapshot `past`, asks for something, and kills the server at a step.
fn crash(ask: Ask, step: Step) -> Crashed {
    let runtime = runtime();
    let crashed = runtime.block_on(async {
        let plane = Plane::new().await;
        let sandboxes = plane.control.sandboxes.clone();
        let snapshots = plane.control.snapshots.clone();
        let order = CreateSandbox {
            env_vars: vec![("A".into(), "1".into())],
            ..request("base")
        };
        let id = plane.create(order).await.id.clone();
        plane.snapshot(&id, Some("past")).await;
        if matches!(ask, Ask::Resume | Ask::KillPaused) {
            sandboxes
                .pause(&id, PauseSandbox::default())
                .await
                .expect("pause");
        }
        let before = Sandbox::clone(&*sandboxes.get(&id).expect("it lives"));
        let reached = plane.fleet.reached(step);
        plane.fleet.takes(step, Duration::from_secs(3600));
        let asked = id.clone();
        tokio::spawn(async move {
            let id = &asked;
            let fork = ForkSandbox {
                count: 3,
                lifetime: MINUTE,
            };
            match ask {
                Ask::Pause => drop(sandboxes.pause(id, PauseSandbox::default()).await),
                Ask::Resume => drop(sandboxes.connect(id, MINUTE).await),
                Ask::Snapshot => drop(snapshots.create(id, CreateSnapshot::default()).await),
                Ask::Fork => drop(sandboxes.fork(id, fork).await),
                Ask::Rollback => drop(sandboxes.rollback(id, "base").await),
                Ask::Kill | Ask::KillPaused => drop(sandboxes.kill(id).await),
                Ask::Delete => drop(snapshots.delete("past").await),
            }
        });
        eventually("the step", || plane.fleet.reached(step) > reached).await;
        Crashed {
            before,
            remains: plane.remains(),
        }
    });
    drop(runtime);
    crashed
}

/// Starts the server again and looks at what there is.
fn restart(crashed: Crashed, check: impl AsyncFnOnce(&Plane, Sandbox)) {
    runtime().block_on(async {
        let plane = crashed.remains.start().await;
        check(&plane, crashed.before).await;
        // Whatever it was, all of it can go.
        for sandbox in plane.control.sandboxes.all() {
            plane
                .control
                .sandboxes
                .kill(&sandbox.id)
                .await
                .expect("kill");
        }
        plane.silence().await;
        let snapshots = &plane.control.snapshots;
        let query = SnapshotQuery {
            states: SnapshotState::ALL.to_vec(),
            ..SnapshotQuery::default()
        };
        for snapshot in snapshots.list(&query).await.expect("list").items {
            if snapshot.state == SnapshotState::Deleted {
                // A place in the tree, no more.
                continue;
            }
            assert_eq!(snapshot.state, SnapshotState::Ready);
            snapshots
                .delete(snapshot.id.as_str())
                .await
                .expect("delete");
        }
        let users = || plane.of_kind(FreezeKind::User);
        eventually("the end of snapshots", || users().is_empty()).await;
        assert_eq!(
            plane.fleet.snapshot_ids().len(),
            1,
            "the template's is left"
        );
    });
}

async fn settled(plane: &Plane) {
    let gone = |kind| plane.of_kind(kind).is_empty();
    eventually("the end of strays", || gone(FreezeKind::Temporary)).await;
}

#[test]
fn a_pause_has_happened_or_it_has_not() {
    for step in [Step::Freeze, Step::Published] {
        restart(crash(Ask::Pause, step), async |plane, before| {
            let now = plane.control.sandboxes.get(&before.id).expect("it lives");
            assert_eq!(*now, before, "{step:?}: as if nothing had been asked");
            eventually("the end of the pause", || plane.pauses().is_empty()).await;
            let paused = plane
                .control
                .sandboxes
                .pause(&before.id, PauseSandbox::default());
            paused.await.expect("now it can be");
        });
    }
    restart(crash(Ask::Pause, Step::Dropped), async |plane, before| {
        let sandboxes = &plane.control.sandboxes;
        let now = sandboxes.get(&before.id).expect("it is not lost");
        assert_eq!((now.state, now.end_at), (State::Paused, None));
        let mode = now.pause.as_ref().map(|pause| pause.mode);
        assert_eq!(mode, Some(PauseMode::Full));
        let awake = sandboxes
            .connect(&before.id, MINUTE)
            .await
            .expect("connect");
        assert_eq!(awake.sandbox.generation, 2);
        let order = plane.fleet.order(&before.id).expect("resumed");
        assert_eq!(order.env_vars, before.env_vars);
    });
}

#[test]
fn a_pause_whose_vm_and_snapshot_are_both_gone_is_an_end() {
    let crashed = crash(Ask::Pause, Step::Freeze);
    crashed.remains.fleet.vanish(&crashed.before.id);
    restart(crashed, async |plane, before| {
        assert!(plane.control.sandboxes.get(&before.id).is_err());
        assert_eq!(plane.reconciled.lost, 1);
    });
    let crashed = crash(Ask::Pause, Step::Dropped);
    let pause = crashed.remains.fleet.snapshot_ids();
    for snapshot in pause {
        crashed.remains.fleet.damage(&snapshot);
    }
    runtime().block_on(async {
        let plane = crashed.remains.start().await;
        assert!(
            plane.control.sandboxes.get(&crashed.before.id).is_err(),
            "nothing can be restored from a torn snapshot"
        );
    });
}

#[test]
fn a_resume_has_happened_or_it_has_not() {
    restart(crash(Ask::Resume, Step::Resume), async |plane, before| {
        let sandboxes = &plane.control.sandboxes;
        assert_eq!(*sandboxes.get(&before.id).expect("asleep"), before);
        assert_eq!(plane.pauses().len(), 1);
        let awake = sandboxes.connect(&before.id, MINUTE).await.expect("again");
        assert!(awake.resumed);
    });
    restart(crash(Ask::Resume, Step::Resumed), async |plane, before| {
        let now = plane.control.sandboxes.get(&before.id).expect("awake");
        assert_eq!((now.state, now.generation), (State::Running, 2));
        assert!(now.end_at.is_some(), "it has the end that was asked for");
        assert_eq!(now.pause, None);
        eventually("the end of the pause", || plane.pauses().is_empty()).await;
    });
    // Its VM did not survive the server: then it sleeps on.
    let crashed = crash(Ask::Resume, Step::Resumed);
    crashed.remains.fleet.vanish(&crashed.before.id);
    restart(crashed, async |plane, before| {
        assert_eq!(
            *plane.control.sandboxes.get(&before.id).expect("asleep"),
            before
        );
    });
}

#[test]
fn a_snapshot_has_been_taken_or_it_has_not() {
    for (step, taken) in [(Step::Freeze, 0), (Step::Published, 1)] {
        restart(crash(Ask::Snapshot, step), async |plane, before| {
            let now = plane.control.sandboxes.get(&before.id).expect("it runs on");
            let query = SnapshotQuery::default();
            let list = plane.control.snapshots.list(&query).await;
            let items = list.expect("list").items;
            assert_eq!(items.len(), 1 + taken, "{step:?}");
            let newest = items[0].id.clone();
            let expected = Sandbox {
                base: newest,
                ..before
            };
            assert_eq!(*now, expected, "it descends from the newest of them");
            for snapshot in items {
                plane.create(request(snapshot.id.as_str())).await;
            }
        });
    }
}

#[test]
fn a_fork_leaves_nothing_that_nobody_learned_of() {
    for step in [Step::Freeze, Step::Published, Step::Create, Step::Delete] {
        restart(crash(Ask::Fork, step), async |plane, before| {
            let sandboxes = &plane.control.sandboxes;
            assert_eq!(*sandboxes.get(&before.id).expect("it runs on"), before);
            settled(plane).await;
            if step == Step::Delete {
                // They were whole, and are seen; their end comes by itself.
                assert_eq!(plane.fleet.alive().len(), 4);
                assert_eq!(sandboxes.all().len(), 4);
            } else {
                assert_eq!(plane.fleet.alive(), std::slice::from_ref(&before.id));
                assert_eq!(sandboxes.in_memory(), (1, 1));
            }
        });
    }
}

#[test]
fn a_rollback_has_happened_or_it_has_not() {
    restart(
        crash(Ask::Rollback, Step::Rollback),
        async |plane, before| {
            let now = plane.control.sandboxes.get(&before.id).expect("it runs on");
            assert_eq!(*now, before, "as if nothing had been asked");
        },
    );
    restart(
        crash(Ask::Rollback, Step::Switched),
        async |plane, before| {
            let sandboxes = &plane.control.sandboxes;
            let now = sandboxes.get(&before.id).expect("it runs");
            assert_eq!((now.state, now.generation), (State::Running, 2));
            let template = plane.control.templates.resolve("base").await;
            let template = template.expect("base").snapshot;
            assert_eq!((&now.snapshot, &now.base), (&template, &template));
            assert_eq!(now.rollback_to, None);
            assert_eq!(
                (&now.envd_token, now.end_at),
                (&before.envd_token, before.end_at)
            );
            sandboxes
                .rollback(&before.id, "past")
                .await
                .expect("its own");
        },
    );
}

#[test]
fn a_kill_goes_on() {
    for ask in [Ask::Kill, Ask::KillPaused] {
        restart(crash(ask, Step::Kill), async |plane, before| {
            assert!(plane.control.sandboxes.get(&before.id).is_err());
            plane.silence().await;
        });
    }
}

#[test]
fn a_deletion_goes_on() {
    restart(crash(Ask::Delete, Step::Delete), async |plane, before| {
        assert!(plane.control.snapshots.get("past").await.is_err());
        eventually("its end", || plane.of_kind(FreezeKind::User).is_empty()).await;
        assert_eq!(
            *plane.control.sandboxes.get(&before.id).expect("runs on"),
            before
        );
    });
}
