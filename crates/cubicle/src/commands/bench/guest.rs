//! A sandbox that is measured.

use serde_json::json;

use crate::{
    client::{
        Client, CreatedSandbox, SandboxRef,
        envd::{Command, Event},
    },
    error::Error,
};

/// Life of a sandbox that a benchmark forgets because it was stopped in the middle.
const TIMEOUT_SECONDS: u32 = 1800;
/// The file that stands for a workload's memory.
const DIRTY_FILE: &str = "/dev/shm/cubicle-bench";
/// Memory that a guest needs beside what is written, in MB.
const SPARE_MB: u64 = 64;

/// A sandbox of our own.
#[derive(Debug, Clone)]
pub(super) struct Guest(SandboxRef);

impl Guest {
    pub(super) async fn create(client: &Client, template: &str) -> Result<Self, Error> {
        let body = json!({ "templateID": template, "timeout": TIMEOUT_SECONDS });
        Ok(Self::of(&client.create(&body).await?))
    }

    pub(super) fn of(created: &CreatedSandbox) -> Self {
        Self(SandboxRef {
            id: created.sandbox_id.clone(),
            token: created.envd_access_token.clone(),
            user: Some("root".to_owned()),
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.0.id
    }

    /// MB that can be written into its memory.
    pub(super) async fn room_mb(&self, client: &Client) -> Result<u64, Error> {
        // The file system in memory is half as large as the memory unless one asks for more.
        let script = "mount -o remount,size=100% /dev/shm 2>/dev/null; \
                      df -B1000000 --output=avail /dev/shm | tail -n 1; \
                      awk '/^MemAvailable:/ {print int($2 * 1024 / 1000000)}' /proc/meminfo";
        let text = self.shell(client, script).await?;
        let numbers = text.split_whitespace().map(str::parse::<u64>);
        let least = numbers.collect::<Result<Vec<_>, _>>().ok();
        let least = least
            .filter(|all| all.len() == 2)
            .and_then(|all| all.into_iter().min());
        match least {
            Some(least) => Ok(least.saturating_sub(SPARE_MB)),
            None => Err(Error::Usage(format!(
                "cannot tell how much memory the sandbox has: {text}"
            ))),
        }
    }

    /// Writes this much memory, with other content each time.
    pub(super) async fn dirty(&self, client: &Client, mb: u32) -> Result<(), Error> {
        if mb == 0 {
            return Ok(());
        }
        let script = format!(
            "yes \"$(head -c 12 /dev/urandom | od -An -tx1)\" | \
             dd of={DIRTY_FILE} bs=1000000 count={mb} iflag=fullblock conv=notrunc status=none"
        );
        self.shell(client, &script).await.map(drop)
    }

    /// Runs `true`: after it, a user's command would have run.
    pub(super) async fn run_true(&self, client: &Client) -> Result<(), Error> {
        run_true(client, &self.0).await
    }

    /// Runs a script and returns what it says.
    pub(super) async fn shell(&self, client: &Client, script: &str) -> Result<String, Error> {
        let command = Command {
            program: "/bin/bash".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..Command::default()
        };
        match client.run(&self.0, &command).await? {
            (0, output) => Ok(output),
            (code, output) => Err(Error::Usage(format!(
                "a command of the benchmark failed in the sandbox with {code}: {}",
                output.trim()
            ))),
        }
    }

    pub(super) async fn kill(&self, client: &Client) -> Result<(), Error> {
        client.kill(self.id()).await.map(drop)
    }

    /// Kills it and deletes what was taken of it.
    pub(super) async fn remove(&self, client: &Client) -> Result<(), Error> {
        self.kill(client).await?;
        for snapshot in client.snapshots(Some(self.id()), true).await? {
            client.delete_snapshot(&snapshot.snapshot_id).await?;
        }
        Ok(())
    }
}

/// Runs `true` in a sandbox.
pub(super) async fn run_true(client: &Client, sandbox: &SandboxRef) -> Result<(), Error> {
    let command = Command {
        program: "true".to_owned(),
        ..Command::default()
    };
    let mut events = client.start(sandbox, &command).await?;
    loop {
        match events.next().await? {
            Some(Event::Ended { code: 0, .. }) => return Ok(()),
            Some(Event::Ended { status, .. }) => {
                return Err(Error::Usage(format!(
                    "`true` failed in the sandbox: {status}"
                )));
            }
            Some(_) => {}
            None => {
                return Err(Error::Usage(
                    "the sandbox died during the benchmark".to_owned(),
                ));
            }
        }
    }
}
