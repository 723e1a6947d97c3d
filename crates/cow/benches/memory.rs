//! How long it takes to capture the memory of a process that stands for a VM, and to write it as an
//! image: for 10 to 200 MB written, in runs and in single pages. Prints medians; run as root with
//! `cargo bench -p cubicle-cow --bench memory`.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod common;

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use common::{GUEST, Pattern, Vm, is_vm, median, ms, noise};
use cubicle_cow::{
    BackingConfig, Store, backing,
    memory::{Base, Buffer, TierChoice, Tracker, probe_soft_dirty, write_image},
};

/// Data in the base image, in bytes, from its beginning.
const BASE: usize = 160 << 20;
const ROUNDS: usize = 9;
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
    println!("{:?}", root.info().unwrap().kind);
    println!("soft-dirty bits: {:?}", probe_soft_dirty());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, _) = runtime.block_on(Store::open(&root)).unwrap();
    residency();
    for pattern in [Pattern::Runs, Pattern::Pages] {
        for megabytes in [0, 10, 50, 100, 200] {
            if pattern == Pattern::Runs || megabytes <= 100 {
                captures(&store, megabytes, pattern);
            }
        }
    }
    runtime.block_on(store.close());
    drop(runtime);
    println!("{:?}", root.close().unwrap());
}

fn residency() {
    for megabytes in [10, 100] {
        let times = (0..ROUNDS).map(|_| {
            let started = Instant::now();
            drop(Buffer::with_resident(megabytes << 20).unwrap());
            started.elapsed()
        });
        let time = ms(median(times.collect()));
        println!(
            "make {megabytes:>3} MB resident {time:>7.2} ms ({:.3} ms/MB)",
            time / megabytes as f64
        );
    }
}

fn captures(store: &Store, megabytes: usize, pattern: Pattern) {
    let base: PathBuf = store.root().path().join("base.img");
    let _ = std::fs::remove_file(&base);
    let file = File::create(&base).unwrap();
    file.set_len(GUEST as u64).unwrap();
    file.write_all_at(&noise(BASE, 5), 0).unwrap();
    file.sync_all().unwrap();
    let image = store.root().path().join("image.img");
    let again = store.root().path().join("again.img");
    let [mut estimate, mut warm, mut cold] = [(); 3].map(|()| Vec::new());
    let [mut write, mut flush, mut second, mut nothing] = [(); 4].map(|()| Vec::new());
    let mut written = (0, 0, 0);
    for round in 0..ROUNDS {
        let mut vm = Vm::start(&base);
        vm.write(megabytes, pattern, round + 1);
        let mut tracker = Tracker::new(TierChoice::AnonymousPages).unwrap();
        let started = Instant::now();
        drop(tracker.capture(&vm.source, Buffer::new()).unwrap());
        cold.push(started.elapsed());
        let started = Instant::now();
        let room = tracker.estimate(&vm.source).unwrap().room();
        estimate.push(started.elapsed());
        let buffer = store.resident_buffer(room).unwrap();
        let started = Instant::now();
        let dirty = tracker.capture(&vm.source, buffer).unwrap();
        warm.push(started.elapsed());
        for path in [&image, &again] {
            let _ = std::fs::remove_file(path);
        }
        let report = write_image(store.support(), base.as_path(), &dirty, &image)
            .unwrap()
            .report;
        write.push(Duration::from_micros(report.write_us));
        written.0 = report.bytes_written;
        let started = Instant::now();
        File::open(&image).unwrap().sync_data().unwrap();
        flush.push(started.elapsed());
        // An idle VM's second snapshot.
        let report = write_image(store.support(), image.as_path(), &dirty, &again)
            .unwrap()
            .report;
        second.push(Duration::from_micros(report.write_us));
        written.1 = report.bytes_written;
        std::fs::remove_file(&again).unwrap();
        let report = write_image(store.support(), Base::Zeros, &dirty, &again)
            .unwrap()
            .report;
        nothing.push(Duration::from_micros(report.write_us));
        written.2 = report.bytes_written;
    }
    let warm = median(warm);
    println!(
        "{megabytes:>3} MB in {pattern:?}: estimate {:.2} ms; freeze {:.2} ms ({:.3} ms/MB), by a buffer that \
         is not resident {:.2}; write {:.1} ms ({} KB), flush {:.1}; of an idle VM over the last image {:.1} ({} KB), \
         without a base {:.1} ({} KB)",
        ms(median(estimate)),
        ms(warm),
        ms(warm) / megabytes.max(1) as f64,
        ms(median(cold)),
        ms(median(write)),
        written.0 >> 10,
        ms(median(flush)),
        ms(median(second)),
        written.1 >> 10,
        ms(median(nothing)),
        written.2 >> 10,
    );
}
