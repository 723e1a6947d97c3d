//! CRIU: a process tree, frozen into files and thawed from them.

use std::{fs::File, path::Path, process::Stdio, time::Instant};

use tokio::process::Command;

use super::{Times, WORKLOAD, ready, say};
use crate::commands::bench::summary::millis;

pub(super) async fn measure(criu: &Path, dir: &Path, rounds: u32) -> Result<Times, String> {
    let output = dir.join("output");
    let file = File::create(&output).map_err(|error| format!("{}: {error}", output.display()))?;
    let again = file.try_clone().map_err(|error| error.to_string())?;
    // In a session of its own: CRIU does not restore one that other processes are in.
    let mut first = Command::new("setsid")
        .args(["python3", "-u", "-c", WORKLOAD])
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(again)
        .spawn()
        .map_err(|error| format!("cannot start the workload: {error}"))?;
    let pid = first.id().ok_or("the workload ended at once")?;
    let outcome = async {
        ready(&output).await?;
        rounds_of(criu, dir, pid, rounds, &mut first).await
    }
    .await;
    // Either the one that was started, or the one that was restored in its place.
    kill(pid).await;
    let _ = first.wait().await;
    outcome
}

async fn rounds_of(
    criu: &Path,
    dir: &Path,
    pid: u32,
    rounds: u32,
    first: &mut tokio::process::Child,
) -> Result<Times, String> {
    let mut times = Times::default();
    for round in 0..rounds {
        let images = dir.join(format!("images-{round}"));
        super::fresh(&images)?;
        let began = Instant::now();
        let mut dump = Command::new(criu);
        dump.args(["dump", "--leave-running", "--tree"])
            .arg(pid.to_string())
            .arg("--images-dir")
            .arg(&images);
        say(&mut dump).await?;
        times.checkpoint.push(millis(began));
        // It comes back under the id that it had, so the old one has to go first.
        kill(pid).await;
        if round == 0 {
            let _ = first.wait().await;
        }
        let began = Instant::now();
        let mut restore = Command::new(criu);
        restore
            .args(["restore", "--restore-detached", "--images-dir"])
            .arg(&images);
        say(&mut restore).await?;
        times.restore.push(millis(began));
    }
    Ok(times)
}

/// Ends a process and waits until it is gone.
async fn kill(pid: u32) {
    let Some(id) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    else {
        return;
    };
    let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
    for _ in 0..200 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
