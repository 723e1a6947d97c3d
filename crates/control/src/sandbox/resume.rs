//! A sandbox wakes up: because a client asks for it, or because of traffic.
//!
//! However many ask at once, it is resumed once; the others wait for that and share its outcome.

use std::{sync::Arc, time::Instant};

use cubicle_ids::SandboxId;
use tokio::sync::oneshot;

use super::{
    Entry, Inner, Lifetime, Pause, PauseMode, Sandbox, Sandboxes,
    create::of_fleet,
    later,
    operation::{Operation, Underway},
    sampler,
};
use crate::{
    db::now,
    error::{Error, Result},
    fleet::{FleetError, Level, Phase},
    lifecycle::{Event, State},
};

/// How often a sandbox may be found between two states with nobody moving it. Each time one
/// operation has ended and no other begun just then, so a few times is far too often already.
const LOOK_AGAIN: u32 = 100;

/// How to resume a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeSandbox {
    /// How long it is to live from now on.
    pub lifetime: Lifetime,
    /// Whether it is paused when that is over; `None`: as before.
    pub auto_pause: Option<bool>,
}

/// A sandbox that answers.
#[derive(Debug, Clone)]
pub struct Connected {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// True if it was paused before.
    pub resumed: bool,
    /// How long each step of that took, in order; empty if it ran already, or if another request
    /// resumed it.
    pub phases: Vec<Phase>,
}

impl Sandboxes {
    /// Resumes a paused sandbox and sets its end.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it runs.
    pub async fn resume(&self, id: &SandboxId, request: ResumeSandbox) -> Result<Connected> {
        let entry = self.inner.visible(id)?;
        let state = entry.sandbox().state;
        if state == State::Running {
            return Err(Error::Conflict {
                id: id.clone(),
                state,
                why: "it is already running",
            });
        }
        let awake = self.inner.wake(&entry, request, |_| true).await?;
        self.inner.at_least(&entry, awake, request.lifetime).await
    }

    /// What a client needs in order to use a sandbox, which is resumed if it is paused. Gives it
    /// at least `lifetime` from now.
    pub async fn connect(&self, id: &SandboxId, lifetime: Lifetime) -> Result<Connected> {
        let entry = self.inner.visible(id)?;
        let request = ResumeSandbox {
            lifetime,
            auto_pause: None,
        };
        let awake = self.inner.wake(&entry, request, |_| true).await?;
        self.inner.at_least(&entry, awake, lifetime).await
    }

    /// Has traffic wake a sandbox: returns once it runs. Its life begins anew, as long as it was
    /// asked for at first. One that runs is left alone.
    ///
    /// # Errors
    /// [`Error::Conflict`] if traffic does not wake it: it must have been created so, and paused
    /// with its memory.
    pub async fn wake(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        let entry = self.inner.visible(id)?;
        let request = ResumeSandbox {
            lifetime: entry.sandbox().lifetime,
            auto_pause: None,
        };
        let awake = self.inner.wake(&entry, request, wakes_by_traffic).await?;
        if awake.led {
            self.inner.metrics.woken();
        }
        Ok(awake.connected.sandbox)
    }

    /// Waits while a sandbox is on its way between two states; returns it as it is then.
    ///
    /// # Errors
    /// [`Error::SandboxNotFound`].
    pub async fn settled(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        let entry = self.inner.visible(id)?;
        let mut looked_again = 0;
        loop {
            let sandbox = entry.sandbox();
            match sandbox.state {
                State::Creating | State::Pausing | State::Resuming => {}
                State::Running | State::Paused => return Ok(sandbox),
                State::Killing | State::Dead => {
                    return Err(Error::SandboxNotFound { id: id.clone() });
                }
            }
            match entry.slot.current() {
                Some(ongoing) => ongoing.made_room().await,
                // It has just ended, and the state says how; unless whoever did it has died of it.
                None if looked_again == LOOK_AGAIN => return Ok(sandbox),
                None => {
                    looked_again += 1;
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

/// Whether traffic may wake a paused sandbox.
fn wakes_by_traffic(sandbox: &Sandbox) -> bool {
    let with_memory = |pause: &Pause| pause.mode == PauseMode::Full;
    sandbox.lifecycle.auto_resume && sandbox.pause.as_ref().is_some_and(with_memory)
}

/// A sandbox that runs.
struct Awake {
    connected: Connected,
    /// Whether it was resumed by this very request.
    led: bool,
}

impl Inner {
    /// Returns once a sandbox runs; resumes it if it is paused and `may` be.
    async fn wake(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        request: ResumeSandbox,
        may: impl Fn(&Sandbox) -> bool,
    ) -> Result<Awake> {
        let mut resumed = false;
        let mut looked_again = 0;
        loop {
            let sandbox = entry.sandbox();
            match sandbox.state {
                State::Running => {
                    let connected = Connected {
                        sandbox,
                        resumed,
                        phases: Vec::new(),
                    };
                    return Ok(Awake {
                        connected,
                        led: false,
                    });
                }
                State::Paused | State::Pausing if !may(&sandbox) => {
                    return Err(Error::Conflict {
                        id: sandbox.id.clone(),
                        state: sandbox.state,
                        why: "traffic does not wake it; connect to it",
                    });
                }
                State::Paused => {
                    if self.stopping.is_cancelled() {
                        return Err(Error::ShuttingDown);
                    }
                    if let Ok(underway) = entry.slot.begin(Operation::Resume) {
                        if entry.sandbox().state != State::Paused {
                            continue;
                        }
                        let connected = self.lead(entry, underway, request).await?;
                        return Ok(Awake {
                            connected,
                            led: true,
                        });
                    }
                }
                State::Pausing | State::Resuming => {}
                State::Creating | State::Killing | State::Dead => {
                    return Err(Error::SandboxNotFound {
                        id: sandbox.id.clone(),
                    });
                }
            }
            let Some(ongoing) = entry.slot.current() else {
                // It has just ended, and the state says how; unless whoever did it has died of it.
                looked_again += 1;
                if looked_again == LOOK_AGAIN {
                    return Err(Error::Conflict {
                        id: sandbox.id.clone(),
                        state: sandbox.state,
                        why: "it does not come to rest; kill it",
                    });
                }
                tokio::task::yield_now().await;
                continue;
            };
            if ongoing.operation == Operation::Resume {
                if let Some(outcome) = ongoing.ended().await {
                    outcome?;
                    resumed = true;
                }
            } else {
                ongoing.made_room().await;
            }
        }
    }

    /// Resumes a sandbox, in a task that outlives the client.
    async fn lead(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        underway: Underway,
        request: ResumeSandbox,
    ) -> Result<Connected> {
        let (answer, answered) = oneshot::channel();
        let (inner, entry) = (Arc::clone(self), Arc::clone(entry));
        self.tasks.spawn(async move {
            let began = Instant::now();
            let result = inner.resume(&entry, request).await;
            underway.tell(match &result {
                Ok(_) => Ok(()),
                Err(Error::Fleet(error)) => Err(error.clone()),
                Err(error) => Err(FleetError::Failed {
                    doing: format!("resume sandbox {}", entry.sandbox().id),
                    why: error.to_string(),
                }),
            });
            drop(underway);
            inner.look_after(&entry);
            inner
                .metrics
                .ended(Operation::Resume, result.is_ok(), began.elapsed());
            let _ = answer.send(result);
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }

    async fn resume(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        request: ResumeSandbox,
    ) -> Result<Connected> {
        let before = entry.sandbox();
        let not_found = || Error::SandboxNotFound {
            id: before.id.clone(),
        };
        let Some(pause) = before.pause.clone() else {
            return Err(Error::damaged(
                format!("sandbox {}", before.id),
                "it is paused, but no snapshot is on record",
            ));
        };
        let end_at = request.lifetime.end(now());
        entry
            .apply(Event::Resume, |sandbox| sandbox.end_at = end_at)
            .ok_or_else(not_found)?;
        let order = super::order(&before, pause.snapshot.clone());
        // On record before it begins: the VM that a crash leaves behind is then wanted.
        let resumed = match self.save(entry).await {
            Ok(()) => {
                let resumed = self.fleet.resume(order, before.generation).await;
                resumed.map_err(Error::from)
            }
            Err(error) => Err(error),
        };
        let created = match resumed {
            Ok(created) => created,
            Err(error) => {
                self.stayed_asleep(entry, &before, &error).await;
                return Err(error);
            }
        };
        let moved = entry.apply(Event::Resumed, |sandbox| {
            sandbox.generation = created.generation;
            if sandbox.end_at == end_at {
                // Nobody has set another one meanwhile.
                sandbox.end_at = request.lifetime.end(now());
            }
            sandbox.pause = None;
            if let Some(auto_pause) = request.auto_pause {
                sandbox.lifecycle.auto_pause = auto_pause;
            }
        });
        let Some(moved) = moved.filter(|moved| moved.sandbox.state == State::Running) else {
            // It was killed meanwhile; `pause` may be forgotten, so its snapshot goes from here.
            self.trash.discard(pause.snapshot);
            return Err(not_found());
        };
        self.follow_end(entry);
        match self.save(entry).await {
            Ok(()) => self.trash.discard(pause.snapshot),
            // Its row needs the snapshot until it says that the sandbox runs. If it never does, the
            // next start finds the VM, and that nothing owns the snapshot.
            Err(error) => {
                tracing::error!(sandbox = %before.id, %error, "the resume is not on record");
            }
        }
        self.log
            .line(&before.id, Level::Info, "sandbox resumed", []);
        sampler::begin(self, entry);
        Ok(Connected {
            sandbox: moved.sandbox,
            resumed: true,
            phases: created.phases.into_iter().map(of_fleet).collect(),
        })
    }

    /// A resume failed: what was paused before is paused again.
    async fn stayed_asleep(self: &Arc<Self>, entry: &Entry, before: &Sandbox, error: &Error) {
        let message = format!("cannot be resumed: {error}");
        self.log.line(&before.id, Level::Error, message, []);
        if self.fleet.generation(&before.id).is_some() {
            // Half a restore. Nothing has used it, and the snapshot has all of it.
            self.release(&before.id).await;
        }
        let moved = entry.apply(Event::ResumeFailed, |sandbox| {
            sandbox.end_at = before.end_at
        });
        if moved.is_some_and(|moved| moved.sandbox.state == State::Paused) {
            self.follow_end(entry);
            if let Err(error) = self.save(entry).await {
                // The next start finds no VM, and that it is paused.
                tracing::error!(sandbox = %before.id, %error, "a failed resume is not on record");
            }
        }
    }

    /// Gives a sandbox that somebody else resumed, or that ran already, at least this long.
    async fn at_least(&self, entry: &Entry, awake: Awake, lifetime: Lifetime) -> Result<Connected> {
        if awake.led {
            return Ok(awake.connected);
        }
        let sandbox = self
            .move_end(entry, |sandbox| later(sandbox.end_at, lifetime.end(now())))
            .await?;
        Ok(Connected {
            sandbox,
            ..awake.connected
        })
    }
}
