//! Volumes, snapshots, and what is left after a crash at any point.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{collections::HashSet, fs, os::unix::fs::FileExt as _, sync::Arc};

use common::{DataDir, fill, manifest, publish};
use cubicle_cow::{
    BackingConfig, Error, Manifest, SnapshotKind, SnapshotState, Store, VolumeName, memory,
};
use cubicle_ids::{SandboxId, SnapshotId};
use proptest::prelude::*;

/// The catalog, opened behind the store's back.
async fn sql(data: &DataDir, statement: &'static str) {
    let path = data.path().join("store/catalog.db");
    let pool = sqlx::SqlitePool::connect(path.to_str().unwrap())
        .await
        .unwrap();
    sqlx::query(statement).execute(&pool).await.unwrap();
    pool.close().await;
}

#[tokio::test]
async fn a_snapshot_is_published_cloned_and_deleted() {
    let data = DataDir::new();
    let (store, report) = data.open().await;
    assert_eq!(report, Default::default());
    let id = SnapshotId::generate();

    let draft = store
        .begin_snapshot(id.clone(), SnapshotKind::Template)
        .unwrap();
    fill(&draft, 7);
    assert!(
        matches!(store.snapshot(&id), Err(Error::NotFound(_))),
        "not there before it is whole"
    );
    let published = manifest(&draft, SnapshotKind::Template);
    let snapshot = draft.publish(published.clone()).await.unwrap();
    assert_eq!(snapshot.manifest().parts.len(), 3);
    assert_eq!(
        Manifest {
            parts: vec![],
            ..(**snapshot.manifest()).clone()
        },
        published
    );
    assert!(matches!(
        store.begin_snapshot(id.clone(), SnapshotKind::User),
        Err(Error::Exists(_))
    ));

    store.wait_durable(&id).await.unwrap();
    store.verify(&id).await.unwrap();

    // A volume of it is writable and does not touch it.
    let name = VolumeName::new(SandboxId::generate(), 3, 0);
    let volume = store.clone_volume(&snapshot.disk(0), &name).unwrap();
    assert_eq!(volume, store.volume(&name));
    let file = fs::File::options().write(true).open(&volume).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    drop(file);
    assert_eq!(fs::read(snapshot.disk(0)).unwrap()[0], 7);
    assert_eq!(fs::read(&volume).unwrap()[4095..4097], [1, 7]);
    assert!(matches!(
        store.clone_volume(&snapshot.disk(0), &name),
        Err(Error::VolumeExists { .. })
    ));

    // Whoever has it open keeps it.
    let open = fs::File::open(snapshot.memory_image()).unwrap();
    store.delete(&id).await.unwrap();
    assert!(!snapshot.dir().exists());
    assert!(matches!(store.delete(&id).await, Err(Error::NotFound(_))));
    assert!(matches!(
        store.wait_durable(&id).await,
        Err(Error::NotFound(_))
    ));
    let mut page = [0; 4096];
    open.read_exact_at(&mut page, 0).unwrap();
    assert_eq!(page, [7; 4096]);
    drop(open);
    store.remove_volumes(&name.sandbox, 3).unwrap();
    store.remove_volumes(&name.sandbox, 3).unwrap();
    assert!(!volume.parent().unwrap().parent().unwrap().exists());

    // A clone that somebody has kept holds nothing.
    let kept = store.clone();
    store.close().await;
    let (again, _) = data.open().await;
    again.close().await;
    drop(kept);
}

#[tokio::test]
async fn what_a_draft_lacks_is_named() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let id = SnapshotId::generate();
    let begin = || {
        store
            .begin_snapshot(id.clone(), SnapshotKind::User)
            .unwrap()
    };
    let drafts = || fs::read_dir(data.path().join("store/tmp")).unwrap().count();

    let draft = begin();
    fill(&draft, 1);
    fs::remove_file(draft.device_state()).unwrap();
    let error = draft
        .publish(manifest(&begin(), SnapshotKind::User))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("device.state is missing"),
        "{error}"
    );

    let draft = begin();
    fill(&draft, 1);
    fs::File::options()
        .write(true)
        .open(draft.disk(0))
        .unwrap()
        .set_len(5)
        .unwrap();
    let error = draft
        .publish(manifest(&begin(), SnapshotKind::User))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("disk-0.img has 5 bytes"),
        "{error}"
    );

    let draft = begin();
    fill(&draft, 1);
    let error = draft
        .publish(manifest(&begin(), SnapshotKind::Pause))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Incomplete { .. }), "{error}");

    // Two drafts of one id: one wins, the other is gone.
    let (first, second) = (begin(), begin());
    fill(&first, 1);
    fill(&second, 2);
    let (a, b) = (
        manifest(&first, SnapshotKind::User),
        manifest(&second, SnapshotKind::User),
    );
    first.publish(a).await.unwrap();
    assert!(matches!(second.publish(b).await, Err(Error::Exists(_))));
    assert_eq!(
        fs::read(store.snapshot(&id).unwrap().disk(0)).unwrap()[0],
        1
    );
    assert_eq!(drafts(), 0, "a draft is removed however it ends");
    store.close().await;
}

#[tokio::test]
async fn an_abandoned_publication_is_whole_or_absent() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    for polls in 0..12 {
        let id = SnapshotId::generate();
        let draft = store
            .begin_snapshot(id.clone(), SnapshotKind::User)
            .unwrap();
        fill(&draft, 9);
        let manifest = manifest(&draft, SnapshotKind::User);
        let mut publication = Box::pin(draft.publish(manifest));
        for _ in 0..polls {
            if futures_poll(&mut publication).await {
                break;
            }
        }
        drop(publication);
        // If it was begun, it is finished in the background.
        if polls > 0 {
            store.wait_for(&id).await;
            store.wait_durable(&id).await.unwrap();
        }
    }
    store.close().await;
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.drafts_removed), (11, 0));
    assert_eq!(report.unowned_removed, Vec::<String>::new());
    store.close().await;
}

/// Polls once, then lets others run.
async fn futures_poll<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> bool {
    let ready = std::future::poll_fn(|context| {
        std::task::Poll::Ready(future.as_mut().poll(context).is_ready())
    })
    .await;
    tokio::task::yield_now().await;
    ready
}

trait WaitFor {
    async fn wait_for(&self, id: &SnapshotId);
}

impl WaitFor for Store {
    async fn wait_for(&self, id: &SnapshotId) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while self.entry(id).is_none() {
            assert!(
                std::time::Instant::now() < deadline,
                "the publication was not finished"
            );
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn a_crash_at_any_point_is_swept_up() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let [kept, no_files, cut, changed, flipped, unflushed] =
        [(); 6].map(|()| SnapshotId::generate());
    for (seed, id) in (1..).zip([&kept, &no_files, &cut, &changed, &flipped, &unflushed]) {
        publish(&store, id, seed).await;
        store.wait_durable(id).await.unwrap();
    }
    let dir = |id: &SnapshotId| data.path().join("store/snapshots").join(id.as_str());
    let sandbox = SandboxId::generate();
    for generation in [1, 2] {
        let name = VolumeName::new(sandbox.clone(), generation, 0);
        store
            .clone_volume(&dir(&kept).join("disk-0.img"), &name)
            .unwrap();
    }
    store.close().await;

    // Between rename and row; between row and rename; torn files; garbage.
    fs::create_dir(dir(&SnapshotId::generate())).unwrap();
    fs::write(data.path().join("store/snapshots/LOST+FOUND"), "x").unwrap();
    fs::create_dir(data.path().join("store/tmp/draft.0")).unwrap();
    fs::write(data.path().join("store/tmp/draft.0/memory.img"), "x").unwrap();
    fs::remove_dir_all(dir(&no_files)).unwrap();
    let shorten = fs::File::options()
        .write(true)
        .open(dir(&cut).join("memory.img"))
        .unwrap();
    shorten.set_len(4096).unwrap();
    let text = fs::read_to_string(dir(&changed).join("manifest.json")).unwrap();
    fs::write(
        dir(&changed).join("manifest.json"),
        text.replace("kernel-1", "kernel-2"),
    )
    .unwrap();
    let flip = fs::File::options()
        .write(true)
        .open(dir(&flipped).join("disk-0.img"))
        .unwrap();
    flip.write_all_at(&[0], 12_345).unwrap();
    drop((shorten, flip));
    sql(
        &data,
        "UPDATE snapshots SET durable = 0, boot_id = 'another kernel' WHERE rowid = 6",
    )
    .await;

    let (store, report) = data.open().await;
    assert_eq!(report.usable, 2, "{report:?}");
    assert_eq!(report.drafts_removed, 1);
    assert_eq!(report.unowned_removed.len(), 2);
    assert_eq!(report.volumes, [(sandbox.clone(), 1), (sandbox.clone(), 2)]);
    let failed: HashSet<_> = report.failed.iter().map(|(id, _)| id.clone()).collect();
    let expected = [&no_files, &cut, &changed, &unflushed].map(Clone::clone);
    assert_eq!(failed, HashSet::from(expected.clone()), "{report:?}");
    for id in &expected {
        let error = store.snapshot(id).unwrap_err();
        assert!(matches!(error, Error::Failed { .. }), "{error}");
    }
    store.verify(&kept).await.unwrap();
    // Same size, other content: found by reading it.
    let error = store.verify(&flipped).await.unwrap_err();
    assert!(error.to_string().contains("disk-0.img"), "{error}");
    assert!(matches!(
        store.snapshot(&flipped),
        Err(Error::Failed { .. })
    ));

    let live = HashSet::from([(sandbox.clone(), 2)]);
    assert_eq!(store.retain_volumes(&live).unwrap(), [(sandbox.clone(), 1)]);
    assert!(
        store
            .volume(&VolumeName::new(sandbox.clone(), 2, 0))
            .exists()
    );

    // Failure is remembered, and does not keep from deletion.
    store.close().await;
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.failed.len()), (1, 0));
    assert_eq!(store.list().len(), 6);
    assert_eq!(
        store
            .list()
            .iter()
            .filter(|entry| !entry.is_usable())
            .count(),
        5
    );
    for id in expected.iter().chain([&flipped, &kept]) {
        store.delete(id).await.unwrap();
    }
    assert_eq!(
        fs::read_dir(data.path().join("store/snapshots"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(
        fs::read_dir(data.path().join("store/tmp")).unwrap().count(),
        0
    );
    store.close().await;
}

#[tokio::test]
async fn what_was_not_flushed_is_flushed_after_a_restart() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let id = SnapshotId::generate();
    publish(&store, &id, 5).await;
    store.wait_durable(&id).await.unwrap();
    store.close().await;
    sql(&data, "UPDATE snapshots SET durable = 0").await;
    sql(&data, "UPDATE parts SET checksum = NULL").await;
    let (store, report) = data.open().await;
    assert_eq!(
        report.usable, 1,
        "the same kernel runs: its page cache has everything"
    );
    store.wait_durable(&id).await.unwrap();
    store.verify(&id).await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn another_format_is_refused_and_nothing_is_deleted() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let id = SnapshotId::generate();
    let snapshot = publish(&store, &id, 5).await;
    store.wait_durable(&id).await.unwrap();
    store.close().await;
    sql(
        &data,
        "UPDATE snapshots SET manifest = '{\"version\": 3, \"novel\": true}'",
    )
    .await;
    let error = Store::open(&data.prepare()).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::ManifestVersion {
                found: 3,
                known: 2,
                ..
            }
        ),
        "{error}"
    );
    assert!(snapshot.memory_image().exists());
}

#[tokio::test]
async fn a_full_disk_is_said_and_leaves_no_draft() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let draft = store
        .begin_snapshot(SnapshotId::generate(), SnapshotKind::User)
        .unwrap();
    let dir = draft.dir().to_owned();
    // This process plays the VM: a piece of its memory larger than the store.
    let content = vec![0xA5_u8; 640 << 20];
    let page = 4096;
    let first = (content.as_ptr() as usize).next_multiple_of(page) - content.as_ptr() as usize;
    let source = memory::Source {
        pid: std::process::id(),
        address: content[first..].as_ptr() as u64,
        len: 639 << 20,
    };
    let dirty = memory::capture(&source, memory::Buffer::new()).unwrap();
    assert_eq!(dirty.bytes(), 639 << 20);
    let error = draft.write_memory(memory::Base::Zeros, &dirty).unwrap_err();
    assert!(error.is_disk_full(), "{error}");
    assert!(error.to_string().contains("no space left"), "{error}");
    assert!(!draft.memory_image().exists());
    drop(draft);
    assert!(!dir.exists());

    // The store goes on.
    let id = SnapshotId::generate();
    publish(&store, &id, 1).await;
    store.wait_durable(&id).await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn a_store_that_copies_works_the_same() {
    let data = DataDir::new();
    fs::create_dir_all(data.path().join("store.xfs.tmp/occupied")).unwrap();
    let config = BackingConfig {
        allow_copy: true,
        ..data.config.clone()
    };
    let root = cubicle_cow::backing::prepare(data.path(), &config).unwrap();
    let (store, _) = Store::open(&root).await.unwrap();
    let id = SnapshotId::generate();
    let snapshot = publish(&store, &id, 5).await;
    let name = VolumeName::new(SandboxId::generate(), 1, 0);
    let volume = store.clone_volume(&snapshot.disk(0), &name).unwrap();
    assert_eq!(
        fs::read(volume).unwrap(),
        fs::read(snapshot.disk(0)).unwrap()
    );
    store.close().await;
    fs::remove_dir_all(root.path()).unwrap();
    fs::remove_dir_all(data.path().join("store.xfs.tmp")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_come_and_go_concurrently() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let store = Arc::new(store);
    let workers: Vec<_> = (0..8_u8)
        .map(|seed| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for round in 0..4 {
                    let id = SnapshotId::generate();
                    publish(&store, &id, seed * 4 + round).await;
                    if round % 2 == 0 {
                        store.wait_durable(&id).await.unwrap();
                    }
                    if round > 0 {
                        store.delete(&id).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    assert_eq!(store.list().len(), 8);
    assert!(
        store
            .list()
            .iter()
            .all(|entry| entry.state == SnapshotState::Published { durable: true })
    );
    Arc::into_inner(store).unwrap().close().await;
    let (store, report) = data.open().await;
    assert_eq!(
        (
            report.usable,
            report.unowned_removed.len(),
            report.drafts_removed
        ),
        (8, 0, 0)
    );
    store.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    /// Random writes, clones, snapshots and deletions of volumes against plain vectors.
    #[test]
    fn volumes_and_snapshots_never_share_a_write(
        steps in proptest::collection::vec((0_u8..4, any::<u16>(), any::<u16>(), any::<u8>()), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(model(steps));
    }
}

async fn model(steps: Vec<(u8, u16, u16, u8)>) {
    const SIZE: usize = 1 << 20;
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let mut snapshots: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
    let first = data.path().join("first.img");
    fs::write(&first, vec![0; SIZE]).unwrap();
    let name = VolumeName::new(SandboxId::generate(), 0, 0);
    let (path, copied) = store.import_volume(&first, &name).unwrap();
    assert_eq!(
        copied, SIZE as u64,
        "from another file system, the data is copied"
    );
    let mut volumes = vec![(path, vec![0; SIZE])];
    for (action, a, b, byte) in steps {
        let pick = usize::from(a);
        match action {
            0 => {
                let index = pick % volumes.len();
                let (path, content) = &mut volumes[index];
                let at = usize::from(b) * 16 % (SIZE - 300);
                content[at..at + 300].fill(byte);
                let file = fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(&[byte; 300], at as u64).unwrap();
            }
            1 => {
                let (path, content) = &volumes[pick % volumes.len()];
                let id = SnapshotId::generate();
                let draft = store
                    .begin_snapshot(id.clone(), SnapshotKind::User)
                    .unwrap();
                fill(&draft, byte);
                fs::remove_file(draft.disk(0)).unwrap();
                draft.clone_disk(0, path).unwrap();
                let manifest = manifest(&draft, SnapshotKind::User);
                draft.publish(manifest).await.unwrap();
                snapshots.push((id, content.clone()));
            }
            2 if !snapshots.is_empty() => {
                let (id, content) = &snapshots[pick % snapshots.len()];
                let name = VolumeName::new(SandboxId::generate(), 0, 0);
                let disk = store.snapshot(id).unwrap().disk(0);
                volumes.push((store.clone_volume(&disk, &name).unwrap(), content.clone()));
            }
            3 if !snapshots.is_empty() => {
                let (id, _) = snapshots.swap_remove(pick % snapshots.len());
                store.delete(&id).await.unwrap();
            }
            _ => {}
        }
    }
    for (path, content) in &volumes {
        assert!(fs::read(path).unwrap() == *content, "{}", path.display());
    }
    for (id, content) in &snapshots {
        assert!(
            fs::read(store.snapshot(id).unwrap().disk(0)).unwrap() == *content,
            "{id}"
        );
    }
    store.close().await;
}
