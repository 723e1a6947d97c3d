//! Snapshots: taken, named, listed, checked, deleted.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::time::Duration;

use common::{Plane, eventually, failed, request};
use cubicle_control::{
    Error,
    fleet::{FleetError, FreezeKind, SnapshotKind, memory::Step},
    lifecycle::State,
    sandbox::{CreateSandbox, ListQuery, PauseMode, PauseSandbox},
    snapshot::{
        CreateSnapshot, Snapshot, SnapshotQuery, SnapshotState, Snapshots, TreeNode, TreeWhat,
    },
    template::{BuildTemplate, Size},
};
use cubicle_ids::{SandboxId, SnapshotId};

async fn ids(snapshots: &Snapshots, query: SnapshotQuery) -> Vec<SnapshotId> {
    let page = snapshots.list(&query).await.expect("list");
    page.items.into_iter().map(|snapshot| snapshot.id).collect()
}

fn named(name: &str) -> SnapshotQuery {
    SnapshotQuery {
        name: Some(name.to_owned()),
        ..SnapshotQuery::default()
    }
}

fn is_missing<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(
        matches!(result, Err(Error::SnapshotNotFound { .. })),
        "{result:?}"
    );
}

fn is_unusable<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(
        matches!(result, Err(Error::SnapshotUnusable { .. })),
        "{result:?}"
    );
}

fn of_users(plane: &Plane) -> Vec<SnapshotId> {
    plane.of_kind(FreezeKind::User)
}

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
        recipe: "base".into(),
        size: Size::default(),
        force: true,
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
async fn the_quota_holds_and_says_so() {
    let plane = Plane::with(|config| config.snapshots.max_count = Some(3)).await;
    let snapshots = &plane.control.snapshots;
    let boxes = [plane.sandbox().await, plane.sandbox().await];
    let all = (0..10).map(|n| snapshots.create(&boxes[n % 2].id, CreateSnapshot::default()));
    let results = futures::future::join_all(all).await;
    assert!(results.iter().filter(|r| r.is_ok()).count() <= 3);
    while of_users(&plane).len() < 3 {
        plane.snapshot(&boxes[0].id, None).await;
    }
    let full = snapshots
        .create(&boxes[0].id, CreateSnapshot::default())
        .await;
    let Err(error @ Error::Quota { .. }) = full else {
        panic!("{full:?}")
    };
    assert!(
        error.to_string().contains("there are 3 snapshots"),
        "{error}"
    );
    plane
        .control
        .sandboxes
        .pause(&boxes[0].id, PauseSandbox::default())
        .await
        .expect("a pause is not counted");
    let usage = snapshots.usage().await.expect("usage");
    assert_eq!((usage.count, usage.max_count), (3, Some(3)));
    assert_eq!(usage.own_bytes, 3 * (7 << 20));
    let newest = &of_users(&plane)[0];
    snapshots.delete(newest.as_str()).await.expect("delete");
    plane.snapshot(&boxes[1].id, None).await;
}

#[tokio::test]
async fn the_quota_of_bytes_holds_and_counts_what_the_store_says() {
    const MAX: u64 = 15 << 20;
    let plane = Plane::with(|config| config.snapshots.max_own_bytes = Some(MAX)).await;
    let snapshots = &plane.control.snapshots;
    let sandbox = plane.sandbox().await;
    for _ in 0..3 {
        plane.snapshot(&sandbox.id, None).await;
    }
    let full = snapshots
        .create(&sandbox.id, CreateSnapshot::default())
        .await;
    assert!(matches!(full, Err(Error::Quota { .. })), "{full:?}");
    assert_eq!(of_users(&plane).len(), 3);
    snapshots
        .delete(of_users(&plane)[0].as_str())
        .await
        .expect("delete");
    plane.snapshot(&sandbox.id, None).await;
}

#[tokio::test]
async fn some_delete_themselves() {
    let plane = Plane::with(|config| {
        config.snapshots.default_ttl = Some(Duration::from_secs(3600));
    })
    .await;
    let snapshots = &plane.control.snapshots;
    let sandbox = plane.sandbox().await;
    let ordinary = plane.snapshot(&sandbox.id, None).await;
    let lives = ordinary.expires_at.expect("an end") - ordinary.created_at;
    assert_eq!(lives, Duration::from_secs(3600));
    let brief = |ttl| CreateSnapshot {
        ttl: Some(Duration::from_millis(ttl)),
        ..CreateSnapshot::default()
    };
    plane.fleet.fail_at(Step::Delete, failed());
    let first = snapshots
        .create(&sandbox.id, brief(30))
        .await
        .expect("take");
    eventually("its end", || of_users(&plane) == [ordinary.id.clone()]).await;
    is_missing(snapshots.get(first.snapshot.id.as_str()).await);
    let second = snapshots
        .create(&sandbox.id, brief(600))
        .await
        .expect("take");
    let plane = plane.restart(|_| ()).await;
    let second = second.snapshot.id;
    assert_eq!(plane.reconciled.stray_snapshots, 0);
    assert!(
        of_users(&plane).contains(&second),
        "a restart forgets no end"
    );
    eventually("its end", || !of_users(&plane).contains(&second)).await;
}

#[tokio::test]
async fn damage_is_found_and_never_used() {
    let plane = Plane::new().await;
    let (sandboxes, snapshots) = (&plane.control.sandboxes, &plane.control.snapshots);
    let sandbox = plane.sandbox().await;
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(plane.snapshot(&sandbox.id, None).await.id);
    }
    let sound = snapshots.verify(taken[0].as_str()).await.expect("sound");
    assert_eq!(sound.state, SnapshotState::Ready);
    for id in &taken[1..] {
        plane.fleet.damage(id);
    }
    let found = snapshots.verify(taken[1].as_str()).await;
    assert!(
        found
            .as_ref()
            .is_err_and(|e| e.to_string().contains("checksum"))
    );
    is_unusable(found);
    is_unusable(sandboxes.create(request(taken[1].as_str())).await);
    // Found by the attempt to use it.
    let used = sandboxes.create(request(taken[2].as_str())).await;
    assert!(
        matches!(used, Err(Error::Fleet(FleetError::Damaged { .. }))),
        "{used:?}"
    );
    is_unusable(sandboxes.create(request(taken[2].as_str())).await);
    let back = sandboxes.rollback(&sandbox.id, taken[3].as_str()).await;
    assert!(back.is_err());
    is_unusable(sandboxes.rollback(&sandbox.id, taken[3].as_str()).await);
    let lost = plane.snapshot(&sandbox.id, None).await.id;
    plane.fleet.lose_snapshot(&lost);
    is_unusable(sandboxes.create(request(lost.as_str())).await);
    snapshots.delete(lost.as_str()).await.expect("delete");
    let now = sandboxes.get(&sandbox.id).expect("it runs on");
    assert_eq!((now.state, now.generation), (State::Running, 1));
    let failed = SnapshotQuery {
        states: vec![SnapshotState::Failed],
        ..SnapshotQuery::default()
    };
    assert_eq!(ids(snapshots, failed).await.len(), 3);
    assert_eq!(
        ids(snapshots, SnapshotQuery::default()).await,
        [taken[0].clone()]
    );
    for id in &taken {
        snapshots.delete(id.as_str()).await.expect("delete");
    }
    assert!(of_users(&plane).is_empty());
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
async fn a_deletion_that_fails_goes_on_in_the_background_and_after_a_restart() {
    let plane = Plane::new().await;
    let sandbox = plane.sandbox().await;
    let first = plane.snapshot(&sandbox.id, None).await.id;
    let second = plane.snapshot(&sandbox.id, None).await.id;
    let snapshots = &plane.control.snapshots;
    plane.fleet.fail_at(Step::Delete, failed());
    snapshots.delete(first.as_str()).await.expect("accepted");
    is_missing(snapshots.get(first.as_str()).await);
    eventually("its end", || !of_users(&plane).contains(&first)).await;
    for _ in 0..100 {
        plane.fleet.fail_at(Step::Delete, failed());
    }
    snapshots.delete(second.as_str()).await.expect("accepted");
    let plane = plane.restart(|fleet| {
        assert!(
            fleet
                .snapshots_of(SnapshotKind::Frozen(FreezeKind::User))
                .contains(&second)
        );
        fleet.behave();
    });
    let plane = plane.await;
    assert_eq!(plane.reconciled.stray_snapshots, 1);
    eventually("its end", || of_users(&plane).is_empty()).await;
    is_missing(plane.control.snapshots.get(second.as_str()).await);
}

fn outline(trees: &[TreeNode], depth: usize, lines: &mut Vec<String>) {
    for node in trees {
        let what = match &node.what {
            TreeWhat::Template { alias, .. } => alias.clone().unwrap_or_default(),
            TreeWhat::Snapshot(snapshot) => snapshot.name.clone().unwrap_or_default(),
            TreeWhat::Deleted { .. } => "deleted".to_owned(),
        };
        lines.push(format!("{}{what}", " ".repeat(depth)));
        outline(&node.children, depth + 1, lines);
    }
}

#[tokio::test]
async fn the_tree_says_what_descends_from_what_also_when_that_is_gone() {
    let plane = Plane::new().await;
    let (sandboxes, snapshots) = (&plane.control.sandboxes, &plane.control.snapshots);
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    let other = plane.sandbox().await;
    let trunk = plane.snapshot(id, Some("trunk")).await;
    let left = plane.snapshot(id, Some("left")).await;
    plane.snapshot(id, Some("leaf")).await;
    sandboxes.rollback(id, "trunk").await.expect("back");
    plane.snapshot(id, Some("right")).await;
    let child = plane.create(request("left")).await;
    plane.snapshot(&child.id, Some("childs")).await;
    plane.snapshot(&other.id, Some("apart")).await;
    let tree = async |of: Option<&SandboxId>| {
        let mut lines = Vec::new();
        outline(&snapshots.tree(of).await.expect("tree"), 0, &mut lines);
        lines
    };
    let whole = [
        "base",
        " trunk",
        "  left",
        "   leaf",
        "   childs",
        "  right",
        " apart",
    ];
    assert_eq!(tree(None).await, whole);
    assert_eq!(
        tree(Some(id)).await,
        whole[..4]
            .iter()
            .chain(&whole[5..6])
            .copied()
            .collect::<Vec<_>>()
    );
    assert_eq!(
        tree(Some(&child.id)).await,
        ["base", " trunk", "  left", "   childs"]
    );
    assert!(tree(Some(&SandboxId::generate())).await.is_empty());

    snapshots.delete(left.id.as_str()).await.expect("delete");
    snapshots.delete(trunk.id.as_str()).await.expect("delete");
    assert_eq!(
        tree(None).await,
        [
            "base",
            " deleted",
            "  deleted",
            "   leaf",
            "   childs",
            "  right",
            " apart"
        ],
        "they part where they parted"
    );
    snapshots.delete("leaf").await.expect("delete");
    assert_eq!(
        tree(None).await,
        ["base", " deleted", "  right", "  childs", " apart"],
        "what only one descends from is of no interest any more"
    );
    for name in ["right", "childs", "apart"] {
        snapshots.delete(name).await.expect("delete");
    }
    assert!(tree(None).await.is_empty());
    let plane = plane.restart(|_| ()).await;
    let back = plane.control.sandboxes.rollback(&child.id, "base").await;
    back.expect("its past is not forgotten with what was in between");
    assert_eq!(plane.fleet.snapshot_ids().len(), 1, "only the template's");
}

#[tokio::test]
async fn a_line_of_descent_may_be_long() {
    let plane = Plane::new().await;
    let snapshots = &plane.control.snapshots;
    let sandbox = plane.sandbox().await;
    for _ in 0..300 {
        plane.snapshot(&sandbox.id, None).await;
    }
    let trees = snapshots.tree(None).await.expect("tree");
    let mut depth = 0;
    let mut node = &trees[0];
    while let Some(child) = node.children.first() {
        (node, depth) = (child, depth + 1);
    }
    assert_eq!((trees.len(), depth), (1, 300));
    let mut all = Vec::new();
    let mut query = SnapshotQuery::default();
    loop {
        let page = snapshots.list(&query).await.expect("list");
        all.extend(page.items.into_iter().map(|snapshot| snapshot.id));
        let Some(next) = page.next else { break };
        query.cursor = Some(next);
    }
    assert_eq!(all.len(), 300);
    // In an order that is neither's.
    all.sort_unstable();
    for id in all {
        snapshots.delete(id.as_str()).await.expect("delete");
    }
    assert!(of_users(&plane).is_empty());
    assert!(snapshots.tree(None).await.expect("tree").is_empty());
}

#[tokio::test]
async fn a_restart_makes_rows_and_store_agree() {
    let plane = Plane::new().await;
    let sandbox = plane.sandbox().await;
    let kept = plane.snapshot(&sandbox.id, Some("kept")).await.id;
    let lost = plane.snapshot(&sandbox.id, Some("lost")).await.id;
    let torn = plane.snapshot(&sandbox.id, Some("torn")).await.id;
    let mut strays = Vec::new();
    let mut template = None;
    let plane = plane
        .restart(|fleet| {
            fleet.lose_snapshot(&lost);
            fleet.damage(&torn);
            for kind in [FreezeKind::User, FreezeKind::Pause, FreezeKind::Temporary] {
                strays.push(fleet.stray_snapshot(SnapshotKind::Frozen(kind)));
            }
            template = Some(fleet.stray_snapshot(SnapshotKind::Template));
        })
        .await;
    let report = &plane.reconciled;
    assert_eq!((report.stray_snapshots, report.failed_snapshots), (3, 2));
    eventually("the strays' end", || {
        let there = plane.fleet.snapshot_ids();
        !strays.iter().any(|stray| there.contains(stray))
    })
    .await;
    let there = plane.fleet.snapshot_ids();
    assert!(there.contains(&kept) && there.contains(&torn));
    assert!(
        there.contains(&template.expect("made")),
        "not ours to delete"
    );
    let snapshots = &plane.control.snapshots;
    for (name, word) in [("lost", "missing"), ("torn", "checksum")] {
        let found = snapshots.get(name).await.expect(name);
        assert_eq!(found.state, SnapshotState::Failed);
        assert!(found.reason.is_some_and(|reason| reason.contains(word)));
    }
    assert_eq!(plane.create(request("kept")).await.snapshot, kept);
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
