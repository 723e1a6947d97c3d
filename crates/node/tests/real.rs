//! Real VMs: QEMU, the real guest daemon, real disks and networks. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::{sync::Arc, time::Instant};

use cubicle_ids::SnapshotId;
use cubicle_image::Progress;
use cubicle_node::{
    CreateSandbox, ImageSource, KillOutcome, Node, SandboxState, TemplateBuild, WarmUp, empty_body,
};
use cubicle_vmm::qemu::{Qemu, QemuConfig};
use support::{Machine, assert_clean, image};

async fn hypervisor() -> Arc<Qemu> {
    Arc::new(Qemu::open(QemuConfig::default()).await.unwrap())
}

async fn template(node: &Node) -> SnapshotId {
    let build = TemplateBuild {
        snapshot: SnapshotId::generate(),
        template: None,
        source: ImageSource::Ready(image().await),
        cpus: 1,
        memory_mib: 512,
        warm_up: WarmUp::usual("user"),
    };
    let built = node
        .build_template(build, Progress::silent())
        .await
        .unwrap();
    eprintln!(
        "boot {:?} warm-up {:?} {} | {}",
        built.boot, built.warm_up, built.freeze, built.proof
    );
    built.snapshot
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_is_built_and_sandboxes_are_made_from_it() {
    tracing_subscriber::fmt()
        .with_test_writer()
        .with_env_filter("info,cubicle_node=debug")
        .init();
    let machine = Machine::new(true);
    let (node, report) = machine.open(hypervisor().await).await;
    assert_eq!(report, Default::default());
    let snapshot = template(&node).await;

    for _ in 0..10 {
        let order = CreateSandbox::new(snapshot.clone());
        let id = order.id.clone();
        let begun = Instant::now();
        let created = node.create(order).await.unwrap();
        eprintln!("create {:?}: {}", begun.elapsed(), created.timings);
        let usage = node.usage(&id).await.unwrap();
        eprintln!("private {} KiB", usage.private_bytes >> 10);
        assert_eq!(node.sandbox(&id).unwrap().state, SandboxState::Running);
        let request = http::Request::get("/health").body(empty_body()).unwrap();
        assert_eq!(node.request(&id, request).await.unwrap().status(), 204);
        let metrics = node.metrics(&id).await.unwrap();
        eprintln!("{metrics:?}");
        let begun = Instant::now();
        assert_eq!(node.kill(&id).await.unwrap(), KillOutcome::Killed);
        eprintln!("kill {:?}", begun.elapsed());
    }
    node.shutdown().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_clean(&machine);
}

/// Where a VM process's private memory is, in KiB: by mapping, largest first.
fn private_by_mapping(pid: i32) -> Vec<(u64, String)> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut sums = std::collections::BTreeMap::<String, u64>::new();
    let mut name = String::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        match first {
            "Private_Dirty:" | "Private_Clean:" => {
                let kib: u64 = words.next().unwrap().parse().unwrap();
                *sums.entry(name.clone()).or_default() += kib;
            }
            _ if first.ends_with(':') => {}
            range => {
                let file = line.split_whitespace().nth(5);
                let (start, end) = range.split_once('-').unwrap();
                let parse = |text| u64::from_str_radix(text, 16).unwrap();
                let mib = (parse(end) - parse(start)) >> 20;
                name = file.map_or_else(|| format!("anonymous, {mib} MiB"), str::to_owned);
            }
        }
    }
    let mut sums: Vec<_> = sums.into_iter().map(|(name, kib)| (kib, name)).collect();
    sums.sort_by(|a, b| b.cmp(a));
    sums
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Not a test: prints what a create takes, by phase, and what a sandbox occupies.
///
/// `cargo test --release -p cubicle-node --test real -- --ignored --nocapture measure`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn measure() {
    let count = |name: &str, default| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let machine = Machine::new(true);
    let (node, _) = machine.open(hypervisor().await).await;
    let snapshot = template(&node).await;
    let mut phases: Vec<(&str, Vec<f64>)> = Vec::new();
    let (mut kills, mut privates, mut cpu, mut commands) = (vec![], vec![], vec![], vec![]);
    for n in 0..count("CREATES", 20) {
        let order = CreateSandbox::new(snapshot.clone());
        let id = order.id.clone();
        let created = node.create(order).await.unwrap();
        for (n, (name, took)) in created.timings.phases().into_iter().enumerate() {
            if phases.len() <= n {
                phases.push((name, vec![]));
            }
            phases[n].1.push(took.as_secs_f64() * 1e3);
        }
        let usage = node.usage(&id).await.unwrap();
        privates.push(usage.private_bytes as f64 / f64::from(1 << 20));
        cpu.push(usage.cpu_time_us as f64 / 1e3);
        let begun = Instant::now();
        support::run(&node, &id, &["/bin/bash", "-l", "-c", "echo hello"]).await;
        commands.push(begun.elapsed().as_secs_f64() * 1e3);
        if n == 0 {
            let pid = support::vm_processes(&machine)[0];
            for (kib, name) in private_by_mapping(pid).into_iter().take(12) {
                println!("    {kib:>8} KiB {name}");
            }
        }
        let begun = Instant::now();
        node.kill(&id).await.unwrap();
        kills.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    for (name, values) in phases {
        let min = values.iter().copied().fold(f64::MAX, f64::min);
        println!(
            "{name:>10} p50 {:7.1} ms   min {min:7.1} ms",
            median(values)
        );
    }
    println!("{:>10} p50 {:7.1} ms", "kill", median(kills));
    println!(
        "{:>10} p50 {:7.1} ms of the host's",
        "CPU time",
        median(cpu)
    );
    println!("{:>10} p50 {:7.1} MiB", "private", median(privates));
    println!("{:>10} p50 {:7.1} ms", "first bash", median(commands));
    node.shutdown().await.unwrap();
    node.store().clone().close().await;
}
