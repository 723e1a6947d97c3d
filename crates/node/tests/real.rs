//! Real VMs: QEMU, the real guest daemon, real disks and networks. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::Progress;
use cubicle_node::{
    AdoptionReport, CreateSandbox, Error, Failure, ImageSource, KillOutcome, Node, NodeEvent,
    TemplateBuild, WarmUp,
};
use cubicle_vmm::qemu::{Qemu, QemuConfig};
use support::{Machine, assert_clean, image, vm_processes};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Builder,
};

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
        settle: TemplateBuild::SETTLE,
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

async fn create(node: &Node, snapshot: &SnapshotId) -> SandboxId {
    let order = CreateSandbox {
        env_vars: [("GREETING".to_owned(), "hello world".to_owned())].into(),
        ..CreateSandbox::new(snapshot.clone())
    };
    let id = order.id.clone();
    node.create(order).await.unwrap();
    id
}

async fn bash(node: &Node, id: &SandboxId, script: &str) -> String {
    support::run(node, id, &["/bin/bash", "-c", script])
        .await
        .trim()
        .to_owned()
}

async fn close(node: Node, machine: &Machine) {
    node.shutdown().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    assert_clean(machine);
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_of_one_template_are_machines_of_their_own() {
    let machine = Machine::new(true);
    let (node, report) = machine.open(hypervisor().await).await;
    assert_eq!(report, AdoptionReport::default());
    let snapshot = template(&node).await;
    let (one, other) = tokio::join!(create(&node, &snapshot), create(&node, &snapshot));

    assert_eq!(
        bash(&node, &one, "hostname; echo $GREETING").await,
        format!("{one}\nhello world")
    );
    assert_eq!(bash(&node, &other, "hostname").await, other.as_str());
    for secret in ["cat /etc/machine-id", "head -c 16 /dev/urandom | md5sum"] {
        let (a, b) = (
            bash(&node, &one, secret).await,
            bash(&node, &other, secret).await,
        );
        assert!(a.len() >= 32 && a != b, "{secret}: {a} {b}");
    }
    let inside: f64 = bash(&node, &one, "date +%s.%N").await.parse().unwrap();
    let outside = OffsetDateTime::now_utc().unix_timestamp_nanos() as f64 / 1e9;
    assert!((outside - inside).abs() < 5.0, "{inside} {outside}");

    bash(
        &node,
        &one,
        "echo only here > /home/user/file; echo x > /dev/shm/file",
    )
    .await;
    let elsewhere = bash(
        &node,
        &other,
        "cat /home/user/file /dev/shm/file 2>&1 || true",
    )
    .await;
    assert!(elsewhere.contains("No such file"), "{elsewhere}");

    // A server that listens on the guest's localhost only.
    let server = "cd /home/user && (python3 -m http.server 8000 --bind 127.0.0.1 \
        >/dev/null 2>&1 &) && for i in $(seq 200); do \
        (echo > /dev/tcp/127.0.0.1/8000) 2>/dev/null && exit; sleep 0.1; done; exit 1";
    bash(&node, &one, server).await;
    let mut stream = node.connect(&one, 8000).await.unwrap();
    stream
        .write_all(b"GET /file HTTP/1.0\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("only here\n"), "{answer}");
    assert!(matches!(
        node.connect(&one, 8001).await,
        Err(Error::PortClosed { port: 8001, .. })
    ));
    assert!(matches!(
        node.connect(&other, 8000).await,
        Err(Error::PortClosed { .. })
    ));

    let metrics = node.metrics(&one).await.unwrap();
    assert_eq!(metrics.cpu_count, 1);
    assert!(
        metrics.mem_used > 0 && metrics.mem_total > 400 << 20,
        "{metrics:?}"
    );
    assert!(
        metrics.host_private < 200 << 20 && metrics.disk_total > 1 << 30,
        "{metrics:?}"
    );
    assert!(!node.logs(&one).await.unwrap().is_empty());
    assert_eq!(vm_processes(&machine).len(), 2);

    let mut events = node.events();
    // The guest powers off in the middle of a request, which breaks.
    let (task, target) = (node.clone(), other.clone());
    let power_off = "sudo sh -c 'echo o > /proc/sysrq-trigger'; sleep 60";
    let cut_off = tokio::spawn(async move { bash(&task, &target, power_off).await });
    let event = events.recv().await.unwrap();
    assert_eq!(
        event,
        NodeEvent::Exited {
            id: other.clone(),
            generation: 1
        }
    );
    assert!(cut_off.await.is_err(), "its answer never came");
    assert_eq!(node.kill(&one).await.unwrap(), KillOutcome::Killed);
    assert_eq!(node.sandboxes(), []);
    close(node, &machine).await;
}

/// The process that owns the node dies; its VMs do not. Each node here has a runtime of its own,
/// which is torn down in the middle of whatever it does, as `kill -9` would.
#[test]
fn sandboxes_outlive_a_crash_and_what_is_nobodys_is_removed() {
    let machine = Machine::new(true);
    let runtime = || Builder::new_multi_thread().enable_all().build().unwrap();
    let first = runtime();
    let survivor = first.block_on(async {
        let (node, _) = machine.open(hypervisor().await).await;
        let snapshot = template(&node).await;
        let survivor = create(&node, &snapshot).await;
        bash(
            &node,
            &survivor,
            "echo kept > /dev/shm/file; (sleep 1000 &) >/dev/null 2>&1",
        )
        .await;
        // A VM that runs and that the journal does not know yet.
        node.failpoints()
            .arm("create/record", Failure::Delay(Duration::from_secs(3600)));
        let before = node.failpoints().passes("create/record");
        let unlucky = node.clone();
        tokio::spawn(async move { create(&unlucky, &snapshot).await });
        while node.failpoints().passes("create/record") == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        survivor
    });
    assert_eq!(vm_processes(&machine).len(), 2);
    first.shutdown_timeout(Duration::from_secs(10));
    assert_eq!(vm_processes(&machine).len(), 2, "VMs outlive the server");

    runtime().block_on(async {
        let begun = Instant::now();
        let (node, report) = machine.open(hypervisor().await).await;
        eprintln!("opened in {:?}: {report:?}", begun.elapsed());
        assert_eq!(report.adopted, std::slice::from_ref(&survivor));
        assert_eq!((report.unfinished.len(), report.swept_vms), (1, 1));
        assert_eq!((report.lost.len(), report.swept_slots), (0, 1));
        assert_eq!(vm_processes(&machine).len(), 1);
        assert_eq!(node.generation(&survivor), Some(1));
        let kept = bash(
            &node,
            &survivor,
            "cat /dev/shm/file; hostname; echo $GREETING",
        )
        .await;
        assert_eq!(kept, format!("kept\n{survivor}\nhello world"));
        bash(&node, &survivor, "pgrep -f 'sleep 1000'").await;

        let mut events = node.events();
        let pid = rustix::process::Pid::from_raw(vm_processes(&machine)[0]).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let event = events.recv().await.unwrap();
        assert_eq!(
            event,
            NodeEvent::Exited {
                id: survivor.clone(),
                generation: 1
            }
        );
        assert_eq!(node.sandboxes(), []);
        close(node, &machine).await;
    });
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
            "Private_Dirty:" => {
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
    if std::env::var_os("NO_THP").is_some() {
        // SAFETY: the call takes numbers only.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
    }
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
            if let Ok(command) = std::env::var("LOOK") {
                println!(
                    "{}",
                    support::run(&node, &id, &["/bin/bash", "-c", &command]).await
                );
            }
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
