//! How long the store's part of a freeze takes: cloning a volume, and capturing what a process has
//! written to its memory. Prints medians; run with `cargo bench -p cubicle-cow`, as root.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use cubicle_cow::{
    BackingConfig, DiskShape, Manifest, SnapshotKind, Store, VmShape, VolumeName, backing,
    memory::{Buffer, Source, capture, write_image},
};
use cubicle_ids::{SandboxId, SnapshotId};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const GUEST: usize = 512 << 20;
const ROUNDS: usize = 11;

fn main() {
    let dir = tempfile::Builder::new()
        .prefix("cubicle-cow-bench-")
        .tempdir_in("/tmp")
        .unwrap();
    let config = BackingConfig {
        initial_size: 8 << 30,
        ..BackingConfig::default()
    };
    let started = Instant::now();
    let root = backing::prepare(dir.path(), &config).unwrap();
    println!(
        "prepare (mkfs, attach, mount)      {:>10.1?}",
        started.elapsed()
    );
    println!("{:?}", root.info().unwrap().kind);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, _) = runtime.block_on(Store::open(&root)).unwrap();
    volumes(&store);
    for megabytes in [0, 10, 100] {
        captures(&store, megabytes);
    }
    runtime.block_on(publish(&store));
    runtime.block_on(store.close());
    drop(runtime);
    println!("{:?}", root.close().unwrap());
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; len];
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// A volume of 1 GiB, a quarter of it data, cloned clean and with fresh writes in the page cache.
fn volumes(store: &Store) {
    let name = VolumeName::new(SandboxId::generate(), 0, 0);
    let image = store.root().path().join("disk.img");
    let file = File::create(&image).unwrap();
    file.set_len(1 << 30).unwrap();
    for megabyte in 0..256 {
        file.write_all_at(&noise(1 << 20, megabyte), megabyte << 22)
            .unwrap();
    }
    file.sync_all().unwrap();
    let volume = store.clone_volume(&image, &name).unwrap();
    let writer = File::options().write(true).open(&volume).unwrap();
    for dirty in [0, 10] {
        let times = (0..ROUNDS as u64).map(|round| {
            for megabyte in 0..dirty {
                writer
                    .write_all_at(&noise(1 << 20, round + megabyte), megabyte << 22)
                    .unwrap();
            }
            let to = VolumeName::new(SandboxId::generate(), 0, 0);
            let started = Instant::now();
            store.clone_volume(&volume, &to).unwrap();
            started.elapsed()
        });
        let time = median(times.collect());
        println!("clone 1 GiB volume, {dirty:>3} MB unflushed {time:>9.1?}");
    }
}

fn captures(store: &Store, megabytes: usize) {
    let base = store.root().path().join("base.img");
    let _ = std::fs::remove_file(&base);
    let file = File::create(&base).unwrap();
    file.set_len(GUEST as u64).unwrap();
    file.write_all_at(&noise(74 << 20, 5), 0).unwrap();
    file.sync_all().unwrap();
    let file = File::open(&base).unwrap();
    let (mut scan, mut copy, mut write) = (vec![], vec![], vec![]);
    let (mut warm, mut written) = (vec![], 0);
    for round in 0..ROUNDS {
        // SAFETY: a fresh private mapping, unmapped at the end of the round.
        let memory = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let start = mmap(
                std::ptr::null_mut(),
                GUEST,
                protection,
                MapFlags::PRIVATE,
                &file,
                0,
            )
            .unwrap();
            std::slice::from_raw_parts_mut(start.cast::<u8>(), GUEST)
        };
        // Runs of 64 KiB, scattered, as a busy guest leaves them.
        let content = noise(64 << 10, round as u64 + 99);
        for run in 0..megabytes * 16 {
            let at = (run * 5 % (GUEST >> 16)) << 16;
            memory[at..at + content.len()].copy_from_slice(&content);
        }
        let source = Source {
            pid: std::process::id(),
            address: memory.as_ptr() as u64,
            len: GUEST as u64,
        };
        let started = Instant::now();
        let dirty = capture(&source, Buffer::new()).unwrap();
        let cold = started.elapsed();
        let to = store.root().path().join("image.img");
        let _ = std::fs::remove_file(&to);
        let report = write_image(store.support(), base.as_path(), &dirty, &to)
            .unwrap()
            .report;
        scan.push(Duration::from_micros(report.scan_us));
        copy.push(cold);
        write.push(Duration::from_micros(report.write_us));
        written = report.bytes_written;
        let buffer = dirty.into_buffer();
        let started = Instant::now();
        let again = capture(&source, buffer).unwrap();
        warm.push(started.elapsed());
        drop(again);
        // SAFETY: the mapping above; `memory` is not used after this.
        unsafe { munmap(memory.as_mut_ptr().cast(), GUEST).unwrap() };
    }
    println!(
        "capture {megabytes:>3} MB of {} MiB: freeze {:.2?} (scan {:.2?}), with a kept buffer {:.2?}; \
         write {:.1?} ({written} bytes)",
        GUEST >> 20,
        median(copy),
        median(scan),
        median(warm),
        median(write),
    );
}

async fn publish(store: &Store) {
    let (mut publish, mut durable) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let id = SnapshotId::generate();
        let draft = store
            .begin_snapshot(id.clone(), SnapshotKind::User)
            .unwrap();
        cubicle_cow::reflink::clone_file(
            &store.root().path().join("image.img"),
            &draft.memory_image(),
        )
        .unwrap();
        draft
            .clone_disk(0, &store.root().path().join("disk.img"))
            .unwrap();
        std::fs::write(draft.device_state(), noise(13 << 10, 1)).unwrap();
        let vm = VmShape {
            cpus: 1,
            memory_mib: (GUEST >> 20) as u32,
            hypervisor: "none".to_owned(),
            options: Default::default(),
        };
        let mut manifest = Manifest::new(id.clone(), SnapshotKind::User, vm, "none");
        manifest.disks = vec![DiskShape {
            size: 1 << 30,
            read_only: false,
        }];
        let started = Instant::now();
        draft.publish(manifest).await.unwrap();
        publish.push(started.elapsed());
        store.wait_durable(&id).await.unwrap();
        durable.push(started.elapsed());
    }
    let (publish, durable) = (median(publish), median(durable));
    println!("publish {publish:.2?}; durable (fsync and checksums) after {durable:.1?}");
}
