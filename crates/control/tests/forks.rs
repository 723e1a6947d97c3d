//! One sandbox becomes several, and goes back to what it was.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::{collections::HashSet, time::Duration};

use common::{Plane, eventually, failed, request};
use cubicle_control::{
    Error,
    fleet::{FleetError, FreezeKind, NetworkOptions, memory::Step},
    lifecycle::State,
    sandbox::{
        CreateSandbox, ForkSandbox, LifecycleOptions, Lifetime, MAX_FORKS, PauseSandbox, Sandbox,
    },
    snapshot::{CreateSnapshot, SnapshotQuery},
};
use cubicle_ids::{SandboxId, SnapshotId};
use time::OffsetDateTime;

const MINUTE: Lifetime = Lifetime::For(Duration::from_secs(60));

fn copies(count: u32) -> ForkSandbox {
    ForkSandbox {
        count,
        lifetime: MINUTE,
    }
}

#[tokio::test]
async fn copies_are_alike_but_not_the_same() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let order = CreateSandbox {
        env_vars: vec![("A".into(), "1".into())],
        metadata: [("k".into(), "v".into())].into(),
        network: NetworkOptions {
            allow_public_traffic: Some(false),
            allow_internet: Some(false),
            ..NetworkOptions::default()
        },
        lifecycle: LifecycleOptions {
            auto_pause: true,
            auto_resume: true,
            ..LifecycleOptions::default()
        },
        lifetime: Lifetime::For(Duration::from_secs(3600)),
        ..request("base")
    };
    let source = plane.create(order).await;
    let own = plane.snapshot(&source.id, None).await;
    let forked = sandboxes.fork(&source.id, copies(12)).await.expect("fork");
    assert_eq!(forked.taken.tier, "anonymous_pages");
    assert_eq!(plane.fleet.reached(Step::Published), 2, "frozen once");
    let children: Vec<_> = forked.children.into_iter().map(Result::unwrap).collect();
    assert_eq!(children.len(), 12);
    let distinct = |of: fn(&Sandbox) -> String| -> usize {
        let all = children.iter().map(|child| of(child));
        all.chain([of(&source)]).collect::<HashSet<_>>().len()
    };
    assert_eq!(distinct(|sandbox| sandbox.id.to_string()), 13);
    assert_eq!(distinct(|sandbox| sandbox.envd_token.clone()), 13);
    let traffic = |sandbox: &Sandbox| sandbox.traffic_token.clone().expect("closed");
    assert_eq!(distinct(traffic), 13);
    for child in &children {
        assert_eq!(child.state, State::Running);
        assert_eq!(child.metadata, source.metadata);
        assert_eq!(child.network, source.network);
        assert_eq!(child.lifecycle, source.lifecycle);
        assert_eq!(child.env_vars, source.env_vars);
        assert_eq!(
            (&child.template, &child.alias),
            (&source.template, &source.alias)
        );
        assert_eq!(child.base, own.id, "the source's past is theirs");
        let left = child.end_at.expect("an end") - OffsetDateTime::now_utc();
        assert!(left <= time::Duration::MINUTE && left > time::Duration::seconds(50));
        let order = plane.fleet.order(&child.id).expect("created");
        assert_eq!(order.envd_token, child.envd_token);
        assert_eq!(order.env_vars, source.env_vars);
    }
    let after = sandboxes.get(&source.id).expect("it runs on");
    assert_eq!((after.state, after.generation), (State::Running, 1));
    assert_eq!(
        after.base, own.id,
        "nothing of the fork is left in its past"
    );
    let gone = || plane.of_kind(FreezeKind::Temporary).is_empty();
    eventually("the end of the temporary snapshot", gone).await;
    let listed = plane
        .control
        .snapshots
        .list(&SnapshotQuery::default())
        .await;
    assert_eq!(listed.expect("list").items.len(), 1);
    let back = sandboxes.rollback(&children[0].id, own.id.as_str()).await;
    assert_eq!(back.expect("its past").sandbox.generation, 2);
    for refused in [0, MAX_FORKS + 1] {
        let refused = sandboxes.fork(&source.id, copies(refused)).await;
        assert!(
            matches!(refused, Err(Error::Invalid { field: "count", .. })),
            "{refused:?}"
        );
    }
    let unknown = sandboxes.fork(&SandboxId::generate(), copies(1)).await;
    assert!(matches!(unknown, Err(Error::SandboxNotFound { .. })));
    sandboxes
        .pause(&source.id, PauseSandbox::default())
        .await
        .expect("pause");
    let asleep = sandboxes.fork(&source.id, copies(1)).await;
    assert!(matches!(asleep, Err(Error::Conflict { .. })), "{asleep:?}");
}

#[tokio::test]
async fn some_copies_may_fail() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let source = plane.sandbox().await;
    for _ in 0..3 {
        plane.fleet.fail_next_create(failed());
    }
    let forked = sandboxes.fork(&source.id, copies(8)).await.expect("fork");
    let made = forked.children.iter().filter(|child| child.is_ok()).count();
    assert_eq!((forked.children.len(), made), (8, 5));
    assert_eq!(plane.fleet.alive().len(), 6);
    assert_eq!(
        sandboxes.in_memory(),
        (6, 6),
        "nothing of the others is left"
    );

    plane.fleet.room_for(8);
    let forked = sandboxes.fork(&source.id, copies(5)).await.expect("fork");
    let full =
        |child: &Result<_, Error>| matches!(child, Err(Error::Fleet(FleetError::Capacity { .. })));
    assert_eq!(
        forked.children.iter().filter(|child| full(child)).count(),
        3
    );

    plane.fleet.fail_at(Step::Published, failed());
    let refused = sandboxes.fork(&source.id, copies(2)).await;
    assert!(matches!(refused, Err(Error::Fleet(_))), "{refused:?}");
    assert_eq!(plane.fleet.alive().len(), 8);
    let gone = || plane.of_kind(FreezeKind::Temporary).is_empty();
    eventually("the end of what was published", gone).await;
    assert_eq!(*sandboxes.get(&source.id).expect("runs on"), *source);
}

#[tokio::test]
async fn the_source_may_die_and_the_client_may_leave() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    // Killed when it is frozen already: the copies need only the snapshot.
    let source = plane.sandbox().await;
    plane.fleet.create_takes(Duration::from_millis(40));
    let fork = {
        let (sandboxes, id) = (sandboxes.clone(), source.id.clone());
        tokio::spawn(async move { sandboxes.fork(&id, copies(3)).await })
    };
    eventually("the copies", || plane.fleet.reached(Step::Create) > 1).await;
    sandboxes.kill(&source.id).await.expect("kill");
    let forked = fork.await.expect("task").expect("fork");
    for child in forked.children {
        sandboxes
            .kill(&child.expect("a copy").id)
            .await
            .expect("kill");
    }
    plane.silence().await;

    // Killed before: there is nothing to copy.
    plane.fleet.behave();
    let source = plane.sandbox().await;
    plane.fleet.takes(Step::Freeze, Duration::from_millis(40));
    let reached = plane.fleet.reached(Step::Freeze);
    let fork = {
        let (sandboxes, id) = (sandboxes.clone(), source.id.clone());
        tokio::spawn(async move { sandboxes.fork(&id, copies(3)).await })
    };
    eventually("the freeze", || plane.fleet.reached(Step::Freeze) > reached).await;
    sandboxes.kill(&source.id).await.expect("kill");
    assert!(fork.await.expect("task").is_err());
    plane.silence().await;

    // Nobody learned of the copies.
    plane.fleet.behave();
    let source = plane.sandbox().await;
    plane.fleet.create_takes(Duration::from_millis(30));
    let creates = plane.fleet.calls().0;
    let soon = Duration::from_millis(10);
    let impatient = tokio::time::timeout(soon, sandboxes.fork(&source.id, copies(3))).await;
    assert!(impatient.is_err());
    eventually("the copies", || plane.fleet.calls().0 == creates + 3).await;
    plane.silence_but(&[&source.id]).await;
    assert_eq!(plane.fleet.alive(), std::slice::from_ref(&source.id));
}

#[tokio::test]
async fn while_copies_are_made_the_source_is_free_again() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let source = plane.sandbox().await;
    let creates = plane.fleet.reached(Step::Create);
    plane.fleet.takes(Step::Freeze, Duration::from_millis(40));
    plane.fleet.create_takes(Duration::from_millis(200));
    let fork = {
        let (sandboxes, id) = (sandboxes.clone(), source.id.clone());
        tokio::spawn(async move { sandboxes.fork(&id, copies(2)).await })
    };
    eventually("the freeze", || plane.fleet.reached(Step::Freeze) == 1).await;
    let busy = plane
        .control
        .snapshots
        .create(&source.id, CreateSnapshot::default())
        .await;
    assert!(
        matches!(busy, Err(Error::Busy { doing: "fork", .. })),
        "{busy:?}"
    );
    eventually("the copies", || plane.fleet.reached(Step::Create) > creates).await;
    plane.snapshot(&source.id, None).await;
    assert!(!fork.is_finished(), "the copies take longer");
    let forked = fork.await.expect("task").expect("fork");
    for child in forked.children {
        assert_eq!(child.expect("a copy").base, source.base, "of before");
    }
}

#[tokio::test]
async fn a_sandbox_goes_back_to_its_past_and_stays_itself() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let order = CreateSandbox {
        env_vars: vec![("A".into(), "1".into())],
        ..request("base")
    };
    let before = plane.create(order).await;
    let id = &before.id;
    let first = plane.snapshot(id, Some("first")).await.id;
    let second = plane.snapshot(id, None).await.id;
    let template = before.snapshot.clone();
    let mut generation = before.generation;
    for (reference, meant) in [
        (first.to_string(), &first),
        (format!("{second}:default"), &second),
        ("first".to_owned(), &first),
        ("base".to_owned(), &template),
        (second.to_string(), &second),
    ] {
        let back = sandboxes.rollback(id, &reference).await.expect("rollback");
        generation += 1;
        assert_eq!(&back.snapshot, meant);
        assert!(!back.phases.is_empty());
        let expected = Sandbox {
            generation,
            snapshot: meant.clone(),
            base: meant.clone(),
            ..Sandbox::clone(&before)
        };
        assert_eq!(*back.sandbox, expected, "all else is as it was");
        assert_eq!(*sandboxes.get(id).expect("it runs"), expected);
        assert_eq!(plane.fleet.generation_of(id), Some(generation));
        let order = plane.fleet.order(id).expect("restored");
        assert_eq!(
            (&order.snapshot, &order.envd_token),
            (meant, &before.envd_token)
        );
        assert_eq!(order.env_vars, before.env_vars);
    }
    // What was taken after the point that it went back to is not lost.
    let third = plane.snapshot(id, None).await;
    assert_eq!(third.parent, Some(second.clone()));
    let plane = plane.restart(|_| ()).await;
    let sandboxes = &plane.control.sandboxes;
    let kept = sandboxes.get(id).expect("kept");
    assert_eq!((&kept.base, kept.generation), (&third.id, generation));
    assert_eq!(plane.fleet.alive(), std::slice::from_ref(id));
    sandboxes.kill(id).await.expect("kill");
    plane.silence().await;
}

#[tokio::test]
async fn a_sandbox_does_not_go_to_the_past_of_others() {
    let plane = Plane::new().await;
    plane.build("other").await;
    let sandboxes = &plane.control.sandboxes;
    let (a, b) = (plane.sandbox().await, plane.sandbox().await);
    let of_a = plane.snapshot(&a.id, None).await.id;
    let of_b = plane.snapshot(&b.id, None).await.id;
    let child = plane.create(request(of_a.as_str())).await;
    let later = plane.snapshot(&a.id, None).await.id;
    for (sandbox, strange) in [
        (&a, of_b.as_str()),
        (&a, "other"),
        (&child, of_b.as_str()),
        (&child, later.as_str()),
    ] {
        let refused = sandboxes.rollback(&sandbox.id, strange).await;
        let Err(error @ Error::NotInHistory { .. }) = refused else {
            panic!("{strange}: {refused:?}")
        };
        assert!(
            error.to_string().contains("create a sandbox from"),
            "{error}"
        );
    }
    for (sandbox, own) in [(&child, of_a.as_str()), (&child, "base"), (&a, "base")] {
        sandboxes.rollback(&sandbox.id, own).await.expect(own);
    }
    for missing in ["nothing", "", SnapshotId::generate().as_str()] {
        let missing = sandboxes.rollback(&a.id, missing).await;
        let Err(error @ Error::SnapshotNotFound { .. }) = missing else {
            panic!("{missing:?}")
        };
        assert!(
            !error.to_string().to_lowercase().contains("template"),
            "{error}"
        );
    }
    let unknown = sandboxes.rollback(&SandboxId::generate(), "base").await;
    assert!(matches!(unknown, Err(Error::SandboxNotFound { .. })));
    plane.control.delete(of_a.as_str()).await.expect("delete");
    let deleted = sandboxes.rollback(&child.id, of_a.as_str()).await;
    assert!(matches!(deleted, Err(Error::SnapshotNotFound { .. })));
    let further = sandboxes.rollback(&child.id, "base").await;
    further.expect("the past beyond what was deleted");
}

#[tokio::test]
async fn a_rollback_that_fails_leaves_it_running_as_it_was() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    plane.fleet.fail_at(Step::Rollback, failed());
    let refused = sandboxes.rollback(id, "base").await;
    assert!(matches!(refused, Err(Error::Fleet(_))), "{refused:?}");
    assert_eq!(*sandboxes.get(id).expect("it runs"), *sandbox);
    assert_eq!(plane.fleet.generation_of(id), Some(1));

    // Too late to fail: another VM runs, and that is what is known of it.
    let snapshot = plane.snapshot(id, None).await.id;
    plane.fleet.fail_at(Step::Switched, failed());
    assert!(sandboxes.rollback(id, "base").await.is_err());
    let switched = sandboxes.get(id).expect("it runs");
    assert_eq!(switched.generation, 2);
    assert_eq!(switched.base, sandbox.snapshot);
    assert_eq!(plane.fleet.generation_of(id), Some(2));

    plane.fleet.lose_snapshot(&snapshot);
    let lost = sandboxes.rollback(id, snapshot.as_str()).await;
    assert!(
        matches!(lost, Err(Error::SnapshotNotFound { .. })),
        "{lost:?}"
    );
    assert_eq!(*sandboxes.get(id).expect("it runs"), *switched);
    assert_eq!(sandboxes.get(id).expect("it runs").rollback_to, None);
}

#[tokio::test]
async fn a_death_during_a_rollback_is_noticed() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    for (step, kill) in [
        (Step::Rollback, true),
        (Step::Switched, true),
        (Step::Rollback, false),
        (Step::Switched, false),
    ] {
        plane.fleet.behave();
        let sandbox = plane.sandbox().await;
        let reached = plane.fleet.reached(step);
        plane.fleet.takes(step, Duration::from_millis(40));
        let rollback = {
            let (sandboxes, id) = (sandboxes.clone(), sandbox.id.clone());
            tokio::spawn(async move { sandboxes.rollback(&id, "base").await })
        };
        eventually("the step", || plane.fleet.reached(step) > reached).await;
        if kill {
            sandboxes.kill(&sandbox.id).await.expect("kill");
        } else {
            plane.fleet.crash(&sandbox.id);
        }
        let _ = rollback.await.expect("task");
        plane.silence().await;
    }
}

#[tokio::test]
async fn a_death_is_noticed_also_if_a_rollback_begins_and_is_refused_just_then() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    for reference in ["nothing", "base"] {
        let sandbox = plane.sandbox().await;
        plane.fleet.crash(&sandbox.id);
        let refused = sandboxes.rollback(&sandbox.id, reference).await;
        assert!(refused.is_err(), "{refused:?}");
        plane.silence().await;
    }
}

#[tokio::test]
async fn its_time_comes_during_a_rollback() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane
        .create(CreateSandbox {
            lifetime: Lifetime::For(Duration::from_millis(30)),
            lifecycle: LifecycleOptions {
                auto_pause: true,
                ..LifecycleOptions::default()
            },
            ..request("base")
        })
        .await;
    plane.fleet.takes(Step::Switched, Duration::from_millis(80));
    let back = sandboxes.rollback(&sandbox.id, "base").await;
    back.expect("it is not disturbed");
    let state = || sandboxes.get(&sandbox.id).expect("it lives").state;
    eventually("the pause", || state() == State::Paused).await;
    plane.fleet.behave();
    let awake = sandboxes
        .connect(&sandbox.id, MINUTE)
        .await
        .expect("connect");
    assert_eq!(awake.sandbox.generation, 3);
}
