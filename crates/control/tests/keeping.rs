//! How many snapshots are kept, how long, and whether they are still sound.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use std::time::Duration;

use common::{
    Plane, eventually, failed,
    past::{ids, is_missing, is_unusable, of_users},
    request,
};
use cubicle_control::{
    Error,
    fleet::{FleetError, FreezeKind, SnapshotKind, memory::Step},
    lifecycle::State,
    sandbox::PauseSandbox,
    snapshot::{CreateSnapshot, SnapshotQuery, SnapshotState},
};

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
    assert!(error.to_string().contains("at most 3"), "{error}");
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
        .create(&sandbox.id, brief(2000))
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

#[tokio::test]
async fn a_restart_makes_rows_and_store_agree() {
    let plane = Plane::new().await;
    let sandbox = plane.sandbox().await;
    let kept = plane.snapshot(&sandbox.id, Some("kept")).await.id;
    let lost = plane.snapshot(&sandbox.id, Some("lost")).await.id;
    let torn = plane.snapshot(&sandbox.id, Some("torn")).await.id;
    let mut strays = Vec::new();
    let plane = plane
        .restart(|fleet| {
            fleet.lose_snapshot(&lost);
            fleet.damage(&torn);
            for kind in [FreezeKind::User, FreezeKind::Pause, FreezeKind::Temporary] {
                strays.push(fleet.stray_snapshot(SnapshotKind::Frozen(kind)));
            }
            strays.push(fleet.stray_snapshot(SnapshotKind::Template));
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
    let snapshots = &plane.control.snapshots;
    for (name, word) in [("lost", "missing"), ("torn", "checksum")] {
        let found = snapshots.get(name).await.expect(name);
        assert_eq!(found.state, SnapshotState::Failed);
        assert!(found.reason.is_some_and(|reason| reason.contains(word)));
    }
    assert_eq!(plane.create(request("kept")).await.snapshot, kept);
}
