use std::path::PathBuf;

use cubicle_vmm::MemoryFile;

use super::*;

fn row(sandbox: &SandboxId, generation: u64) -> Row {
    Row {
        key: Key {
            sandbox: sandbox.clone(),
            generation,
        },
        serves: Some((sandbox.clone(), generation)),
        origin: None,
        snapshot: SnapshotId::generate(),
        step: Step::Creating,
        shape: Shape {
            cpus: 2,
            memory_mib: 512,
            disk_mib: 1024,
        },
        slot: None,
        vm: None,
        identity: InitRequest {
            env_vars: [("K".to_owned(), "a 'quoted'\nvalue".to_owned())].into(),
            access_token: Some("secret".to_owned()),
            generation: Some(generation),
            ..InitRequest::default()
        },
        created_at: OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap(),
        running_at: None,
    }
}

fn record(sandbox: &SandboxId) -> VmRecord {
    VmRecord {
        id: sandbox.clone(),
        driver: "fake".to_owned(),
        pid: 4711,
        start_time: 42,
        boot_id: "b".to_owned(),
        run_dir: PathBuf::from("/run/x"),
        cgroups: vec![PathBuf::from("/sys/fs/cgroup/x")],
        uid: 200_003,
        memory: MemoryFile {
            inode: u64::from(u32::MAX) + 5,
            len: 1 << 28,
        },
    }
}

async fn rows(journal: &Journal) -> Vec<Row> {
    journal
        .rows()
        .await
        .unwrap()
        .into_iter()
        .map(|row| row.unwrap())
        .collect()
}

#[tokio::test]
async fn a_row_survives_reopening_at_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.db");
    let id = SandboxId::generate();
    let mut want = row(&id, 1);

    let journal = Journal::open(&path).await.unwrap();
    journal.begin(&want).await.unwrap();
    // Not closed: what was written must be there for whoever comes after a crash.
    let journal = Journal::open(&path).await.unwrap();
    assert_eq!(rows(&journal).await, [want.clone()]);

    journal.started(&want.key, 3, &record(&id)).await.unwrap();
    (want.slot, want.vm) = (Some(3), Some(record(&id)));
    let journal = Journal::open(&path).await.unwrap();
    assert_eq!(rows(&journal).await, [want.clone()]);

    let at = OffsetDateTime::from_unix_timestamp(1_700_000_001).unwrap();
    let serves = (&want.key.sandbox, want.key.generation);
    journal
        .running(&want.key, serves, &want.identity, at)
        .await
        .unwrap();
    (want.step, want.running_at) = (Step::Running, Some(at));
    assert_eq!(rows(&journal).await, [want.clone()]);

    journal.removing(&want.key).await.unwrap();
    want.step = Step::Removing;
    let journal = Journal::open(&path).await.unwrap();
    assert_eq!(rows(&journal).await, [want.clone()]);

    journal.forget(&want.key).await.unwrap();
    assert_eq!(rows(&journal).await, []);
    journal.forget(&want.key).await.unwrap();
}

#[tokio::test]
async fn two_generations_of_one_sandbox_live_side_by_side_but_not_twice() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(&dir.path().join("node.db")).await.unwrap();
    let id = SandboxId::generate();
    journal.begin(&row(&id, 1)).await.unwrap();
    journal.begin(&row(&id, 2)).await.unwrap();
    assert!(matches!(
        journal.begin(&row(&id, 2)).await,
        Err(Error::Journal { .. })
    ));
    journal
        .forget(&Key {
            sandbox: id.clone(),
            generation: 1,
        })
        .await
        .unwrap();
    assert_eq!(rows(&journal).await.len(), 1);
    let gone = Key {
        sandbox: id,
        generation: 1,
    };
    assert!(
        journal
            .running(
                &gone,
                (&gone.sandbox, 1),
                &InitRequest::default(),
                OffsetDateTime::now_utc()
            )
            .await
            .is_err(),
        "no row, no success"
    );
}

#[tokio::test]
async fn a_damaged_row_is_reported_and_can_be_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(&dir.path().join("node.db")).await.unwrap();
    let (good, bad) = (SandboxId::generate(), SandboxId::generate());
    journal.begin(&row(&good, 1)).await.unwrap();
    journal.begin(&row(&bad, 1)).await.unwrap();
    sqlx::query("UPDATE instance SET identity = '{' WHERE sandbox = ?")
        .bind(bad.as_str())
        .execute(&journal.pool)
        .await
        .unwrap();
    let rows = journal.rows().await.unwrap();
    let errors: Vec<_> = rows.iter().filter_map(|row| row.as_ref().err()).collect();
    assert!(
        matches!(&errors[..], [Error::JournalRow { sandbox, .. }] if sandbox == bad.as_str()),
        "{errors:?}"
    );
    journal.discard(bad.as_str()).await.unwrap();
    assert_eq!(super::tests::rows(&journal).await.len(), 1);
}
