//! Which accelerator can run the guest kernel on this host.
//!
//! `/dev/kvm` being there says nothing: some hosts have it and run an ordinary kernel one emulated
//! instruction at a time, or stop at instructions that their emulator lacks. So the real kernel is
//! booted once, for a few seconds at most, with an initial file system of one tiny program that
//! says a word on the console. The verdict is kept in a file and holds as long as kernel,
//! hypervisor and host are the same.

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cubicle_ids::SandboxId;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt as _, net::UnixStream, time::timeout};

use crate::{
    VM_UID_BASE, Vm as _,
    error::{Error, Result},
    qemu::{Features, Qemu, QemuConfig, QemuVm},
    spec::{Boot, VmSpec},
};

mod initramfs;

/// What runs guest instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The processor, by hardware virtualisation: fast, and a security boundary.
    Kvm,
    /// Software emulation: works everywhere; for development, tests and trusted code.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Time that a kernel gets to reach its first program. Under KVM it needs 0.2 to 0.5 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// Memory of the probe's VM: what a distribution kernel unpacks itself in, in MiB.
const MEMORY_MIB: u32 = 256;

/// User of the probe's VM: below those of sandboxes.
const UID: u32 = VM_UID_BASE - 1;

/// What to probe with.
#[derive(Debug, Clone)]
pub struct ProbeConfig {
    /// Program, as in [`QemuConfig::binary`].
    pub binary: PathBuf,
    /// Uncompressed guest kernel, readable by every uid.
    pub kernel: PathBuf,
    /// Identifies the kernel; another one is probed anew.
    pub kernel_fingerprint: String,
    /// Existing directory in which the probe's VM gets its run directory.
    pub run_root: PathBuf,
    /// File that keeps the verdict.
    pub cache: PathBuf,
}

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What to use.
    pub accelerator: Accelerator,
    /// Why, in a sentence for a person.
    pub reason: String,
    /// How long the kernel took to its first program, in milliseconds, if it got there.
    pub boot_ms: Option<u64>,
}

/// Everything a verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Conditions {
    kernel: String,
    qemu: String,
    host_kernel: String,
    processor: String,
    /// Device and inode number of `/dev/kvm`.
    kvm: Option<(u64, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Cached {
    conditions: Conditions,
    verdict: Verdict,
}

/// Finds out which accelerator to use, or remembers.
///
/// # Errors
/// When QEMU is unusable; that KVM does not work is a verdict, not an error.
pub async fn probe(config: &ProbeConfig) -> Result<Verdict> {
    let features = Features::detect(&config.binary).await?;
    let conditions = Conditions::of_this_host(&features, &config.kernel_fingerprint);
    if let Some(verdict) = remembered(&config.cache, &conditions) {
        return Ok(verdict);
    }
    let verdict = match obstacle() {
        Some(reason) => Verdict {
            accelerator: Accelerator::Tcg,
            reason,
            boot_ms: None,
        },
        None => judge(config).await,
    };
    let cached = Cached {
        conditions,
        verdict,
    };
    // Not being able to remember costs time at the next start, no more.
    if let Err(error) = remember(&config.cache, &cached) {
        tracing::warn!(path = %config.cache.display(), %error, "could not keep the verdict on KVM");
    }
    Ok(cached.verdict)
}

/// What rules KVM out without trying.
fn obstacle() -> Option<String> {
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match device {
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some("there is no /dev/kvm: the host offers no hardware virtualisation".to_owned())
        }
        Err(error) => Some(format!("/dev/kvm cannot be opened: {error}")),
    }
}

async fn judge(config: &ProbeConfig) -> Verdict {
    let reason = match try_boot(config, Accelerator::Kvm, PATIENCE).await {
        Ok(Trial::Booted(took)) => {
            let boot_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            let reason = format!("the guest kernel boots under KVM in {boot_ms} ms");
            return Verdict {
                accelerator: Accelerator::Kvm,
                reason,
                boot_ms: Some(boot_ms),
            };
        }
        Ok(Trial::Silent) => format!(
            "/dev/kvm is there, but the guest kernel did not come up under it within {} s: the \
             host emulates it instead of running it",
            PATIENCE.as_secs()
        ),
        Ok(Trial::Ended(words)) => {
            format!("/dev/kvm is there, but the VM ended before the guest kernel came up{words}")
        }
        Err(error) => format!("/dev/kvm is there, but unusable: {error}"),
    };
    Verdict {
        accelerator: Accelerator::Tcg,
        reason,
        boot_ms: None,
    }
}

/// How a trial boot went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// The word was said, after that long.
    Booted(Duration),
    /// Time was up.
    Silent,
    /// The VM ended by itself; what QEMU printed.
    Ended(String),
}

/// Boots the kernel once, up to its first program; nothing of the VM is left afterwards.
///
/// # Errors
/// When the VM cannot be started, or not be removed again.
pub async fn try_boot(
    config: &ProbeConfig,
    accelerator: Accelerator,
    patience: Duration,
) -> Result<Trial> {
    let binary = config.binary.clone();
    let qemu = Qemu::open(QemuConfig {
        binary,
        accelerator,
    })
    .await?;
    let id = SandboxId::generate();
    let run_dir = config.run_root.join(id.as_str());
    // In memory only; the driver opens it by the path that it has as a descriptor of ours.
    let in_memory = || {
        let mut file = fs::File::from(memfd_create("probe", MemfdFlags::CLOEXEC)?);
        file.write_all(&initramfs::build())?;
        io::Result::Ok(file)
    };
    let file = in_memory().map_err(Error::io("write a file in memory for", &run_dir))?;
    let boot = Boot::Cold {
        kernel: config.kernel.clone(),
        initramfs: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
        cmdline: "quiet".to_owned(),
    };
    let mut spec = VmSpec::new(id, run_dir, UID, 1, MEMORY_MIB, boot);
    spec.kernel_log = true;
    let started = Instant::now();
    let Ok(launched) = timeout(patience, qemu.start(spec, false)).await else {
        return Ok(Trial::Silent);
    };
    let (vm, console) = launched?;
    let trial = listen(&vm, console, started, patience).await;
    vm.kill().await?;
    Ok(trial)
}

async fn listen(
    vm: &QemuVm,
    console: Option<UnixStream>,
    started: Instant,
    patience: Duration,
) -> Trial {
    let heard = async {
        let mut console = console?;
        let mut said = Vec::new();
        let mut buffer = [0; 1024];
        loop {
            let read = console
                .read(&mut buffer)
                .await
                .ok()
                .filter(|read| *read > 0)?;
            said.extend_from_slice(&buffer[..read]);
            // The console sends a carriage return before the line feed.
            let marker = initramfs::MARKER.trim_ascii_end();
            if said.windows(marker.len()).any(|window| window == marker) {
                return Some(started.elapsed());
            }
        }
    };
    match timeout(patience.saturating_sub(started.elapsed()), heard).await {
        Ok(Some(took)) => Trial::Booted(took),
        Ok(None) => {
            let words = vm.last_words();
            Trial::Ended(if words.is_empty() {
                words
            } else {
                format!("; it printed: {words}")
            })
        }
        Err(_) => Trial::Silent,
    }
}

impl Conditions {
    fn of_this_host(features: &Features, kernel: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap_or_default();
            line.split_once(':')
                .map(|(_, value)| value.trim())
                .unwrap_or_default()
                .to_owned()
        };
        let kvm = fs::metadata("/dev/kvm")
            .ok()
            .map(|device| (device.rdev(), device.ino()));
        Self {
            kernel: kernel.to_owned(),
            qemu: format!("{} {}", features.binary.display(), features.version),
            host_kernel: format!(
                "{} {}",
                read("/proc/sys/kernel/osrelease").trim(),
                read("/proc/sys/kernel/version").trim()
            ),
            processor: format!("{} {}", field("model name"), field("flags")),
            kvm,
        }
    }
}

fn remembered(cache: &Path, conditions: &Conditions) -> Option<Verdict> {
    let cached = read_cache(cache)?;
    (cached.conditions == *conditions).then_some(cached.verdict)
}

fn read_cache(cache: &Path) -> Option<Cached> {
    serde_json::from_slice(&fs::read(cache).ok()?).ok()
}

fn remember(cache: &Path, cached: &Cached) -> io::Result<()> {
    // Renamed into place: a half-written verdict would be read as none, but a reader that comes
    // at the wrong moment need not probe.
    let partial = cache.with_extension("partial");
    fs::write(&partial, serde_json::to_vec_pretty(cached)?)?;
    fs::rename(partial, cache)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn cached() -> Cached {
        Cached {
            conditions: Conditions {
                kernel: "k1".to_owned(),
                qemu: "qemu 10.0.2".to_owned(),
                host_kernel: "6.12".to_owned(),
                processor: "x".to_owned(),
                kvm: Some((2792, 7)),
            },
            verdict: Verdict {
                accelerator: Accelerator::Tcg,
                reason: "because".to_owned(),
                boot_ms: None,
            },
        }
    }

    #[test]
    fn a_verdict_holds_as_long_as_its_conditions() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("verdict.json");
        let cached = cached();
        assert_eq!(remembered(&file, &cached.conditions), None);
        remember(&file, &cached).unwrap();
        assert_eq!(
            remembered(&file, &cached.conditions).as_ref(),
            Some(&cached.verdict)
        );
        for change in [
            |conditions: &mut Conditions| conditions.kernel.push('x'),
            |conditions: &mut Conditions| conditions.qemu.push('x'),
            |conditions: &mut Conditions| conditions.host_kernel.push('x'),
            |conditions: &mut Conditions| conditions.processor.push('x'),
            |conditions: &mut Conditions| conditions.kvm = None,
        ] {
            let mut other = cached.conditions.clone();
            change(&mut other);
            assert_eq!(remembered(&file, &other), None);
        }
        fs::write(&file, "{").unwrap();
        assert_eq!(remembered(&file, &cached.conditions), None);
    }
}
