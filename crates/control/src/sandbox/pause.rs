//! A sandbox falls asleep: because a client asks for it, or because its time is up.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_ids::{SandboxId, SnapshotId};
use tokio::sync::oneshot;

use super::{
    EndReason, Entry, Inner, Pause, PauseMode, Sandbox, Sandboxes,
    operation::{Operation, Underway},
};
use crate::{
    db::now,
    error::{Error, Result},
    fleet::{FleetError, FreezeKind, FreezeOrder, Level, SnapshotTaken},
    lifecycle::{Event, State},
};

/// First and longest time between two attempts to pause a sandbox whose time is up.
const RETRY_AFTER: Duration = Duration::from_millis(500);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// How to pause a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseSandbox {
    /// Keep its memory. Without, it boots when it is resumed.
    pub memory: bool,
    /// Refuse if the guest does not answer.
    pub require_healthy: bool,
}

impl Default for PauseSandbox {
    fn default() -> Self {
        Self {
            memory: true,
            require_healthy: false,
        }
    }
}

/// A sandbox that was paused.
#[derive(Debug, Clone)]
pub struct Paused {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// How it was frozen.
    pub taken: SnapshotTaken,
}

impl Sandboxes {
    /// Pauses a running sandbox: what it is becomes a snapshot, and its VM goes. If that fails it
    /// runs on. A paused sandbox has no end until it is given one.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it is paused already, [`Error::Busy`] while something else is done
    /// with it.
    pub async fn pause(&self, id: &SandboxId, request: PauseSandbox) -> Result<Paused> {
        let why = "only a running sandbox can be paused";
        let (entry, underway) = self.inner.begin(id, Operation::Pause, why)?;
        let (answer, answered) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        self.inner.tasks.spawn(async move {
            let result = inner.pause(&entry, underway, request, |_| true).await;
            if result.is_err() {
                // Its time may have come meanwhile, unnoticed.
                inner.follow_end(&entry);
            }
            let _ = answer.send(result);
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }
}

impl Inner {
    /// Pauses a sandbox if `condition` holds.
    async fn pause(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        underway: Underway,
        request: PauseSandbox,
        condition: impl FnOnce(&Sandbox) -> bool,
    ) -> Result<Paused> {
        let began = Instant::now();
        let pause = Pause {
            snapshot: SnapshotId::generate(),
            mode: PauseMode::of(request.memory),
            at: now(),
        };
        let order = FreezeOrder {
            id: entry.sandbox().id.clone(),
            snapshot: pause.snapshot.clone(),
            kind: FreezeKind::Pause,
            memory: request.memory,
            quiesce: self.quiesce(request.memory),
            require_healthy: request.require_healthy,
        };
        let snapshot = pause.snapshot.clone();
        entry
            .apply_if(Event::Pause, condition, |sandbox| {
                sandbox.pause = Some(pause);
            })
            .ok_or_else(|| refused(entry))?;
        // On record before it begins: what a crash leaves behind is then known to be a pause.
        let taken = match self.save(entry).await {
            Ok(()) => self.fleet.pause(order).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        let result = match taken {
            Ok(taken) => self
                .fell_asleep(entry)
                .await
                .map(|sandbox| Paused { sandbox, taken }),
            Err(error) => {
                if self.is_what_is_left(entry, &snapshot).await {
                    tracing::error!(%snapshot, %error, "the pause succeeded, but not quite");
                    self.fell_asleep(entry).await?;
                } else {
                    self.stayed_awake(entry, snapshot, &error).await;
                }
                Err(error)
            }
        };
        drop(underway);
        self.look_after(entry);
        self.metrics
            .ended(Operation::Pause, result.is_ok(), began.elapsed());
        if let Ok(paused) = &result {
            self.metrics.frozen(Operation::Pause, &paused.taken);
        }
        result
    }

    /// Whether all that there is of a sandbox is its snapshot.
    async fn is_what_is_left(&self, entry: &Entry, snapshot: &SnapshotId) -> bool {
        if self.fleet.generation(&entry.sandbox().id).is_some() {
            return false;
        }
        let facts = self.fleet.snapshots().await.unwrap_or_default();
        facts
            .iter()
            .any(|fact| fact.id == *snapshot && fact.failure.is_none())
    }

    async fn fell_asleep(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<Arc<Sandbox>> {
        let moved = entry.apply(Event::Paused, |sandbox| sandbox.end_at = None);
        let Some(moved) = moved.filter(|moved| moved.sandbox.state == State::Paused) else {
            // It was killed meanwhile, and whoever did that deletes the snapshot, too.
            return Err(Error::SandboxNotFound {
                id: entry.sandbox().id.clone(),
            });
        };
        self.follow_end(entry);
        if let Err(error) = self.save(entry).await {
            // The row says that it is being paused, and the next start finds that it has been.
            tracing::error!(sandbox = %moved.sandbox.id, %error, "the pause is not on record");
        }
        let mode = moved.sandbox.pause.as_ref().map(|pause| pause.mode);
        let fields = [("mode", mode.map_or("", PauseMode::as_str).to_owned())];
        self.log
            .line(&moved.sandbox.id, Level::Info, "sandbox paused", fields);
        Ok(moved.sandbox)
    }

    async fn stayed_awake(self: &Arc<Self>, entry: &Entry, snapshot: SnapshotId, error: &Error) {
        let sandbox = entry.sandbox();
        let moved = entry.apply(Event::PauseFailed, |sandbox| sandbox.pause = None);
        if moved.is_some_and(|moved| moved.sandbox.state == State::Running) {
            if let Err(error) = self.save(entry).await {
                // The next start finds its VM, and that it runs on.
                tracing::error!(sandbox = %sandbox.id, %error, "the end of a pause is not on record");
            }
            let message = format!("cannot be paused: {error}");
            self.log.line(&sandbox.id, Level::Error, message, []);
        }
        self.trash.discard(snapshot);
    }

    /// Pauses a sandbox because its time is up.
    ///
    /// If that fails it runs on and the pause is tried again for a while. After that, a pause
    /// that was to keep its memory is tried without (its files are worth more than nothing), and
    /// only if that fails, too, is the sandbox killed. Whoever gives it more time, pauses or kills
    /// it ends all this.
    pub(super) fn begin_auto_pause(self: &Arc<Self>, entry: &Arc<Entry>) {
        let (inner, entry) = (Arc::clone(self), Arc::clone(entry));
        let stopping = self.stopping.clone();
        self.tasks.spawn(async move {
            let patience = inner.config.auto_pause_patience;
            let deadline = Instant::now() + patience;
            let mut wait = RETRY_AFTER;
            for attempt in 0.. {
                let last = attempt > 0 && Instant::now() >= deadline;
                match inner.auto_pause(&entry, last).await {
                    Outcome::Over => return,
                    Outcome::Failed if last => break,
                    Outcome::Failed => {}
                }
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = entry.dead.cancelled() => return,
                    // The next start finds that its time is up.
                    () = stopping.cancelled() => return,
                }
                let left = deadline.saturating_duration_since(Instant::now());
                wait = (wait * 2).min(RETRY_AFTER_MAX).min(left);
            }
            let id = &entry.sandbox().id;
            let message = "its time is up and it cannot be paused";
            inner.log.line(id, Level::Error, message, []);
            inner.begin_end(&entry, EndReason::PauseLost, is_due);
        });
    }

    async fn auto_pause(self: &Arc<Self>, entry: &Arc<Entry>, last: bool) -> Outcome {
        let underway = loop {
            if !is_due(&entry.sandbox()) {
                return Outcome::Over;
            }
            match entry.slot.begin(Operation::Pause) {
                Ok(underway) => break underway,
                Err(ongoing) => ongoing.made_room().await,
            }
        };
        let lifecycle = entry.sandbox().lifecycle;
        let request = PauseSandbox {
            memory: lifecycle.auto_pause_memory && !last,
            require_healthy: false,
        };
        let inner = Arc::clone(self);
        match inner.pause(entry, underway, request, is_due).await {
            Ok(_) => {
                self.metrics.auto_paused(true);
                Outcome::Over
            }
            Err(error) if !is_due(&entry.sandbox()) => {
                tracing::debug!(%error, "not paused: that is not wanted any more");
                Outcome::Over
            }
            Err(error) => {
                let sandbox = entry.sandbox();
                tracing::error!(sandbox = %sandbox.id, %error, last, "cannot pause it in time");
                self.metrics.auto_paused(false);
                match error {
                    // It never will.
                    Error::Fleet(FleetError::Unsupported { .. }) => {
                        self.begin_end(entry, EndReason::Timeout, is_due);
                        Outcome::Over
                    }
                    _ => Outcome::Failed,
                }
            }
        }
    }
}

/// What an attempt to pause a sandbox whose time is up leaves to do.
enum Outcome {
    /// Nothing.
    Over,
    /// It must be tried again.
    Failed,
}

/// Whether a sandbox is to be paused because its time is up.
fn is_due(sandbox: &Sandbox) -> bool {
    sandbox.state == State::Running && sandbox.lifecycle.auto_pause && sandbox.is_expired(now())
}

/// Why a running sandbox could not begin to be paused.
fn refused(entry: &Entry) -> Error {
    let sandbox = entry.sandbox();
    match sandbox.state {
        State::Killing | State::Dead => Error::SandboxNotFound {
            id: sandbox.id.clone(),
        },
        state => Error::Conflict {
            id: sandbox.id.clone(),
            state,
            why: "only a running sandbox can be paused",
        },
    }
}
