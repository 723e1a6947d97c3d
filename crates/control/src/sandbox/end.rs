//! How a sandbox ends: killed, timed out, or by itself.
//!
//! An end begins with a transition in memory, from which moment nobody outside sees the sandbox
//! any more, and goes on in a task until the machine has released everything. It is tried again
//! until that is so.

use std::{sync::Arc, time::Duration};

use cubicle_ids::SandboxId;

use super::{EndReason, Entry, Inner, Sandbox, Sandboxes};
use crate::{
    error::{Error, Result},
    fleet::{FleetError, Level},
    lifecycle::{Event, State},
};

/// First and longest pause between two attempts to release a sandbox.
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

impl Sandboxes {
    /// Kills a sandbox, whatever it is doing, and returns when everything of it is released.
    ///
    /// # Errors
    /// [`Error::SandboxNotFound`] if there is none. [`FleetError::Failed`] if the machine has not
    /// managed to release it in time: it goes on trying, and clients do not see the sandbox any
    /// more.
    pub async fn kill(&self, id: &SandboxId) -> Result<()> {
        let entry = self
            .inner
            .registry
            .get(id)
            .ok_or_else(|| Error::SandboxNotFound { id: id.clone() })?;
        self.inner.begin_end(&entry, EndReason::Killed, |_| true);
        tokio::time::timeout(self.inner.config.kill_patience, entry.dead.cancelled())
            .await
            .map_err(|_| {
                Error::Fleet(FleetError::Failed {
                    doing: format!("release sandbox {id} in time"),
                    why: "the node has not finished; it goes on in the background".to_owned(),
                })
            })
    }
}

impl Inner {
    /// Starts the end of a sandbox if `condition` holds. Returns at once.
    pub(super) fn begin_end(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        reason: EndReason,
        condition: impl FnOnce(&Sandbox) -> bool,
    ) {
        let Some(moved) = entry.apply_if(Event::Kill, condition, |_| ()) else {
            return;
        };
        if matches!(moved.from, State::Killing | State::Dead) {
            return;
        }
        let reason = entry.end_reason(reason);
        let (inner, entry) = (Arc::clone(self), Arc::clone(entry));
        self.tasks
            .spawn(async move { inner.tear_down(&entry, reason).await });
    }

    /// A VM ended by itself. Ignores the end of a life that is over anyway.
    pub(super) fn exited(self: &Arc<Self>, id: &SandboxId, generation: u64) {
        let Some(entry) = self.registry.get(id) else {
            return;
        };
        if let Some(ongoing) = entry.slot.current()
            && ongoing.operation.ends_vm()
        {
            // Perhaps it was asked to end. That is known when whoever may have asked has ended.
            let inner = Arc::clone(self);
            self.tasks.spawn(async move {
                ongoing.made_room().await;
                inner.look_after(&entry);
            });
            return;
        }
        let current = |sandbox: &Sandbox| sandbox.generation == generation;
        if entry
            .apply_if(Event::Exited, current, |_| ())
            .is_none_or(|m| m.from == State::Killing)
        {
            return;
        }
        let reason = entry.end_reason(EndReason::Exited);
        self.log
            .line(id, Level::Error, "the virtual machine ended by itself", []);
        let inner = Arc::clone(self);
        self.tasks.spawn(async move {
            if inner.release(&entry.sandbox().id).await {
                inner.forget(&entry, reason).await;
            }
        });
    }

    /// After an operation that may have ended a VM: is the one that should be there?
    pub(super) fn look_after(self: &Arc<Self>, entry: &Entry) {
        let sandbox = entry.sandbox();
        if sandbox.state == State::Running
            && self.fleet.generation(&sandbox.id) != Some(sandbox.generation)
        {
            self.exited(&sandbox.id, sandbox.generation);
        }
    }

    async fn tear_down(&self, entry: &Arc<Entry>, reason: EndReason) {
        let sandbox = entry.sandbox();
        if let Err(error) = self.save(entry).await {
            // Only a restart in this very moment would miss it, and then its timeout ends it.
            tracing::warn!(sandbox = %sandbox.id, %error, "the kill is not on record");
        }
        let mut released = self.release(&sandbox.id).await;
        if let Some(ongoing) = entry.slot.current() {
            // The machine may have begun to restore it after it was told to release it.
            ongoing.made_room().await;
            released = self.release(&sandbox.id).await;
        }
        if !released {
            return;
        }
        entry.apply(Event::Killed, |_| ());
        self.forget(entry, reason).await;
    }

    /// Has the machine release everything of a sandbox, however often it takes to ask. False: the
    /// server stops first; its row says that it is to die, and the next start goes on from there.
    pub(super) async fn release(&self, id: &SandboxId) -> bool {
        let mut pause = RETRY_AFTER;
        while let Err(error) = self.fleet.kill(id).await {
            tracing::error!(sandbox = %id, %error, "cannot release it, trying again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stopping.cancelled() => return false,
            }
            pause = (pause * 2).min(RETRY_AFTER_MAX);
        }
        true
    }

    /// Drops a dead sandbox from memory and writes down its end.
    pub(super) async fn forget(&self, entry: &Arc<Entry>, reason: EndReason) {
        let sandbox = entry.sandbox();
        self.deadlines.set(&sandbox.id, || None);
        if let Some(pause) = &sandbox.pause {
            self.trash.discard(pause.snapshot.clone());
        }
        let fields = [("reason", reason.as_str().to_owned())];
        self.log
            .line(&sandbox.id, Level::Info, "sandbox ended", fields);
        if let Err(error) = self.store.bury(&sandbox.id, reason).await {
            tracing::error!(sandbox = %sandbox.id, %error, "its end is not on record");
        }
        self.registry.remove(&sandbox.id);
        entry.dead.cancel();
        tracing::info!(sandbox = %sandbox.id, reason = reason.as_str(), "ended");
    }
}
