//! QEMU's own snapshots, `savevm` and `loadvm`, of the same guest: the `base` template's kernel, guest
//! daemon and root file system, booted the way Cubicle boots them, on a disk in QEMU's format.
//!
//! What it saves goes into the disk image, memory and all; what it loads replaces the machine in
//! place.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use cubicle_image::{
    GuestBinary, KernelSource, Progress, Recipe, RootFs, build_rootfs, prepare_kernel,
};
use cubicle_protocol::{
    CHANNEL_PORT_NAME,
    channel::{Nonce, host},
    guest_api::{InitRequest, Introduced},
};
use cubicle_vmm::tsc;
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Bytes, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};

use super::{PATIENCE, READY, Times, WORKLOAD, say};
use crate::commands::bench::summary::millis;

/// How long one attempt to reach the guest may take; it does not answer before it has booted.
const ATTEMPT: Duration = Duration::from_secs(1);

/// A name for what `savevm` saves.
const TAG: &str = "bench";

/// Boots the guest, has it run the workload, and saves and loads it over and over. `images` is the
/// server's image directory.
pub(super) async fn measure(
    qemu: &Path,
    images: &Path,
    dir: &Path,
    rounds: u32,
) -> Result<Times, String> {
    let mut machine = Machine::start(qemu, images, dir).await?;
    let outcome = timed(&mut machine, rounds).await;
    let _ = machine.process.kill().await;
    outcome
}

async fn timed(machine: &mut Machine, rounds: u32) -> Result<Times, String> {
    machine.run_workload().await?;
    let mut times = Times::default();
    for _ in 0..rounds {
        let began = Instant::now();
        machine.monitor.say(&format!("savevm {TAG}")).await?;
        times.checkpoint.push(millis(began));
        let began = Instant::now();
        machine.monitor.say(&format!("loadvm {TAG}")).await?;
        times.restore.push(millis(began));
        machine.monitor.say(&format!("delvm {TAG}")).await?;
    }
    Ok(times)
}

/// A QEMU of our own, and the way into its guest.
struct Machine {
    process: Child,
    monitor: Monitor,
    channel: PathBuf,
}

impl Machine {
    async fn start(qemu: &Path, images: &Path, dir: &Path) -> Result<Self, String> {
        let failed = |error: cubicle_image::Error| error.to_string();
        let guest = GuestBinary::locate().map_err(failed)?;
        let silent = Progress::silent();
        let kernel = prepare_kernel(images, &KernelSource::default(), &guest, &silent).await;
        let kernel = kernel.map_err(failed)?;
        let root = build_rootfs(&Recipe::base(), images, &silent).await;
        let disk = overlay(&root.map_err(failed)?, dir).await?;
        let (channel, monitor) = (dir.join("channel"), dir.join("monitor"));
        let words = format!(
            "quiet cubicle.root=/dev/vda cubicle.rootfstype=ext4 console=ttyS0 tsc=reliable \
             tsc_early_khz={} lsm=capability nowatchdog psi=0 audit=0",
            tsc::khz()
        );
        let socket = |id: &str, path: &Path| {
            format!("socket,id={id},path={},server=on,wait=off", path.display())
        };
        let mut command = Command::new(qemu);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args([
                "-serial",
                "null",
                "-accel",
                "tcg,tb-size=256",
                "-cpu",
                "max",
            ])
            .args(["-machine", "microvm,acpi=on,pit=off,pic=off,rtc=on"])
            .args(["-smp", "1", "-m", "512M", "-append", &words])
            .arg("-kernel")
            .arg(&kernel.vmlinux)
            .arg("-initrd")
            .arg(&kernel.initramfs)
            .args(["-chardev", &socket("monitor", &monitor)])
            .args(["-mon", "chardev=monitor,mode=control"])
            .args(["-chardev", &socket("channel", &channel)])
            .args(["-device", "virtio-serial-device,max_ports=2", "-device"])
            .arg(format!(
                "virtserialport,nr=1,chardev=channel,name={CHANNEL_PORT_NAME}"
            ))
            .arg("-drive")
            .arg(format!(
                "file={},format=qcow2,if=none,id=disk,cache=unsafe",
                disk.display()
            ))
            .args(["-device", "virtio-blk-device,drive=disk"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let process = command
            .spawn()
            .map_err(|error| format!("{}: {error}", qemu.display()))?;
        Ok(Self {
            monitor: Monitor::connect(&monitor).await?,
            process,
            channel,
        })
    }

    /// Has the guest run the workload, once it has booted.
    async fn run_workload(&self) -> Result<(), String> {
        let since = Instant::now();
        let mut channel = loop {
            let attempt = async {
                let stream = UnixStream::connect(&self.channel).await;
                let stream = stream.map_err(|error| error.to_string())?;
                let shaken = host::handshake(stream, Nonce::generate()).await;
                shaken.map_err(|error| error.to_string())
            };
            match timeout(ATTEMPT, attempt).await {
                Ok(Ok(channel)) => break channel,
                _ if since.elapsed() > PATIENCE => return Err("the guest does not boot".into()),
                _ => {}
            }
        };
        let broken = |error: std::io::Error| format!("the guest's channel: {error}");
        let init = InitRequest {
            default_user: Some("user".to_owned()),
            ..InitRequest::default()
        };
        let introduced = channel.introduce(&init).await.map_err(broken)?;
        if let Introduced::Refused(why) = introduced {
            return Err(why);
        }
        let (mut sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(channel))
                .await
                .map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let script = format!(
            "nohup python3 -u -c \"{WORKLOAD}\" > /tmp/workload 2>&1 < /dev/null &\n\
             for _ in $(seq 300); do grep -q {READY} /tmp/workload && exit 0; sleep 0.1; done; exit 1"
        );
        let message = json!({ "process": { "cmd": "/bin/bash", "args": ["-c", script] } });
        let message = message.to_string();
        let mut framed = vec![0];
        framed.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
        framed.extend_from_slice(message.as_bytes());
        let request = hyper::Request::post("http://host/process.Process/Start")
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1")
            .body(Full::new(Bytes::from(framed)))
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await;
        let body = response.map_err(|error| error.to_string())?.into_body();
        let said = body.collect().await.map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&said.to_bytes()).into_owned();
        if said.contains("exit status 0") {
            Ok(())
        } else {
            Err(format!("the workload does not start: {said}"))
        }
    }
}

/// A disk in QEMU's own format over the template's root file system, which is only read.
async fn overlay(root: &RootFs, dir: &Path) -> Result<PathBuf, String> {
    let disk = dir.join("disk.qcow2");
    let mut create = Command::new("qemu-img");
    create
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&root.image)
        .arg(&disk);
    say(&mut create).await?;
    Ok(disk)
}

/// QEMU's monitor.
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    async fn connect(path: &Path) -> Result<Self, String> {
        let since = Instant::now();
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(error) if since.elapsed() > PATIENCE => return Err(error.to_string()),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let stream = BufReader::new(stream);
        let mut monitor = Self { stream };
        monitor.answer().await?;
        monitor
            .execute(json!({ "execute": "qmp_capabilities" }))
            .await?;
        Ok(monitor)
    }

    /// Has QEMU do what a person would type, and waits until it is done.
    async fn say(&mut self, line: &str) -> Result<(), String> {
        let command = json!({
            "execute": "human-monitor-command",
            "arguments": { "command-line": line },
        });
        match self.execute(command).await?.as_str() {
            // It answers with what went wrong, and with nothing if nothing did.
            Some(said) if !said.trim().is_empty() => Err(format!("{line}: {}", said.trim())),
            _ => Ok(()),
        }
    }

    async fn execute(&mut self, command: Value) -> Result<Value, String> {
        let line = format!("{command}\n");
        let sent = self.stream.get_mut().write_all(line.as_bytes()).await;
        sent.map_err(|error| error.to_string())?;
        loop {
            let answer = self.answer().await?;
            if let Some(done) = answer.get("return") {
                return Ok(done.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error.to_string());
            }
            // An event.
        }
    }

    async fn answer(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        let read = timeout(PATIENCE, self.stream.read_line(&mut line));
        let read = read.await.map_err(|_| "QEMU does not answer".to_owned())?;
        match read {
            Ok(0) => Err("QEMU has ended".to_owned()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
