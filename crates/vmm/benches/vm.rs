//! How long a VM takes to start, to answer and to die, from a snapshot, one at a time.
//!
//! `cargo bench -p cubicle-vmm [-- RUNS]` as root. Needs QEMU and, the first time, the network to
//! fetch a kernel. Prints the median and the range of each phase in milliseconds.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, dead_code)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use cubicle_vmm::Hypervisor as _;
use support::{Conversation, Dir, driver, template};

#[derive(Default)]
struct Measurements(BTreeMap<&'static str, Vec<Duration>>);

impl Measurements {
    fn add(&mut self, what: &'static str, took: Duration) {
        self.0.entry(what).or_default().push(took);
    }

    fn print(mut self) {
        for (what, taken) in &mut self.0 {
            taken.sort_unstable();
            let ms = |took: Duration| took.as_secs_f64() * 1e3;
            let (least, most) = (ms(taken[0]), ms(taken[taken.len() - 1]));
            let median = ms(taken[taken.len() / 2]);
            println!(
                "{what:44} {median:8.2} ms  ({least:.2} to {most:.2}, n={})",
                taken.len()
            );
        }
    }
}

async fn measure(runs: usize) {
    let mut all = Measurements::default();
    let (driver, dir, snapshot) = (driver().await, Dir::new(), template().await);
    for _ in 0..runs {
        let mut spec = dir.spec(snapshot.boot());
        spec.start = false;
        let started = Instant::now();
        let vm = driver.launch(spec).await.unwrap();
        all.add("restore: launch to loaded, stopped", started.elapsed());
        let resumed = Instant::now();
        vm.resume().await.unwrap();
        all.add("restore: resume", resumed.elapsed());
        vm.kill().await.unwrap();

        let started = Instant::now();
        let vm = driver.launch(dir.spec(snapshot.boot())).await.unwrap();
        all.add("restore: launch to running", started.elapsed());
        let mut guest = Conversation::with(&*vm).await;
        assert_eq!(guest.ask("get").await, "template");
        all.add("restore: launch to the guest's answer", started.elapsed());
        let asked = Instant::now();
        assert_eq!(guest.ask("get").await, "template");
        all.add(
            "channel: round trip (the guest looks every ms)",
            asked.elapsed(),
        );
        let paused = Instant::now();
        vm.pause().await.unwrap();
        all.add("freeze: pause", paused.elapsed());
        let saved = Instant::now();
        let state = dir.path().join("state");
        vm.save_device_state(&state).await.unwrap();
        all.add("freeze: save device state", saved.elapsed());
        std::fs::remove_file(state).unwrap();
        let killed = Instant::now();
        vm.kill().await.unwrap();
        all.add("kill", killed.elapsed());
    }
    for _ in 0..runs.min(5) {
        let started = Instant::now();
        let vm = driver.launch(dir.spec(support::cold())).await.unwrap();
        all.add("cold: launch to QEMU's monitor", started.elapsed());
        assert_eq!(Conversation::with(&*vm).await.ask("ping").await, "pong");
        all.add("cold: launch to the guest's answer", started.elapsed());
        vm.kill().await.unwrap();
    }
    all.print();
}

fn main() {
    // Cargo adds options of its own.
    let runs = std::env::args()
        .find_map(|argument| argument.parse().ok())
        .unwrap_or(15);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(measure(runs));
}
