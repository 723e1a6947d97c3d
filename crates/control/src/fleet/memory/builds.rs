//! Templates without machines: what was done in a VM is a list of words, and a snapshot keeps it.

use std::time::Duration;

use cubicle_ids::{SandboxId, SnapshotId};
use tokio::sync::mpsc;

use super::{MemoryFleet, Step, fact};
use crate::{
    fleet::{
        BuildOrder, BuildStep, Command, Ended, FleetError, Level, OriginFacts, Output, Program,
        SnapshotKind, Source,
    },
    template::{Defaults, Origin, Probe},
};

impl MemoryFleet {
    /// What was done to what a snapshot was taken of, in order.
    pub fn contents(&self, snapshot: &SnapshotId) -> Vec<String> {
        let state = self.lock();
        state.contents.get(snapshot).cloned().unwrap_or_default()
    }

    /// How many images were booted.
    pub fn boots(&self) -> u64 {
        self.lock().boots
    }

    /// From now on every container image, and what every recipe makes, is another than before.
    pub fn push_images(&self) {
        self.lock().image += 1;
    }

    pub(super) async fn look_at(
        &self,
        origin: &Origin,
        progress: &mpsc::UnboundedSender<BuildStep>,
    ) -> Result<OriginFacts, FleetError> {
        self.reach(Step::Origin).await?;
        let step = BuildStep {
            level: Level::Info,
            step: Some("base".to_owned()),
            message: format!("looking at {origin}"),
        };
        let _ = progress.send(step);
        let image = self.lock().image;
        let facts = |source: Source, fingerprint: String| OriginFacts {
            source,
            fingerprint,
            defaults: Defaults::default(),
            command: Vec::new(),
            start: None,
            ready: Probe::None,
        };
        Ok(match origin {
            Origin::Recipe(name) => facts(
                Source::Recipe(name.clone()),
                format!("recipe {name} {image}"),
            ),
            Origin::Image { reference, .. } => {
                let name = format!("{reference} {image}");
                OriginFacts {
                    defaults: Defaults {
                        env: vec![("IMAGE".to_owned(), reference.clone())],
                        user: Some("root".to_owned()),
                        ..Defaults::default()
                    },
                    command: vec!["serve".to_owned(), "image".to_owned()],
                    ..facts(Source::Image(name.clone()), format!("image {name}"))
                }
            }
            Origin::Template(_) => {
                return Err(FleetError::Unsupported {
                    what: "a template as the origin of an image".to_owned(),
                });
            }
        })
    }

    pub(super) async fn boot(
        &self,
        order: BuildOrder,
        progress: &mpsc::UnboundedSender<BuildStep>,
    ) -> Result<(), FleetError> {
        self.reach(Step::Boot).await?;
        tokio::task::yield_now().await;
        let failed = |why: String| FleetError::Failed {
            doing: format!("build {}", order.build),
            why,
        };
        {
            let mut state = self.lock();
            if let Some(why) = state.fail_builds.take() {
                return Err(failed(why));
            }
            let done = match &order.source {
                Source::Recipe(name) => vec![format!("boot recipe {name}")],
                Source::Image(name) => vec![format!("boot image {name}")],
                Source::Snapshot(from) => {
                    let Some(done) = state.contents.get(from) else {
                        return Err(FleetError::NoSnapshot { id: from.clone() });
                    };
                    // What ran is gone, what was written is there.
                    let kept = done.iter().filter(|done| !done.contains("serve"));
                    kept.cloned().chain(["boot".to_owned()]).collect()
                }
            };
            let id = order.snapshot.clone();
            let taken = fact(id.clone(), SnapshotKind::Template, None, Vec::new(), true);
            if state.snapshots.insert(id.clone(), taken).is_some() {
                return Err(failed("the snapshot exists already".to_owned()));
            }
            state.contents.insert(id, done);
            state.boots += 1;
        }
        let step = BuildStep {
            level: Level::Info,
            step: Some("base".to_owned()),
            message: "published".to_owned(),
        };
        let _ = progress.send(step);
        self.reach(Step::Booted).await
    }

    /// `exit N` ends with N, `echo` prints, `serve` runs until its VM is gone; all else succeeds.
    pub(super) async fn run_in(
        &self,
        id: &SandboxId,
        program: Program,
        output: &mpsc::UnboundedSender<Output>,
    ) -> Result<Ended, FleetError> {
        self.reach(Step::Run).await?;
        let text = match program.command {
            Command::Shell(text) => text,
            Command::Exec(words) => words.join(" "),
        };
        let user = program.user.unwrap_or_default();
        let first = text.lines().next().unwrap_or_default();
        self.note(id, format!("{user}: {first}"))?;
        if let Some(printed) = text.strip_prefix("echo ") {
            let _ = output.send(Output::Stdout(format!("{printed}\n").into()));
        }
        while text.starts_with("serve") {
            tokio::time::sleep(Duration::from_millis(2)).await;
            if !self.lock().sandboxes.contains_key(id) {
                return Err(FleetError::NoSandbox { id: id.clone() });
            }
        }
        let code = text.strip_prefix("exit ").unwrap_or("0");
        Ok(Ended {
            success: code == "0",
            status: format!("exit status {code}"),
        })
    }

    pub(super) fn note(&self, id: &SandboxId, what: String) -> Result<(), FleetError> {
        let mut state = self.lock();
        let no_sandbox = || FleetError::NoSandbox { id: id.clone() };
        let vm = state.sandboxes.get_mut(id).ok_or_else(no_sandbox)?;
        vm.done.push(what);
        Ok(())
    }
}
