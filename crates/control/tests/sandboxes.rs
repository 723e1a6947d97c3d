//! Lives of sandboxes: ordinary ones, interrupted ones, and thousands at once.

mod common;

use std::time::Duration;

use common::{Plane, eventually, idempotent, request};
use cubicle_control::{
    Error,
    fleet::{Fleet as _, FleetError, NetworkOptions, memory::Step},
    lifecycle::State,
    sandbox::{CreateSandbox, Lifetime, ListQuery, LogQuery, PauseSandbox},
};
use cubicle_ids::SandboxId;
use time::OffsetDateTime;

#[tokio::test]
async fn a_change_of_the_network_lasts_and_is_made_whole_or_not_at_all() {
    let closed = NetworkOptions {
        allow_internet: Some(false),
        allow_public_traffic: Some(false),
        ..NetworkOptions::default()
    };
    let plane = Plane::new().await;
    let sandboxes = plane.control.sandboxes.clone();
    let id = plane.create(request("base")).await.id.clone();
    plane.fleet.fail_at(Step::Network, failed());
    sandboxes
        .set_network(&id, closed.clone())
        .await
        .expect_err("told to fail");
    let same = sandboxes.get(&id).expect("it lives");
    assert_eq!(same.network, NetworkOptions::default());

    let changed = sandboxes.set_network(&id, closed.clone()).await;
    let changed = changed.expect("change");
    assert_eq!(changed.network, closed);
    let token = changed
        .traffic_token
        .clone()
        .expect("only who has it comes in");
    let again = sandboxes.set_network(&id, NetworkOptions::default()).await;
    let again = again.expect("change");
    assert_eq!(again.network.allow_internet, None, "it was not said again");
    assert_eq!(again.traffic_token, Some(token), "who may come in stays");
    sandboxes
        .set_network(&id, closed.clone())
        .await
        .expect("change");

    // It sleeps and wakes up as it was.
    sandboxes
        .pause(&id, PauseSandbox::default())
        .await
        .expect("pause");
    let asleep = sandboxes.set_network(&id, NetworkOptions::default()).await;
    assert!(matches!(asleep, Err(Error::Conflict { .. })));
    let minute = Lifetime::For(Duration::from_secs(60));
    sandboxes.connect(&id, minute).await.expect("connect");
    let order = plane.fleet.order(&id).expect("the fleet woke it");
    assert_eq!(order.network, closed);

    // So it is after a restart; what was in force and not on record is undone.
    let unrecorded = NetworkOptions::default();
    plane
        .fleet
        .set_network(&id, &unrecorded)
        .await
        .expect("set");
    let plane = plane.restart(|_| ()).await;
    assert_eq!(
        plane.control.sandboxes.get(&id).expect("it lives").network,
        closed
    );
    assert_eq!(plane.fleet.order(&id).expect("order").network, closed);
}

fn failed() -> FleetError {
    FleetError::Failed {
        doing: "restore".into(),
        why: "told to fail".into(),
    }
}

#[tokio::test]
async fn a_sandbox_is_created_found_given_time_and_killed() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let order = CreateSandbox {
        env_vars: vec![("A".into(), "1".into())],
        metadata: [("k".into(), "v".into())].into(),
        ..request("base")
    };
    let made = sandboxes.create(order).await.expect("create");
    let sandbox = made.sandbox;
    assert_eq!(sandbox.state, State::Running);
    assert_eq!(sandbox.alias.as_deref(), Some("base"));
    assert_eq!(
        (sandbox.cpu_count, sandbox.memory_mib, sandbox.disk_mib),
        (2, 512, 1024)
    );
    assert_eq!(sandbox.traffic_token, None);
    let names: Vec<_> = made.phases.iter().map(|p| p.name).collect();
    assert_eq!(names, ["resolve", "record", "restore", "fleet", "publish"]);
    let order = plane.fleet.order(&sandbox.id).expect("the fleet made it");
    assert_eq!(order.env_vars, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(order.envd_token, sandbox.envd_token);

    assert_eq!(sandboxes.get(&sandbox.id).expect("get"), sandbox);
    let lifetime = Lifetime::For(Duration::from_secs(5));
    let shorter = sandboxes
        .set_lifetime(&sandbox.id, lifetime)
        .await
        .expect("shorten");
    assert!(shorter.end_at < sandbox.end_at, "set_timeout may shorten");
    let same = sandboxes
        .extend(&sandbox.id, Lifetime::For(Duration::ZERO))
        .await
        .expect("extend");
    assert_eq!(same.end_at, shorter.end_at, "refresh never shortens");
    let lifetime = Lifetime::For(Duration::from_secs(600));
    let longer = sandboxes
        .connect(&sandbox.id, lifetime)
        .await
        .expect("connect");
    assert!(longer.sandbox.end_at > sandbox.end_at, "connect extends");
    assert_eq!(longer.sandbox.envd_token, sandbox.envd_token);
    let never = sandboxes
        .connect(&sandbox.id, Lifetime::Never)
        .await
        .expect("connect for ever");
    assert_eq!(never.sandbox.end_at, None);
    let still = sandboxes
        .connect(&sandbox.id, lifetime)
        .await
        .expect("connect");
    assert_eq!(still.sandbox.end_at, None, "and never shortens that");

    sandboxes.kill(&sandbox.id).await.expect("kill");
    assert!(plane.fleet.alive().is_empty());
    assert_eq!(sandboxes.in_memory(), (0, 0));
    let unknown = SandboxId::generate();
    for id in [&sandbox.id, &unknown] {
        let gone = |e: &Error| matches!(e, Error::SandboxNotFound { .. });
        assert!(sandboxes.kill(id).await.is_err_and(|e| gone(&e)));
        assert!(sandboxes.get(id).is_err_and(|e| gone(&e)));
        assert!(
            sandboxes
                .set_lifetime(id, lifetime)
                .await
                .is_err_and(|e| gone(&e))
        );
        assert!(
            sandboxes
                .extend(id, lifetime)
                .await
                .is_err_and(|e| gone(&e))
        );
        assert!(
            sandboxes
                .connect(id, lifetime)
                .await
                .is_err_and(|e| gone(&e))
        );
        assert!(
            sandboxes
                .metrics(id, None, None)
                .await
                .is_err_and(|e| gone(&e))
        );
        let message = sandboxes.get(id).expect_err("gone").to_string();
        assert!(!message.to_lowercase().contains("template"), "{message}");
    }
    let log = sandboxes
        .log(&sandbox.id, &LogQuery::default())
        .await
        .expect("log");
    let messages: Vec<_> = log.iter().map(|l| l.message.as_str()).collect();
    assert_eq!(
        messages,
        ["sandbox created", "timeout set", "sandbox ended"]
    );
    assert_eq!(log[2].fields["reason"], "killed");
    assert!(sandboxes.log(&unknown, &LogQuery::default()).await.is_err());
}

#[tokio::test]
async fn its_time_comes_and_only_then() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let brief = CreateSandbox {
        lifetime: Lifetime::For(Duration::from_millis(80)),
        ..request("base")
    };
    let dies = sandboxes
        .create(brief.clone())
        .await
        .expect("create")
        .sandbox;
    let saved = sandboxes.create(brief).await.expect("create").sandbox;
    let never = CreateSandbox {
        lifetime: Lifetime::Never,
        ..request("base")
    };
    let stays = sandboxes.create(never).await.expect("create").sandbox;
    sandboxes
        .extend(&saved.id, Lifetime::For(Duration::from_secs(60)))
        .await
        .expect("extend");
    eventually("the timeout", || sandboxes.get(&dies.id).is_err()).await;
    assert!(
        OffsetDateTime::now_utc() >= dies.end_at.expect("has an end"),
        "not before its end"
    );
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(sandboxes.get(&saved.id).is_ok() && sandboxes.get(&stays.id).is_ok());
    sandboxes
        .set_lifetime(&stays.id, Lifetime::For(Duration::ZERO))
        .await
        .expect("now");
    eventually("the end of now", || {
        plane.fleet.alive() == [saved.id.clone()]
    })
    .await;
    let log = sandboxes
        .log(&dies.id, &LogQuery::default())
        .await
        .expect("log");
    assert_eq!(log.last().expect("an end").fields["reason"], "timeout");
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    plane.fleet.fail_next_create(failed());
    assert!(matches!(
        sandboxes.create(request("base")).await,
        Err(Error::Fleet(_))
    ));
    plane.fleet.room_for(1);
    let kept = sandboxes
        .create(request("base"))
        .await
        .expect("room for one")
        .sandbox;
    let full = sandboxes.create(request("base")).await;
    assert!(matches!(
        full,
        Err(Error::Fleet(FleetError::Capacity { .. }))
    ));
    let missing = sandboxes.create(request("nothing")).await;
    assert!(matches!(missing, Err(Error::TemplateNotFound { .. })));
    assert_eq!(sandboxes.in_memory(), (1, 1));
    assert_eq!(plane.fleet.alive(), std::slice::from_ref(&kept.id));
    let snapshot = kept.snapshot.clone();
    for name in [kept.template.as_str(), "base:default", snapshot.as_str()] {
        plane.fleet.room_for(10);
        let other = sandboxes.create(request(name)).await.expect(name).sandbox;
        assert_eq!(other.snapshot, snapshot, "{name}");
    }
    let no_tag = sandboxes.create(request("base:v2")).await;
    assert!(matches!(no_tag, Err(Error::TemplateNotFound { .. })));
}

#[tokio::test]
async fn a_kill_during_create_wins() {
    let plane = Plane::new().await;
    plane.fleet.create_takes(Duration::from_millis(50));
    let sandboxes = plane.control.sandboxes.clone();
    let creating = tokio::spawn(async move { sandboxes.create(request("base")).await });
    let sandboxes = &plane.control.sandboxes;
    eventually("the create", || sandboxes.counts()["creating"] == 1).await;
    assert!(sandboxes.all().is_empty(), "nobody sees it yet");
    // Its id is not known outside; the timer, the abandoned client and the shutdown know it.
    let id = plane.control.sandboxes.ids_in_memory().pop().expect("one");
    sandboxes.kill(&id).await.expect("kill");
    let lost = creating.await.expect("task");
    assert!(
        matches!(lost, Err(Error::KilledDuringCreate { .. })),
        "{lost:?}"
    );
    assert!(plane.fleet.alive().is_empty());
    assert_eq!(sandboxes.in_memory(), (0, 0));
}

#[tokio::test]
async fn a_client_that_goes_away_leaks_nothing() {
    let plane = Plane::new().await;
    plane.fleet.create_takes(Duration::from_millis(30));
    let sandboxes = &plane.control.sandboxes;
    for _ in 0..20 {
        let impatient = sandboxes.create(request("base"));
        assert!(
            tokio::time::timeout(Duration::from_millis(5), impatient)
                .await
                .is_err()
        );
    }
    eventually("the creates", || plane.fleet.calls().0 == 20).await;
    eventually("silence", || sandboxes.in_memory() == (0, 0)).await;
    assert!(plane.fleet.alive().is_empty());

    // With an idempotency key it can ask again, and gets what it asked for.
    let impatient = sandboxes.create(idempotent("k", 1));
    assert!(
        tokio::time::timeout(Duration::from_millis(5), impatient)
            .await
            .is_err()
    );
    let early = sandboxes.create(idempotent("k", 1)).await;
    assert!(
        matches!(early, Err(Error::IdempotencyInProgress { .. })),
        "{early:?}"
    );
    eventually("the create", || sandboxes.counts()["running"] == 1).await;
    let again = sandboxes.create(idempotent("k", 1)).await.expect("again");
    assert!(again.replayed);
    assert_eq!(plane.fleet.alive(), std::slice::from_ref(&again.sandbox.id));
}

#[tokio::test]
async fn idempotency_keys_replay_mismatch_and_forgive_failures() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    plane.fleet.fail_next_create(failed());
    assert!(sandboxes.create(idempotent("k", 1)).await.is_err());
    let first = sandboxes
        .create(idempotent("k", 1))
        .await
        .expect("after a failure");
    assert!(!first.replayed);
    let second = sandboxes.create(idempotent("k", 1)).await.expect("replay");
    assert!(second.replayed);
    assert_eq!(second.sandbox, first.sandbox);
    let other = sandboxes.create(idempotent("k", 2)).await;
    assert!(matches!(other, Err(Error::IdempotencyMismatch { .. })));
    sandboxes.kill(&first.sandbox.id).await.expect("kill");
    let late = sandboxes
        .create(idempotent("k", 1))
        .await
        .expect("replay after its end");
    assert_eq!(
        late.sandbox.id, first.sandbox.id,
        "the same answer, also when it is gone"
    );
    assert_eq!(plane.fleet.calls().0, 2);
    assert!(plane.fleet.alive().is_empty());
}

#[tokio::test]
async fn a_kill_that_fails_is_tried_again_and_hidden_meanwhile() {
    let plane = Plane::with_kill_patience(Duration::from_secs(2)).await;
    let sandboxes = &plane.control.sandboxes;
    let a = sandboxes
        .create(request("base"))
        .await
        .expect("create")
        .sandbox;
    plane.fleet.fail_kills(2);
    sandboxes
        .kill(&a.id)
        .await
        .expect("the third attempt works");
    assert!(plane.fleet.alive().is_empty());

    let b = sandboxes
        .create(request("base"))
        .await
        .expect("create")
        .sandbox;
    plane.fleet.fail_kills(u32::MAX);
    let refused = sandboxes.kill(&b.id).await;
    assert!(
        matches!(refused, Err(Error::Fleet(FleetError::Failed { .. }))),
        "{refused:?}"
    );
    assert!(sandboxes.get(&b.id).is_err() && sandboxes.all().is_empty());
    let plane = plane.restart(|fleet| fleet.fail_kills(0)).await;
    assert!(
        plane.fleet.alive().is_empty(),
        "the next start finishes the kill"
    );
    assert_eq!(plane.control.sandboxes.in_memory(), (0, 0));
}

#[tokio::test]
async fn many_kills_of_one_sandbox_all_succeed_or_find_nothing() {
    let plane = Plane::new().await;
    plane.fleet.kill_takes(Duration::from_millis(20));
    let sandbox = plane
        .control
        .sandboxes
        .create(request("base"))
        .await
        .expect("create")
        .sandbox;
    let kills = (0..20).map(|_| plane.control.sandboxes.kill(&sandbox.id));
    let results = futures::future::join_all(kills).await;
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(plane.fleet.calls().1, 1, "the fleet is asked once");
}

#[tokio::test]
async fn a_crash_ends_a_sandbox_unless_it_is_of_another_life() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let sandbox = sandboxes
        .create(request("base"))
        .await
        .expect("create")
        .sandbox;
    plane.fleet.crash(&sandbox.id);
    eventually("the end", || sandboxes.in_memory() == (0, 0)).await;
    let log = sandboxes
        .log(&sandbox.id, &LogQuery::default())
        .await
        .expect("log");
    assert_eq!(log.last().expect("an end").fields["reason"], "exited");
}

#[tokio::test]
async fn a_restart_keeps_what_runs_and_cleans_up_the_rest() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let mut ids = Vec::new();
    for n in 0..3 {
        let order = CreateSandbox {
            metadata: [("n".into(), n.to_string())].into(),
            ..request("base")
        };
        ids.push(sandboxes.create(order).await.expect("create").sandbox);
    }
    let overdue = CreateSandbox {
        lifetime: Lifetime::For(Duration::from_secs(1)),
        ..request("base")
    };
    let overdue = sandboxes.create(overdue).await.expect("create").sandbox;
    let mut stray = None;
    let plane = plane
        .restart(|fleet| {
            fleet.vanish(&ids[1].id);
            stray = Some(fleet.stray());
            std::thread::sleep(Duration::from_millis(1100));
        })
        .await;
    let report = &plane.reconciled;
    assert_eq!((report.kept, report.lost, report.strays), (3, 1, 1));
    let sandboxes = &plane.control.sandboxes;
    assert_eq!(
        sandboxes.get(&ids[0].id).expect("kept"),
        ids[0],
        "nothing about it changed"
    );
    assert!(sandboxes.get(&ids[1].id).is_err());
    eventually("the overdue timeout", || {
        sandboxes.get(&overdue.id).is_err()
    })
    .await;
    eventually("the strays' end", || plane.fleet.alive().len() == 2).await;
    let log = sandboxes
        .log(&ids[1].id, &LogQuery::default())
        .await
        .expect("log");
    assert_eq!(log.last().expect("an end").fields["reason"], "lost");
}

#[tokio::test]
async fn what_nobody_wants_is_killed_however_often_that_takes() {
    let plane = Plane::new().await;
    let kept = plane.sandbox().await;
    let plane = plane
        .restart(|fleet| {
            fleet.stray();
            fleet.fail_kills(3);
        })
        .await;
    assert_eq!((plane.reconciled.kept, plane.reconciled.strays), (1, 1));
    eventually("its end", || {
        plane.fleet.alive() == std::slice::from_ref(&kept.id)
    })
    .await;
}

#[tokio::test]
async fn a_sandbox_is_sampled_while_it_works_and_when_somebody_asks() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let made = sandboxes.create(request("base")).await.expect("create");
    let sandbox = made.sandbox;
    let all = async || {
        sandboxes
            .metrics(&sandbox.id, None, None)
            .await
            .expect("metrics")
    };
    // One that rests is left alone.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(sandboxes.latest_metrics(None).await.is_empty());
    let first = all().await;
    assert_eq!((first.len(), first[0].usage.cpu_used_pct), (1, 12.5));
    while all().await.len() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let rested = all().await;
    assert_eq!(rested[2].usage.cpu_used_pct, 0.0);
    assert_eq!(rested[2].usage.mem_used, first[0].usage.mem_used);

    plane.fleet.work(Duration::from_millis(20));
    while all().await.last().expect("a sample").usage.cpu_used_pct == 0.0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(all().await.windows(2).all(|w| w[0].at <= w[1].at));
    let before = sandbox.started_at - Duration::from_secs(1);
    let none = sandboxes.metrics(&sandbox.id, None, Some(before)).await;
    assert!(none.expect("metrics").is_empty());
    assert_eq!(sandboxes.latest_metrics(None).await.len(), 1);
    let unknown = SandboxId::generate();
    assert!(sandboxes.latest_metrics(Some(&[unknown])).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_lives_leak_nothing() {
    const LIVES: usize = 3000;
    const AT_ONCE: usize = 64;
    let plane = Plane::new().await;
    let began = std::time::Instant::now();
    let sandboxes = plane.control.sandboxes.clone();
    futures::StreamExt::for_each_concurrent(futures::stream::iter(0..LIVES), AT_ONCE, |n| {
        let (sandboxes, fleet) = (sandboxes.clone(), plane.fleet.clone());
        async move {
            match n % 10 {
                0 => fleet.fail_next_create(failed()),
                1 => {
                    // Polled once and dropped.
                    let never = std::pin::pin!(sandboxes.create(request("base")));
                    let _ = futures::poll!(never);
                    return;
                }
                _ => {}
            }
            let Ok(made) = sandboxes.create(request("base")).await else {
                return;
            };
            let id = made.sandbox.id.clone();
            match n % 10 {
                2 => fleet.crash(&id),
                3 => drop(
                    sandboxes
                        .set_lifetime(&id, Lifetime::For(Duration::ZERO))
                        .await,
                ),
                4 => fleet.fail_kills(1),
                _ => {}
            }
            match sandboxes.kill(&id).await {
                Ok(()) | Err(Error::SandboxNotFound { .. }) => {}
                Err(error) => panic!("kill {n}: {error}"),
            }
        }
    })
    .await;
    eventually("silence", || sandboxes.in_memory() == (0, 0)).await;
    eventually("an empty fleet", || plane.fleet.alive().is_empty()).await;
    eprintln!("{LIVES} lives in {:?}", began.elapsed());
    assert_eq!(
        sandboxes
            .list(&ListQuery::default())
            .await
            .expect("list")
            .total,
        0
    );
    assert!(sandboxes.counts().values().all(|n| *n == 0));
}
