//! A store without room, at every step of a snapshot: a clear error, and nothing is lost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use common::{
    DataDir, manifest,
    model::{self, Model, PAGE, PAGES, Write, base_image, same},
};
use cubicle_cow::{
    DiskShape, Draft, Error, Snapshot, SnapshotKind, Store, VolumeName,
    memory::{Buffer, Dirty, capture, started_from},
};
use cubicle_ids::{SandboxId, SnapshotId};
use rustix::fs::{FallocateFlags, fallocate};

const DISK: u64 = 1 << 20;

#[test]
fn model_process() {
    model::play();
}

/// Takes all the room there is, but for `left` bytes; dropped, it gives it back.
struct Ballast(PathBuf);

impl Ballast {
    fn new(store: &Store, left: u64) -> Self {
        let path = store.root().path().join("ballast");
        let file = File::create(&path).unwrap();
        let (mut at, mut piece) = (0, 1_u64 << 30);
        // What the file system says is free is not always to be had in one piece, or at all.
        while piece >= 4096 {
            match fallocate(&file, FallocateFlags::empty(), at, piece) {
                Ok(()) => at += piece,
                Err(rustix::io::Errno::NOSPC) => piece /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        file.set_len(at.saturating_sub(left)).unwrap();
        file.sync_all().unwrap();
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

struct Sandbox {
    store: Store,
    model: Model,
    volume: PathBuf,
    previous: Option<Snapshot>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Begin,
    Device,
    Disk,
    Memory,
    Publish,
    /// Nothing is in the way.
    Never,
}

impl Sandbox {
    /// A snapshot, before one step of which the room is taken. Whatever comes of it, the ballast is
    /// gone when this returns.
    async fn snapshot(&self, full: Step, left: u64) -> Result<Snapshot, Error> {
        let mut ballast = None;
        let mut reach = |step| {
            if step == full {
                ballast = Some(Ballast::new(&self.store, left));
            }
        };
        let id = SnapshotId::generate();
        reach(Step::Begin);
        let draft = self.store.begin_snapshot(id, SnapshotKind::User)?;
        let dirty = capture(&self.model.source, Buffer::new()).unwrap();
        reach(Step::Device);
        match fs::write(draft.device_state(), vec![5; 20_000]) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                // The hypervisor driver says this in its own words.
                return Err(Error::DiskFull {
                    attempt: "save",
                    path: draft.device_state(),
                });
            }
            outcome => outcome.unwrap(),
        }
        reach(Step::Disk);
        draft.clone_disk(0, &self.volume)?;
        reach(Step::Memory);
        self.write_memory(&draft, &dirty)?;
        let mut manifest = manifest(&draft, SnapshotKind::User);
        manifest.vm.memory_mib = ((PAGES * PAGE) >> 20) as u32;
        manifest.disks = vec![DiskShape {
            size: DISK,
            read_only: false,
        }];
        reach(Step::Publish);
        draft.publish(manifest).await
    }

    fn write_memory(&self, draft: &Draft, dirty: &Dirty) -> Result<(), Error> {
        let start = started_from(&self.model.source).unwrap();
        match &self.previous {
            Some(previous) => {
                draft.write_memory(previous.memory_image().as_path(), dirty)?;
            }
            None => {
                draft.write_memory(&start, dirty)?;
            }
        }
        Ok(())
    }
}

fn entries(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

#[tokio::test]
async fn no_room_at_any_step_is_said_and_loses_nothing() {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let image = store.root().path().join("start.img");
    base_image(&image);
    let first = data.path().join("disk.img");
    fs::write(&first, vec![7; DISK as usize]).unwrap();
    let name = VolumeName::new(SandboxId::generate(), 1, 0);
    let (volume, _) = store.import_volume(&first, &name).unwrap();
    let mut sandbox = Sandbox {
        store: store.clone(),
        model: Model::start(&image),
        volume,
        previous: None,
    };
    let mut said = Vec::new();
    let mut expected: Vec<(SnapshotId, Vec<u8>, u8)> = Vec::new();
    let steps = [
        Step::Begin,
        Step::Device,
        Step::Disk,
        Step::Memory,
        Step::Publish,
    ];
    let rooms = [0, 8 << 10, 64 << 10, 512 << 10];
    let cases = steps
        .iter()
        .flat_map(|step| rooms.map(|left| (*step, left)))
        .zip(10_u8..);
    for ((step, left), seed) in cases {
        // The VM lives on: every page and a block of the disk are new in every round.
        for page in (0..PAGES).step_by(4) {
            sandbox.model.apply(page, Write::Fill(seed));
        }
        let disk = File::options().write(true).open(&sandbox.volume).unwrap();
        disk.write_all_at(&[seed; 4096], 8192).unwrap();
        let before = store.list().len();
        match sandbox.snapshot(step, left).await {
            Ok(snapshot) => {
                let content = sandbox.model.content.clone();
                expected.push((snapshot.id().clone(), content, seed));
                sandbox.previous = Some(snapshot);
            }
            Err(error) => {
                assert!(error.is_disk_full(), "{step:?}, {left} left: {error}");
                assert!(error.to_string().contains("no space left"), "{error}");
                said.push(step);
                assert_eq!(store.list().len(), before);
            }
        }
        assert_eq!(entries(&store.root().path().join("tmp")), 0, "{step:?}");
        // Room again: the same sandbox, the same memory, now for good.
        let snapshot = sandbox.snapshot(Step::Never, 0).await.unwrap();
        expected.push((snapshot.id().clone(), sandbox.model.content.clone(), seed));
        sandbox.previous = Some(snapshot);
    }
    // Where exactly the last block goes is the file system's business, but it went somewhere.
    assert!(said.len() >= 3, "{said:?}");
    let all = store.root().path().join("snapshots");
    assert_eq!(entries(&all), expected.len());
    for (id, memory, seed) in &expected {
        store.wait_durable(id).await.unwrap();
        store.verify(id).await.unwrap();
        let snapshot = store.snapshot(id).unwrap();
        same(&snapshot.memory_image(), memory);
        assert_eq!(fs::read(snapshot.disk(0)).unwrap()[8192], *seed);
    }
    drop(sandbox);
    store.close().await;
    let (store, report) = data.open().await;
    assert_eq!((report.usable, report.failed.len()), (expected.len(), 0));
    store.close().await;
}
