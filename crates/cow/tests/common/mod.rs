//! A store root of its own for every test, taken down with it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test binary uses another part of this"
)]

pub mod model;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cubicle_cow::{
    BackingConfig, DiskShape, Draft, Manifest, SnapshotKind, Store, StoreRoot, SweepReport,
    VmShape,
    backing::{self, Closed},
};
use cubicle_ids::SnapshotId;

/// The smallest image.
pub const SMALL: u64 = 512 << 20;
/// Guest memory of the snapshots that [`publish`] makes.
pub const MEMORY_MIB: u32 = 4;

/// A data directory; the image in it is unmounted when the value is dropped, and a mount or loop
/// device left behind fails the test.
pub struct DataDir {
    dir: Option<tempfile::TempDir>,
    pub config: BackingConfig,
}

impl DataDir {
    pub fn new() -> Self {
        let config = BackingConfig {
            initial_size: SMALL,
            max_size: SMALL,
            headroom: 0,
            ..BackingConfig::default()
        };
        let dir = tempfile::Builder::new()
            .prefix("cubicle-cow-")
            .tempdir_in("/tmp")
            .unwrap();
        Self {
            dir: Some(dir),
            config,
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    pub fn image(&self) -> PathBuf {
        self.path().join("store.xfs")
    }

    pub fn prepare(&self) -> StoreRoot {
        backing::prepare(self.path(), &self.config).unwrap()
    }

    pub async fn open(&self) -> (Store, SweepReport) {
        Store::open(&self.prepare()).await.unwrap()
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        let path = self.path().to_owned();
        // A process that a test beside this one is starting holds all our files open, between its
        // fork and its exec.
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.prepare().close().unwrap() == Closed::InUse {
            if Instant::now() > deadline {
                let detach = rustix::mount::UnmountFlags::DETACH;
                rustix::mount::unmount(path.join("store"), detach).unwrap();
                assert!(
                    std::thread::panicking(),
                    "something of the store is still open"
                );
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(mounts_below(&path), 0);
        assert_eq!(loop_devices_of(&path), Vec::<PathBuf>::new());
        self.dir.take().unwrap().close().unwrap();
    }
}

pub fn mounts_below(path: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter(|line| line.contains(path.to_str().unwrap()))
        .count()
}

/// Loop devices of files below `path`, also of deleted ones.
pub fn loop_devices_of(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block").unwrap() {
        let entry = entry.unwrap().path();
        let file = std::fs::read_to_string(entry.join("loop/backing_file")).unwrap_or_default();
        if file.starts_with(path.to_str().unwrap()) {
            found.push(entry);
        }
    }
    found
}

pub fn manifest(draft: &Draft, kind: SnapshotKind) -> Manifest {
    let vm = VmShape {
        cpus: 1,
        memory_mib: MEMORY_MIB,
        hypervisor: "fake".to_owned(),
        options: [("machine".to_owned(), "microvm".to_owned())].into(),
    };
    let mut manifest = Manifest::new(draft.id().clone(), kind, vm, "kernel-1");
    manifest.guest_nonce = "00ff".to_owned();
    manifest.disks = vec![DiskShape {
        size: 1 << 20,
        read_only: false,
    }];
    manifest
}

/// Fills a draft with files whose content depends on `seed`.
pub fn fill(draft: &Draft, seed: u8) {
    std::fs::write(
        draft.memory_image(),
        vec![seed; (MEMORY_MIB as usize) << 20],
    )
    .unwrap();
    std::fs::write(draft.device_state(), [seed; 999]).unwrap();
    std::fs::write(draft.disk(0), vec![seed; 1 << 20]).unwrap();
}

pub async fn publish(store: &Store, id: &SnapshotId, seed: u8) -> cubicle_cow::Snapshot {
    let draft = store
        .begin_snapshot(id.clone(), SnapshotKind::User)
        .unwrap();
    fill(&draft, seed);
    let manifest = manifest(&draft, SnapshotKind::User);
    draft.publish(manifest).await.unwrap()
}
