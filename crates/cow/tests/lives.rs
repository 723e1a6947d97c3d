//! The lives of a VM, at random: it writes to its memory and its disk, is captured, falls back to
//! what it was, and what was captured of it is deleted, against a model that knows every byte.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use common::{
    DataDir, manifest,
    model::{self, Model, PAGE, PAGES, Write, base_image, same, writes},
};
use cubicle_cow::{
    DiskShape, Manifest, SnapshotKind, Store, VolumeName,
    memory::{Base, PageSums, SoftDirtyBits, Tier, TierChoice, Tracker, Written, started_from},
};
use cubicle_ids::{SandboxId, SnapshotId};
use proptest::prelude::*;

const DISK: usize = 1 << 20;
/// What the file system may need for itself after everything was deleted, in bytes.
const METADATA: u64 = 512 << 10;

#[test]
fn model_process() {
    model::play();
}

/// How the memory is captured.
#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    Kernel(TierChoice),
    /// Soft-dirty bits that the model sets: this works on every kernel.
    ModelBits,
}

#[derive(Debug, Clone)]
enum Step {
    Memory(Vec<(usize, Write)>),
    Disk(usize, u8),
    Snapshot {
        /// Over the image that the VM was started from, if the tier permits.
        over_start: bool,
    },
    /// A snapshot that fails after the freeze.
    Lost,
    Rollback(usize),
    Delete(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => writes().prop_map(Step::Memory),
        2 => (0..DISK - 300, any::<u8>()).prop_map(|(at, byte)| Step::Disk(at, byte)),
        5 => any::<bool>().prop_map(|over_start| Step::Snapshot { over_start }),
        1 => Just(Step::Lost),
        1 => any::<usize>().prop_map(Step::Rollback),
        1 => any::<usize>().prop_map(Step::Delete),
    ];
    proptest::collection::vec(step, 4..40)
}

/// Soft-dirty bits of one process, by page number.
#[derive(Debug, Default)]
struct Bits(Mutex<BTreeSet<u64>>);

impl SoftDirtyBits for Bits {
    fn entries(&self, _: u32, first: u64, into: &mut [u64]) -> io::Result<()> {
        let bits = self.0.lock().unwrap();
        for (entry, page) in into.iter_mut().zip(first..) {
            *entry = u64::from(bits.contains(&page)) << 55;
        }
        Ok(())
    }

    fn clear(&self, _: u32) -> io::Result<()> {
        self.0.lock().unwrap().clear();
        Ok(())
    }
}

struct Vm {
    model: Model,
    tracker: Tracker,
    bits: Arc<Bits>,
    /// The image of the last capture.
    /// The image of its last capture, and what is known of it.
    last: Option<(File, PageSums)>,
    /// Which snapshot that is.
    imaged_as: Option<SnapshotId>,
    /// What it was restored from, or captured as last.
    parent: Option<Arc<Manifest>>,
    name: VolumeName,
    disk: Vec<u8>,
}

struct Taken {
    id: SnapshotId,
    memory: Vec<u8>,
    disk: Vec<u8>,
}

struct World {
    store: Store,
    how: How,
    vm: Option<Vm>,
    taken: Vec<Taken>,
    generation: u64,
    sandbox: SandboxId,
}

impl World {
    fn start(
        &mut self,
        image: &Path,
        disk: &Path,
        content: Vec<u8>,
        parent: Option<Arc<Manifest>>,
    ) {
        // The old VM runs until the new one does.
        self.generation += 1;
        let name = VolumeName::new(self.sandbox.clone(), self.generation, 0);
        self.store.clone_volume(disk, &name).unwrap();
        let bits = Arc::new(Bits::default());
        let tracker = match self.how {
            How::Kernel(choice) => Tracker::new(choice).unwrap(),
            How::ModelBits => Tracker::with_bits(bits.clone()),
        };
        let old = self.vm.replace(Vm {
            model: Model::start(image),
            tracker,
            bits,
            last: None,
            imaged_as: None,
            parent,
            name,
            disk: content,
        });
        if let Some(old) = old {
            self.stop(old);
        }
    }

    fn stop(&self, vm: Vm) {
        let name = vm.name.clone();
        drop(vm);
        self.store
            .remove_volumes(&name.sandbox, name.generation)
            .unwrap();
    }

    async fn step(&mut self, step: Step) {
        let vm = self.vm.as_mut().unwrap();
        match step {
            Step::Memory(writes) => {
                let first = vm.model.source.address / PAGE as u64;
                for (page, write) in writes {
                    vm.model.apply(page, write);
                    if !matches!(write, Write::Read) {
                        vm.bits.0.lock().unwrap().insert(first + page as u64);
                    }
                }
            }
            Step::Disk(at, byte) => {
                vm.disk[at..at + 300].fill(byte);
                let volume = self.store.volume(&vm.name);
                let file = File::options().write(true).open(volume).unwrap();
                file.write_all_at(&[byte; 300], at as u64).unwrap();
            }
            Step::Snapshot { over_start } => self.snapshot(over_start, false).await,
            Step::Lost => self.snapshot(false, true).await,
            Step::Rollback(pick) if !self.taken.is_empty() => {
                let taken = &self.taken[pick % self.taken.len()];
                let snapshot = self.store.snapshot(&taken.id).unwrap();
                let disk = taken.disk.clone();
                let parent = Some(snapshot.manifest().clone());
                self.start(&snapshot.memory_image(), &snapshot.disk(0), disk, parent);
            }
            Step::Delete(pick) if !self.taken.is_empty() => {
                let taken = self.taken.swap_remove(pick % self.taken.len());
                self.store.delete(&taken.id).await.unwrap();
            }
            Step::Rollback(_) | Step::Delete(_) => {}
        }
    }

    async fn snapshot(&mut self, over_start: bool, lost: bool) {
        let vm = self.vm.as_mut().unwrap();
        let id = SnapshotId::generate();
        let draft = self
            .store
            .begin_snapshot(id.clone(), SnapshotKind::User)
            .unwrap();
        let source = vm.model.source;
        let estimate = vm.tracker.estimate(&source).unwrap();
        let buffer = self.store.resident_buffer(estimate.room()).unwrap();
        let start = started_from(&source).unwrap();
        let expected = match self.how {
            How::Kernel(TierChoice::Full) => Tier::Full,
            How::ModelBits if estimate.tier == Tier::SoftDirty => Tier::SoftDirty,
            _ => Tier::AnonymousPages,
        };
        let dirty = vm.tracker.capture(&source, buffer).unwrap();
        // The VM stood still: the estimate was right.
        assert_eq!((dirty.tier(), dirty.bytes()), (expected, estimate.bytes));
        draft.clone_disk(0, &self.store.volume(&vm.name)).unwrap();
        fs::write(draft.device_state(), id.as_str()).unwrap();
        if lost {
            return; // Dropped, like a draft for which there was no room.
        }
        let base = match &vm.last {
            Some((last, sums)) if dirty.needs_last_image() || !over_start => Base::Last(last, sums),
            None if dirty.needs_last_image() => panic!("relative to an image that is not there"),
            _ => Base::File(&start),
        };
        let Written { report, mut sums } = draft.write_memory(base, &dirty).unwrap();
        sums.complete(&dirty);
        assert!(report.bytes_written <= report.bytes_dirty);
        // A VM that did nothing since its last image writes nothing.
        let idle = self.taken.last().is_some_and(|last| {
            vm.imaged_as.as_ref() == Some(&last.id) && last.memory == vm.model.content
        });
        if idle && !over_start {
            assert_eq!(report.bytes_written, 0);
        }
        let mut manifest = manifest(&draft, SnapshotKind::User);
        manifest.vm.memory_mib = ((PAGES * PAGE) >> 20) as u32;
        manifest.disks = vec![DiskShape {
            size: DISK as u64,
            read_only: false,
        }];
        if let Some(parent) = &vm.parent {
            manifest = manifest.child_of(parent);
        }
        let snapshot = draft.publish(manifest).await.unwrap();
        vm.parent = Some(snapshot.manifest().clone());
        vm.tracker.imaged();
        vm.imaged_as = Some(id.clone());
        vm.last = Some((File::open(snapshot.memory_image()).unwrap(), sums));
        same(&snapshot.memory_image(), &vm.model.content);
        self.taken.push(Taken {
            id,
            memory: vm.model.content.clone(),
            disk: vm.disk.clone(),
        });
    }

    fn check(&self) {
        for taken in &self.taken {
            let snapshot = self.store.snapshot(&taken.id).unwrap();
            same(&snapshot.memory_image(), &taken.memory);
            same(&snapshot.disk(0), &taken.disk);
        }
    }
}

/// Bytes that the store's file system has given away, but for the catalog.
fn used(store: &Store) -> u64 {
    let root = store.root().path();
    rustix::fs::syncfs(File::open(root).unwrap()).unwrap();
    let space = rustix::fs::statvfs(root).unwrap();
    let catalog: u64 = ["catalog.db", "catalog.db-wal", "catalog.db-shm"]
        .iter()
        .filter_map(|name| fs::metadata(root.join(name)).ok())
        .map(|metadata| metadata.blocks() * 512)
        .sum();
    (space.f_blocks - space.f_bfree) * space.f_frsize - catalog
}

async fn lives(how: How, steps: Vec<Step>) {
    let data = DataDir::new();
    let (store, _) = data.open().await;
    let before = used(&store);
    let image: PathBuf = store.root().path().join("start.img");
    let disk = store.root().path().join("start-disk.img");
    base_image(&image);
    let content = vec![3; DISK];
    fs::write(&disk, &content).unwrap();
    let mut world = World {
        store: store.clone(),
        how,
        vm: None,
        taken: Vec::new(),
        generation: 0,
        sandbox: SandboxId::generate(),
    };
    world.start(&image, &disk, content, None);
    let half = steps.len() / 2;
    for (index, step) in steps.into_iter().enumerate() {
        if index == half {
            // The VM's own image may go: it keeps what it has mapped.
            fs::remove_file(&image).unwrap();
        }
        world.step(step).await;
    }
    world.check();
    for taken in &world.taken {
        store.wait_durable(&taken.id).await.unwrap();
        store.verify(&taken.id).await.unwrap();
    }
    // Everything goes, in an order that the generator chose by its ids, and so does what it took.
    let vm = world.vm.take().unwrap();
    world.stop(vm);
    while !world.taken.is_empty() {
        let pick = usize::from(world.taken[0].id.as_str().as_bytes()[3]) % world.taken.len();
        let taken = world.taken.swap_remove(pick);
        store.delete(&taken.id).await.unwrap();
        world.check();
    }
    fs::remove_file(&disk).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        // The file system gives blocks back in its own time.
        let left = used(&store).saturating_sub(before);
        if left <= METADATA {
            break;
        }
        assert!(Instant::now() < deadline, "{left} bytes are not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(world);
    store.close().await;
}

fn run(how: How, steps: Vec<Step>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(lives(how, steps));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 40, ..Default::default() })]

    #[test]
    fn every_image_is_exact_by_anonymous_pages(steps in steps()) {
        run(How::Kernel(TierChoice::AnonymousPages), steps);
    }

    #[test]
    fn every_image_is_exact_by_soft_dirty_bits(steps in steps()) {
        run(How::ModelBits, steps);
    }

    #[test]
    fn every_image_is_exact_in_full(steps in steps()) {
        run(How::Kernel(TierChoice::Full), steps);
    }

    /// By the kernel's own bits, where it has them.
    #[test]
    fn every_image_is_exact_by_what_is_best_here(steps in steps()) {
        run(How::Kernel(TierChoice::Auto), steps);
    }
}
