//! Snapshots: taken, named, listed, used, deleted.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::time::Duration;

use common::{
    Plane, eventually, failed,
    past::{ids, is_missing, named, of_users},
    request,
};
use cubicle_control::{
    Error,
    fleet::{FleetError, memory::Step},
    lifecycle::State,
    sandbox::{CreateSandbox, ListQuery, PauseMode, PauseSandbox},
    snapshot::{CreateSnapshot, Snapshot, SnapshotQuery, SnapshotState},
    template::{BuildSpec, BuildTemplate, Size},
};
use cubicle_ids::SandboxId;

#[tokio::test]
async fn a_snapshot_is_taken_found_used_and_deleted() {
    let plane = Plane::new().await;
    let (sandboxes, snapshots) = (&plane.control.sandboxes, &plane.control.snapshots);
    let sandbox = plane.sandbox().await;
    let request_it = CreateSnapshot::default();
    let made = snapshots
        .create(&sandbox.id, request_it)
        .await
        .expect("take");
    let snapshot = made.snapshot;
    assert_eq!(made.taken.snapshot, snapshot.id);
    assert_eq!(snapshot.state, SnapshotState::Ready);
    assert_eq!(snapshot.sandbox, sandbox.id);
    assert_eq!(snapshot.template, sandbox.template);
    assert_eq!(snapshot.parent.as_ref(), Some(&sandbox.snapshot));
    assert_eq!(snapshot.mode, PauseMode::Full);
    assert!(snapshot.names().is_empty());
    let report = snapshot.report.clone().expect("a report");
    assert_eq!(report.tier, "anonymous_pages");
    assert_eq!(report.bytes_written, 7 << 20);
    assert_eq!(report.frozen, Duration::from_millis(5));
    let source = sandboxes.get(&sandbox.id).expect("it runs on");
    assert_eq!((source.state, source.generation), (State::Running, 1));
    assert_eq!(source.base, snapshot.id);

    let id = snapshot.id.as_str();
    for reference in [id.to_owned(), snapshot.reference()] {
        let found = snapshots.get(&reference).await.expect("get");
        let stored = found.stored.expect("the store knows it");
        assert!(stored.own_bytes < stored.logical_bytes);
        let without = Snapshot {
            stored: None,
            ..found
        };
        assert_eq!(without, snapshot, "as it was told at first");
        let child = plane.create(request(&reference)).await;
        assert_eq!(child.template.as_str(), id, "it takes a template's place");
        assert_eq!(child.snapshot, snapshot.id);
        assert_ne!(child.envd_token, sandbox.envd_token);
        assert!(child.metadata.is_empty());
        let query = ListQuery {
            template: Some(reference),
            ..ListQuery::default()
        };
        let page = sandboxes.list(&query).await.expect("list");
        assert!(page.items.iter().any(|listed| listed.id == child.id));
    }
    assert_eq!(plane.fleet.alive().len(), 3);

    snapshots
        .delete(&snapshot.reference())
        .await
        .expect("delete");
    assert!(of_users(&plane).is_empty());
    assert_eq!(
        plane.fleet.alive().len(),
        3,
        "what was made from it runs on"
    );
    is_missing(snapshots.delete(id).await);
    is_missing(snapshots.get(id).await);
    is_missing(snapshots.verify(id).await);
    let gone = sandboxes.create(request(id)).await;
    assert!(
        matches!(gone, Err(Error::TemplateNotFound { .. })),
        "{gone:?}"
    );
    assert!(ids(snapshots, SnapshotQuery::default()).await.is_empty());
    for wrong in ["", "snap-x", "A", "a:b:c", "nothing", "nothing:default"] {
        is_missing(snapshots.get(wrong).await);
        is_missing(snapshots.delete(wrong).await);
    }
}

#[tokio::test]
async fn one_request_deletes_templates_and_snapshots() {
    let plane = Plane::new().await;
    let sandbox = plane.sandbox().await;
    let snapshot = plane.snapshot(&sandbox.id, Some("mine")).await;
    plane
        .control
        .delete("mine:default")
        .await
        .expect("a snapshot");
    plane.control.delete("base").await.expect("a template");
    for gone in [snapshot.id.as_str(), "mine", "base"] {
        let missing = plane.control.delete(gone).await;
        assert!(
            matches!(missing, Err(Error::TemplateNotFound { .. })),
            "{missing:?}"
        );
    }
    assert!(plane.fleet.snapshot_ids().is_empty());
    assert_eq!(plane.fleet.alive(), std::slice::from_ref(&sandbox.id));
}

#[tokio::test]
async fn a_name_stands_for_the_newest_of_that_name() {
    let plane = Plane::new().await;
    let snapshots = &plane.control.snapshots;
    let templates = &plane.control.templates;
    let sandbox = plane.sandbox().await;
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(plane.snapshot(&sandbox.id, Some("snap-test_it")).await.id);
    }
    let tagged = plane.snapshot(&sandbox.id, Some("snap-test_it:v2")).await;
    let other = plane.snapshot(&sandbox.id, Some("team/other")).await;
    assert_eq!(tagged.names(), ["snap-test_it:v2"]);
    assert_eq!(other.names(), ["team/other:default"]);
    let resolve = async |reference: &str| {
        let resolved = templates.resolve(reference).await;
        resolved.map(|resolved| resolved.snapshot)
    };
    for (reference, meant) in [
        ("snap-test_it", &taken[2]),
        ("snap-test_it:default", &taken[2]),
        ("snap-test_it:v2", &tagged.id),
        ("team/other", &other.id),
        (taken[0].as_str(), &taken[0]),
    ] {
        assert_eq!(&resolve(reference).await.expect(reference), meant);
        assert_eq!(&snapshots.get(reference).await.expect(reference).id, meant);
    }
    let all = [&tagged.id, &taken[2], &taken[1], &taken[0]];
    assert_eq!(
        ids(snapshots, named("snap-test_it")).await,
        all.map(Clone::clone)
    );
    assert_eq!(
        ids(snapshots, named("snap-test_it:v2")).await,
        std::slice::from_ref(&tagged.id)
    );
    assert!(ids(snapshots, named("snap-test")).await.is_empty());
    assert!(ids(snapshots, named("NO NAME")).await.is_empty());

    snapshots
        .delete(taken[2].as_str())
        .await
        .expect("the newest");
    assert_eq!(resolve("snap-test_it").await.expect("older"), taken[1]);
    snapshots
        .delete("snap-test_it:default")
        .await
        .expect("the others");
    assert!(resolve("snap-test_it").await.is_err());
    assert!(resolve(taken[0].as_str()).await.is_err());
    assert_eq!(resolve("snap-test_it:v2").await.expect("kept"), tagged.id);

    let child = plane.create(request("team/other")).await;
    assert_eq!(child.alias.as_deref(), Some("team/other"));
    let take = async |name: &str| {
        let request = CreateSnapshot {
            name: Some(name.to_owned()),
            ..CreateSnapshot::default()
        };
        snapshots.create(&sandbox.id, request).await
    };
    let taken_name = take("base").await;
    assert!(
        matches!(taken_name, Err(Error::NameTaken { .. })),
        "{taken_name:?}"
    );
    for wrong in ["", "A", "a b", "a:B", other.id.as_str()] {
        let refused = take(wrong).await;
        assert!(
            matches!(refused, Err(Error::Invalid { field: "name", .. })),
            "{wrong}: {refused:?}"
        );
    }
    let order = BuildTemplate {
        name: "team/other".into(),
        tags: Vec::new(),
        size: Size::default(),
        spec: BuildSpec {
            force: true,
            ..BuildSpec::recipe("base")
        },
        request_id: None,
    };
    let refused = templates.build(order).await;
    assert!(
        matches!(refused, Err(Error::NameTaken { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn pages_partition_the_list() {
    let plane = Plane::new().await;
    let snapshots = &plane.control.snapshots;
    let (a, b) = (plane.sandbox().await, plane.sandbox().await);
    let mut of_a = Vec::new();
    for n in 0..25 {
        let of = if n % 5 == 0 { &b } else { &a };
        let snapshot = plane.snapshot(&of.id, None).await;
        if n % 5 != 0 {
            of_a.push(snapshot.id);
        }
    }
    of_a.reverse();
    for limit in [1, 3, 7, 20, 100] {
        let mut query = SnapshotQuery {
            sandbox: Some(a.id.clone()),
            limit: Some(limit),
            ..SnapshotQuery::default()
        };
        let mut seen = Vec::new();
        loop {
            let page = snapshots.list(&query).await.expect("page");
            assert!(page.next.is_none() || page.items.len() == limit);
            seen.extend(page.items.into_iter().map(|snapshot| snapshot.id));
            let Some(next) = page.next else { break };
            query.cursor = Some(next.to_string().parse().expect("own token"));
        }
        assert_eq!(seen, of_a, "newest first, each once, in pages of {limit}");
    }
    for limit in [0, 101] {
        let query = SnapshotQuery {
            limit: Some(limit),
            ..SnapshotQuery::default()
        };
        let refused = snapshots.list(&query).await;
        assert!(
            matches!(refused, Err(Error::Invalid { field: "limit", .. })),
            "{refused:?}"
        );
    }
    let nobodys = SnapshotQuery {
        sandbox: Some(SandboxId::generate()),
        ..SnapshotQuery::default()
    };
    assert!(ids(snapshots, nobodys).await.is_empty());
    plane.control.sandboxes.kill(&a.id).await.expect("kill");
    let of_the_dead = SnapshotQuery {
        sandbox: Some(a.id.clone()),
        ..SnapshotQuery::default()
    };
    assert_eq!(ids(snapshots, of_the_dead).await, of_a, "they outlive it");
}

#[tokio::test]
async fn a_failure_or_a_death_at_any_step_leaves_nothing() {
    let plane = Plane::new().await;
    let (sandboxes, snapshots) = (&plane.control.sandboxes, &plane.control.snapshots);
    let sandbox = plane.sandbox().await;
    let everything = || SnapshotQuery {
        states: SnapshotState::ALL.to_vec(),
        ..SnapshotQuery::default()
    };
    for step in [Step::Freeze, Step::Published] {
        plane.fleet.fail_at(step, failed());
        let refused = snapshots
            .create(&sandbox.id, CreateSnapshot::default())
            .await;
        assert!(matches!(refused, Err(Error::Fleet(_))), "{refused:?}");
        assert!(ids(snapshots, everything()).await.is_empty());
        eventually("the end of it", || of_users(&plane).is_empty()).await;
        let now = sandboxes.get(&sandbox.id).expect("it runs on");
        assert_eq!(*now, *sandbox, "as if nothing had been asked");
    }
    plane.fleet.deafen(&sandbox.id);
    let healthy = CreateSnapshot {
        require_healthy: true,
        ..CreateSnapshot::default()
    };
    let deaf = snapshots.create(&sandbox.id, healthy).await;
    assert!(
        matches!(deaf, Err(Error::Fleet(FleetError::Unresponsive { .. }))),
        "{deaf:?}"
    );
    for kill in [true, false] {
        let doomed = plane.sandbox().await;
        let reached = plane.fleet.reached(Step::Freeze);
        plane.fleet.takes(Step::Freeze, Duration::from_millis(30));
        let taking = {
            let (snapshots, id) = (snapshots.clone(), doomed.id.clone());
            tokio::spawn(async move { snapshots.create(&id, CreateSnapshot::default()).await })
        };
        eventually("the freeze", || plane.fleet.reached(Step::Freeze) > reached).await;
        if kill {
            sandboxes.kill(&doomed.id).await.expect("kill");
        } else {
            plane.fleet.crash(&doomed.id);
        }
        assert!(taking.await.expect("task").is_err());
        eventually("its end", || sandboxes.get(&doomed.id).is_err()).await;
        assert!(ids(snapshots, everything()).await.is_empty());
    }
    // Killed when it was published already: the snapshot is whole, and its sandbox is dead.
    let doomed = plane.sandbox().await;
    plane.fleet.behave();
    let reached = plane.fleet.reached(Step::Published);
    plane
        .fleet
        .takes(Step::Published, Duration::from_millis(30));
    let taking = {
        let (snapshots, id) = (snapshots.clone(), doomed.id.clone());
        tokio::spawn(async move { snapshots.create(&id, CreateSnapshot::default()).await })
    };
    eventually("the step", || {
        plane.fleet.reached(Step::Published) > reached
    })
    .await;
    sandboxes.kill(&doomed.id).await.expect("kill");
    let taken = taking.await.expect("task").expect("taken").snapshot;
    plane.create(request(taken.id.as_str())).await;
}

#[tokio::test]
async fn what_a_paused_sandbox_consists_of_is_not_for_deletion() {
    let plane = Plane::new().await;
    let sandbox = plane.sandbox().await;
    let own = plane.snapshot(&sandbox.id, None).await;
    let sandboxes = &plane.control.sandboxes;
    sandboxes
        .pause(&sandbox.id, PauseSandbox::default())
        .await
        .expect("pause");
    let pause = plane.pauses().pop().expect("a pause");
    for reference in [pause.to_string(), format!("{pause}:default")] {
        let refused = plane.control.delete(&reference).await;
        assert!(
            matches!(&refused, Err(Error::SnapshotInUse { sandbox: of, .. }) if *of == sandbox.id),
            "{refused:?}"
        );
    }
    let not_for_use = sandboxes.create(request(pause.as_str())).await;
    assert!(matches!(not_for_use, Err(Error::TemplateNotFound { .. })));
    assert_eq!(
        ids(&plane.control.snapshots, SnapshotQuery::default()).await,
        std::slice::from_ref(&own.id),
        "nobody sees it"
    );
    plane
        .control
        .delete(own.id.as_str())
        .await
        .expect("its own");
    let awake = sandboxes.connect(&sandbox.id, cubicle_control::sandbox::Lifetime::Never);
    assert!(awake.await.expect("connect").resumed);
}

#[tokio::test]
async fn disks_alone_can_be_kept() {
    let plane = Plane::new().await;
    let sandbox = plane.sandbox().await;
    let request_it = CreateSnapshot {
        memory: false,
        ..CreateSnapshot::default()
    };
    let snapshots = &plane.control.snapshots;
    let made = snapshots
        .create(&sandbox.id, request_it)
        .await
        .expect("take");
    assert_eq!(made.snapshot.mode, PauseMode::Filesystem);
    assert_eq!(made.taken.tier, "none");
    let order = CreateSandbox {
        env_vars: vec![("B".into(), "2".into())],
        ..request(made.snapshot.id.as_str())
    };
    let child = plane.create(order).await;
    let order = plane.fleet.order(&child.id).expect("created");
    assert_eq!(order.env_vars, [("B".to_owned(), "2".to_owned())]);
}
