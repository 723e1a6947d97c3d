//! gVisor: a container on a kernel in user space, which can write itself down.
//!
//! A checkpoint ends the container here, where ours runs on: the way that leaves it running starts a
//! new one in its place and, in some versions, never returns.

use std::{fs::File, path::Path, process::Stdio, time::Instant};

use serde_json::{Value, json};
use tokio::process::Command;

use super::{PATIENCE, Times, WORKLOAD, ready, say};
use crate::commands::bench::summary::millis;

pub(super) async fn measure(runsc: &Path, dir: &Path, rounds: u32) -> Result<Times, String> {
    bundle(runsc, dir).await?;
    let mut lives = 0;
    let outcome = measure_in(runsc, dir, rounds, &mut lives).await;
    for life in 0..=lives {
        // Gone already, or never there: both are fine.
        let _ = delete(runsc, dir, life).await;
    }
    outcome
}

/// Checkpoints a container and restores it as the next one, over and over.
async fn measure_in(
    runsc: &Path,
    dir: &Path,
    rounds: u32,
    lives: &mut u32,
) -> Result<Times, String> {
    let output = dir.join("output");
    let mut run = command(runsc, dir);
    run.args(["run", "--detach", "--bundle"])
        .arg(dir)
        .arg(name(0));
    apart(&mut run, &output).await?;
    ready(&output).await?;
    let mut times = Times::default();
    for life in 0..rounds {
        let images = dir.join(format!("images-{life}"));
        super::fresh(&images)?;
        let began = Instant::now();
        let mut checkpoint = command(runsc, dir);
        checkpoint
            .args(["checkpoint", "--image-path"])
            .arg(&images)
            .arg(name(life));
        apart(&mut checkpoint, &dir.join("checkpoint-output")).await?;
        times.checkpoint.push(millis(began));
        delete(runsc, dir, life).await?;

        *lives = life + 1;
        let began = Instant::now();
        let mut restore = command(runsc, dir);
        restore
            .args(["restore", "--detach", "--bundle"])
            .arg(dir)
            .arg("--image-path")
            .arg(&images)
            .arg(name(*lives));
        apart(&mut restore, &dir.join("restore-output")).await?;
        times.restore.push(millis(began));
    }
    Ok(times)
}

/// The container in one of its lives.
fn name(life: u32) -> String {
    format!("life-{life}")
}

async fn delete(runsc: &Path, dir: &Path, life: u32) -> Result<(), String> {
    let mut delete = command(runsc, dir);
    delete.args(["delete", "--force"]).arg(name(life));
    apart(&mut delete, &dir.join("delete-output")).await
}

/// `runsc` with a state directory of our own, and without what a benchmark does not need.
fn command(runsc: &Path, dir: &Path) -> Command {
    let mut command = Command::new(runsc);
    command
        .arg(format!("--root={}", dir.join("state").display()))
        .args(["--network=none", "--ignore-cgroups"]);
    command
}

/// Runs a command whose output goes into a file: the container keeps it open, so that a pipe would
/// not end with the command.
async fn apart(command: &mut Command, output: &Path) -> Result<(), String> {
    let file = File::create(output).map_err(|error| format!("{}: {error}", output.display()))?;
    let again = file.try_clone().map_err(|error| error.to_string())?;
    command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(again)
        .kill_on_drop(true);
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
