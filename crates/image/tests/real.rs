//! Real kernel packages and a real bootstrap, from the package mirror of this machine.
//!
//! What they make stays in a cache, so that they cost time only once:
//! `CUBICLE_TEST_IMAGES`, or else `target/cubicle-test-images`.

#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::{
    fs, iter,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use cubicle_image::{
    Error, Event, GuestBinary, Kernel, KernelSource, Progress, Recipe, RootFs, Step, build_rootfs,
    prepare_kernel,
};

fn cache() -> PathBuf {
    let directory = std::env::var_os("CUBICLE_TEST_IMAGES").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("cubicle-test-images"),
        PathBuf::from,
    );
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// A program that is linked statically: 64-bit ELF for x86-64 without an interpreter.
fn guest() -> GuestBinary {
    let mut header = vec![0; 64];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    header[16] = 2; // executable
    header[18] = 62; // x86-64
    header[20] = 1; // version
    header[52] = 64; // size of this header
    header[54] = 56; // size of a program header, of which there is none
    GuestBinary::from_bytes(header).unwrap()
}

fn run(program: &str, arguments: &[&str], file: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{errors}"
    );
    text
}

/// The entries of an initramfs, by the system's own tool.
fn entries(initramfs: &Path) -> Vec<String> {
    let output = Command::new("cpio")
        .args(["--list", "--quiet"])
        .stdin(fs::File::open(initramfs).unwrap())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn content(initramfs: &Path, entry: &str) -> String {
    let output = Command::new("cpio")
        .args(["--extract", "--to-stdout", "--quiet", entry])
        .stdin(fs::File::open(initramfs).unwrap())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the modules in the order in which they are loaded.
fn check_kernel(kernel: &Kernel) -> Vec<String> {
    assert!(fs::read(&kernel.vmlinux).unwrap().starts_with(b"\x7fELF"));
    // QEMU can start the file directly only by this note (PVH, type 18 of owner Xen).
    let notes = run("readelf", &["--notes", "--wide"], &kernel.vmlinux);
    assert!(
        notes.contains("Xen") && notes.contains("0x00000012"),
        "{notes}"
    );

    let entries = entries(&kernel.initramfs);
    assert!(entries.iter().any(|entry| entry == "init"), "{entries:?}");
    assert!(
        entries.iter().any(|entry| entry == "dev/console"),
        "{entries:?}"
    );
    let order = content(&kernel.initramfs, "modules/order");
    let order: Vec<&str> = order.lines().collect();
    assert!(
        order
            .iter()
            .all(|name| entries.contains(&format!("modules/{name}"))),
        "{order:?}"
    );
    // Both lists name the same modules.
    assert_eq!(
        entries
            .iter()
            .filter(|entry| entry.ends_with(".ko"))
            .count(),
        order.len()
    );
    assert!(
        !order.contains(&"ext4.ko"),
        "it is built into the distributions' kernels"
    );
    order.into_iter().map(str::to_owned).collect()
}

#[tokio::test]
async fn the_newest_kernel_of_the_distribution() {
    let kernel = prepare_kernel(
        &cache(),
        &KernelSource::default(),
        &guest(),
        &Progress::silent(),
    )
    .await;
    let kernel = kernel.unwrap();
    check_kernel(&kernel);
    assert!(
        kernel.package.as_ref().unwrap().contains(&kernel.version),
        "{kernel:?}"
    );

    let start = Instant::now();
    let again = prepare_kernel(
        &cache(),
        &KernelSource::default(),
        &guest(),
        &Progress::silent(),
    )
    .await;
    assert_eq!(again.unwrap(), kernel);
    assert!(
        start.elapsed().as_millis() < 200,
        "took {:?} from the cache",
        start.elapsed()
    );
}

/// The kernel of the oldest line that the configured suites have is packed in other ways than that
/// of the newest (Debian 12: lz4 and plain modules against zstd and xz).
#[tokio::test]
async fn an_older_kernel_by_package_name_and_by_file() {
    let names = Command::new("apt-cache")
        .args(["pkgnames", "linux-image-6.1.0-"])
        .output()
        .unwrap();
    let names = String::from_utf8(names.stdout).unwrap();
    let Some(name) = names
        .lines()
        .filter(|name| name.ends_with("-cloud-amd64"))
        .max()
    else {
        eprintln!("skipped: this release has no Linux 6.1");
        return;
    };
    let source = KernelSource::Package {
        name: name.to_owned(),
    };
    let kernel = prepare_kernel(&cache(), &source, &guest(), &Progress::silent())
        .await
        .unwrap();
    let order = check_kernel(&kernel);
    assert!(kernel.version.starts_with("6.1.0-"), "{}", kernel.version);
    // What needs something comes after it.
    let at = |name: &str| {
        order
            .iter()
            .position(|entry| *entry == format!("{name}.ko"))
            .unwrap()
    };
    for (needed, by) in [
        ("virtio", "virtio_mmio"),
        ("virtio_ring", "virtio_blk"),
        ("failover", "net_failover"),
        ("net_failover", "virtio_net"),
    ] {
        assert!(at(needed) < at(by), "{order:?}");
    }

    // A kernel without modules is taken to have all that it needs built in.
    let file = KernelSource::File {
        path: kernel.vmlinux.clone(),
        modules: None,
    };
    let own = prepare_kernel(&cache(), &file, &guest(), &Progress::silent())
        .await
        .unwrap();
    assert_eq!((&own.version, &own.package), (&kernel.version, &None));
    assert_ne!(own.fingerprint, kernel.fingerprint);
    assert_eq!(content(&own.initramfs, "modules/order"), "");
}

#[tokio::test]
async fn a_kernel_that_does_not_exist_is_an_error_that_says_so() {
    let source = KernelSource::File {
        path: "/nonexistent/vmlinux".into(),
        modules: None,
    };
    let error = prepare_kernel(&cache(), &source, &guest(), &Progress::silent())
        .await
        .unwrap_err();
    let chain: Vec<String> =
        iter::successors(Some(&error as &dyn std::error::Error), |e| e.source())
            .map(ToString::to_string)
            .collect();
    assert!(
        chain.join(": ").contains("/nonexistent/vmlinux"),
        "{chain:?}"
    );
}

async fn base() -> (RootFs, Vec<Event>) {
    let (progress, mut events) = Progress::channel();
    let built = build_rootfs(&Recipe::base(), &cache(), &progress)
        .await
        .unwrap();
    drop(progress);
    let mut reported = Vec::new();
    while let Some(event) = events.recv().await {
        reported.push(event);
    }
    (built, reported)
}

#[tokio::test]
async fn base_is_built_once_and_holds_what_it_promises() {
    // Two at the same time: one builds, the other waits for it and gets the same.
    let ((first, mut events), (second, others)) = tokio::join!(base(), base());
    assert_eq!(first, second);
    let built_now = events
        .iter()
        .chain(&others)
        .any(|event| event.step == Step::BOOTSTRAP);
    if built_now {
        events.extend(others);
        let waited = events
            .iter()
            .filter(|event| event.step == Step::WAIT)
            .count();
        assert_eq!(waited, 1, "one of them waited");
        assert!(
            events
                .iter()
                .any(|event| event.message == "configuring git"),
            "{events:?}"
        );
    }

    let image = &first.image;
    run("e2fsck", &["-f", "-n"], image);
    let length = fs::metadata(image).unwrap().len();
    assert_eq!(length, u64::from(first.disk_mib) << 20);
    assert_eq!(length % (2 << 20), 0);
    assert!(first.used_bytes < 400 << 20, "{} bytes", first.used_bytes);

    let read = |path: &str| run("debugfs", &["-R", &format!("cat {path}")], image);
    let stat = |path: &str| run("debugfs", &["-R", &format!("stat {path}")], image);
    assert!(read("/etc/passwd").contains("user:x:1000:1000::/home/user:/bin/bash"));
    assert!(stat("/home/user").contains("User:  1000   Group:  1000"));
    assert!(stat("/etc/sudoers.d/user").contains("Mode:  0440"));
    assert!(
        stat("/usr/bin/sudo").contains("Mode:  04755"),
        "set-user-id survives"
    );
    assert_eq!(read("/etc/machine-id"), "");
    assert_eq!(
        read("/etc/resolv.conf"),
        "",
        "the host's resolver is not the sandbox's"
    );
    let sources = read("/etc/apt/sources.list.d/sandbox.sources");
    assert!(sources.contains(&format!("Suites: {}\n", first.suite)) && !sources.contains('@'));
    for program in [
        "bash", "python3", "python", "curl", "git", "ps", "sudo", "ip", "ping", "ssh",
    ] {
        assert!(
            stat(&format!("/usr/bin/{program}")).contains("Inode:"),
            "{program} is missing"
        );
    }
    for absent in [
        "/etc/apt/apt.conf.d/99mmdebstrap",
        "/usr/share/man/man1/ls.1.gz",
    ] {
        assert!(!stat(absent).contains("Inode:"), "{absent} is there");
    }
}

#[tokio::test]
async fn a_cancelled_build_leaves_nothing_running_mounted_or_half_written() {
    let directory = tempfile::tempdir().unwrap();
    let (progress, mut events) = Progress::channel();
    let recipe = Recipe {
        packages: vec!["less".into()],
        ..Recipe::base()
    };
    let place = directory.path().to_owned();
    let build = tokio::spawn(async move { build_rootfs(&recipe, &place, &progress).await });
    // In the middle of it: packages are being unpacked.
    while !events
        .recv()
        .await
        .unwrap()
        .message
        .starts_with("unpacking ")
    {}
    build.abort();
    assert!(build.await.unwrap_err().is_cancelled());

    let left: Vec<_> = fs::read_dir(directory.path().join("rootfs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".log"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let here = directory.path().to_str().unwrap();
    assert!(
        !fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(here)
    );
    let works_here = |pid: &fs::DirEntry| {
        fs::read(pid.path().join("cmdline")).is_ok_and(|line| contains(&line, here.as_bytes()))
    };
    let deadline = Instant::now() + std::time::Duration::from_secs(5);
    loop {
        let alive = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(works_here)
            .count();
        if alive == 0 {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{alive} processes are still there"
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[tokio::test]
async fn a_package_that_does_not_exist_is_quoted_from_apt() {
    let directory = tempfile::tempdir().unwrap();
    let packages = vec!["no-such-package-anywhere".into()];
    let recipe = Recipe {
        packages,
        ..Recipe::base()
    };
    let error = build_rootfs(&recipe, directory.path(), &Progress::silent())
        .await
        .unwrap_err();
    let Error::Program { log: Some(log), .. } = &error else {
        panic!("{error:?}")
    };
    assert!(
        error
            .to_string()
            .contains("Unable to locate package no-such-package-anywhere")
    );
    assert!(
        fs::read_to_string(log)
            .unwrap()
            .contains("no-such-package-anywhere")
    );
}
