//! What a power failure, a bad disk or a kill leaves behind is found, and never restored.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::{DataDir, fill, manifest, publish};
use cubicle_cow::{DiskShape, Error, Manifest, SnapshotKind, SnapshotState, Store};
use cubicle_ids::SnapshotId;
use proptest::prelude::*;

/// What happens to a file.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Cut(u64),
    Grow(u64),
    Flip(u64, u8),
    Punch(u64),
    Remove,
}

const PARTS: [&str; 4] = ["memory.img", "device.state", "disk-0.img", "manifest.json"];

fn damage() -> impl Strategy<Value = (usize, Damage)> {
    let damage = prop_oneof![
        any::<u64>().prop_map(Damage::Cut),
        (1_u64..1 << 20).prop_map(Damage::Grow),
        (any::<u64>(), 1_u8..).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        any::<u64>().prop_map(Damage::Punch),
        Just(Damage::Remove),
    ];
    (0..PARTS.len(), damage)
}

impl Damage {
    fn inflict(self, path: &PathBuf) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        match self {
            Self::Cut(to) => file.set_len(to % len).unwrap(),
            Self::Grow(by) => file.set_len(len + by).unwrap(),
            Self::Flip(at, bits) => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at % len).unwrap();
                file.write_all_at(&[byte[0] ^ bits], at % len).unwrap();
            }
            Self::Punch(at) => {
                // A block that never reached the disk reads as zeros.
                let at = at % len / 4096 * 4096;
                let zeros = vec![0; 4096.min(len - at) as usize];
                file.write_all_at(&zeros, at).unwrap();
            }
            Self::Remove => fs::remove_file(path).unwrap(),
        }
    }

    /// Whether it shows without reading the file.
    fn shows(self, part: &str) -> bool {
        !matches!(self, Self::Flip(..) | Self::Punch(_)) && part != "manifest.json"
    }
}

fn is_failed<T>(outcome: Result<T, Error>) -> bool {
    matches!(outcome, Err(Error::Failed { .. }))
}

async fn torn(part: &str, damage: Damage, restart: bool) {
    let data = DataDir::new();
    let (mut store, _) = data.open().await;
    let [whole, hurt] = [(); 2].map(|()| SnapshotId::generate());
    for (seed, id) in (1..).zip([&whole, &hurt]) {
        publish(&store, id, seed).await;
        store.wait_durable(id).await.unwrap();
    }
    let path = store.snapshot(&hurt).unwrap().dir().join(part);
    if restart {
        store.close().await;
        damage.inflict(&path);
        store = data.open().await.0;
    } else {
        damage.inflict(&path);
    }
    if part == "manifest.json" {
        // A letter of a field that is empty anyway: the manifest still says the same.
        let text = fs::read(&path).unwrap_or_default();
        let known = store.entry(&hurt).unwrap().manifest;
        if Manifest::parse(&text, &path).is_ok_and(|read| read == *known) {
            store.verify(&hurt).await.unwrap();
            return store.close().await;
        }
    }
    if damage.shows(part) {
        assert!(is_failed(store.snapshot(&hurt)), "restorable as it is");
    }
    assert!(
        is_failed(store.verify(&hurt).await),
        "not found by reading it"
    );
    assert!(is_failed(store.snapshot(&hurt)));
    assert!(is_failed(store.wait_durable(&hurt).await));
    store.verify(&whole).await.unwrap();
    // It is remembered, and can be deleted.
    store.close().await;
    let (store, report) = data.open().await;
    assert_eq!(report.usable, 1, "{report:?}");
    assert!(is_failed(store.snapshot(&hurt)));
    store.delete(&hurt).await.unwrap();
    store.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 30, ..Default::default() })]
    #[test]
    fn a_torn_snapshot_is_never_restored((part, damage) in damage(), restart in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(torn(PARTS[part], damage, restart));
    }
}

/// As if the store had been opened last by another run of the kernel, and never closed.
fn interrupt(data: &DataDir) {
    let root = data.prepare();
    fs::write(root.path().join("lock"), "another run of the kernel").unwrap();
}

async fn state_of(store: &Store, id: &SnapshotId) -> SnapshotState {
    store.entry(id).unwrap().state
}

#[tokio::test]
async fn after_a_power_failure_everything_is_read_again() {
    let data = DataDir::new();
    let (store, report) = data.open().await;
    assert_eq!(report.checking, 0);
    let [whole, hurt] = [(); 2].map(|()| SnapshotId::generate());
    for id in [&whole, &hurt] {
        publish(&store, id, 3).await;
        store.wait_durable(id).await.unwrap();
    }
    let disk = store.snapshot(&hurt).unwrap().disk(0);
    store.close().await;
    Damage::Flip(77_777, 4).inflict(&disk);

    // After an orderly end nobody looks.
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.checking), (2, 0));
    store.close().await;

    interrupt(&data);
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.checking), (2, 2));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_failed(store.snapshot(&hurt)) {
        assert!(Instant::now() < deadline, "nobody looks");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(
        state_of(&store, &whole).await,
        SnapshotState::Published { durable: true }
    );
    store.close().await;
    // It is in the catalog, and looked at once.
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.checking), (1, 0));
    store.close().await;
}

/// The process is killed: what it had open is not closed, and the kernel goes on.
#[tokio::test]
async fn after_a_kill_nothing_needs_to_be_read() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let id = SnapshotId::generate();
    publish(&store, &id, 3).await;
    store.wait_durable(&id).await.unwrap();
    let lock = data.path().join("store/lock");
    let mark = fs::read(&lock).unwrap();
    assert!(!mark.is_empty());
    store.close().await;
    assert_eq!(fs::read(&lock).unwrap(), b"");
    fs::write(&lock, mark).unwrap();
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.checking), (1, 0));
    store.close().await;
}

/// Bytes of a file that are in the page cache.
fn cached(path: &Path) -> usize {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let mut pages = vec![0_u8; len / 4096];
    // SAFETY: a fresh mapping that nobody reads, and a vector with a byte for each of its pages.
    unsafe {
        let hint = std::ptr::null_mut();
        let start = mmap(hint, len, ProtFlags::READ, MapFlags::SHARED, &file, 0).unwrap();
        assert_eq!(libc::mincore(start, len, pages.as_mut_ptr()), 0);
        munmap(start, len).unwrap();
    }
    pages.iter().filter(|page| **page & 1 != 0).count() * 4096
}

/// Checksums cost what has changed, not what there is.
#[tokio::test]
async fn what_a_child_shares_is_not_read_for_its_checksum() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let first = SnapshotId::generate();
    let parent = publish(&store, &first, 1).await;
    store.wait_durable(&first).await.unwrap();
    let clone = |known: bool| {
        let id = SnapshotId::generate();
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
        image.write_all_at(&[0xEE; 100_000], 1 << 20).unwrap();
        let mut manifest = manifest(&draft, SnapshotKind::User);
        if known {
            manifest = manifest.child_of(parent.manifest());
        }
        (id, draft, manifest)
    };
    // A busy machine may have dropped some of it again.
    for (known, read) in [(true, 0..1 << 20), (false, 2 << 20..(4 << 20) + 1)] {
        let (id, draft, manifest) = clone(known);
        let child = draft.publish(manifest).await.unwrap();
        store.wait_durable(&id).await.unwrap();
        let cached = cached(&child.memory_image());
        assert!(read.contains(&cached), "{cached} bytes were read");
        // The checksum is that of all the content, whoever it was read from.
        store.verify(&id).await.unwrap();
        Damage::Flip(3 << 20, 1).inflict(&child.memory_image());
        assert!(is_failed(store.verify(&id).await));
    }
    store.verify(&first).await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn a_temporary_snapshot_does_not_outlive_its_program() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let [kept, temporary] = [(); 2].map(|()| SnapshotId::generate());
    let draft = store
        .begin_snapshot(temporary.clone(), SnapshotKind::Temporary)
        .unwrap();
    fill(&draft, 4);
    let manifest = manifest(&draft, SnapshotKind::Temporary);
    let snapshot = draft.publish(manifest).await.unwrap();
    publish(&store, &kept, 3).await;
    // What is flushed is flushed in the order in which it was published.
    store.wait_durable(&kept).await.unwrap();
    assert_eq!(
        state_of(&store, &temporary).await,
        SnapshotState::Published { durable: false }
    );
    store.close().await;
    let (store, report) = data.open().await;
    assert_eq!(report.temporary_removed, std::slice::from_ref(&temporary));
    assert_eq!((report.usable, report.unowned_removed.len()), (1, 0));
    assert!(!snapshot.dir().exists());
    assert!(matches!(
        store.snapshot(&temporary),
        Err(Error::NotFound(_))
    ));
    store.close().await;
}

#[tokio::test]
async fn a_snapshot_of_disks_holds_disks_and_nothing_else() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let id = SnapshotId::generate();
    let begin = || {
        store
            .begin_snapshot(id.clone(), SnapshotKind::Pause)
            .unwrap()
    };
    // With memory, with a part of it, with nothing.
    let draft = begin();
    fill(&draft, 1);
    let text = manifest(&draft, SnapshotKind::Pause).of_disks();
    let error = draft.publish(text.clone()).await.unwrap_err();
    assert!(error.to_string().contains("no memory"), "{error}");
    let draft = begin();
    fill(&draft, 1);
    fs::remove_file(draft.memory_image()).unwrap();
    let error = draft.publish(text.clone()).await.unwrap_err();
    assert!(error.to_string().contains("device.state"), "{error}");
    let mut empty = text.clone();
    empty.disks.clear();
    let error = begin().publish(empty).await.unwrap_err();
    assert!(error.to_string().contains("nothing"), "{error}");

    let draft = begin();
    fs::write(draft.disk(0), vec![5; 1 << 20]).unwrap();
    let snapshot = draft.publish(text).await.unwrap();
    assert!(!snapshot.has_memory() && !snapshot.memory_image().exists());
    assert_eq!(snapshot.manifest().parts.len(), 1);
    assert_eq!(
        snapshot.manifest().disks,
        [DiskShape {
            size: 1 << 20,
            read_only: false
        }]
    );
    store.wait_durable(&id).await.unwrap();
    store.verify(&id).await.unwrap();
    assert!(store.sizes(&id).unwrap().own_bytes >= 1 << 20);
    store.close().await;
    let (store, report) = data.open().await;
    assert_eq!(report.usable, 1);
    assert!(!store.snapshot(&id).unwrap().has_memory());
    let disk = store.snapshot(&id).unwrap().disk(0);
    File::options()
        .write(true)
        .open(disk)
        .unwrap()
        .write_all_at(&[6], 9)
        .unwrap();
    assert!(is_failed(store.verify(&id).await));
    store.close().await;
}
