//! Sandboxes that sleep and wake up because clients ask for it.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::{sync::Arc, time::Duration};

use common::{
    Plane, eventually, failed, request,
    sleep::{
        AUTO_PAUSE, FILESYSTEM, FULL, HOUR, MINUTE, is_conflict, is_gone, left, resume_for, sleepy,
    },
};
use cubicle_control::{
    Error,
    fleet::{FleetError, memory::Step},
    lifecycle::{State, Visible},
    sandbox::{
        CreateSandbox, LifecycleOptions, Lifetime, ListQuery, LogQuery, PauseMode, PauseSandbox,
        ResumeSandbox, Sandbox,
    },
};
use cubicle_ids::SandboxId;

#[tokio::test]
async fn a_sandbox_sleeps_and_wakes_up_as_itself() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let order = CreateSandbox {
        env_vars: vec![("A".into(), "1".into())],
        metadata: [("k".into(), "v".into())].into(),
        ..request("base")
    };
    let before = plane.create(order).await;
    let id = &before.id;
    let paused = sandboxes.pause(id, FULL).await.expect("pause");
    let asleep = paused.sandbox;
    assert_eq!(asleep.state, State::Paused);
    assert_eq!(asleep.end_at, None, "a paused sandbox has no end");
    let pause = asleep.pause.clone().expect("what it consists of");
    assert_eq!(pause.mode, PauseMode::Full);
    assert_eq!(paused.taken.tier, "anonymous_pages");
    assert!(plane.fleet.alive().is_empty());
    assert_eq!(plane.pauses(), std::slice::from_ref(&pause.snapshot));

    is_conflict(sandboxes.pause(id, FULL).await, State::Paused);
    is_conflict(sandboxes.wake(id).await, State::Paused);
    let base = before.snapshot.as_str();
    is_conflict(sandboxes.rollback(id, base).await, State::Paused);
    let snapshot = plane.control.snapshots.create(id, Default::default()).await;
    is_conflict(snapshot, State::Paused);

    let awake = sandboxes.connect(id, HOUR).await.expect("connect");
    assert!(awake.resumed);
    assert!(!awake.phases.is_empty());
    let after = awake.sandbox;
    assert!(left(&after) > time::Duration::minutes(59));
    let same = Sandbox {
        generation: before.generation,
        end_at: before.end_at,
        ..Sandbox::clone(&after)
    };
    assert_eq!(same, *before, "all else is as it was");
    assert_eq!(after.generation, before.generation + 1);
    let order = plane.fleet.order(id).expect("resumed");
    assert_eq!(order.env_vars, before.env_vars);
    assert_eq!(order.envd_token, before.envd_token);
    assert_eq!(order.snapshot, pause.snapshot);
    eventually("the end of the pause", || plane.pauses().is_empty()).await;

    is_conflict(sandboxes.resume(id, resume_for(HOUR)).await, State::Running);
    let again = sandboxes.connect(id, MINUTE).await.expect("connect");
    assert!(!again.resumed);
    assert_eq!(again.sandbox.end_at, after.end_at, "never shortens");
    let unknown = SandboxId::generate();
    is_gone(sandboxes.pause(&unknown, FULL).await);
    is_gone(sandboxes.resume(&unknown, resume_for(HOUR)).await);
    is_gone(sandboxes.connect(&unknown, HOUR).await);
    is_gone(sandboxes.wake(&unknown).await);
    sandboxes.kill(id).await.expect("kill");
    let log = sandboxes.log(id, &LogQuery::default()).await.expect("log");
    let messages: Vec<_> = log.iter().map(|line| line.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "sandbox created",
            "sandbox paused",
            "sandbox resumed",
            "sandbox ended"
        ]
    );
    plane.silence().await;
}

#[tokio::test]
async fn paused_sandboxes_are_listed_as_such() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let mut asleep = Vec::new();
    for n in 0..10 {
        let sandbox = plane.sandbox().await;
        if n % 2 == 0 {
            sandboxes.pause(&sandbox.id, FULL).await.expect("pause");
            asleep.push(sandbox.id.clone());
        }
    }
    let mut query = ListQuery {
        states: vec![Visible::Paused],
        limit: Some(2),
        ..ListQuery::default()
    };
    let mut found = Vec::new();
    loop {
        let page = sandboxes.list(&query).await.expect("list");
        assert_eq!(page.total, 5);
        found.extend(page.items.iter().map(|sandbox| sandbox.id.clone()));
        let Some(next) = page.next else { break };
        query.cursor = Some(next);
    }
    found.reverse();
    assert_eq!(found, asleep, "newest first, each once");
    let all = sandboxes.list(&ListQuery::default()).await.expect("list");
    assert_eq!(all.total, 10);
    assert_eq!(sandboxes.counts()["paused"], 5);
    // What is asleep is not disturbed by requests for samples of it.
    assert!(
        sandboxes.metrics(&asleep[0], None, None).await.is_ok(),
        "it exists"
    );
}

#[tokio::test]
async fn a_pause_of_disks_only_is_ended_by_clients_not_by_traffic() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let lifecycle = LifecycleOptions {
        auto_pause: true,
        auto_resume: true,
        ..LifecycleOptions::default()
    };
    let sandbox = plane
        .create(sleepy(Duration::from_secs(60), lifecycle))
        .await;
    let paused = sandboxes
        .pause(&sandbox.id, FILESYSTEM)
        .await
        .expect("pause");
    assert_eq!(paused.taken.tier, "none");
    let pause = paused.sandbox.pause.clone().expect("a pause");
    assert_eq!(pause.mode, PauseMode::Filesystem);
    is_conflict(sandboxes.wake(&sandbox.id).await, State::Paused);
    let awake = sandboxes
        .resume(&sandbox.id, resume_for(MINUTE))
        .await
        .expect("resume");
    assert!(awake.resumed);
    assert_eq!(awake.sandbox.envd_token, sandbox.envd_token);
}

#[tokio::test]
async fn resume_sets_the_end_and_a_paused_sandbox_has_one_only_if_it_is_given_one() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let brief = sleepy(Duration::from_millis(150), LifecycleOptions::default());
    let sandbox = plane.create(brief).await;
    let id = &sandbox.id;
    sandboxes.pause(id, FULL).await.expect("pause");
    tokio::time::sleep(Duration::from_millis(250)).await;
    let asleep = sandboxes.get(id).expect("its time does not run");
    assert_eq!(asleep.state, State::Paused);
    let request = ResumeSandbox {
        lifetime: MINUTE,
        auto_pause: Some(true),
    };
    let awake = sandboxes.resume(id, request).await.expect("resume").sandbox;
    assert!(left(&awake) <= time::Duration::MINUTE);
    assert!(left(&awake) > time::Duration::seconds(55));
    assert!(awake.lifecycle.auto_pause);

    sandboxes.pause(id, FULL).await.expect("pause");
    let ends = sandboxes
        .set_lifetime(id, Lifetime::For(Duration::from_millis(50)))
        .await
        .expect("an end");
    assert!(ends.end_at.is_some());
    eventually("its end", || sandboxes.get(id).is_err()).await;
    plane.silence().await;
    let log = sandboxes.log(id, &LogQuery::default()).await.expect("log");
    assert_eq!(log.last().expect("an end").fields["reason"], "timeout");
}

#[tokio::test]
async fn a_pause_that_fails_leaves_it_running() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    for step in [Step::Freeze, Step::Published] {
        plane.fleet.fail_at(step, failed());
        let refused = sandboxes.pause(id, FULL).await;
        assert!(matches!(refused, Err(Error::Fleet(_))), "{refused:?}");
        let awake = sandboxes.get(id).expect("it lives");
        assert_eq!(*awake, *sandbox, "as if nothing had been asked");
        eventually("the end of the pause", || plane.pauses().is_empty()).await;
    }
    plane.fleet.deafen(id);
    let request = PauseSandbox {
        require_healthy: true,
        ..FULL
    };
    let deaf = sandboxes.pause(id, request).await;
    assert!(
        matches!(deaf, Err(Error::Fleet(FleetError::Unresponsive { .. }))),
        "{deaf:?}"
    );
    // Too late to fail: what is left of it is its snapshot, and that is good.
    plane.fleet.fail_at(Step::Dropped, failed());
    assert!(sandboxes.pause(id, FULL).await.is_err());
    assert_eq!(sandboxes.get(id).expect("it lives").state, State::Paused);
    assert!(
        sandboxes
            .connect(id, MINUTE)
            .await
            .expect("connect")
            .resumed
    );
}

#[tokio::test]
async fn a_vm_that_dies_while_it_is_paused_is_kept_if_it_can_be() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    for (step, kept) in [(Step::Freeze, false), (Step::Published, true)] {
        let sandbox = plane.sandbox().await;
        let reached = plane.fleet.reached(step);
        plane.fleet.takes(step, Duration::from_millis(50));
        let pause = {
            let (sandboxes, id) = (sandboxes.clone(), sandbox.id.clone());
            tokio::spawn(async move { sandboxes.pause(&id, FULL).await })
        };
        eventually("the step", || plane.fleet.reached(step) > reached).await;
        plane.fleet.crash(&sandbox.id);
        assert!(pause.await.expect("task").is_err());
        if kept {
            let asleep = sandboxes.get(&sandbox.id).expect("it is not lost");
            assert_eq!(asleep.state, State::Paused);
            plane.fleet.behave();
            sandboxes
                .connect(&sandbox.id, MINUTE)
                .await
                .expect("connect");
            sandboxes.kill(&sandbox.id).await.expect("kill");
        } else {
            eventually("its end", || sandboxes.get(&sandbox.id).is_err()).await;
        }
        plane.silence().await;
    }
}

#[tokio::test]
async fn a_kill_wins_at_every_step() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    for step in [Step::Freeze, Step::Published, Step::Dropped] {
        let sandbox = plane.sandbox().await;
        let reached = plane.fleet.reached(step);
        plane.fleet.takes(step, Duration::from_millis(30));
        let pause = {
            let (sandboxes, id) = (sandboxes.clone(), sandbox.id.clone());
            tokio::spawn(async move { sandboxes.pause(&id, FULL).await })
        };
        eventually("the step", || plane.fleet.reached(step) > reached).await;
        sandboxes.kill(&sandbox.id).await.expect("kill");
        assert!(pause.await.expect("task").is_err(), "{step:?}");
        plane.silence().await;
    }
    for step in [Step::Resume, Step::Resumed] {
        let sandbox = plane.sandbox().await;
        plane.fleet.behave();
        sandboxes.pause(&sandbox.id, FULL).await.expect("pause");
        let reached = plane.fleet.reached(step);
        plane.fleet.takes(step, Duration::from_millis(30));
        let all: Vec<_> = (0..5)
            .map(|_| {
                let (sandboxes, id) = (sandboxes.clone(), sandbox.id.clone());
                tokio::spawn(async move { sandboxes.connect(&id, MINUTE).await })
            })
            .collect();
        eventually("the step", || plane.fleet.reached(step) > reached).await;
        sandboxes.kill(&sandbox.id).await.expect("kill");
        for connect in all {
            assert!(connect.await.expect("task").is_err(), "{step:?}");
        }
        plane.silence().await;
    }
    let asleep = plane.sandbox().await;
    sandboxes.pause(&asleep.id, FULL).await.expect("pause");
    sandboxes.kill(&asleep.id).await.expect("kill");
    is_gone(sandboxes.connect(&asleep.id, MINUTE).await);
    plane.silence().await;
}

#[tokio::test]
async fn one_thing_at_a_time() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    plane.fleet.takes(Step::Freeze, Duration::from_millis(100));
    let pause = {
        let (sandboxes, id) = (sandboxes.clone(), id.clone());
        tokio::spawn(async move { sandboxes.pause(&id, FULL).await })
    };
    eventually("the pause", || plane.fleet.reached(Step::Freeze) == 1).await;
    let seen = sandboxes.get(id).expect("it lives");
    assert_eq!(seen.state.visible(), Some(Visible::Running), "not yet");
    let second = sandboxes.pause(id, FULL).await;
    let Err(error @ Error::Busy { doing: "pause", .. }) = second else {
        panic!("{second:?}");
    };
    assert!(
        error.to_string().contains("operation in progress"),
        "{error}"
    );
    let snapshot = plane.control.snapshots.create(id, Default::default()).await;
    assert!(matches!(snapshot, Err(Error::Busy { .. })), "{snapshot:?}");
    let rollback = sandboxes.rollback(id, sandbox.snapshot.as_str()).await;
    assert!(matches!(rollback, Err(Error::Busy { .. })), "{rollback:?}");
    // A client that wants it awake waits for its sleep and wakes it.
    let awake = sandboxes.connect(id, MINUTE).await.expect("connect");
    assert!(awake.resumed);
    assert_eq!(
        pause.await.expect("task").expect("pause").sandbox.state,
        State::Paused
    );
    assert_eq!(awake.sandbox.state, State::Running);
}

#[tokio::test]
async fn who_waits_for_it_to_come_to_rest_learns_where() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    let at_rest = sandboxes.settled(id).await.expect("it runs");
    assert_eq!(at_rest.state, State::Running);
    plane.fleet.takes(Step::Freeze, Duration::from_millis(30));
    plane.fleet.takes(Step::Resume, Duration::from_millis(30));
    let later = async |step| {
        eventually("the step", || plane.fleet.reached(step) == 1).await;
        sandboxes.settled(id).await
    };
    let (paused, at_rest) = tokio::join!(sandboxes.pause(id, FULL), later(Step::Freeze));
    paused.expect("pause");
    assert_eq!(at_rest.expect("it sleeps").state, State::Paused);
    let (resumed, at_rest) = tokio::join!(sandboxes.connect(id, MINUTE), later(Step::Resume));
    resumed.expect("resume");
    assert_eq!(at_rest.expect("it runs").state, State::Running);
    sandboxes.kill(id).await.expect("kill");
    is_gone(sandboxes.settled(id).await);
}

#[tokio::test]
async fn a_client_that_goes_away_interrupts_nothing() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane.sandbox().await;
    let state = || sandboxes.get(&sandbox.id).expect("it lives").state;
    let soon = Duration::from_millis(5);
    plane
        .fleet
        .takes(Step::Published, Duration::from_millis(40));
    let impatient = tokio::time::timeout(soon, sandboxes.pause(&sandbox.id, FULL)).await;
    assert!(impatient.is_err());
    eventually("the pause", || state() == State::Paused).await;
    plane.fleet.takes(Step::Resumed, Duration::from_millis(40));
    let impatient = tokio::time::timeout(soon, sandboxes.connect(&sandbox.id, MINUTE)).await;
    assert!(impatient.is_err());
    eventually("the resume", || state() == State::Running).await;
}

#[tokio::test]
async fn a_restart_lets_it_sleep() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let lifecycle = LifecycleOptions {
        auto_resume: true,
        ..AUTO_PAUSE
    };
    let order = CreateSandbox {
        env_vars: vec![("A".into(), "1".into())],
        ..sleepy(Duration::from_secs(90), lifecycle)
    };
    let sandbox = plane.create(order).await;
    let asleep = sandboxes
        .pause(&sandbox.id, FULL)
        .await
        .expect("pause")
        .sandbox;
    let plane = plane.restart(|_| ()).await;
    let sandboxes = &plane.control.sandboxes;
    assert_eq!(
        (plane.reconciled.kept, plane.reconciled.stray_snapshots),
        (1, 0)
    );
    assert_eq!(sandboxes.get(&sandbox.id).expect("kept"), asleep);
    let woken: Arc<Sandbox> = sandboxes.wake(&sandbox.id).await.expect("wake");
    assert!(left(&woken) > time::Duration::seconds(85));
    let order = plane.fleet.order(&sandbox.id).expect("resumed");
    assert_eq!(order.env_vars, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(woken.generation, 2);
}
