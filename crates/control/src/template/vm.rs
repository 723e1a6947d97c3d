//! The VM that the steps of a build run in: a sandbox that no user has or sees.
//!
//! It belongs to the build and to nobody else. If the server dies, the next one finds a VM that no
//! sandbox owns, and kills it.

use std::time::{Duration, Instant};

use cubicle_ids::{SandboxId, SnapshotId};
use tokio::sync::mpsc;

use super::{
    Defaults, Probe, Templates,
    log::{Lines, Log},
    plan::{Launch, Stage, Work},
    shorten,
};
use crate::{
    error::{Error, Result},
    fleet::{
        Command, CopyFiles, CreateOrder, Ended, FleetError, FreezeKind, FreezeOrder, Level,
        NetworkOptions, Program,
    },
    secret,
};

/// How long a guest may take to write out what it has before it is frozen.
const QUIESCE: Duration = Duration::from_secs(30);
/// How long one look at whether a template is ready may take.
const PROBE_WITHIN: Duration = Duration::from_secs(30);
/// How many bytes of a program's last output are part of the reason why it failed.
const TAIL: usize = 2000;

/// Makes the user `user`, for images that have a shell and no more. As a login shell would have it.
const MAKE_USER: &str = r#"grep -q '^user:' /etc/passwd && exit 0
shell=/bin/sh; [ -x /bin/bash ] && shell=/bin/bash
id=1000; while grep -q "^[^:]*:[^:]*:$id:" /etc/passwd /etc/group; do id=$((id + 1)); done
echo "user:x:$id:$id::/home/user:$shell" >> /etc/passwd
echo "user:x:$id:" >> /etc/group
[ -f /etc/shadow ] && echo 'user:!:20000:0:99999:7:::' >> /etc/shadow
mkdir -p /home/user && chown "$id:$id" /home/user
if [ -d /etc/sudoers.d ]; then
    echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' > /etc/sudoers.d/user && chmod 0440 /etc/sudoers.d/user
fi
exit 0"#;

/// A VM restored from a layer.
pub(super) struct BuildVm<'a> {
    templates: &'a Templates,
    id: SandboxId,
}

impl<'a> BuildVm<'a> {
    /// Restores a layer.
    pub(super) async fn restore(templates: &'a Templates, layer: &SnapshotId) -> Result<Self> {
        let id = SandboxId::generate();
        let order = CreateOrder {
            id: id.clone(),
            snapshot: layer.clone(),
            template: cubicle_ids::TemplateId::generate(),
            env_vars: Vec::new(),
            user: Some("root".to_owned()),
            workdir: None,
            dns: Vec::new(),
            envd_token: secret::hex(16),
            network: NetworkOptions::default(),
            transient: true,
            mounts: Vec::new(),
        };
        templates.vms().insert(id.clone());
        let vm = Self { templates, id };
        if let Err(error) = templates.fleet.create(order).await {
            // Whatever there is of it.
            vm.end().await;
            return Err(error.into());
        }
        Ok(vm)
    }

    /// Ends the VM.
    pub(super) async fn end(self) {
        if let Err(error) = self.templates.fleet.kill(&self.id).await {
            tracing::error!(vm = %self.id, %error, "the VM of a build stays until the next start");
        }
        self.templates.vms().remove(&self.id);
    }

    /// Freezes it as a layer; it runs on.
    pub(super) async fn freeze(&self, snapshot: &SnapshotId) -> Result<()> {
        let order = FreezeOrder {
            id: self.id.clone(),
            snapshot: snapshot.clone(),
            kind: FreezeKind::Template,
            memory: true,
            quiesce: Some(QUIESCE),
            require_healthy: true,
        };
        self.templates.fleet.snapshot(order).await?;
        Ok(())
    }

    /// Does what a stage consists of.
    pub(super) async fn carry_out(&self, stage: &Stage, log: &Log) -> Result<()> {
        let done = self.do_work(stage, log).await;
        done.map_err(|error| match (&stage.work, error) {
            // In the words of E2B's builder, which clients look for.
            (Work::Run { command, .. }, Error::StepFailed { why }) => Error::StepFailed {
                why: format!("failed to run command '{}': {why}", shorten(command)),
            },
            (Work::Run { command, .. }, Error::Fleet(FleetError::Failed { why, .. })) => {
                let command = shorten(command);
                Error::StepFailed {
                    why: format!("failed to run command '{command}': command failed: {why}"),
                }
            }
            (_, Error::StepFailed { why }) => Error::StepFailed {
                why: format!("{}: {why}", shorten(&stage.title)),
            },
            (_, error) => error,
        })
    }

    async fn do_work(&self, stage: &Stage, log: &Log) -> Result<()> {
        for (path, user) in &stage.directories {
            self.make_directory(path, user, log).await?;
        }
        let held = &stage.defaults;
        match &stage.work {
            Work::Directories => Ok(()),
            Work::MakeUser => {
                let program = self.shell(MAKE_USER, "root", &Defaults::default());
                self.must_run(program, log).await
            }
            Work::Run { command, user } => {
                let program = self.shell(command, user, held);
                self.must_run(program, log).await
            }
            Work::Copy {
                src,
                dest,
                user,
                mode,
                files,
            } => {
                let not_there =
                    || Error::invalid("steps", format!("its files ({files}) are not here"));
                let archive = self
                    .templates
                    .files
                    .find(files)
                    .await?
                    .ok_or_else(not_there)?;
                let files = CopyFiles {
                    archive,
                    src: src.clone(),
                    dest: dest.clone(),
                    user: user.clone(),
                    mode: *mode,
                    within: self.templates.config.step_within,
                };
                Ok(self.templates.fleet.copy_files(&self.id, files).await?)
            }
            Work::Launch(launch) => self.launch(launch, log).await,
        }
    }

    fn shell(&self, command: &str, user: &str, held: &Defaults) -> Program {
        Program {
            command: Command::Shell(command.to_owned()),
            user: Some(user.to_owned()),
            env: held.env.clone(),
            workdir: held.workdir.clone(),
            within: Some(self.templates.config.step_within),
        }
    }

    async fn make_directory(&self, path: &str, user: &str, log: &Log) -> Result<()> {
        // The path is a value, never a part of the command.
        let command = r#"[ -d "$DIR" ] || { mkdir -p "$DIR" && chown "$OWNER" "$DIR"; }"#;
        let held = Defaults {
            env: vec![
                ("DIR".to_owned(), path.to_owned()),
                ("OWNER".to_owned(), user.to_owned()),
            ],
            ..Defaults::default()
        };
        self.must_run(self.shell(command, "root", &held), log).await
    }

    /// Runs a program, which must succeed.
    async fn must_run(&self, program: Program, log: &Log) -> Result<()> {
        let (ended, tail) = self.run(program, log).await?;
        if ended.success {
            return Ok(());
        }
        Err(failed(&ended, &tail))
    }

    /// Runs a program; also returns the end of what it printed.
    async fn run(&self, program: Program, log: &Log) -> Result<(Ended, String)> {
        let (output, mut printed) = mpsc::unbounded_channel();
        let mut lines = Lines::new(log);
        let reading = async {
            while let Some(output) = printed.recv().await {
                lines.push(output);
            }
        };
        let fleet = &self.templates.fleet;
        let (ended, ()) = tokio::join!(fleet.run(&self.id, program, output), reading);
        Ok((ended?, lines.finish(TAIL)))
    }

    /// Starts what runs in every sandbox, and waits until it is ready.
    async fn launch(&self, launch: &Launch, log: &Log) -> Result<()> {
        let Some(command) = &launch.command else {
            return self.until_ready(launch, log).await;
        };
        let program = Program {
            command: command.clone(),
            user: launch.defaults.user.clone(),
            env: launch.defaults.env.clone(),
            workdir: launch.defaults.workdir.clone(),
            within: None,
        };
        let ended = async {
            match self.run(program, log).await {
                // It may well put what it starts into the background.
                Ok((ended, _)) if ended.success => Ok(()),
                Ok((ended, tail)) => Err(failed(&ended, &tail)),
                Err(error) => Err(error),
            }
        };
        let ready = async {
            self.until_ready(launch, log).await?;
            if launch.ready == Probe::None {
                tokio::time::sleep(self.templates.config.settle).await;
            }
            Ok(())
        };
        tokio::pin!(ended, ready);
        tokio::select! {
            // What has ended badly will not be ready, whatever else answers.
            biased;
            ended = &mut ended => { ended?; ready.await }
            ready = &mut ready => ready,
        }
    }

    async fn until_ready(&self, launch: &Launch, log: &Log) -> Result<()> {
        let (begun, mut last) = (Instant::now(), "it was never asked".to_owned());
        while begun.elapsed() <= launch.within {
            match self.is_ready(launch, log).await? {
                Ok(()) => {
                    if launch.ready != Probe::None {
                        log.line(Level::Info, format!("ready after {:.1?}", begun.elapsed()));
                    }
                    return Ok(());
                }
                Err(why) => last = why,
            }
            tokio::time::sleep(self.templates.config.probe_every).await;
        }
        let within = launch.within;
        Err(Error::invalid(
            "ready",
            format!("not ready within {within:.0?}: {last}"),
        ))
    }

    /// Looks once; why it is not ready, if it is not.
    async fn is_ready(
        &self,
        launch: &Launch,
        log: &Log,
    ) -> Result<std::result::Result<(), String>> {
        let fleet = &self.templates.fleet;
        let (port, path) = match &launch.ready {
            Probe::None => return Ok(Ok(())),
            Probe::Command(command) => {
                let mut program = self.shell(command, "root", &launch.defaults);
                program.user.clone_from(&launch.defaults.user);
                program.within = Some(PROBE_WITHIN);
                let quiet = log.quiet();
                let looked = self.run(program, &quiet).await;
                return match looked {
                    Ok((ended, _)) if ended.success => Ok(Ok(())),
                    Ok((ended, tail)) => Ok(Err(format!("{} {tail}", ended.status))),
                    Err(Error::Fleet(FleetError::Failed { why, .. })) => Ok(Err(why)),
                    Err(error) => Err(error),
                };
            }
            Probe::Http { port, path } => (*port, Some(path.as_str())),
            Probe::Tcp { port } => (*port, None),
        };
        Ok(if fleet.probe(&self.id, port, path).await? {
            Ok(())
        } else {
            let path = path.unwrap_or_default();
            Err(format!("port {port}{path} does not answer as it should"))
        })
    }
}

fn failed(ended: &Ended, tail: &str) -> Error {
    let gap = if tail.is_empty() { "" } else { ": " };
    Error::StepFailed {
        why: format!("{}{gap}{tail}", ended.status),
    }
}
