//! The accelerator probe with the real kernel, on whatever host this is.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, dead_code)]

mod support;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use cubicle_vmm::probe::{Accelerator, ProbeConfig, Trial, probe, try_boot};

fn config(dir: &Path, kernel: &Path) -> ProbeConfig {
    ProbeConfig {
        binary: "qemu-system-x86_64".into(),
        kernel: kernel.to_owned(),
        kernel_fingerprint: "of the test".to_owned(),
        run_root: dir.to_owned(),
        cache: dir.join("verdict.json"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_comes_in_time_and_is_kept() {
    let (dir, guest) = (support::Dir::new(), support::guest());
    let mut config = config(dir.path(), &guest.kernel);
    assert!(!config.cache.exists());
    let started = Instant::now();
    let verdict = probe(&config).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(9),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        verdict.accelerator == Accelerator::Kvm,
        verdict.boot_ms.is_some(),
        "{verdict:?}"
    );
    assert!(
        verdict.reason.contains("kvm") || verdict.reason.contains("KVM"),
        "{verdict:?}"
    );
    println!("{verdict:?}");
    // From memory: with a kernel that is not there.
    config.kernel = dir.path().join("missing");
    assert_eq!(probe(&config).await.unwrap(), verdict);
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(left, [config.cache]);
}

#[tokio::test(flavor = "multi_thread")]
async fn software_emulation_boots_the_kernel() {
    let (dir, guest) = (support::Dir::new(), support::guest());
    let config = config(dir.path(), &guest.kernel);
    let trial = try_boot(&config, Accelerator::Tcg, Duration::from_secs(60))
        .await
        .unwrap();
    assert!(matches!(trial, Trial::Booted(_)), "{trial:?}");
    let hurried = try_boot(&config, Accelerator::Tcg, Duration::from_millis(60))
        .await
        .unwrap();
    assert_eq!(hurried, Trial::Silent);
    // What was cancelled in the middle of its launch is removed in the background.
    let left = || std::fs::read_dir(dir.path()).unwrap().count();
    for _ in 0..200 {
        if left() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(left(), 0, "something is left");
}
