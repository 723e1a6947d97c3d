//! What a hundred snapshots of one VM cost, the hundredth beside the first; what their sizes cost to
//! tell; and what the first restore of a new image waits for. Run as root with
//! `cargo bench -p cubicle-cow --bench lineage`.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod common;

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant},
};

use common::{GUEST, Pattern, Vm, is_vm, median, ms, noise};
use cubicle_cow::{
    BackingConfig, Manifest, Snapshot, SnapshotKind, Store, VmShape, backing,
    memory::{Source, TierChoice, Tracker, write_image},
};
use cubicle_ids::SnapshotId;
use rustix::{
    fs::{Advice, fadvise},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

/// Data in the first image, in bytes.
const BASE: usize = 160 << 20;
const SNAPSHOTS: usize = 100;
/// What a restored guest touches first, of the data: one page in this many.
const STRIDE: usize = 5;

fn main() {
    if is_vm() {
        return;
    }
    let dir = tempfile::Builder::new()
        .prefix("cubicle-cow-bench-")
        .tempdir_in("/tmp")
        .unwrap();
    let config = BackingConfig {
        initial_size: 8 << 30,
        ..BackingConfig::default()
    };
    let root = backing::prepare(dir.path(), &config).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, _) = runtime.block_on(Store::open(&root)).unwrap();
    let base = root.path().join("base.img");
    let file = File::create(&base).unwrap();
    file.set_len(GUEST as u64).unwrap();
    file.write_all_at(&noise(BASE, 5), 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    runtime.block_on(first_restore(&store, &base));
    for (dirty, pattern, gap) in [
        (10, Pattern::Runs, 0),
        (10, Pattern::Runs, 100),
        (2, Pattern::Pages, 0),
    ] {
        let gap = Duration::from_millis(gap);
        runtime.block_on(lineage(&store, &base, dirty, pattern, gap));
    }
    runtime.block_on(store.close());
    drop(runtime);
    println!("{:?}", root.close().unwrap());
}

async fn publish(
    store: &Store,
    tracker: &mut Tracker,
    source: &Source,
    base: &Path,
    parent: Option<&Snapshot>,
) -> Snapshot {
    let id = SnapshotId::generate();
    let draft = store
        .begin_snapshot(id.clone(), SnapshotKind::User)
        .unwrap();
    let room = tracker.estimate(source).unwrap().room();
    let buffer = store.resident_buffer(room).unwrap();
    let dirty = tracker.capture(source, buffer).unwrap();
    std::fs::write(draft.device_state(), noise(13 << 10, 1)).unwrap();
    draft.write_memory(base, &dirty).unwrap();
    let vm = VmShape {
        cpus: 1,
        memory_mib: (GUEST >> 20) as u32,
        hypervisor: "none".to_owned(),
        options: Default::default(),
    };
    let mut manifest = Manifest::new(id, SnapshotKind::User, vm, "none");
    if let Some(parent) = parent {
        manifest = manifest.child_of(parent.manifest());
    }
    let snapshot = draft.publish(manifest).await.unwrap();
    tracker.imaged();
    snapshot
}

/// Snapshots in a row, `dirty` MB written before each, each over the one before.
async fn lineage(store: &Store, base: &Path, dirty: usize, pattern: Pattern, gap: Duration) {
    let mut vm = Vm::start(base);
    let mut tracker = Tracker::new(TierChoice::Auto).unwrap();
    let mut last: Option<Snapshot> = None;
    let (mut times, mut ids) = (Vec::new(), Vec::new());
    for round in 0..SNAPSHOTS {
        vm.write(dirty, pattern, round + 1);
        tokio::time::sleep(gap).await;
        let started = Instant::now();
        let over = last
            .as_ref()
            .map_or(base.to_owned(), Snapshot::memory_image);
        let snapshot = publish(store, &mut tracker, &vm.source, &over, last.as_ref()).await;
        times.push(started.elapsed());
        ids.push(snapshot.id().clone());
        last = Some(snapshot);
    }
    let ends = [&times[..5], &times[48..53], &times[95..]].map(|part| ms(median(part.to_vec())));
    let started = Instant::now();
    store.wait_durable(&ids[SNAPSHOTS - 1]).await.unwrap();
    let durable = started.elapsed();
    let [first, again] = [(); 2].map(|()| {
        let started = Instant::now();
        let own: u64 = ids
            .iter()
            .map(|id| store.sizes(id).unwrap().own_bytes)
            .sum();
        (started.elapsed(), own)
    });
    println!(
        "{SNAPSHOTS} snapshots, {dirty} MB in {pattern:?} before each, {} ms between them: the 1st {:.1} ms, the \
         50th {:.1}, the 100th {:.1} (x{:.2}); all durable {:.0} ms after the last; sizes of all {:.1} ms \
         ({} MB own), again {:.3} ms",
        gap.as_millis(),
        ends[0],
        ends[1],
        ends[2],
        ends[2] / ends[0],
        ms(durable),
        ms(first.0),
        first.1 >> 20,
        ms(again.0),
    );
    let started = Instant::now();
    for id in &ids {
        store.delete(id).await.unwrap();
    }
    println!(
        "  deleted in {:.1} ms each",
        ms(started.elapsed()) / SNAPSHOTS as f64
    );
}

/// Touches what a restore would, and returns how long that took.
fn touch(image: &Path) -> Duration {
    let file = File::open(image).unwrap();
    let started = Instant::now();
    // SAFETY: a fresh private mapping, unmapped below after its last use.
    unsafe {
        let (hint, protection) = (std::ptr::null_mut(), ProtFlags::READ | ProtFlags::WRITE);
        let start = mmap(hint, GUEST, protection, MapFlags::PRIVATE, &file, 0).unwrap();
        for page in (0..BASE).step_by(4096 * STRIDE) {
            std::hint::black_box(start.cast::<u8>().add(page).read_volatile());
        }
        munmap(start, GUEST).unwrap();
    }
    started.elapsed()
}

/// The first access to a new image, of which the parent's pages are cached.
async fn first_restore(store: &Store, base: &Path) {
    let _ = std::fs::read(base).unwrap();
    let mut vm = Vm::start(base);
    vm.write(10, Pattern::Runs, 7);
    let mut tracker = Tracker::new(TierChoice::AnonymousPages).unwrap();
    let capture = |tracker: &mut Tracker| {
        let room = tracker.estimate(&vm.source).unwrap().room();
        let buffer = store.resident_buffer(room).unwrap();
        tracker.capture(&vm.source, buffer).unwrap()
    };
    let plain = store.root().path().join("plain.img");
    let mut times = Vec::new();
    for _ in 0..5 {
        let _ = std::fs::remove_file(&plain);
        write_image(store.support(), base, &capture(&mut tracker), &plain).unwrap();
        times.push(touch(&plain));
    }
    println!(
        "first access to {} MB of a new image: {:.1} ms without read-ahead",
        (BASE / STRIDE) >> 20,
        ms(median(times))
    );
    for wait in [0, 50, 100, 200, 400] {
        let mut times = Vec::new();
        for _ in 0..5 {
            let snapshot = publish(store, &mut tracker, &vm.source, base, None).await;
            tokio::time::sleep(Duration::from_millis(wait)).await;
            times.push(touch(&snapshot.memory_image()));
            store.wait_durable(snapshot.id()).await.unwrap();
            store.delete(snapshot.id()).await.unwrap();
        }
        println!(
            "  {wait} ms after it was published {:.1} ms",
            ms(median(times))
        );
    }
    let file = File::open(&plain).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    println!(
        "  of an image that nobody has read {:.1} ms",
        ms(touch(&plain))
    );
    println!("  of one that is cached {:.1} ms", ms(touch(base)));
}
