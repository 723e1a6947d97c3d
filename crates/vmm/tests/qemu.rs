//! Real VMs under software emulation: life, confinement, restore, adoption, and what is left.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::Duration};

use cubicle_vmm::{Boot, Disk, Error, Hypervisor as _, Limits, Vm, VmRecord, VmSpec};
use support::{
    Conversation, Dir, assert_gone, assert_nothing_left, cold, driver, freeze, template,
};

fn status(pid: i32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{field}:")));
    line.unwrap_or_else(|| panic!("no {field} in {status}"))
        .trim()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_vm_answers_freezes_and_runs_on() {
    let (driver, dir) = (driver().await, Dir::new());
    let mut spec = dir.spec(cold());
    spec.kernel_log = true;
    spec.cpus = 2;
    let vm = driver.launch(spec).await.unwrap();
    let mut guest = Conversation::with(&*vm).await;
    assert_eq!(guest.ask("ping").await, "pong");
    assert_eq!(guest.ask("cpus").await, "2");
    assert_eq!(guest.ask("set before").await, "ok");
    let devices = guest.ask("ls /sys/bus/virtio/devices").await;
    assert_eq!(devices, "virtio0 virtio1 virtio2");

    let used = vm.usage().await.unwrap();
    assert!(
        used.cpu_time_us > 100_000 && used.private_bytes > 50 << 20,
        "{used:?}"
    );
    let frozen = freeze(&*vm, &dir.path().join("frozen")).await;
    assert_eq!(
        guest.ask_within("ping", Duration::from_millis(300)).await,
        None,
        "it is paused"
    );
    // Twice, as a retry would.
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    vm.resume().await.unwrap();
    // The answer to the question asked while it was paused.
    assert_eq!(guest.answer().await.unwrap(), "pong");
    assert_eq!(guest.ask("set after").await, "ok");

    let mut restored = dir.spec(frozen.boot());
    restored.cpus = 2;
    let child = driver.launch(restored).await.unwrap();
    let mut other = Conversation::with(&*child).await;
    assert_eq!(other.ask("get").await, "before");
    let log = fs::read_to_string(VmSpec::kernel_log_path(&vm.record().run_dir)).unwrap();
    assert!(log.contains("GUEST READY"), "{log}");
    for vm in [vm, child] {
        vm.kill().await.unwrap();
        assert_gone(&vm.record());
        // Killing what is gone is no error; asking it is.
        vm.kill().await.unwrap();
        assert!(matches!(
            vm.connect_channel().await,
            Err(Error::Gone { .. })
        ));
        assert!(vm.pause().await.is_err());
        assert!(vm.usage().await.is_err());
    }
}

/// What QEMU writes before it looks at its arguments is its zygote's: relocations, and its types.
#[tokio::test(flavor = "multi_thread")]
async fn vms_share_what_qemu_writes_at_its_start() {
    let (driver, dir) = (driver().await, Dir::new());
    let snapshot = template().await;
    let vm = driver.launch(dir.spec(snapshot.boot())).await.unwrap();
    assert_eq!(Conversation::with(&*vm).await.ask("get").await, "template");
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.record().pid)).unwrap();
    let shared = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Shared_Dirty:"));
    let shared = shared.and_then(|kb| kb.trim().strip_suffix(" kB")).unwrap();
    // 7 MB here. Without the types it would be 5, without a zygote nothing.
    assert!(shared.parse::<u64>().unwrap() > 4_000, "{rollup}");
    vm.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_share_a_past_and_nothing_else() {
    let (driver, dir) = (driver().await, Dir::new());
    let snapshot = template().await;
    let image = match snapshot.boot() {
        Boot::Restore { memory, .. } => memory,
        Boot::Cold { .. } => unreachable!("a snapshot is restored"),
    };
    let before = fs::metadata(&image).unwrap();
    let launches = (0..3).map(|_| {
        let (driver, spec) = (driver.clone(), dir.spec(snapshot.boot()));
        tokio::spawn(async move { driver.launch(spec).await.unwrap() })
    });
    let mut vms: Vec<Arc<dyn Vm>> = Vec::new();
    for launch in launches.collect::<Vec<_>>() {
        vms.push(launch.await.unwrap());
    }
    let mut sums = Vec::new();
    for (number, vm) in vms.iter().enumerate() {
        let mut guest = Conversation::with(&**vm).await;
        assert_eq!(guest.ask("get").await, "template");
        sums.push(guest.ask("sum").await);
        assert_eq!(guest.ask(&format!("set clone{number}")).await, "ok");
    }
    assert!(
        sums[0].starts_with("8388608 ") && sums.iter().all(|sum| *sum == sums[0]),
        "{sums:?}"
    );
    // Handles are dropped, as by a server that stops; another one adopts the VMs.
    let records: Vec<VmRecord> = vms.iter().map(|vm| vm.record()).collect();
    let memory = vms[0].memory().unwrap();
    drop(vms);
    for (number, record) in records.iter().enumerate() {
        let text = serde_json::to_string(record).unwrap();
        let record: VmRecord = serde_json::from_str(&text).unwrap();
        let vm = driver.adopt(&record).await.unwrap().expect("it still runs");
        let mut guest = Conversation::with(&*vm).await;
        assert_eq!(guest.ask("get").await, format!("clone{number}"));
        if number == 0 {
            assert_eq!(vm.memory().unwrap(), memory);
        }
        vm.kill().await.unwrap();
        assert_gone(&record);
        assert!(driver.adopt(&record).await.unwrap().is_none());
    }
    let after = fs::metadata(&image).unwrap();
    assert_eq!(
        after.mtime_nsec(),
        before.mtime_nsec(),
        "a clone wrote to the image"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn its_process_can_reach_nothing() {
    let (driver, dir) = (driver().await, Dir::new());
    let mut spec = dir.spec(template().await.boot());
    spec.limits = Limits {
        cpu_millis: Some(1500),
        memory_mib: Some(700),
        pids: Some(77),
    };
    let (uid, limits) = (spec.uid, spec.limits);
    let vm = driver.launch(spec).await.unwrap();
    let record = vm.record();
    let pid = record.pid;

    assert_eq!(status(pid, "Uid"), [uid.to_string().as_str(); 4].join("\t"));
    assert_eq!(status(pid, "Gid"), [uid.to_string().as_str(); 4].join("\t"));
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    for kind in ["net", "ipc", "mnt"] {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(namespace(&pid.to_string()), namespace("self"), "{kind}");
    }
    let session: Vec<String> = fs::read_to_string(format!("/proc/{pid}/stat"))
        .unwrap()
        .rsplit_once(')')
        .unwrap()
        .1
        .split_ascii_whitespace()
        .map(str::to_owned)
        .collect();
    assert_eq!(
        [&session[2], &session[3]],
        [&pid.to_string(), &pid.to_string()]
    );

    // Its root, seen from outside: no data, nothing to write.
    let root = format!("/proc/{pid}/root");
    let mut seen: Vec<String> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    seen.sort();
    // A QEMU outside the distribution's directories brings its own.
    let binary = driver.features().binary.to_string_lossy().into_owned();
    for secret in [
        "root", "home", "var", "tmp", "run", "work", "sys", "boot", "srv",
    ] {
        let expected = binary.starts_with(&format!("/{secret}/"));
        assert_eq!(
            seen.contains(&secret.to_owned()),
            expected,
            "{secret} in {seen:?}"
        );
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let read_only = fields[3].split(',').any(|option| option == "ro");
        let special = fields[1].starts_with("/proc") || fields[1].starts_with("/dev/");
        assert!(read_only || special, "writable: {line}");
    }

    let enforced = cubicle_vmm::cgroup::probe().enforced;
    let read = |file: &str| {
        let path = record
            .cgroups
            .iter()
            .map(|dir| dir.join(file))
            .find(|path| path.exists());
        fs::read_to_string(path.unwrap_or_else(|| panic!("no {file} in {:?}", record.cgroups)))
    };
    let unified = record
        .cgroups
        .iter()
        .any(|dir| dir.join("memory.max").exists());
    if enforced.contains(&cubicle_vmm::cgroup::Controller::Memory) {
        let file = if unified {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        let bytes = u64::from(limits.memory_mib.unwrap()) << 20;
        assert_eq!(read(file).unwrap().trim(), bytes.to_string());
        assert_eq!(read("pids.max").unwrap().trim(), "77");
    }
    assert!(!record.cgroups.is_empty(), "this host can limit nothing");
    for cgroup in &record.cgroups {
        let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        assert_eq!(members.trim(), pid.to_string(), "{}", cgroup.display());
    }
    vm.kill().await.unwrap();
    assert_gone(&record);
}

/// What a program that took over QEMU could see and do, tried by a thread of ours that enters the
/// VM's root and becomes its user.
#[tokio::test(flavor = "multi_thread")]
async fn its_user_sees_itself_and_writes_nothing() {
    let (driver, dir) = (driver().await, Dir::new());
    let vm = driver
        .launch(dir.spec(template().await.boot()))
        .await
        .unwrap();
    let record = vm.record();
    let (pid, uid) = (record.pid, record.uid);
    let intruder = std::thread::spawn(move || {
        let root = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
        // SAFETY: the flag leaves the descriptor table shared; the other calls take numbers only.
        unsafe {
            rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS).unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&root);
            assert_eq!(libc::setns(fd, libc::CLONE_NEWNS), 0);
            // The C library's functions would change the user of every thread.
            assert_eq!(libc::syscall(libc::SYS_setgroups, 0, 0), 0);
            assert_eq!(libc::syscall(libc::SYS_setresgid, uid, uid, uid), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
        }
        let numbers = |entry: std::io::Result<fs::DirEntry>| {
            entry.ok()?.file_name().to_str()?.parse::<i32>().ok()
        };
        let seen: Vec<i32> = fs::read_dir("/proc").unwrap().filter_map(numbers).collect();
        let places = [
            "/x",
            "/dev/x",
            "/etc/x",
            "/usr/lib/x",
            "/proc/x",
            "/tmp/x",
            "/dev/shm/x",
        ];
        let written: Vec<&str> = places
            .into_iter()
            .filter(|place| fs::write(place, "x").is_ok())
            .collect();
        let reached: Vec<&str> = [
            "/etc/shadow",
            "/etc/passwd",
            "/root",
            "/proc/1/environ",
            "/sys",
        ]
        .into_iter()
        .filter(|place| fs::metadata(place).is_ok())
        .collect();
        (seen, written, reached)
    });
    let (seen, written, reached) = intruder.join().unwrap();
    // The intruder always sees the process that it is a thread of.
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(
        seen.iter().all(|seen| [pid, own].contains(seen)),
        "{seen:?} besides {pid}"
    );
    assert_eq!((written, reached), (vec![], vec![]));
    vm.kill().await.unwrap();
    assert_gone(&record);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_guest_is_noticed() {
    let (driver, dir) = (driver().await, Dir::new());
    for order in ["poweroff", "restart"] {
        let vm = driver
            .launch(dir.spec(template().await.boot()))
            .await
            .unwrap();
        let mut guest = Conversation::with(&*vm).await;
        assert_eq!(guest.ask_within(order, Duration::from_secs(10)).await, None);
        tokio::time::timeout(Duration::from_secs(10), vm.exited())
            .await
            .expect(order);
        let stat = fs::read_to_string(format!("/proc/{}/stat", vm.record().pid));
        assert!(stat.is_err(), "a zombie is left: {stat:?}");
        assert!(matches!(vm.memory(), Err(Error::Gone { .. })));
        vm.kill().await.unwrap();
        assert_gone(&vm.record());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_vm_waits_until_it_is_resumed() {
    let (driver, dir) = (driver().await, Dir::new());
    let mut spec = dir.spec(template().await.boot());
    spec.start = false;
    let vm = driver.launch(spec).await.unwrap();
    let mut guest = Conversation::with(&*vm).await;
    assert_eq!(
        guest.ask_within("get", Duration::from_millis(300)).await,
        None
    );
    vm.resume().await.unwrap();
    // The answer to the question asked while it waited.
    assert_eq!(guest.answer().await.unwrap(), "template");
    // One connection at a time: the next is served when this one is closed.
    drop(guest);
    let mut guest = Conversation::with(&*vm).await;
    assert_eq!(guest.ask("get").await, "template");
    // Nor does a second VM move in where one lives.
    let mut second = dir.spec(template().await.boot());
    second.run_dir = vm.record().run_dir;
    let error = driver.launch(second).await.err().unwrap();
    assert!(error.to_string().contains("another VM runs in"), "{error}");
    assert_eq!(guest.ask("ping").await, "pong");
    vm.kill().await.unwrap();
    assert_gone(&vm.record());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_that_fails_says_why_and_leaves_nothing() {
    let (driver, dir) = (driver().await, Dir::new());
    let Boot::Restore {
        memory,
        device_state,
    } = template().await.boot()
    else {
        unreachable!("a snapshot is restored")
    };
    let (garbage, secret) = (dir.path().join("garbage"), dir.path().join("secret"));
    fs::write(&garbage, vec![0x5a; 9000]).unwrap();
    fs::copy(&memory, &secret).unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let missing = dir.path().join("missing");
    let cases = [
        (
            memory.clone(),
            garbage.clone(),
            "ended while it should come up",
        ),
        (memory.clone(), missing.clone(), "No such file"),
        (garbage, device_state.clone(), "holds 9000 bytes"),
        (secret, device_state.clone(), "mode 0600"),
    ];
    for (memory, device_state, words) in cases {
        if words == "mode 0600" && !driver.features().read_only_images() {
            // Such a QEMU must be able to write to its image, and is made so.
            continue;
        }
        let spec = dir.spec(Boot::Restore {
            memory,
            device_state,
        });
        let (run_dir, id, uid) = (spec.run_dir.clone(), spec.id.clone(), spec.uid);
        let error = driver.launch(spec).await.err().expect(words);
        assert!(error.to_string().contains(words), "{error}");
        assert_nothing_left(&run_dir, id.as_str(), uid);
    }
    // A shape that is not the snapshot's.
    let boot = Boot::Restore {
        memory,
        device_state,
    };
    let mut spec = dir.spec(boot);
    spec.disks.push(Disk {
        path: dir.path().join("none"),
        read_only: true,
    });
    let (run_dir, id, uid) = (spec.run_dir.clone(), spec.id.clone(), spec.uid);
    assert!(matches!(driver.launch(spec).await, Err(Error::Io { .. })));
    assert_nothing_left(&run_dir, id.as_str(), uid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_that_is_cancelled_leaves_nothing() {
    let (driver, dir) = (driver().await, Dir::new());
    let snapshot = template().await;
    for delay in [0, 1, 3, 6, 12, 20] {
        let spec = dir.spec(snapshot.boot());
        let (run_dir, id, uid) = (spec.run_dir.clone(), spec.id.clone(), spec.uid);
        let launch = driver.launch(spec);
        let outcome = tokio::time::timeout(Duration::from_millis(delay), launch).await;
        if let Ok(vm) = outcome {
            vm.unwrap().kill().await.unwrap();
        }
        // Removal goes on in the background.
        let left = |run_dir: &Path| run_dir.exists();
        for _ in 0..200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if !left(&run_dir) {
                break;
            }
        }
        assert_nothing_left(&run_dir, id.as_str(), uid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_come_in_order_and_are_drained_by_a_pause() {
    let (driver, dir) = (driver().await, Dir::new());
    let image = |name: &str| {
        let path = dir.path().join(name);
        let mut content = vec![0; 1 << 20];
        content[..name.len()].copy_from_slice(name.as_bytes());
        fs::write(&path, content).unwrap();
        path
    };
    let mut spec = dir.spec(cold());
    spec.disks = vec![
        Disk {
            path: image("first"),
            read_only: false,
        },
        Disk {
            path: image("second"),
            read_only: true,
        },
    ];
    let vm = driver.launch(spec).await.unwrap();
    let mut guest = Conversation::with(&*vm).await;
    assert_eq!(guest.ask("read-disk /dev/vda 16").await, "first");
    assert_eq!(guest.ask("read-disk /dev/vdb 16").await, "second");
    let refused = guest.ask("write-disk /dev/vdb x").await;
    assert!(
        refused.contains("error") || refused.contains("permitted"),
        "{refused}"
    );
    assert_eq!(guest.ask("write-disk /dev/vda rewritten").await, "ok");
    vm.pause().await.unwrap();
    let head = fs::read(dir.path().join("first")).unwrap();
    assert!(head.starts_with(b"rewritten\0"));
    vm.kill().await.unwrap();
    assert_gone(&vm.record());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_floods_its_console_fills_no_disk() {
    let (driver, dir) = (driver().await, Dir::new());
    let mut spec = dir.spec(template().await.boot());
    spec.kernel_log = true;
    let log = VmSpec::kernel_log_path(&spec.run_dir);
    let vm = driver.launch(spec).await.unwrap();
    let mut guest = Conversation::with(&*vm).await;
    let line = "x".repeat(1000);
    assert_eq!(guest.ask(&format!("print {line} 1500")).await, "ok");
    let len = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
    let (now, old) = (len(&log), len(&log.with_extension("log.old")));
    assert!(
        old > 256 << 10 && old <= 512 << 10 && now <= 512 << 10,
        "{now} {old}"
    );
    vm.kill().await.unwrap();
    assert_gone(&vm.record());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_lives_in_its_network_namespace_and_so_does_its_clone() {
    let (driver, dir) = (driver().await, Dir::new());
    let inode = |netns: &std::os::fd::OwnedFd| {
        fs::File::from(netns.try_clone().unwrap())
            .metadata()
            .unwrap()
            .ino()
    };
    let mut boot = cold();
    for round in 0..2 {
        let (netns, tap) = support::network();
        let namespace = inode(&netns);
        let mut spec = dir.spec(boot);
        (spec.netns, spec.tap) = (Some(netns), Some(tap));
        let vm = driver.launch(spec).await.unwrap();
        let record = vm.record();
        let of_process = fs::metadata(format!("/proc/{}/ns/net", record.pid))
            .unwrap()
            .ino();
        assert_eq!(of_process, namespace);
        let mut guest = Conversation::with(&*vm).await;
        assert_eq!(
            guest.ask("ls /sys/class/net").await,
            "eth0 lo",
            "round {round}"
        );
        let address = guest.ask("cat /sys/class/net/eth0/address").await;
        assert_eq!(address.trim_end_matches('|'), cubicle_vmm::qemu::GUEST_MAC);
        boot = freeze(&*vm, &dir.path().join(format!("frozen{round}")))
            .await
            .boot();
        vm.kill().await.unwrap();
        assert_gone(&record);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_vms_leave_no_descriptor_behind() {
    let (driver, dir) = (driver().await, Dir::new());
    let boot = template().await.boot();
    // Descriptors that lead into the test's own directory or to a process: other tests run at the
    // same time, in the same process.
    let ours = |records: &[VmRecord]| {
        let own_inodes: Vec<String> = records.iter().map(|record| record.id.to_string()).collect();
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links = links.filter_map(|entry| fs::read_link(entry.path()).ok());
        let links = links.map(|link| link.to_string_lossy().into_owned());
        let own = |link: &String| own_inodes.iter().any(|id| link.contains(id));
        let in_dir = |link: &String| link.contains(&*dir.path().to_string_lossy());
        let mut found: Vec<String> = links.filter(|link| own(link) || in_dir(link)).collect();
        for entry in fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
            let info = fs::read_to_string(entry.path()).unwrap_or_default();
            let pids = records
                .iter()
                .map(|record| format!("Pid:\t{}\n", record.pid));
            found.extend(pids.filter(|pid| info.contains(pid.as_str())));
        }
        found
    };
    let mut records = Vec::new();
    for _ in 0..2 {
        let launches = (0..6).map(|_| {
            let (driver, mut spec) = (driver.clone(), dir.spec(boot.clone()));
            spec.kernel_log = true;
            tokio::spawn(async move { driver.launch(spec).await.unwrap() })
        });
        let mut vms: Vec<Arc<dyn Vm>> = Vec::new();
        for launch in launches.collect::<Vec<_>>() {
            vms.push(launch.await.unwrap());
        }
        records.extend(vms.iter().map(|vm| vm.record()));
        assert!(
            !ours(&records).is_empty(),
            "the search finds nothing at all"
        );
        let kills = vms.iter().map(|vm| {
            let vm = Arc::clone(vm);
            tokio::spawn(async move { vm.kill().await.unwrap() })
        });
        for kill in kills.collect::<Vec<_>>() {
            kill.await.unwrap();
        }
    }
    for _ in 0..100 {
        if ours(&records).is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(ours(&records), [] as [String; 0]);
    records.iter().for_each(assert_gone);
}

/// Not a test of its own: what `a_vm_survives_its_server` runs as a server, to be killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by another test"]
async fn a_server_that_will_be_killed() {
    let run_dir = std::env::var("RUN_DIR").expect("a directory from the test that starts this");
    let driver = driver().await;
    let mut spec = Dir::new().spec(template().await.boot());
    spec.run_dir = run_dir.into();
    spec.kernel_log = true;
    let vm = driver.launch(spec).await.unwrap();
    let mut guest = Conversation::with(&*vm).await;
    assert_eq!(guest.ask("set survivor").await, "ok");
    let record = vm.record();
    let path = record.run_dir.with_extension("record");
    fs::write(&path, serde_json::to_string(&record).unwrap()).unwrap();
    // Killed with its connections open, a command in flight.
    loop {
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_survives_its_server() {
    let (driver, dir) = (driver().await, Dir::new());
    let run_dir = dir.path().join("vm");
    let mut server = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_server_that_will_be_killed", "--ignored"])
        .env("RUN_DIR", &run_dir)
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let path = run_dir.with_extension("record");
    let text = loop {
        match fs::read_to_string(&path) {
            Ok(text) if text.ends_with('}') => break text,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
        assert_eq!(server.try_wait().unwrap(), None, "the server failed");
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.kill().await.unwrap();

    let record: VmRecord = serde_json::from_str(&text).unwrap();
    let vm = driver
        .adopt(&record)
        .await
        .unwrap()
        .expect("it outlives its server");
    // The server may have died between a pause and the resume.
    vm.resume().await.unwrap();
    let mut guest = Conversation::with(&*vm).await;
    assert_eq!(guest.ask("get").await, "survivor");
    assert_eq!(guest.ask("print adopted").await, "ok");
    let frozen = freeze(&*vm, &dir.path().join("frozen")).await;
    let child = driver.launch(dir.spec(frozen.boot())).await.unwrap();
    assert_eq!(
        Conversation::with(&*child).await.ask("get").await,
        "survivor"
    );
    child.kill().await.unwrap();
    let log = fs::read_to_string(VmSpec::kernel_log_path(&record.run_dir)).unwrap();
    assert!(log.contains("adopted"), "{log}");
    let watched = Arc::clone(&vm);
    let exited = tokio::spawn(async move { watched.exited().await });
    vm.kill().await.unwrap();
    exited.await.unwrap();
    assert_gone(&record);

    // After a restart of the host, the same pid and start time mean nothing.
    let mut stale = record;
    stale.pid = i32::try_from(std::process::id()).unwrap();
    stale.boot_id = "another".to_owned();
    assert!(driver.adopt(&stale).await.unwrap().is_none());
}
