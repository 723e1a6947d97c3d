//! Recipes with a setup, from the registries that this machine uses.
//!
//! What `node` makes stays in the same cache as in `real.rs`.

#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::{fs, path::Path, process::Command};

use cubicle_image::{Error, Progress, Recipe, Setup, build_rootfs};

fn cache() -> std::path::PathBuf {
    let directory = std::env::var_os("CUBICLE_TEST_IMAGES").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("cubicle-test-images"),
        Into::into,
    );
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("debugfs")
        .args(["-R", request])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The least that a setup can run in.
fn small(setup: Vec<Setup>) -> Recipe {
    Recipe {
        name: "small".into(),
        packages: vec!["sudo".into()],
        setup,
        ..Recipe::base()
    }
}

fn run(words: &[&str]) -> Setup {
    Setup::Run(words.iter().map(|&word| word.to_owned()).collect())
}

#[tokio::test]
async fn node_holds_what_it_promises_and_nothing_of_the_host() {
    let recipe = Recipe::by_name("node").unwrap();
    let built = build_rootfs(&recipe, &cache(), &Progress::silent())
        .await
        .unwrap();
    assert!(built.used_bytes < 600 << 20, "{} bytes", built.used_bytes);
    let node = debugfs(&built.image, "stat /usr/local/bin/node");
    assert!(node.contains("Mode:  0755"), "{node}");
    let npm = debugfs(&built.image, "stat /usr/local/bin/npm");
    assert!(npm.contains("npm-cli.js"), "{npm}");
    // What was lent to the build is gone, and so is what only the build needed.
    for empty in ["/run", "/tmp", "/dev/shm", "/root/.cache", "/root/.npm"] {
        let listing = debugfs(&built.image, &format!("ls -l {empty}"));
        let entries: Vec<_> = listing
            .lines()
            .filter_map(|line| line.split_whitespace().last())
            .filter(|name| ![".", "..", "lock"].contains(name))
            .collect();
        assert!(entries.is_empty(), "{empty}: {entries:?}");
    }
    assert_eq!(debugfs(&built.image, "cat /etc/resolv.conf"), "");
    let hosts = debugfs(&built.image, "cat /etc/hosts");
    assert!(
        hosts.starts_with("127.0.0.1\tlocalhost sandbox\n"),
        "{hosts}"
    );
}

/// A program of the tree is root there, and can do nothing to the host all the same.
#[tokio::test]
async fn a_setup_is_confined_and_its_failure_is_quoted() {
    let directory = tempfile::tempdir().unwrap();
    let canary = directory.path().join("canary");
    fs::write(&canary, "").unwrap();
    let canary = canary.to_str().unwrap();
    // Each of these must fail; `!` of a shell turns that into success.
    let refused = [
        "mknod /root/disk b 254 0",
        "mount -t tmpfs none /mnt",
        "chroot / true",
        "echo x >/proc/sys/kernel/core_pattern",
        "echo b >/proc/sysrq-trigger",
        &format!("test -e /proc/1/root{canary}"),
        &format!("test -e {canary}"),
        // Cargo gives its tests such variables.
        "env | grep -q CARGO_",
        "test -e /sys/kernel",
    ];
    let mut setup: Vec<_> = refused
        .iter()
        .map(|attempt| run(&["sh", "-c", &format!("! {{ {attempt}; }} 2>/dev/null")]))
        .collect();
    setup.push(run(&[
        "sh",
        "-c",
        "touch /root/mine && chown 1000 /root/mine",
    ]));
    setup.push(Setup::RunAsUser(vec![
        "sh".into(),
        "-c".into(),
        "test $(id -un) = user && touch $HOME/note && ! sudo -n true 2>/dev/null".into(),
    ]));
    setup.push(Setup::File {
        path: "/opt/new/program".into(),
        content: "#!/bin/sh\nexit 3\n".into(),
        executable: true,
    });
    setup.push(run(&[
        "sh",
        "-c",
        "echo what happened >&2; exec /opt/new/program",
    ]));
    let error = build_rootfs(&small(setup), directory.path(), &Progress::silent())
        .await
        .unwrap_err();
    let message = error.to_string();
    assert!(message.contains("exit status: 3"), "{message}");
    assert!(message.contains("what happened"), "{message}");
    let Error::Program { log: Some(log), .. } = error else {
        panic!("{error:?}")
    };
    assert!(fs::read_to_string(log).unwrap().contains("what happened"));
    let here = directory.path().to_str().unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(here), "{mounts}");
    let left: Vec<_> = fs::read_dir(directory.path().join("rootfs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".log"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_cancelled_setup_leaves_nothing_running_mounted_or_half_written() {
    let directory = tempfile::tempdir().unwrap();
    let (progress, mut events) = Progress::channel();
    let recipe = small(vec![run(&["sh", "-c", "sleep 86399 & sleep 86399"])]);
    let place = directory.path().to_owned();
    let build = tokio::spawn(async move { build_rootfs(&recipe, &place, &progress).await });
    while !events.recv().await.unwrap().message.starts_with("running ") {}
    // Until it runs.
    while sleepers() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    build.abort();
    assert!(build.await.unwrap_err().is_cancelled());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while sleepers() > 0 {
        assert!(std::time::Instant::now() < deadline, "it still runs");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let here = directory.path().to_str().unwrap();
    assert!(
        !fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(here)
    );
    let rootfs = fs::read_dir(directory.path().join("rootfs")).unwrap();
    let left = rootfs
        .flatten()
        .filter(|e| e.path().extension().is_none_or(|x| x != "log"));
    assert_eq!(left.count(), 0);
}

fn sleepers() -> usize {
    let sleeps = |pid: &fs::DirEntry| {
        fs::read(pid.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x0086399\0")
    };
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(sleeps)
        .count()
}
