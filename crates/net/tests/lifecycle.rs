//! How slots come and go: the pool's books, what survives a killed process, and that nothing is
//! left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::fd::AsRawFd as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cubicle_net::{Counts, EgressPolicy, Error, PoolConfig, SlotIndex, SlotPool, probe};
use support::*;

#[test]
fn this_host_can_have_slots() {
    let report = probe();
    assert!(report.is_usable(), "{report:#?}");
    assert!(report.capabilities.len() > 10);
}

#[test]
fn the_pool_keeps_slots_ready_and_counts_them() {
    in_world(async |world| {
        let config = PoolConfig {
            size_min: 2,
            size_max: 4,
            ..world.config()
        };
        let (pool, report) = SlotPool::open(config).await.unwrap();
        assert!(report.removed.is_empty() && report.adoptable.is_empty());
        until(&pool, |counts| counts.ready == 2 && counts.pending == 0).await;

        let mut slots = Vec::new();
        for _ in 0..4 {
            slots.push(pool.acquire().await.unwrap());
        }
        let indices: BTreeSet<SlotIndex> = slots.iter().map(cubicle_net::Slot::index).collect();
        assert_eq!(indices, (0..4).map(SlotIndex).collect());
        let full = Counts {
            leased: 4,
            max: 4,
            ..Counts::default()
        };
        assert_eq!(pool.counts(), full);

        let error = pool.acquire().await.unwrap_err();
        assert!(matches!(error, Error::Exhausted { max: 4 }), "{error}");

        // Whoever waits gets the one that comes back; one more would wait in vain.
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.acquire().await }
        });
        let slot = slots.pop().unwrap();
        let (released, index) = (slot.index(), slot.index());
        let releasing = tokio::spawn({
            let pool = pool.clone();
            async move { pool.release(slot).await }
        });
        releasing.await.unwrap().unwrap();
        let next = match waiting.await.unwrap() {
            Ok(slot) => slot,
            // It asked before the release had begun.
            Err(Error::Exhausted { .. }) => pool.acquire().await.unwrap(),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(next.index(), released);
        drop((next, slots));
        until(&pool, |counts| counts.leased == 0 && counts.pending == 0).await;
        assert!(pool.counts().ready >= 2);
        assert_eq!(index, released);
        pool.close().await.unwrap();
    });
}

#[test]
fn many_waiters_are_served_and_those_that_leave_cost_nothing() {
    in_world(async |world| {
        let config = PoolConfig {
            size_min: 1,
            size_max: 12,
            ..world.config()
        };
        let (pool, _) = SlotPool::open(config).await.unwrap();
        let mut waiting = Vec::new();
        for _ in 0..12 {
            let pool = pool.clone();
            waiting.push(tokio::spawn(async move { pool.acquire().await }));
        }
        tokio::task::yield_now().await;
        for impatient in &waiting[8..] {
            impatient.abort();
        }
        let mut slots = Vec::new();
        for patient in waiting {
            match patient.await {
                Ok(slot) => slots.push(slot.unwrap()),
                Err(aborted) => assert!(aborted.is_cancelled()),
            }
        }
        assert!(slots.len() >= 8);
        let indices: BTreeSet<SlotIndex> = slots.iter().map(cubicle_net::Slot::index).collect();
        assert_eq!(indices.len(), slots.len());
        drop(slots);
        until(&pool, |counts| {
            counts.leased + counts.pending == 0 && counts.ready >= 1
        })
        .await;
        // No more are kept than make sense.
        assert!(pool.counts().ready <= 2, "{:?}", pool.counts());
        pool.close().await.unwrap();
    });
}

#[test]
fn a_pool_that_rests_has_as_many_slots_as_it_is_to_keep() {
    in_world(async |world| {
        let config = PoolConfig {
            size_min: 2,
            size_max: 8,
            linger: Duration::from_secs(4),
            ..world.config()
        };
        let (pool, _) = SlotPool::open(config).await.unwrap();
        let mut slots = Vec::new();
        for _ in 0..6 {
            slots.push(pool.acquire().await.unwrap());
        }
        for slot in slots {
            pool.release(slot).await.unwrap();
        }
        // As many as this may be wanted again at once, and are there.
        until(&pool, |counts| counts.ready == 4 && counts.pending == 0).await;
        until(&pool, |counts| counts.ready == 2 && counts.pending == 0).await;
        let left = ip("-oneline link show type veth").lines().count();
        assert_eq!(left, 3, "two slots and the way to the internet");
        pool.close().await.unwrap();
    });
}

#[test]
fn nobody_waits_for_another_slots_removal() {
    in_world(async |world| {
        // A pool that keeps none removes each slot that comes back.
        let config = PoolConfig {
            size_min: 0,
            size_max: 8,
            ..world.config()
        };
        let (pool, _) = SlotPool::open(config).await.unwrap();
        let first = pool.acquire().await.unwrap();
        let index = first.index();
        pool.release(first).await.unwrap();
        // Its removal goes on, and its number is not free before that has ended.
        assert_eq!(pool.counts().pending, 1);
        let second = pool.acquire().await.unwrap();
        assert_ne!(second.index(), index, "the removal was waited for");
        pool.release(second).await.unwrap();
        pool.close().await.unwrap();
    });
}

#[test]
fn a_slot_of_another_pool_is_refused() {
    in_world(async |world| {
        let other_dir = tempfile::tempdir().unwrap();
        let other = PoolConfig {
            name: "other".parse().unwrap(),
            run_dir: other_dir.path().to_owned(),
            subnet: "10.234.0.0/24".parse().unwrap(),
            ..world.config()
        };
        let (pool, _) = SlotPool::open(world.config()).await.unwrap();
        let (other, _) = SlotPool::open(other).await.unwrap();
        let slot = other.acquire().await.unwrap();
        let error = pool.release(slot).await.unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        pool.close().await.unwrap();
        other.close().await.unwrap();
    });
}

#[test]
fn two_processes_cannot_have_the_same_pool() {
    in_world(async |world| {
        let (pool, _) = SlotPool::open(world.config()).await.unwrap();
        let error = SlotPool::open(world.config()).await.unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");

        // Nor can two with directories of their own have the same names.
        let elsewhere = tempfile::tempdir().unwrap();
        let config = PoolConfig {
            run_dir: elsewhere.path().to_owned(),
            ..world.config()
        };
        let error = SlotPool::open(config).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::NameTaken { .. }), "{text}");
        assert!(text.contains(world.dir.path().to_str().unwrap()), "{text}");
        let slot = pool.acquire().await.unwrap();
        pool.release(slot).await.unwrap();
        pool.close().await.unwrap();
    });
}

#[test]
fn a_subnet_that_is_in_use_is_refused() {
    in_world(async |world| {
        let open = |config| async { SlotPool::open(config).await.map(drop) };
        ip("addr add 10.233.7.1/24 dev wan");
        let error = open(world.config()).await.unwrap_err();
        assert!(matches!(error, Error::SubnetTaken { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("10.233.7.0/24 is reached through wan"),
            "{error}"
        );
        ip("addr del 10.233.7.1/24 dev wan");
        // A way to a larger network that contains the subnet does not matter.
        ip("route add 10.0.0.0/8 via 203.0.113.10");
        open(world.config()).await.unwrap();
    });
}

#[test]
fn a_host_without_what_slots_need_says_so_at_once() {
    in_world(async |world| {
        fs::write(world.dir.path().join("netns"), "in the way").unwrap();
        let error = SlotPool::open(world.config()).await.unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot create the directory "),
            "{error}"
        );
    });
}

#[test]
fn releasing_a_slot_whose_vm_still_runs_is_an_error_and_harms_no_other_slot() {
    in_world(async |world| {
        world
            .internet
            .run(|| serve(std::net::Ipv4Addr::UNSPECIFIED, 80));
        let (pool, slot, guest) = world.guest(world.config()).await;
        let index = slot.index();
        let error = pool.release(slot).await.unwrap_err();
        assert!(
            matches!(error, Error::TapAttached { index: i } if i == index),
            "{error}"
        );
        assert!(guest.reaches(SERVER, 80).is_err());
        assert!(!world.dir.path().join(format!("netns/{index}")).exists());
        // A VM still runs with the user id that goes with the number: nobody else gets it.
        assert_eq!(pool.counts().broken, 1);

        let mut next = pool.acquire().await.unwrap();
        assert_ne!(next.index(), index);
        Guest::attach(&mut next).reaches(SERVER, 80).unwrap();
        drop(guest);
        pool.close().await.unwrap();
    });
}

#[test]
fn a_slot_that_lost_its_interface_is_replaced() {
    in_world(async |world| {
        let (pool, _) = SlotPool::open(world.config()).await.unwrap();
        let slot = pool.acquire().await.unwrap();
        ip(&format!("link delete {}", slot.host_interface()));
        let error = pool.release(slot).await.unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        until(&pool, |counts| counts.ready == 2 && counts.pending == 0).await;
        assert_eq!(pool.counts().broken, 0);
        pool.close().await.unwrap();
    });
}

/// A process that has a pool and gets killed, and what stands for the VM of its slot.
struct Victim {
    process: Child,
    leased: SlotIndex,
    vm: u32,
}

impl Victim {
    /// Kills the process, as `kill -9` does.
    fn die(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if fs::read_link(format!("/proc/{}/fd/0", self.vm))
            .is_ok_and(|stdin| stdin == Path::new("/dev/net/tun"))
        {
            kill(self.vm);
        }
    }
}

const DIR: &str = "CUBICLE_NET_TEST_DIR";

fn victim(dir: &Path) -> Victim {
    let program = std::env::current_exe().unwrap();
    let mut process = Command::new(program)
        .args([
            "--exact",
            "the_process_that_gets_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(process.stdout.take().unwrap());
    let line = std::io::BufRead::lines(output)
        .map(Result::unwrap)
        .find_map(|line| Some(line.split_once("ready ")?.1.to_owned()))
        .expect("the victim has its slots");
    let mut words = line.split(' ');
    let leased = SlotIndex(words.next().unwrap().parse().unwrap());
    Victim {
        process,
        leased,
        vm: words.next().unwrap().parse().unwrap(),
    }
}

#[test]
#[ignore = "runs as a process of its own, started by another test"]
fn the_process_that_gets_killed() {
    let dir = std::env::var_os(DIR).expect("only another test starts this one");
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async {
            let config = PoolConfig {
                run_dir: dir.into(),
                size_min: 2,
                size_max: 8,
                ..PoolConfig::default()
            };
            let (pool, _) = SlotPool::open(config).await.unwrap();
            let mut slot = pool.acquire().await.unwrap();
            let _unused = pool.acquire().await.unwrap();
            slot.set_policy(&EgressPolicy::deny_all()).await.unwrap();
            until(&pool, |counts| counts.ready == 2).await;
            // Whoever holds the tap is the VM.
            #[allow(clippy::zombie_processes, reason = "it is to outlive this process")]
            let vm = Command::new("sleep")
                .arg("600")
                .stdin(Stdio::from(slot.take_tap().unwrap()))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            println!("ready {} {}", slot.index(), vm.id());
            std::future::pending::<()>().await;
        });
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Waits until a process that is not our child is gone.
fn gone(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let alive =
        || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    while alive() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_killed_process_loses_nothing_that_a_vm_uses_and_leaves_nothing_else() {
    in_world(async |world| {
        world
            .internet
            .run(|| serve(std::net::Ipv4Addr::UNSPECIFIED, 80));
        let before = Inventory::take(world.dir.path());
        let mut victim = victim(world.dir.path());
        victim.die();
        assert_eq!(Inventory::take(world.dir.path()).mounts, 4);

        let (pool, report) = SlotPool::open(world.config()).await.unwrap();
        assert_eq!(report.adoptable, [victim.leased]);
        assert_eq!(report.removed.len(), 3);
        assert_eq!(pool.counts().adoptable, 1);

        let absent = pool.adopt(SlotIndex(77)).await.unwrap_err();
        assert!(matches!(absent, Error::NotAdoptable { .. }), "{absent}");
        let mut slot = pool.adopt(victim.leased).await.unwrap();
        assert!(pool.adopt(victim.leased).await.is_err());
        assert!(slot.take_tap().is_none());
        assert_eq!(pool.counts().leased, 1);
        // Its number is not given to another slot.
        let other = pool.acquire().await.unwrap();
        assert_ne!(other.index(), victim.leased);
        drop(other);

        // Its rules are those that it had, and can be changed.
        let inside = Space::of(slot.netns_fd().unwrap());
        let denies = || sh("nft", "list set inet slot deny").contains("elements");
        assert!(inside.run(denies));
        slot.set_policy(&EgressPolicy::allow_all()).await.unwrap();
        assert!(!inside.run(denies));

        // A graceful end leaves it in place as well.
        let left = pool.close().await.unwrap().left;
        assert_eq!(left, [victim.leased]);
        drop(slot);
        assert!(sh("nft", "list tables").contains("inet cubicle"));
        let (pool, report) = SlotPool::open(world.config()).await.unwrap();
        assert_eq!(report.adoptable, [victim.leased]);

        let slot = pool.adopt(victim.leased).await.unwrap();
        kill(victim.vm);
        gone(victim.vm);
        pool.release(slot).await.unwrap();
        let mut fresh = pool.acquire().await.unwrap();
        while fresh.index() != victim.leased {
            fresh = pool.acquire().await.unwrap();
        }
        let guest = Guest::attach(&mut fresh);
        guest.reaches(SERVER, 80).unwrap();
        drop((guest, inside));
        pool.release(fresh).await.unwrap();
        pool.close().await.unwrap();
        let after = Inventory::take(world.dir.path());
        assert_eq!((after.links, after.tables), (before.links, before.tables));
        assert_eq!((after.mounts, after.files), (before.mounts, before.files));
    });
}

#[test]
fn what_nobody_adopts_is_swept_and_a_dead_vms_slot_is_not_adoptable() {
    in_world(async |world| {
        let mut first = victim(world.dir.path());
        first.die();
        let (pool, report) = SlotPool::open(world.config()).await.unwrap();
        assert_eq!(report.adoptable, [first.leased]);
        kill(first.vm);
        gone(first.vm);
        let error = pool.adopt(first.leased).await.unwrap_err();
        assert!(matches!(error, Error::NotAdoptable { .. }), "{error}");
        assert_eq!(pool.sweep().await.unwrap().removed, [first.leased]);
        assert_eq!(pool.counts().adoptable, 0);
        assert!(pool.close().await.unwrap().left.is_empty());
        assert_eq!(Inventory::take(world.dir.path()).mounts, 0);
    });
}

#[test]
fn leftovers_of_an_interrupted_start_are_removed() {
    in_world(async |world| {
        let netns = world.dir.path().join("netns");
        fs::create_dir(&netns).unwrap();
        // A file without a namespace, a link without a slot, a table of old, and things that
        // are not ours.
        fs::write(netns.join("3"), "").unwrap();
        fs::write(netns.join("notes.txt"), "keep me").unwrap();
        ip("link add cubicle-5 type veth peer name cubicle-x");
        sh("nft", "add table inet cubicle");
        sh("nft", "add chain inet cubicle old");
        sh("nft", "add table inet mine");

        let (pool, report) = SlotPool::open(world.config()).await.unwrap();
        assert_eq!(report.removed, [SlotIndex(3), SlotIndex(5)]);
        let rules = sh("nft", "list ruleset");
        assert!(!rules.contains("chain old") && rules.contains("table inet mine"));
        pool.close().await.unwrap();
        assert_eq!(
            fs::read_to_string(netns.join("notes.txt")).unwrap(),
            "keep me"
        );
        assert!(!ip("-o link").contains("cubicle-"));
    });
}

#[test]
fn qemu_takes_the_tap_as_a_user_without_rights() {
    in_world(async |world| {
        let (pool, _) = SlotPool::open(world.config()).await.unwrap();
        let mut slot = pool.acquire().await.unwrap();
        let tap = slot.take_tap().unwrap();
        rustix::io::fcntl_setfd(&tap, rustix::io::FdFlags::empty()).unwrap();
        let uid = 200_000 + slot.index().0;
        let inside = Space::of(slot.netns_fd().unwrap());
        let said = inside.run(move || {
            use std::{io::Write as _, os::unix::process::CommandExt as _};
            let mut qemu = Command::new("qemu-system-x86_64")
                .args([
                    "-M",
                    "microvm",
                    "-accel",
                    "tcg",
                    "-m",
                    "16",
                    "-nodefaults",
                    "-S",
                ])
                .args(["-display", "none", "-monitor", "stdio"])
                .arg("-netdev")
                .arg(format!("tap,id=net,fd={}", tap.as_raw_fd()))
                .args([
                    "-device",
                    "virtio-net-device,netdev=net,mac=02:cb:1c:1e:00:21",
                ])
                .uid(uid)
                .gid(uid)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            drop(tap);
            let commands =
                b"info network\nqom-get /machine/peripheral-anon/device[0] host_tso4\nquit\n";
            qemu.stdin.take().unwrap().write_all(commands).unwrap();
            let output = qemu.wait_with_output().unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (
                output.status.success(),
                text(&output.stdout),
                text(&output.stderr),
            )
        });
        assert!(said.0, "{said:?}");
        assert!(said.1.contains("type=tap,fd="), "{said:?}");
        // Offloads need the virtio header in front of each frame.
        assert!(said.1.contains("true"), "{said:?}");
        // The tap went with the VM.
        pool.release(slot).await.unwrap();
        pool.close().await.unwrap();
    });
}
