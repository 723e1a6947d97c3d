//! Unpacks archives that are wrong in every way that chance finds, and sees that nothing outside
//! of the target changes, nothing panics, nothing takes long, and what is left can be removed.
//!
//! `cargo test` spends some seconds on it. For longer:
//!
//! ```text
//! CUBICLE_FUZZ_SECONDS=3600 cargo test -p cubicle-oci --test fuzz -- --nocapture
//! ```
//!
//! Inputs that have behaved in a way that none before has are kept in memory and varied further.
//! With `CUBICLE_FUZZ_KEEP=DIR` they are also written there; those in `tests/corpus` are what past
//! runs have found, and where every run begins. A run is repeated with `CUBICLE_FUZZ_SEED=N`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::{
    collections::HashSet,
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cubicle_oci::{
    Error,
    unpack::{Limits, Stop, Unpacker},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use support::{canary::Ground, hostile::Mutator};

const LIMITS: Limits = Limits {
    bytes: 4 << 20,
    entries: 500,
};
/// More than any input within the limits can need, also on a machine with other things to do.
const TOO_LONG: Duration = Duration::from_secs(20);
/// How many inputs are kept to be varied.
const MAX_POOL: usize = 4000;

fn corpus() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut paths: Vec<PathBuf> = fs_err::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "layer"))
        .collect();
    paths.sort();
    let read = |path: &PathBuf| {
        let stored = fs_err::read(path).unwrap();
        zstd::decode_all(&*stored).unwrap()
    };
    paths.iter().map(read).collect()
}

/// Unpacks some layers over one another and tells in a few words what came of it.
fn run(ground: &Ground, layers: &[&[u8]]) -> String {
    let mut unpacker = Unpacker::new(&ground.target(), LIMITS, Stop::default()).unwrap();
    let mut outcome = String::new();
    for layer in layers {
        match unpacker.layer(*layer) {
            Ok(unpacked) => {
                let magnitude = u64::BITS - unpacked.entries.leading_zeros();
                outcome.push_str(&format!("ok {magnitude};"));
            }
            Err(Error::Layer { reason, source, .. }) => {
                let kind = source.map(|source| source.kind());
                outcome.push_str(&format!("{reason} {kind:?};"));
                break;
            }
            Err(other) => {
                outcome.push_str(&format!("{other};"));
                break;
            }
        }
    }
    outcome.push_str(&shape(&ground.target()));
    outcome
}

/// Which kinds of files there are, and roughly how many.
fn shape(target: &Path) -> String {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let mut counts = [0_u32; 8];
    let mut waiting = vec![target.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs_err::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let kind = meta.file_type();
            let index = match () {
                () if kind.is_dir() => 0,
                () if kind.is_symlink() => 1,
                () if kind.is_fifo() => 2,
                () if kind.is_char_device() => 3,
                () if kind.is_block_device() => 4,
                () if meta.nlink() > 1 => 5,
                () if meta.size() > meta.blocks() * 512 => 6,
                () => 7,
            };
            counts[index] += 1;
            if kind.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    let magnitudes = counts.map(|count| u32::BITS - count.leading_zeros());
    format!("{magnitudes:?}")
}

#[test]
fn what_earlier_runs_have_found_is_harmless() {
    let ground = Ground::new();
    let corpus = corpus();
    assert!(!corpus.is_empty());
    for layer in &corpus {
        for lower in [&corpus[0], layer, &corpus[corpus.len() / 2]] {
            run(&ground, &[lower, layer]);
            ground.check();
            ground.clear();
        }
    }
}

#[test]
fn no_archive_reaches_beyond_its_target() {
    let number = |name| env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let seconds = number("CUBICLE_FUZZ_SECONDS").unwrap_or(4);
    let seed = number("CUBICLE_FUZZ_SEED").unwrap_or_else(rand::random);
    let keep = env::var_os("CUBICLE_FUZZ_KEEP").map(PathBuf::from);
    println!("CUBICLE_FUZZ_SEED={seed}");

    let ground = Ground::new();
    let mut random = StdRng::seed_from_u64(seed);
    let mutator = Mutator::new(&ground.canary());
    let mut pool = corpus();
    let mut seen = HashSet::new();
    let start = Instant::now();
    let (mut runs, mut accepted, mut slowest) = (0_u64, 0_u64, Duration::ZERO);
    let mut next_report = 60;
    while start.elapsed() < Duration::from_secs(seconds) {
        let count = random.random_range(1..=3);
        let layers: Vec<Vec<u8>> = (0..count)
            .map(|_| mutator.layer(&mut random, &pool))
            .collect();
        let slices: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            let outcome = run(&ground, &slices);
            ground.check();
            outcome
        }));
        let took = began.elapsed();
        let outcome = match result {
            Ok(outcome) if took < TOO_LONG => outcome,
            other => {
                let place = env::temp_dir().join(format!("cubicle-fuzz-{seed}-{runs}"));
                fs_err::create_dir_all(&place).unwrap();
                for (index, layer) in layers.iter().enumerate() {
                    fs_err::write(place.join(index.to_string()), layer).unwrap();
                }
                panic!(
                    "run {runs} took {took:?}: {other:?}; see {}",
                    place.display()
                );
            }
        };
        ground.clear();
        runs += 1;
        slowest = slowest.max(took);
        accepted += u64::from(outcome.starts_with("ok"));
        if seen.insert(outcome) {
            for layer in layers {
                if let Some(keep) = &keep {
                    let name = format!("{}.layer", &cubicle_oci::Digest::of(&layer).hex()[..16]);
                    fs_err::write(keep.join(name), zstd::encode_all(&*layer, 19).unwrap()).unwrap();
                }
                if pool.len() < MAX_POOL {
                    pool.push(layer);
                } else {
                    let index = random.random_range(0..pool.len());
                    pool[index] = layer;
                }
            }
        }
        let elapsed = start.elapsed().as_secs();
        if elapsed >= next_report {
            next_report = elapsed + 60;
            println!("{elapsed} s: {runs} runs, {} behaviours", seen.len());
        }
    }
    println!(
        "{runs} runs, {accepted} of them accepted, {} behaviours, slowest {slowest:?}",
        seen.len()
    );
    assert!(accepted > 0 && seen.len() > 20, "this exercises nothing");
}
