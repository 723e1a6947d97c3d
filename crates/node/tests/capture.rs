//! Snapshots, rollbacks and pauses of real VMs: what was frozen is what comes back. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use cubicle_cow::{SnapshotKind, memory::TierChoice};
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_node::{BootFiles, CreateSandbox, Error, Node, TakeSnapshot};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use support::{
    Machine, image, run,
    world::{back, create, end, python, snapshot, world, world_on},
};

/// Cycles of random operations, for each tier.
const CYCLES: usize = 20;

/// Restores of the guest that counts.
const RESTORES: usize = 50;

/// Files in memory and on disk that the guest writes, `O_DIRECT` on disk so that what is read is
/// the disk's and not the page cache's.
const FILES: &str = r#"
import hashlib, mmap, os, random, sys
def write(path, seed, pages):
    flags = os.O_RDWR | os.O_CREAT | (0 if path.startswith("/dev/shm") else os.O_DIRECT)
    fd = os.open(path, flags, 0o600)
    block = mmap.mmap(-1, 4096 * pages)
    block[:] = random.Random(seed).randbytes(4096 * pages)
    os.pwrite(fd, block, 0)
    os.close(fd)
def digest(path):
    flags = os.O_RDONLY | (0 if path.startswith("/dev/shm") else os.O_DIRECT)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return "none"
    block = mmap.mmap(-1, os.fstat(fd).st_size)
    os.preadv(fd, [block], 0)
    return hashlib.sha256(block).hexdigest()[:16]
"#;

/// What each file holds.
type Contents = BTreeMap<String, String>;

async fn contents(node: &Node, id: &SandboxId, paths: &[String]) -> Contents {
    let script = format!("{FILES}\nfor path in sys.argv[1:]: print(digest(path))");
    let mut program = vec!["/usr/bin/python3", "-c", &script];
    program.extend(paths.iter().map(String::as_str));
    let output = run(node, id, &program).await;
    paths
        .iter()
        .cloned()
        .zip(output.lines().map(str::to_owned))
        .collect()
}

/// Random writes to memory and disk, snapshots, rollbacks, clones and deletions, against a model.
async fn random_operations(tier: TierChoice) {
    let (machine, node, template) = world(|config| config.memory_tier = tier).await;
    let mut random = StdRng::seed_from_u64(7);
    let paths: Vec<String> = (0..3)
        .flat_map(|n| [format!("/dev/shm/{n}"), format!("/home/user/{n}")])
        .collect();
    let id = create(&node, &template).await;
    let mut now = contents(&node, &id, &paths).await;
    let mut taken: Vec<(SnapshotId, Contents)> = vec![(template.clone(), now.clone())];
    for cycle in 0..CYCLES {
        for _ in 0..random.random_range(1..3) {
            let path = paths.choose(&mut random).unwrap();
            let (seed, pages) = (random.random::<u32>(), random.random_range(1..2000));
            let script =
                format!("{FILES}\nwrite({path:?}, {seed}, {pages})\nprint(digest({path:?}))");
            now.insert(path.clone(), python(&node, &id, &script).await);
        }
        match random.random_range(0..10) {
            0..5 => taken.push((snapshot(&node, &id).await, now.clone())),
            5..7 => {
                let (to, then) = taken.choose(&mut random).unwrap();
                node.rollback(back(&id, to)).await.unwrap();
                now = then.clone();
            }
            7 => {
                let (of, then) = taken.choose(&mut random).unwrap();
                let clone = create(&node, of).await;
                assert_eq!(
                    contents(&node, &clone, &paths).await,
                    *then,
                    "cycle {cycle}"
                );
                node.kill(&clone).await.unwrap();
            }
            _ if taken.len() > 1 => {
                let (gone, _) = taken.swap_remove(random.random_range(1..taken.len()));
                node.delete_snapshot(&gone).await.unwrap();
            }
            _ => {}
        }
        assert_eq!(contents(&node, &id, &paths).await, now, "cycle {cycle}");
    }
    for (snapshot, _) in &taken {
        node.store().verify(snapshot).await.unwrap();
    }
    node.kill(&id).await.unwrap();
    end(machine, node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_frozen_comes_back_found_by_anonymous_pages() {
    random_operations(TierChoice::AnonymousPages).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_frozen_comes_back_copied_whole() {
    random_operations(TierChoice::Full).await;
}

/// Counts on disk and in memory in lock-step: block `n` of a ring on disk, then a log in memory.
/// Before each write it looks at what the block holds: the number that it wrote there one lap
/// before, or the disk is older or newer than the memory that it runs in.
const COUNTER: &str = r#"
import mmap, os, struct
LAP = 512
disk = os.open("/home/user/ring", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
os.ftruncate(disk, LAP * 4096)
block = mmap.mmap(-1, 4096)
seen = mmap.mmap(-1, 4096)
status = mmap.mmap(os.open("/dev/shm/status", os.O_RDWR | os.O_CREAT, 0o600), 0) if os.path.exists("/dev/shm/status") else None
if status is None:
    fd = os.open("/dev/shm/status", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, 4096)
    status = mmap.mmap(fd, 4096)
n = 0
while True:
    n += 1
    os.preadv(disk, [seen], n % LAP * 4096)
    before = struct.unpack_from("<Q", seen)[0]
    if before != max(n - LAP, 0):
        struct.pack_into("<QQQ", status, 8, 1, n, before)
    os.preadv(disk, [seen], (n - 1) % LAP * 4096)
    last = struct.unpack_from("<Q", seen)[0]
    if last != n - 1:
        struct.pack_into("<QQQ", status, 8, 2, n, last)
    struct.pack_into("<Q", block, 0, n)
    os.pwritev(disk, [block], n % LAP * 4096)
    struct.pack_into("<Q", status, 0, n)
"#;

const STATUS: &str =
    "import struct; print(*struct.unpack('<QQQQ', open('/dev/shm/status','rb').read(32)))";

async fn status(node: &Node, id: &SandboxId) -> Vec<u64> {
    let text = python(node, id, STATUS).await;
    text.split(' ')
        .map(|number| number.parse().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_and_memory_are_of_one_instant() {
    let (machine, node, template) = world(|_| ()).await;
    let id = create(&node, &template).await;
    let start = format!(
        "cat > /tmp/c.py <<'END'\n{COUNTER}\nEND\nsetsid python3 /tmp/c.py >/tmp/c.log 2>&1 & sleep 1; cat /tmp/c.log"
    );
    run(&node, &id, &["/bin/bash", "-c", &start]).await;
    // Somebody else who uses the disk and the processor meanwhile.
    let busy = create(&node, &template).await;
    let load = "setsid sh -c 'while :; do dd if=/dev/zero of=/home/user/x bs=64k count=100 oflag=direct 2>/dev/null; done' >/dev/null 2>&1 &";
    run(&node, &busy, &["/bin/bash", "-c", load]).await;

    let mut counted = 0;
    for round in 0..RESTORES {
        let taken = snapshot(&node, &id).await;
        node.rollback(back(&id, &taken)).await.unwrap();
        node.delete_snapshot(&taken).await.unwrap();
        // It looks at the disk before it counts on, which takes a moment on a busy machine.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = status(&node, &id).await;
            assert_eq!(
                &status[1..],
                [0, 0, 0],
                "round {round}: disk and memory disagree"
            );
            if status[0] > counted {
                counted = status[0];
                break;
            }
            assert!(Instant::now() < deadline, "round {round}: it counts on");
        }
    }
    node.kill(&busy).await.unwrap();
    node.kill(&id).await.unwrap();
    end(machine, node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_are_machines_of_their_own_and_a_clock_is_right_after_a_sleep() {
    let (machine, node, template) = world(|_| ()).await;
    let id = create(&node, &template).await;
    // A process that lives in all of them, with a generator of the C library's and one of Python's.
    let secrets = "import uuid, os; print(os.urandom(16).hex(), uuid.uuid4(), open('/etc/machine-id').read().strip(), open('/proc/sys/kernel/random/uuid').read().strip(), os.uname().nodename)";
    let frozen = snapshot(&node, &id).await;
    let (one, other) = tokio::join!(create(&node, &frozen), create(&node, &frozen));
    // Their source is deleted under them.
    node.delete_snapshot(&frozen).await.unwrap();
    let mut seen = std::collections::HashSet::new();
    for id in [&id, &one, &other] {
        for secret in python(&node, id, secrets).await.split(' ') {
            assert!(seen.insert(secret.to_owned()), "{secret} twice");
        }
    }
    // A snapshot of a clone whose own snapshot is gone is whole.
    let again = snapshot(&node, &one).await;
    node.rollback(back(&one, &again)).await.unwrap();
    node.store().verify(&again).await.unwrap();

    let order = TakeSnapshot::new(SnapshotKind::Pause);
    let paused = node.pause(&one, order).await.unwrap().manifest.id.clone();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let order = CreateSandbox {
        last_generation: 2,
        ..back(&one, &paused)
    };
    node.create(order).await.unwrap();
    // The guest's clock is read between two readings of ours.
    let clock = "import time; print(time.time())";
    let before = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .unwrap()
        .as_secs_f64();
    let inside: f64 = python(&node, &one, clock).await.parse().unwrap();
    let after = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .unwrap()
        .as_secs_f64();
    assert!(
        before - 0.05 < inside && inside < after + 0.05,
        "{before} {inside} {after}"
    );
    end(machine, node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_the_disks_boots() {
    let (machine, node, template) = world(|_| ()).await;
    let id = create(&node, &template).await;
    python(
        &node,
        &id,
        "open('/dev/shm/gone', 'w').write('x'); open('/home/user/kept', 'w').write('still here')",
    )
    .await;
    let order = TakeSnapshot {
        memory: false,
        quiesce: Some(Duration::from_secs(5)),
        ..TakeSnapshot::new(SnapshotKind::Pause)
    };
    let taken = node.pause(&id, order).await.unwrap();
    assert!(!taken.manifest.has_memory());
    let order = CreateSandbox {
        last_generation: 1,
        ..back(&id, &taken.manifest.id)
    };
    let error = node.create(order.clone()).await.unwrap_err();
    assert!(matches!(error, Error::NoKernel { .. }), "{error}");
    let image = image().await;
    let order = CreateSandbox {
        kernel: Some(BootFiles {
            kernel: image.kernel,
            initramfs: image.initramfs,
        }),
        ..order
    };
    node.create(order).await.unwrap();
    let found = run(
        &node,
        &id,
        &[
            "/bin/sh",
            "-c",
            "cat /home/user/kept; ls /dev/shm; hostname",
        ],
    )
    .await;
    assert_eq!(found.trim(), format!("still here{id}"));
    // It has a memory of its own again.
    python(&node, &id, "open('/dev/shm/new', 'w').write('y')").await;
    let frozen = snapshot(&node, &id).await;
    node.rollback(back(&id, &frozen)).await.unwrap();
    assert_eq!(run(&node, &id, &["/bin/cat", "/dev/shm/new"]).await, "y");
    end(machine, node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_cannot_be_leaves_everything_as_it_was() {
    let (machine, node, template) = world(|config| {
        config.deadlines.answer = Duration::from_secs(3);
    })
    .await;
    let id = create(&node, &template).await;
    python(&node, &id, "open('/dev/shm/here', 'w').write('still')").await;
    let good = snapshot(&node, &id).await;
    let still = async || run(&node, &id, &["/bin/cat", "/dev/shm/here"]).await;

    // Its device state is not one, after it was found to be good.
    let broken = snapshot(&node, &id).await;
    node.store().wait_durable(&broken).await.unwrap();
    let state = node.store().snapshot(&broken).unwrap().device_state();
    let len = state.metadata().unwrap().len();
    std::fs::write(&state, vec![7; usize::try_from(len).unwrap()]).unwrap();
    let error = node.rollback(back(&id, &broken)).await.unwrap_err();
    assert!(matches!(error, Error::Vm(_)), "{error}");
    assert_eq!(still().await, "still");
    // A torn one is not even tried, once it is known.
    node.store().verify(&broken).await.unwrap_err();
    let error = node.rollback(back(&id, &broken)).await.unwrap_err();
    assert!(
        matches!(error, Error::Store(cubicle_cow::Error::Failed { .. })),
        "{error}"
    );

    // Its memory is another guest's: nobody answers, or not with the right nonce.
    let silent = snapshot(&node, &id).await;
    let memory = node.store().snapshot(&silent).unwrap().memory_image();
    let len = memory.metadata().unwrap().len();
    std::fs::remove_file(&memory).unwrap();
    std::fs::File::create(&memory)
        .unwrap()
        .set_len(len)
        .unwrap();
    std::fs::set_permissions(&memory, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let error = node.rollback(back(&id, &silent)).await.unwrap_err();
    assert!(!matches!(error, Error::NotFound { .. }), "{error}");
    assert_eq!(still().await, "still");

    let unknown = back(&id, &SnapshotId::generate());
    assert!(node.rollback(unknown).await.unwrap_err().is_not_found());
    assert_eq!(
        (still().await.as_str(), node.generation(&id)),
        ("still", Some(1))
    );
    node.rollback(back(&id, &good)).await.unwrap();
    assert_eq!(still().await, "still");
    end(machine, node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_without_a_free_slot_leaves_everything_as_it_was() {
    let mut machine = Machine::new(true);
    machine.slots = 1;
    let (machine, node, template) = world_on(machine, |_| ()).await;
    let id = create(&node, &template).await;
    python(&node, &id, "open('/dev/shm/here', 'w').write('still')").await;
    let frozen = snapshot(&node, &id).await;
    // The new VM runs beside the old one for a moment, and needs a network of its own.
    let error = node.rollback(back(&id, &frozen)).await.unwrap_err();
    assert!(
        matches!(error, Error::Network(cubicle_net::Error::Exhausted { .. })),
        "{error}"
    );
    assert_eq!(
        run(&node, &id, &["/bin/cat", "/dev/shm/here"]).await,
        "still"
    );
    assert_eq!(node.generation(&id), Some(1));
    end(machine, node).await;
}
