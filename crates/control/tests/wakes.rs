//! Sandboxes that sleep because their time is up, and wake up because of traffic.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::time::Duration;

use common::{
    Plane, eventually, failed,
    sleep::{AUTO_PAUSE, FULL, HOUR, MINUTE, is_conflict, left, resume_for, sleepy},
};
use cubicle_control::{
    Error,
    fleet::{FleetError, memory::Step},
    lifecycle::State,
    sandbox::{LifecycleOptions, Lifetime, LogQuery, PauseMode},
};
use cubicle_ids::SandboxId;

#[tokio::test]
async fn its_time_is_up_and_it_is_paused_instead() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let state = |id: &SandboxId| sandboxes.get(id).expect("it lives").state;
    let a = plane
        .create(sleepy(Duration::from_millis(40), AUTO_PAUSE))
        .await;
    let b = plane
        .create(sleepy(Duration::from_secs(60), AUTO_PAUSE))
        .await;
    let disks = LifecycleOptions {
        auto_pause_memory: false,
        ..AUTO_PAUSE
    };
    let c = plane.create(sleepy(Duration::from_millis(40), disks)).await;
    let now = Lifetime::For(Duration::ZERO);
    sandboxes.set_lifetime(&b.id, now).await.expect("now");
    for sandbox in [&a, &b, &c] {
        eventually("the pause", || state(&sandbox.id) == State::Paused).await;
    }
    let mode = |id| {
        sandboxes
            .get(id)
            .expect("it lives")
            .pause
            .clone()
            .map(|p| p.mode)
    };
    assert_eq!(mode(&a.id), Some(PauseMode::Full));
    assert_eq!(mode(&c.id), Some(PauseMode::Filesystem));
    is_conflict(sandboxes.wake(&a.id).await, State::Paused);
    assert!(
        sandboxes
            .connect(&a.id, MINUTE)
            .await
            .expect("connect")
            .resumed
    );

    for wrong in [
        LifecycleOptions {
            auto_pause: false,
            ..disks
        },
        LifecycleOptions {
            auto_resume: true,
            ..disks
        },
    ] {
        let refused = sandboxes
            .create(sleepy(Duration::from_secs(1), wrong))
            .await;
        assert!(
            matches!(refused, Err(Error::Invalid { field, .. }) if field == "autoPauseMemory"),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn traffic_wakes_what_is_meant_to_wake_for_as_long_as_it_was_made_for() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let lifecycle = LifecycleOptions {
        auto_resume: true,
        ..AUTO_PAUSE
    };
    let sandbox = plane
        .create(sleepy(Duration::from_secs(120), lifecycle))
        .await;
    let id = &sandbox.id;
    let untouched = sandboxes.wake(id).await.expect("it runs");
    assert_eq!(untouched.end_at, sandbox.end_at);
    sandboxes.extend(id, HOUR).await.expect("extend");
    sandboxes.pause(id, FULL).await.expect("pause");
    plane.fleet.takes(Step::Resume, Duration::from_millis(30));
    let storm = (0..100).map(|_| sandboxes.wake(id));
    for woken in futures::future::join_all(storm).await {
        let woken = woken.expect("woken");
        assert_eq!(woken.state, State::Running);
        assert!(left(&woken) > time::Duration::seconds(115));
        assert!(left(&woken) <= time::Duration::seconds(120));
    }
    assert_eq!(plane.fleet.reached(Step::Resume), 1, "resumed once");
    assert_eq!(plane.fleet.alive(), std::slice::from_ref(id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_every_kind_resumes_once_and_nobody_is_shortened() {
    let plane = Plane::new().await;
    let lifecycle = LifecycleOptions {
        auto_resume: true,
        ..AUTO_PAUSE
    };
    let sandbox = plane
        .create(sleepy(Duration::from_secs(60), lifecycle))
        .await;
    for round in 1..=10 {
        let sandboxes = &plane.control.sandboxes;
        sandboxes.pause(&sandbox.id, FULL).await.expect("pause");
        plane.fleet.takes(Step::Resume, Duration::from_millis(20));
        let tasks: Vec<_> = (0..60)
            .map(|n| {
                let (sandboxes, id) = (sandboxes.clone(), sandbox.id.clone());
                tokio::spawn(async move {
                    match n % 3 {
                        0 => sandboxes.wake(&id).await,
                        1 => sandboxes.connect(&id, HOUR).await.map(|c| c.sandbox),
                        _ => sandboxes
                            .resume(&id, resume_for(MINUTE))
                            .await
                            .map(|c| c.sandbox),
                    }
                })
            })
            .collect();
        for task in tasks {
            match task.await.expect("task") {
                Ok(sandbox) => assert_eq!(sandbox.state, State::Running),
                // A resume that came when it ran already.
                Err(Error::Conflict { state, .. }) => assert_eq!(state, State::Running),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(plane.fleet.reached(Step::Resume), round);
        let awake = sandboxes.get(&sandbox.id).expect("awake");
        assert!(
            left(&awake) > time::Duration::minutes(59),
            "{}",
            left(&awake)
        );
        assert_eq!(awake.generation, round + 1);
    }
}

#[tokio::test]
async fn a_resume_that_fails_fails_for_all_who_wait_and_loses_nothing() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    sandboxes.pause(id, FULL).await.expect("pause");
    for step in [Step::Resume, Step::Resumed] {
        let before = plane.fleet.reached(Step::Resume);
        plane.fleet.takes(step, Duration::from_millis(20));
        plane.fleet.fail_at(step, failed());
        let all = (0..20).map(|_| sandboxes.connect(id, MINUTE));
        for refused in futures::future::join_all(all).await {
            assert!(
                matches!(refused, Err(Error::Fleet(FleetError::Failed { .. }))),
                "{refused:?}"
            );
        }
        assert_eq!(plane.fleet.reached(Step::Resume), before + 1, "tried once");
        let asleep = sandboxes.get(id).expect("it is not lost");
        assert_eq!((asleep.state, asleep.end_at), (State::Paused, None));
        assert!(plane.fleet.alive().is_empty(), "half a restore is not kept");
    }
    plane.fleet.room_for(0);
    let full = sandboxes.connect(id, MINUTE).await;
    assert!(
        matches!(full, Err(Error::Fleet(FleetError::Capacity { .. }))),
        "{full:?}"
    );
    plane.fleet.room_for(10);
    let awake = sandboxes.connect(id, MINUTE).await.expect("at last");
    assert_eq!(awake.sandbox.state, State::Running);

    sandboxes.pause(id, FULL).await.expect("pause");
    plane.fleet.lose_snapshot(&plane.pauses()[0]);
    let lost = sandboxes.connect(id, MINUTE).await;
    assert!(
        matches!(lost, Err(Error::Fleet(FleetError::NoSnapshot { .. }))),
        "{lost:?}"
    );
    assert_eq!(sandboxes.get(id).expect("still there").state, State::Paused);
    sandboxes.kill(id).await.expect("kill");
    plane.silence().await;
}

#[tokio::test]
async fn a_pause_at_the_end_of_its_time_is_tried_again() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane
        .create(sleepy(Duration::from_secs(60), AUTO_PAUSE))
        .await;
    let id = &sandbox.id;
    let now = Lifetime::For(Duration::ZERO);
    plane.fleet.fail_at(Step::Freeze, failed());
    sandboxes.set_lifetime(id, now).await.expect("now");
    eventually("an attempt", || plane.fleet.reached(Step::Freeze) == 1).await;
    let state = || sandboxes.get(id).expect("it lives").state;
    eventually("its failure", || state() == State::Running).await;
    eventually("the pause", || state() == State::Paused).await;
    let mode = sandboxes
        .get(id)
        .expect("it lives")
        .pause
        .clone()
        .map(|p| p.mode);
    assert_eq!(mode, Some(PauseMode::Full));

    // Whoever gives it more time meanwhile, keeps it.
    sandboxes.connect(id, MINUTE).await.expect("connect");
    let reached = plane.fleet.reached(Step::Freeze);
    plane.fleet.fail_at(Step::Freeze, failed());
    sandboxes.set_lifetime(id, now).await.expect("now");
    eventually("an attempt", || plane.fleet.reached(Step::Freeze) > reached).await;
    sandboxes.extend(id, HOUR).await.expect("extend");
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(state(), State::Running);
    assert_eq!(plane.fleet.reached(Step::Freeze), reached + 1);
}

#[tokio::test]
async fn what_cannot_be_paused_keeps_its_disks_and_is_killed_only_then() {
    let brief = Duration::from_millis(1);
    let plane = Plane::with(|config| config.sandboxes.auto_pause_patience = brief).await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = plane
        .create(sleepy(Duration::from_millis(20), AUTO_PAUSE))
        .await;
    plane.fleet.fail_at(Step::Freeze, failed());
    let state = || sandboxes.get(&sandbox.id).map(|s| s.state).ok();
    eventually("the pause", || state() == Some(State::Paused)).await;
    let pause = sandboxes.get(&sandbox.id).expect("it lives").pause.clone();
    assert_eq!(pause.map(|p| p.mode), Some(PauseMode::Filesystem));

    plane.fleet.fail_at(Step::Freeze, failed());
    plane.fleet.fail_at(Step::Freeze, failed());
    let doomed = plane
        .create(sleepy(Duration::from_millis(20), AUTO_PAUSE))
        .await;
    eventually("its end", || sandboxes.get(&doomed.id).is_err()).await;
    let query = LogQuery {
        backward: true,
        limit: 1,
        ..LogQuery::default()
    };
    let reason = async || {
        let log = sandboxes.log(&doomed.id, &query).await.expect("log");
        log[0].fields.get("reason").cloned()
    };
    plane.silence_but(&[&sandbox.id]).await;
    assert_eq!(reason().await.as_deref(), Some("pause_lost"));
}
