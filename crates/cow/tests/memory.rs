//! Memory snapshots of a process that stands for a VM: it maps an image privately and writes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{fs::File, os::unix::fs::MetadataExt as _, path::Path};

use common::{
    DataDir,
    model::{self, Model, PAGE, PAGES, Write, base_image, same, writes},
};
use cubicle_cow::{
    Error,
    memory::{Base, Buffer, MemoryReport, PageSums, Tier, capture, capture_all, write_image},
    reflink::Support,
};
use proptest::prelude::*;

#[test]
fn model_process() {
    model::play();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, ..Default::default() })]
    /// Capture, continue, capture again, restore, capture: always bit for bit what the process saw.
    #[test]
    fn every_cycle_is_exact(
        lives in proptest::collection::vec(proptest::collection::vec(writes(), 1..4), 1..3),
        reflink in any::<bool>(),
    ) {
        let data = DataDir::new();
        let root = data.prepare();
        let support = if reflink {
            root.support().clone()
        } else {
            Support::Copy { reason: "to test it".to_owned() }
        };
        let mut started_from = root.path().join("start.img");
        base_image(&started_from);
        let mut buffer = Buffer::new();
        for (life, cycles) in lives.into_iter().enumerate() {
            let mut model = Model::start(&started_from);
            let mut previous = started_from.clone();
            let mut last: Option<(File, PageSums)> = None;
            for (cycle, writes) in cycles.into_iter().enumerate() {
                for (page, write) in writes {
                    model.apply(page, write);
                }
                let dirty = capture(&model.source, buffer).unwrap();
                let path = |name| root.path().join(format!("{life}-{cycle}-{name}.img"));
                // Over the image the process started from, and over the one before this.
                let over_start = path("start");
                let over_previous = path("previous");
                write_image(&support, started_from.as_path(), &dirty, &over_start).unwrap();
                let report = write_image(&support, previous.as_path(), &dirty, &over_previous).unwrap().report;
                same(&over_start, &model.content);
                same(&over_previous, &model.content);
                prop_assert_eq!(report.tier, Tier::AnonymousPages);
                prop_assert_eq!(report.bytes_dirty, dirty.bytes());
                prop_assert!(report.bytes_written + report.bytes_unchanged <= report.bytes_dirty);
                // Without reading the image before.
                if let Some((file, sums)) = &last {
                    let over_known = path("known");
                    let base = Base::Last(file, sums);
                    let known = write_image(&support, base, &dirty, &over_known).unwrap();
                    same(&over_known, &model.content);
                    // Where pages between two others are written along with them may differ.
                    let of = |report: &MemoryReport| report.bytes_unchanged + report.bytes_written;
                    prop_assert_eq!(of(&known.report), of(&report));
                }
                let mut sums = PageSums::default();
                sums.complete(&dirty);
                last = Some((File::open(&over_previous).unwrap(), sums));
                // Nothing changes between two captures: nothing is written.
                let again = capture(&model.source, dirty.into_buffer()).unwrap();
                let third = path("again");
                let report = write_image(&support, over_previous.as_path(), &again, &third).unwrap().report;
                prop_assert_eq!(report.bytes_written, 0);
                prop_assert_eq!(report.bytes_unchanged, again.bytes());
                same(&third, &model.content);
                // All of it, for when the base is gone.
                let all = capture_all(&model.source, again.into_buffer()).unwrap();
                let full = path("full");
                let report = write_image(&support, Base::Zeros, &all, &full).unwrap().report;
                prop_assert_eq!(report.tier, Tier::Full);
                same(&full, &model.content);
                buffer = all.into_buffer();
                previous = over_previous;
            }
            started_from = previous;
        }
    }

    /// A VM that booted cold: an empty image, and what was written over it.
    #[test]
    fn a_cold_start_gives_a_sparse_image(writes in writes()) {
        let data = DataDir::new();
        let root = data.prepare();
        let start = root.path().join("start.img");
        File::create(&start).unwrap().set_len((PAGES * PAGE) as u64).unwrap();
        let mut model = Model::start(&start);
        for (page, write) in writes {
            model.apply(page, write);
        }
        let dirty = capture(&model.source, Buffer::new()).unwrap();
        let image = root.path().join("image.img");
        let report = write_image(root.support(), Base::Zeros, &dirty, &image).unwrap().report;
        same(&image, &model.content);
        let used = model.content.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count();
        prop_assert_eq!(report.bytes_written, (used * PAGE) as u64);
        prop_assert_eq!(report.bytes_zero, report.bytes_dirty - report.bytes_written);
        let metadata = std::fs::metadata(&image).unwrap();
        prop_assert_eq!(metadata.len(), (PAGES * PAGE) as u64);
        // Freed speculative preallocation aside, holes take nothing.
        File::open(&image).unwrap().sync_all().unwrap();
        prop_assert!(std::fs::metadata(&image).unwrap().blocks() * 512 <= metadata.len() + (64 << 10));
    }
}

#[test]
fn a_page_that_became_zero_is_a_hole_over_its_base() {
    let data = DataDir::new();
    let root = data.prepare();
    let start = root.path().join("start.img");
    std::fs::write(&start, vec![9; PAGES * PAGE]).unwrap();
    let mut model = Model::start(&start);
    for page in 0..PAGES {
        model.apply(page, Write::Zero);
    }
    let dirty = capture(&model.source, Buffer::with_resident(PAGES * PAGE).unwrap()).unwrap();
    let image = root.path().join("image.img");
    let report = write_image(root.support(), start.as_path(), &dirty, &image)
        .unwrap()
        .report;
    assert_eq!(
        (report.bytes_written, report.bytes_zero),
        (0, (PAGES * PAGE) as u64)
    );
    same(&image, &model.content);
    assert_eq!(std::fs::metadata(&image).unwrap().blocks(), 0);
    same(&start, &[9; PAGES * PAGE]);
}

#[test]
fn a_base_works_after_its_deletion_and_one_of_another_size_is_refused() {
    let data = DataDir::new();
    let root = data.prepare();
    let start = root.path().join("start.img");
    base_image(&start);
    let mut model = Model::start(&start);
    model.apply(5, Write::Fill(77));
    let held = File::open(&start).unwrap();
    std::fs::remove_file(&start).unwrap();
    let dirty = capture(&model.source, Buffer::new()).unwrap();
    assert_eq!(dirty.runs().len(), 1);
    let image = root.path().join("image.img");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&held);
    let base = format!("/proc/self/fd/{fd}");
    let report = write_image(root.support(), Path::new(&base), &dirty, &image)
        .unwrap()
        .report;
    assert_eq!(report.bytes_written, PAGE as u64);
    same(&image, &model.content);

    let short = root.path().join("short.img");
    std::fs::write(&short, [1; PAGE]).unwrap();
    let refused = root.path().join("refused.img");
    let error = write_image(root.support(), short.as_path(), &dirty, &refused).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    assert!(!refused.exists());
    let error = write_image(root.support(), Base::Zeros, &dirty, &image).unwrap_err();
    assert!(
        error.to_string().contains("image.img"),
        "an image is never overwritten: {error}"
    );
    same(&image, &model.content);
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let start = dir.path().join("start.img");
    base_image(&start);
    let model = Model::start(&start);
    let source = model.source;
    drop(model);
    let error = capture(&source, Buffer::new()).unwrap_err();
    assert!(
        matches!(error, Error::Memory { pid, .. } if pid == source.pid),
        "{error}"
    );
}
