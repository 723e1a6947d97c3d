//! What else checkpoints and restores programs on this machine, measured in the same run on the same
//! workload: a Python program that holds 20 MB.
//!
//! A peer is a module with a `measure` of its own, and a line in [`measure`]. One that is not
//! installed is said to be missing; one that fails is said to fail, and why.

mod criu;
mod gvisor;
mod qemu;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::process::Command;

use super::{
    guest::Guest,
    operations::take,
    summary::{Summary, millis},
};
use crate::{cli::BenchMatrix, client::Client, error::Error, output};

/// The workload: what it holds is not zero, and not the same everywhere.
const WORKLOAD: &str = "import os, time\n\
    block = os.urandom(1000000)\n\
    data = [bytearray(block) for _ in range(20)]\n\
    print('ready', flush=True)\n\
    while True: time.sleep(3600)\n";
/// What the workload says once it holds its memory.
const READY: &str = "ready";
/// How long any step of a peer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long one program took, in milliseconds.
#[derive(Debug, Default)]
struct Times {
    /// From the call until the checkpoint is written and, where it does, the workload runs on.
    checkpoint: Vec<f64>,
    /// From the call until the workload runs again.
    restore: Vec<f64>,
}

/// All peers beside ourselves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Peers {
    pub(super) workload: String,
    measured: Vec<Peer>,
}

/// One of them.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Peer {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// Why there are no numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint_ms: Option<Summary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restore_ms: Option<Summary>,
    /// Its median over ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restore_ratio: Option<f64>,
}

impl Peer {
    fn missing(name: &str, why: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            missing: Some(why.into()),
            ..Self::default()
        }
    }

    fn of(name: &str, version: Option<String>, outcome: Result<Times, String>) -> Self {
        match outcome {
            Ok(times) => Self {
                name: name.to_owned(),
                version,
                checkpoint_ms: Summary::of(times.checkpoint),
                restore_ms: Summary::of(times.restore),
                ..Self::default()
            },
            Err(why) => Self {
                version,
                ..Self::missing(name, format!("failed: {why}"))
            },
        }
    }
}

/// Measures ourselves and every peer that is installed.
pub(super) async fn measure(
    client: &Client,
    options: &BenchMatrix,
    data_dir: &Path,
) -> Result<Peers, Error> {
    let rounds = options.count.min(10);
    let own = match ours(client, &options.template, rounds).await {
        Ok(times) => Peer::of("cubicle", None, Ok(times)),
        Err(Error::Usage(why)) => Peer::missing("cubicle", why),
        Err(error) => return Err(error),
    };
    let mut measured = vec![own];
    let peers = [
        ("QEMU savevm (tcg)", "qemu-system-x86_64"),
        ("gVisor", "runsc"),
        ("CRIU", "criu"),
    ];
    for (name, program) in peers {
        let Some(path) = installed(program) else {
            measured.push(Peer::missing(name, "not installed"));
            continue;
        };
        let version = say(Command::new(&path).arg("--version")).await.ok();
        let version = version.and_then(|text| text.lines().next().map(str::to_owned));
        let dir =
            std::env::temp_dir().join(format!("cubicle-bench-{program}-{}", std::process::id()));
        let outcome = match fresh(&dir) {
            Ok(()) if program == "runsc" => gvisor::measure(&path, &dir, rounds).await,
            Ok(()) if program == "qemu-system-x86_64" => {
                qemu::measure(&path, &data_dir.join("images"), &dir, rounds).await
            }
            Ok(()) => criu::measure(&path, &dir, rounds).await,
            Err(why) => Err(why),
        };
        // What is left of it is temporary by its place and its name.
        let _ = std::fs::remove_dir_all(&dir);
        measured.push(Peer::of(name, version, outcome));
    }
    Ok(Peers::new(measured))
}

impl Peers {
    /// With ratios to the first, which is ourselves.
    fn new(mut measured: Vec<Peer>) -> Self {
        let p50 = |summary: &Option<Summary>| summary.as_ref().map(|summary| summary.p50);
        let own = measured
            .first()
            .map(|own| (p50(&own.checkpoint_ms), p50(&own.restore_ms)));
        let (checkpoint, restore) = own.unwrap_or_default();
        let over = |theirs: Option<f64>, ours: Option<f64>| Some(theirs? / ours?);
        for peer in measured.iter_mut().skip(1) {
            peer.checkpoint_ratio = over(p50(&peer.checkpoint_ms), checkpoint);
            peer.restore_ratio = over(p50(&peer.restore_ms), restore);
        }
        Self {
            workload: "a Python program that holds 20 MB".to_owned(),
            measured,
        }
    }

    pub(super) fn print(&self) {
        println!("beside others, on {}; p50", self.workload);
        output::print_table(&self.table());
        for line in self.missing() {
            println!("{line}");
        }
    }

    /// Of whom there are no numbers, and why.
    pub(super) fn missing(&self) -> Vec<String> {
        let missing = |peer: &Peer| Some(format!("{}: {}", peer.name, peer.missing.as_ref()?));
        self.measured.iter().filter_map(missing).collect()
    }

    pub(super) fn table(&self) -> comfy_table::Table {
        let mut table = output::table(&["", "CHECKPOINT", "OVER OURS", "RESTORE", "OVER OURS"]);
        for peer in self.measured.iter().filter(|peer| peer.missing.is_none()) {
            let ms = |summary: &Option<Summary>| match summary {
                Some(summary) => format!("{:.1} ms", summary.p50),
                None => String::new(),
            };
            let ratio = |ratio: Option<f64>| match ratio {
                Some(ratio) => format!("{ratio:.1} x"),
                None => String::new(),
            };
            table.add_row([
                peer.name.clone(),
                ms(&peer.checkpoint_ms),
                ratio(peer.checkpoint_ratio),
                ms(&peer.restore_ms),
                ratio(peer.restore_ratio),
            ]);
        }
        table
    }
}

/// Ourselves: a snapshot of a sandbox in which the workload runs, and a sandbox from it.
async fn ours(client: &Client, template: &str, rounds: u32) -> Result<Times, Error> {
    let guest = Guest::create(client, template).await?;
    let times = ours_in(client, &guest, rounds).await;
    guest.remove(client).await?;
    times
}

async fn ours_in(client: &Client, guest: &Guest, rounds: u32) -> Result<Times, Error> {
    let start = format!(
        "nohup python3 -u -c \"{WORKLOAD}\" > /tmp/workload 2>&1 < /dev/null &\n\
         for _ in $(seq 300); do grep -q {READY} /tmp/workload && exit 0; sleep 0.1; done\n\
         cat /tmp/workload; exit 1"
    );
    guest.shell(client, &start).await?;
    let mut times = Times::default();
    for _ in 0..rounds {
        let began = Instant::now();
        let taken = take(client, guest).await?;
        times.checkpoint.push(millis(began));
        let began = Instant::now();
        let body = json!({ "templateID": taken.snapshot_id, "timeout": 300 });
        let created = client.create(&body).await;
        times.restore.push(millis(began));
        if let Ok(created) = &created {
            client.kill(&created.sandbox_id).await?;
        }
        client.delete_snapshot(&taken.snapshot_id).await?;
        created?;
    }
    Ok(times)
}

/// Where a program is, if it is installed.
fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn fresh(dir: &Path) -> Result<(), String> {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))
}

/// Runs a command to its end and returns what it says, or why it failed.
async fn say(command: &mut Command) -> Result<String, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let shown = format!("{:?}", command.as_std());
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .map_err(|_| format!("{shown} takes too long"))?
        .map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    Err(format!(
        "{shown} ended with {}: {}",
        output.status,
        last.unwrap_or("it says nothing")
    ))
}

/// Waits until the workload that writes into this file is ready.
async fn ready(output: &Path) -> Result<(), String> {
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if std::fs::read_to_string(output).is_ok_and(|text| text.contains(READY)) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let said = std::fs::read_to_string(output).unwrap_or_default();
    Err(format!("the workload does not get ready: {}", said.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a peer is installed, it is measured or says why it cannot be; nothing stays behind.
    #[tokio::test]
    async fn what_is_installed_is_measured_or_says_why_not() {
        let dir = std::env::temp_dir().join(format!("cubicle-peers-{}", std::process::id()));
        for program in ["runsc", "criu"] {
            let Some(path) = installed(program) else {
                continue;
            };
            fresh(&dir).expect("a directory");
            let outcome = match program {
                "runsc" => gvisor::measure(&path, &dir, 2).await,
                _ => criu::measure(&path, &dir, 2).await,
            };
            match outcome {
                Ok(times) => assert_eq!((times.checkpoint.len(), times.restore.len()), (2, 2)),
                Err(why) => assert!(why.contains(program), "{why}"),
            }
            std::fs::remove_dir_all(&dir).expect("removed");
        }
    }

    #[test]
    fn ratios_are_to_ourselves_and_what_is_missing_is_said() {
        let times = |checkpoint: f64, restore: f64| Times {
            checkpoint: vec![checkpoint],
            restore: vec![restore],
        };
        let peers = Peers::new(vec![
            Peer::of("cubicle", None, Ok(times(40.0, 60.0))),
            Peer::of("gVisor", Some("1".into()), Ok(times(80.0, 240.0))),
            Peer::missing("CRIU", "not installed"),
            Peer::of("other", None, Err("no".into())),
        ]);
        let json = serde_json::to_value(&peers).expect("JSON");
        assert_eq!(json["measured"][1]["checkpointRatio"], 2.0);
        assert_eq!(json["measured"][1]["restoreRatio"], 4.0);
        assert_eq!(json["measured"][2]["missing"], "not installed");
        assert_eq!(json["measured"][3]["missing"], "failed: no");
        let table = peers.table();
        let lines: Vec<_> = table
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect();
        insta::assert_snapshot!(format!(
            "{}\n{}",
            lines.join("\n"),
            peers.missing().join("\n")
        ));
    }

    #[tokio::test]
    async fn commands_say_what_they_say_or_why_they_failed() {
        assert_eq!(say(Command::new("echo").arg("a")).await, Ok("a\n".into()));
        let failed = say(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).await;
        let why = failed.expect_err("it fails");
        assert!(
            why.contains("exit status: 3") && why.ends_with("why"),
            "{why}"
        );
        assert!(installed("sh").is_some() && installed("no-such-program").is_none());
    }
}
