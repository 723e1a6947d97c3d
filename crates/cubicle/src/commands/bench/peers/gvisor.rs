//! gVisor: a container on a kernel in user space, which can write itself down.

use std::{fs::File, path::Path, process::Stdio, time::Instant};

use serde_json::{Value, json};
use tokio::process::Command;

use super::{PATIENCE, Times, WORKLOAD, ready, say};
use crate::commands::bench::summary::millis;

const SOURCE: &str = "source";

pub(super) async fn measure(runsc: &Path, dir: &Path, rounds: u32) -> Result<Times, String> {
    bundle(runsc, dir).await?;
    let outcome = measure_in(runsc, dir, rounds).await;
    // Gone already, or never there: both are fine.
    let _ = say(command(runsc, dir).args(["delete", "--force", SOURCE])).await;
    outcome
}

async fn measure_in(runsc: &Path, dir: &Path, rounds: u32) -> Result<Times, String> {
    let output = dir.join("output");
    let mut run = command(runsc, dir);
    run.args(["run", "--detach", "--bundle"])
        .arg(dir)
        .arg(SOURCE);
    detached(&mut run, &output).await?;
    ready(&output).await?;
    let mut times = Times::default();
    for round in 0..rounds {
        let images = dir.join(format!("images-{round}"));
        super::fresh(&images)?;
        let began = Instant::now();
        let mut checkpoint = command(runsc, dir);
        checkpoint
            .args(["checkpoint", "--leave-running", "--image-path"])
            .arg(&images)
            .arg(SOURCE);
        say(&mut checkpoint).await?;
        times.checkpoint.push(millis(began));

        let copy = format!("copy-{round}");
        let began = Instant::now();
        let mut restore = command(runsc, dir);
        restore
            .args(["restore", "--detach", "--bundle"])
            .arg(dir)
            .arg("--image-path")
            .arg(&images)
            .arg(&copy);
        let restored = detached(&mut restore, &dir.join("copy-output")).await;
        times.restore.push(millis(began));
        let _ = say(command(runsc, dir).args(["delete", "--force", &copy])).await;
        restored?;
    }
    Ok(times)
}

/// `runsc` with a state directory of our own, and without what a benchmark does not need.
fn command(runsc: &Path, dir: &Path) -> Command {
    let mut command = Command::new(runsc);
    command
        .arg(format!("--root={}", dir.join("state").display()))
        .args(["--network=none", "--ignore-cgroups"]);
    command
}

/// Runs a command whose container keeps its output streams open.
async fn detached(command: &mut Command, output: &Path) -> Result<(), String> {
    let file = File::create(output).map_err(|error| format!("{}: {error}", output.display()))?;
    let again = file.try_clone().map_err(|error| error.to_string())?;
    command.stdin(Stdio::null()).stdout(file).stderr(again);
    let shown = format!("{:?}", command.as_std());
    let status = tokio::time::timeout(PATIENCE, command.status())
        .await
        .map_err(|_| format!("{shown} takes too long"))?
        .map_err(|error| format!("{shown}: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let said = std::fs::read_to_string(output).unwrap_or_default();
    Err(format!("{shown} ended with {status}: {}", said.trim()))
}

/// A bundle that runs the workload on this machine's own files, which it cannot write.
async fn bundle(runsc: &Path, dir: &Path) -> Result<(), String> {
    say(Command::new(runsc).current_dir(dir).arg("spec")).await?;
    let path = dir.join("config.json");
    let text = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut spec: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    spec["root"] = json!({ "path": "/", "readonly": true });
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = json!(["python3", "-u", "-c", WORKLOAD]);
    std::fs::write(&path, spec.to_string()).map_err(|error| format!("{}: {error}", path.display()))
}
