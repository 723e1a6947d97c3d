//! The database cannot be written: nothing is begun that could not be remembered.

mod common;

use common::{
    Plane,
    sleep::{FULL, MINUTE},
};
use cubicle_control::{
    Error,
    fleet::memory::Step,
    lifecycle::State,
    sandbox::ForkSandbox,
    snapshot::{CreateSnapshot, SnapshotQuery},
};
use sqlx::{Connection as _, SqliteConnection};

fn is_refused<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Database { .. })), "{result:?}");
}

/// Triggers stand for a disk that is full: with both, every write fails.
#[tokio::test]
async fn what_cannot_be_remembered_is_not_done() {
    let plane = Plane::new().await;
    let sandboxes = &plane.control.sandboxes;
    let snapshots = &plane.control.snapshots;
    let [awake, other, third, asleep] = [
        plane.sandbox().await,
        plane.sandbox().await,
        plane.sandbox().await,
        plane.sandbox().await,
    ];
    sandboxes.pause(&asleep.id, FULL).await.expect("pause");
    let asleep = sandboxes.get(&asleep.id).expect("it sleeps");
    let steps = [Step::Freeze, Step::Resume, Step::Rollback];
    let reached = || steps.map(|step| plane.fleet.reached(step));
    let before = reached();

    let file = plane.dir.path().join("cubicle.db");
    let file = format!("sqlite://{}", file.display());
    let mut disk = SqliteConnection::connect(&file).await.expect("open");
    let writes = [
        "INSERT ON sandboxes",
        "UPDATE ON sandboxes",
        "INSERT ON snapshots",
    ];
    for (n, write) in writes.into_iter().enumerate() {
        let full = format!(
            "CREATE TRIGGER full_{n} BEFORE {write} BEGIN SELECT RAISE(FAIL, 'it is full'); END"
        );
        let done = sqlx::query(sqlx::AssertSqlSafe(full)).execute(&mut disk);
        done.await.expect("a full disk");
    }
    let copies = ForkSandbox {
        count: 2,
        lifetime: MINUTE,
    };
    let (paused, resumed, rolled_back, taken) = tokio::join!(
        sandboxes.pause(&awake.id, FULL),
        sandboxes.connect(&asleep.id, MINUTE),
        sandboxes.rollback(&other.id, "base"),
        snapshots.create(&third.id, CreateSnapshot::default()),
    );
    is_refused(paused);
    is_refused(rolled_back);
    is_refused(resumed);
    is_refused(taken);
    assert_eq!(reached(), before, "the fleet was not asked");
    let forked = sandboxes.fork(&other.id, copies).await.expect("frozen");
    for child in forked.children {
        is_refused(child);
    }
    for n in 0..writes.len() {
        let room = format!("DROP TRIGGER full_{n}");
        let done = sqlx::query(sqlx::AssertSqlSafe(room)).execute(&mut disk);
        done.await.expect("room");
    }

    for sandbox in [&awake, &other, &third, &asleep] {
        assert_eq!(sandboxes.get(&sandbox.id).expect("it lives"), *sandbox);
    }
    assert_eq!(plane.fleet.alive().len(), 3);
    let query = SnapshotQuery::default();
    assert!(snapshots.list(&query).await.expect("list").items.is_empty());
    let now = sandboxes.connect(&asleep.id, MINUTE).await.expect("resume");
    assert_eq!(now.sandbox.state, State::Running);
    sandboxes
        .rollback(&other.id, "base")
        .await
        .expect("rollback");
    sandboxes.pause(&awake.id, FULL).await.expect("pause");
    plane.snapshot(&other.id, None).await;
}
