//! `cubicle doctor`: what this machine offers, and how to mend what is missing.
//!
//! Everything is tried, nothing inferred, and nothing on the machine is changed.

use std::{net::TcpListener, path::Path, process::ExitCode};

use cubicle_cow::reflink;
use cubicle_image::GuestBinary;
use cubicle_vmm::{cgroup, qemu};
use serde::Serialize;

use crate::{
    cli::Global,
    client::Connection,
    error::{Chain, Error},
    output,
    server::accelerator_verdict,
};

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Pass,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
struct Check {
    name: &'static str,
    level: Level,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn pass(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Pass,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self {
            name,
            level: Level::Warn,
            detail: detail.into(),
            remedy,
        }
    }

    fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self {
            name,
            level: Level::Fail,
            detail: detail.into(),
            remedy,
        }
    }
}

/// Sandboxes need at least this much free on the data directory's file system.
const DISK_LEAST: u64 = 4 << 30;
/// Below this, a handful of sandboxes is all there is room for.
const DISK_FINE: u64 = 20 << 30;

pub(crate) async fn run(global: &Global) -> Result<ExitCode, Error> {
    let mut checks = vec![privileges(), kernel()];
    checks.push(qemu_version().await);
    checks.push(accelerator(&global.data_dir).await);
    checks.push(guest());
    checks.extend(tools());
    checks.push(store(&global.data_dir));
    checks.push(disk(&global.data_dir));
    checks.extend(network());
    checks.extend(cgroups());
    checks.push(server(global));

    let count = |level| checks.iter().filter(|check| check.level == level).count();
    let (pass, warn, fail) = (count(Level::Pass), count(Level::Warn), count(Level::Fail));
    if global.json {
        output::print_json(&serde_json::json!({
            "pass": pass, "warn": warn, "fail": fail, "checks": checks,
        }));
    } else {
        for check in &checks {
            let mark = match check.level {
                Level::Pass => "ok  ",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            println!("{mark}  {:<14} {}", check.name, check.detail);
            if let Some(remedy) = &check.remedy {
                println!("      {:<14} -> {remedy}", "");
            }
        }
        println!("\n{pass} passed, {warn} warnings, {fail} failed");
    }
    Ok(super::code(fail == 0))
}

fn privileges() -> Check {
    if rustix::process::geteuid().is_root() {
        Check::pass("privileges", "root")
    } else {
        Check::fail(
            "privileges",
            "not root: VMs and networks need it",
            "run it with sudo",
        )
    }
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let detail = format!("Linux {release}");
    if version >= (6, 7) {
        Check::pass("kernel", detail)
    } else if version >= (5, 10) {
        Check::warn(
            "kernel",
            format!("{detail}: finds changed memory by reading all of pagemap"),
            "snapshots are quicker from Linux 6.7 on",
        )
    } else {
        Check::fail(
            "kernel",
            format!("{detail} is too old"),
            "Linux 5.10 is the oldest that works",
        )
    }
}

async fn qemu_version() -> Check {
    let config = qemu::QemuConfig::default();
    match qemu::Features::detect(&config.binary).await {
        Ok(features) if features.read_only_images() => Check::pass(
            "qemu",
            format!("{} ({})", features.version, features.binary.display()),
        ),
        Ok(features) => Check::warn(
            "qemu",
            format!(
                "{} opens memory images for writing, which weakens the VMs' confinement",
                features.version
            ),
            "install QEMU 8.2 or later, for example from your distribution's backports",
        ),
        Err(error) => Check::fail(
            "qemu",
            Chain(&error).to_string(),
            "apt-get install qemu-system-x86",
        ),
    }
}

async fn accelerator(data_dir: &Path) -> Check {
    match accelerator_verdict(data_dir).await {
        Ok(Some(verdict)) if verdict.accelerator == cubicle_vmm::probe::Accelerator::Kvm => {
            Check::pass("accelerator", format!("kvm: {}", verdict.reason))
        }
        Ok(Some(verdict)) => Check::warn(
            "accelerator",
            format!(
                "tcg (software emulation, no security boundary): {}",
                verdict.reason
            ),
            "use a machine with hardware virtualisation for code that you do not trust",
        ),
        Ok(None) => Check::warn(
            "accelerator",
            "not probed yet: the probe boots the guest kernel, which is not there yet",
            "`cubicle up` prepares the kernel and probes",
        ),
        Err(error) => Check::fail(
            "accelerator",
            Chain(&error).to_string(),
            "see the reason given",
        ),
    }
}

fn guest() -> Check {
    match GuestBinary::locate() {
        Ok(guest) => Check::pass(
            "guest daemon",
            format!("{} KiB", guest.bytes().len() / 1024),
        ),
        Err(error) => Check::fail("guest daemon", Chain(&error).to_string(), "make build"),
    }
}

/// The programs that building a template starts.
fn tools() -> Vec<Check> {
    let find = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into);
        std::env::split_paths(&path)
            .chain(extra)
            .any(|dir| dir.join(program).is_file())
    };
    let missing: Vec<&str> = [
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("mkfs.xfs", "xfsprogs"),
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
    ]
    .into_iter()
    .filter(|(program, _)| !find(program))
    .map(|(_, package)| package)
    .collect();
    if missing.is_empty() {
        return vec![Check::pass(
            "tools",
            "mmdebstrap, mke2fs, mkfs.xfs, apt-get, dpkg-deb",
        )];
    }
    let detail = format!("missing: {}", missing.join(", "));
    vec![Check::fail(
        "tools",
        detail,
        format!("apt-get install {}", missing.join(" ")),
    )]
}

/// The nearest directory above that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or_else(|| Path::new("/"))
}

fn store(data_dir: &Path) -> Check {
    if data_dir.join("store.xfs").exists() {
        return Check::pass(
            "store",
            format!("{}/store.xfs, an XFS image", data_dir.display()),
        );
    }
    match reflink::probe(existing(data_dir)) {
        Ok(reflink::Support::Reflink) => {
            Check::pass("store", format!("{} has reflinks", data_dir.display()))
        }
        Ok(_) if Path::new("/dev/loop-control").exists() => Check::pass(
            "store",
            format!(
                "{} has no reflinks: a loop-mounted XFS image will be used",
                data_dir.display()
            ),
        ),
        Ok(_) => Check::fail(
            "store",
            format!(
                "{} has no reflinks, and there are no loop devices",
                data_dir.display()
            ),
            "put --data-dir on XFS or Btrfs, or load the `loop` module",
        ),
        Err(error) => Check::fail(
            "store",
            Chain(&error).to_string(),
            "choose another --data-dir",
        ),
    }
}

fn disk(data_dir: &Path) -> Check {
    let at = existing(data_dir);
    match rustix::fs::statvfs(at) {
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let detail = format!("{} GiB free at {}", free >> 30, at.display());
            if free < DISK_LEAST {
                Check::fail(
                    "disk",
                    detail,
                    "free some space, or choose another --data-dir",
                )
            } else if free < DISK_FINE {
                Check::warn(
                    "disk",
                    detail,
                    "20 GiB make room for templates and snapshots",
                )
            } else {
                Check::pass("disk", detail)
            }
        }
        Err(error) => Check::fail("disk", error.to_string(), "choose another --data-dir"),
    }
}

fn network() -> Vec<Check> {
    use cubicle_net::State;
    let report = cubicle_net::probe();
    let mut checks: Vec<Check> = report
        .capabilities
        .iter()
        .filter_map(|capability| {
            let detail =
                |reason: &str| format!("{} ({}): {reason}", capability.name, capability.purpose);
            match &capability.state {
                State::Available => None,
                State::Missing { reason, remedy } => {
                    Some(Check::fail("network", detail(reason), remedy))
                }
                State::Doubtful { reason, remedy } => {
                    Some(Check::warn("network", detail(reason), remedy))
                }
            }
        })
        .collect();
    if checks.is_empty() {
        let names: Vec<&str> = report.capabilities.iter().map(|it| it.name).collect();
        checks.push(Check::pass("network", names.join(", ")));
    }
    checks
}

fn cgroups() -> Vec<Check> {
    let support = cgroup::probe();
    let enforced: Vec<String> = support.enforced.iter().map(ToString::to_string).collect();
    let mut checks = Vec::new();
    if !enforced.is_empty() {
        let detail = format!("{}: limits on {}", support.layout, enforced.join(", "));
        checks.push(Check::pass("cgroup", detail));
    }
    for (what, why) in &support.missing {
        checks.push(Check::warn(
            "cgroup",
            format!("no limit on {what}: {why}"),
            "boot with cgroup v2 and all controllers (systemd.unified_cgroup_hierarchy=1)",
        ));
    }
    checks
}

fn server(global: &Global) -> Check {
    match Connection::load(&global.data_dir) {
        Ok(connection) => {
            let address = connection.url.trim_start_matches("http://");
            match std::net::TcpStream::connect(address) {
                Ok(_) => Check::pass("server", format!("answers at {}", connection.url)),
                Err(_) => Check::pass("server", "none is running"),
            }
        }
        Err(_) => match TcpListener::bind("127.0.0.1:3000") {
            Ok(_) => Check::pass("server", "none is running; port 3000 is free"),
            Err(error) => Check::warn(
                "server",
                format!("port 3000 cannot be used: {error}"),
                "choose another with `cubicle up --listen`",
            ),
        },
    }
}
