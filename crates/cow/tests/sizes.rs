//! What snapshots take, on a real file system that shares blocks.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use common::{DataDir, MEMORY_MIB, fill, manifest, publish};
use cubicle_cow::{BackingConfig, Error, Sizes, SnapshotKind, Store, VolumeName};
use cubicle_ids::{SandboxId, SnapshotId};

/// What the manifest takes, and a file's last, partial block.
const SMALL_FILES: u64 = 64 << 10;
const MEMORY: u64 = (MEMORY_MIB as u64) << 20;
const DISK: u64 = 1 << 20;

/// A snapshot that is a clone of `parent` but for `changed` bytes of its memory.
async fn child(store: &Store, parent: &SnapshotId, changed: usize) -> SnapshotId {
    let id = SnapshotId::generate();
    let parent = store.snapshot(parent).unwrap();
    let draft = store
        .begin_snapshot(id.clone(), SnapshotKind::User)
        .unwrap();
    cubicle_cow::reflink::clone_file(&parent.memory_image(), &draft.memory_image()).unwrap();
    draft.clone_disk(0, &parent.disk(0)).unwrap();
    fs::write(draft.device_state(), "state").unwrap();
    let image = File::options()
        .write(true)
        .open(draft.memory_image())
        .unwrap();
    image.write_all_at(&vec![0xEE; changed], 1 << 20).unwrap();
    let manifest = manifest(&draft, SnapshotKind::User);
    draft.publish(manifest).await.unwrap();
    store.wait_durable(&id).await.unwrap();
    id
}

fn about(found: u64, expected: u64) -> bool {
    (expected..=expected + SMALL_FILES).contains(&found)
}

/// Waits until a snapshot has about as many bytes of its own: the file system gives back the blocks
/// of deleted files in its own time.
async fn settled(store: &Store, id: &SnapshotId, own: u64) -> Sizes {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let sizes = store.sizes(id).unwrap();
        if about(sizes.own_bytes, own) {
            return sizes;
        }
        assert!(Instant::now() < deadline, "{sizes:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn own_bytes_are_what_a_deletion_gives_back() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let first = SnapshotId::generate();
    publish(&store, &first, 1).await;
    store.wait_durable(&first).await.unwrap();
    let alone = store.sizes(&first).unwrap();
    assert!(about(alone.logical_bytes, MEMORY + DISK), "{alone:?}");
    assert_eq!(alone.own_bytes, alone.logical_bytes);
    assert_eq!(store.sizes(&first).unwrap(), alone);

    let second = child(&store, &first, 256 << 10).await;
    let (one, two) = (store.sizes(&first).unwrap(), store.sizes(&second).unwrap());
    assert_eq!(one.logical_bytes, alone.logical_bytes);
    assert!(about(two.logical_bytes, MEMORY + DISK), "{two:?}");
    // Each has its own version of what was changed, and nothing else.
    assert!(about(one.own_bytes, 256 << 10), "{one:?}");
    assert!(about(two.own_bytes, 256 << 10), "{two:?}");

    // What the first alone had is gone, the rest is the second's now.
    store.delete(&first).await.unwrap();
    let two = settled(&store, &second, MEMORY + DISK).await;
    assert!(matches!(store.sizes(&first), Err(Error::NotFound(_))));

    // A sandbox that uses its disk shares it.
    let name = VolumeName::new(SandboxId::generate(), 1, 0);
    let disk = store.snapshot(&second).unwrap().disk(0);
    store.clone_volume(&disk, &name).unwrap();
    let shared = store.sizes(&second).unwrap();
    assert!(about(shared.own_bytes, MEMORY), "{shared:?}");
    store.remove_sandbox_volumes(&name.sandbox).unwrap();
    assert_eq!(settled(&store, &second, MEMORY + DISK).await, two);
    store.close().await;
}

#[tokio::test]
async fn holes_count_as_nothing_and_scattered_pages_as_what_they_are() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let id = SnapshotId::generate();
    let draft = store
        .begin_snapshot(id.clone(), SnapshotKind::User)
        .unwrap();
    fill(&draft, 1);
    let image = File::create(draft.memory_image()).unwrap();
    image.set_len(MEMORY).unwrap();
    // More extents than one request returns.
    let pages = MEMORY / 8192;
    for page in 0..pages {
        image.write_all_at(&[9; 4096], page * 8192).unwrap();
    }
    let manifest = manifest(&draft, SnapshotKind::User);
    draft.publish(manifest).await.unwrap();
    store.wait_durable(&id).await.unwrap();
    let sizes = store.sizes(&id).unwrap();
    assert!(about(sizes.logical_bytes, pages * 4096 + DISK), "{sizes:?}");
    assert_eq!(sizes.own_bytes, sizes.logical_bytes);
    store.close().await;
}

#[tokio::test]
async fn where_nothing_is_shared_everything_is_own() {
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
    store.wait_durable(&id).await.unwrap();
    let name = VolumeName::new(SandboxId::generate(), 1, 0);
    store.clone_volume(&snapshot.disk(0), &name).unwrap();
    let sizes = store.sizes(&id).unwrap();
    assert!(about(sizes.own_bytes, MEMORY + DISK), "{sizes:?}");
    assert_eq!(sizes.own_bytes, sizes.logical_bytes);
    store.close().await;
    fs::remove_dir_all(root.path()).unwrap();
    fs::remove_dir_all(data.path().join("store.xfs.tmp")).unwrap();
}
