//! A sandbox goes back to its past.

use std::sync::Arc;

use cubicle_ids::{SandboxId, SnapshotId};

use super::{Entry, Inner, Sandbox, Sandboxes, create::of_fleet, operation::Operation};
use crate::{
    error::{Error, Result},
    fleet::{FleetError, Level, Phase},
    lifecycle::State,
};

/// A sandbox that was rolled back.
#[derive(Debug, Clone)]
pub struct RolledBack {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// What it went back to.
    pub snapshot: SnapshotId,
    /// How long each step took, in order.
    pub phases: Vec<Phase>,
}

impl Sandboxes {
    /// Takes a running sandbox back to a snapshot: one of its own, or one that it descends from.
    /// It keeps its id, tokens, metadata and end. If it fails the sandbox runs on as it was.
    ///
    /// # Errors
    /// [`Error::SnapshotNotFound`], [`Error::NotInHistory`] for a snapshot of others,
    /// [`Error::Conflict`] if the sandbox is paused, [`Error::Busy`] while something else is done
    /// with it.
    pub async fn rollback(&self, id: &SandboxId, snapshot: &str) -> Result<RolledBack> {
        let why = "only a running sandbox can be rolled back; resume it first";
        let (entry, underway) = self.inner.begin(id, Operation::Rollback, why)?;
        let target = self.inner.past(&entry.sandbox(), snapshot).await?;
        let work = |inner: Arc<Inner>, entry: Arc<Entry>| async move {
            inner.rollback(&entry, target).await
        };
        let begun = (entry, underway);
        self.inner
            .see_through(Operation::Rollback, begun, work)
            .await
    }
}

impl Inner {
    /// The snapshot in a sandbox's past that a reference stands for.
    async fn past(&self, sandbox: &Sandbox, reference: &str) -> Result<SnapshotId> {
        let snapshot = match self.templates.resolve(reference).await {
            Ok(resolved) => resolved.snapshot,
            Err(Error::TemplateNotFound { reference }) => {
                return Err(Error::SnapshotNotFound { reference });
            }
            Err(error) => return Err(error),
        };
        if snapshot == sandbox.snapshot || self.snapshots.is_past_of(&sandbox.id, &snapshot).await?
        {
            return Ok(snapshot);
        }
        Err(Error::NotInHistory {
            sandbox: sandbox.id.clone(),
            snapshot,
        })
    }

    async fn rollback(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        target: SnapshotId,
    ) -> Result<RolledBack> {
        let not_found = || Error::SandboxNotFound {
            id: entry.sandbox().id.clone(),
        };
        let before = entry
            .change(|sandbox| sandbox.rollback_to = Some(target.clone()))
            .filter(|sandbox| sandbox.state == State::Running)
            .ok_or_else(not_found)?;
        // On record before it begins: if the server is killed right after the switch, the next
        // start sees another generation and knows what that one was restored from.
        let rolled_back = match self.save(entry).await {
            Ok(()) => {
                let order = super::order(&before, target.clone());
                self.fleet.rollback(order).await.map_err(Error::from)
            }
            Err(error) => Err(error),
        };
        let generation = match &rolled_back {
            Ok(created) => Some(created.generation),
            // On any error the old VM should run on; what counts is which one does.
            Err(_) => self.fleet.generation(&before.id),
        };
        let switched = generation.filter(|generation| *generation != before.generation);
        let after = entry.change(|sandbox| {
            sandbox.rollback_to = None;
            if let Some(generation) = switched {
                sandbox.generation = generation;
                sandbox.snapshot = target.clone();
                sandbox.base = target.clone();
            }
        });
        let saved = self.save(entry).await;
        match rolled_back {
            Ok(created) => {
                let sandbox = after.ok_or_else(not_found)?;
                saved?;
                let fields = [("snapshot", target.to_string())];
                self.log
                    .line(&sandbox.id, Level::Info, "sandbox rolled back", fields);
                Ok(RolledBack {
                    sandbox,
                    snapshot: target,
                    phases: created.phases.into_iter().map(of_fleet).collect(),
                })
            }
            Err(error) => {
                let message = format!("cannot be rolled back to {target}: {error}");
                self.log.line(&before.id, Level::Error, message, []);
                self.note_damage(&error).await;
                Err(match error {
                    // It was deleted a moment ago, or is lost.
                    Error::Fleet(FleetError::NoSnapshot { id }) => Error::SnapshotNotFound {
                        reference: id.to_string(),
                    },
                    error => error,
                })
            }
        }
    }
}
