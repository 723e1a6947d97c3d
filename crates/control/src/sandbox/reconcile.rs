//! Intent meets fact: at start, and whenever events of the fleet were missed.

use std::{collections::HashMap, sync::Arc};

use cubicle_ids::SandboxId;
use tokio::sync::broadcast::{self, error::RecvError};

use super::{EndReason, Inner, sampler};
use crate::{
    db::now,
    error::Result,
    fleet::{Fact, FleetEvent, Level},
    lifecycle::{Event, State},
};

/// Pause between two looks for dead sandboxes that are old enough to forget.
const PRUNE_EVERY: std::time::Duration = std::time::Duration::from_secs(3600);

/// What a restart found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Sandboxes that run on.
    pub kept: usize,
    /// Sandboxes whose VM is gone.
    pub lost: usize,
    /// VMs that nobody wants, killed.
    pub strays: usize,
}

impl Inner {
    /// Loads every sandbox that is not dead and compares it with what the fleet has.
    pub(super) async fn reconcile(self: &Arc<Self>) -> Result<Reconciled> {
        let mut facts: HashMap<SandboxId, Fact> = self
            .fleet
            .sandboxes()
            .await?
            .into_iter()
            .map(|f| (f.id.clone(), f))
            .collect();
        let mut report = Reconciled::default();
        for row in self.store.alive().await? {
            let fact = facts.remove(&row.id);
            let entry = self.registry.insert(row);
            entry.settled.cancel();
            let event = if fact.is_some() {
                Event::Found
            } else {
                Event::Missing
            };
            let Some(moved) = entry.apply(event, |sandbox| {
                if let Some(fact) = &fact {
                    sandbox.generation = fact.generation;
                }
            }) else {
                continue;
            };
            let sandbox = moved.sandbox;
            if let Some(fact) = fact
                && !sandbox.state.may_own_vm()
            {
                facts.insert(fact.id.clone(), fact);
            }
            match sandbox.state {
                State::Dead | State::Killing => {
                    report.lost += usize::from(moved.from == State::Running);
                    let reason = match moved.from {
                        State::Creating => EndReason::CreateFailed,
                        State::Killing => EndReason::Killed,
                        _ => EndReason::Lost,
                    };
                    entry.end_reason(reason);
                }
                _ => {
                    report.kept += 1;
                    self.store.update(&sandbox).await?;
                    self.deadlines.change(&sandbox.id, None, sandbox.end_at);
                }
            }
        }
        for stray in facts.into_values() {
            tracing::warn!(sandbox = %stray.id, "a virtual machine that nobody wants is killed");
            report.strays += 1;
            if let Err(error) = self.fleet.kill(&stray.id).await {
                tracing::error!(sandbox = %stray.id, %error, "cannot kill it");
            }
        }
        for entry in self.registry.entries() {
            if matches!(entry.sandbox().state, State::Dead | State::Killing) {
                let reason = entry.end_reason(EndReason::Lost);
                if reason == EndReason::Lost {
                    let id = &entry.sandbox().id;
                    self.log
                        .line(id, Level::Error, "the virtual machine is gone", []);
                }
                entry.apply(Event::Killed, |_| ());
                self.forget(&entry, reason).await;
            }
        }
        Ok(report)
    }

    /// Starts what watches over sandboxes.
    pub(super) fn start_tasks(self: &Arc<Self>, events: broadcast::Receiver<FleetEvent>) {
        let spawn = |task: futures::future::BoxFuture<'static, ()>| {
            let stopping = self.stopping.clone();
            self.tasks.spawn(async move {
                stopping.run_until_cancelled(task).await;
            });
        };
        spawn(Box::pin(watch_deadlines(Arc::clone(self))));
        spawn(Box::pin(watch_fleet(Arc::clone(self), events)));
        spawn(Box::pin(sampler::sample_all(Arc::clone(self))));
        spawn(Box::pin(prune(Arc::clone(self))));
    }
}

async fn watch_deadlines(inner: Arc<Inner>) {
    loop {
        for id in inner.deadlines.due().await {
            if let Some(entry) = inner.registry.get(&id) {
                // It may have been given more time since; its new end is with the timer already.
                inner.begin_end(&entry, EndReason::Timeout, |sandbox| {
                    sandbox.is_expired(now())
                });
            }
        }
    }
}

async fn watch_fleet(inner: Arc<Inner>, mut events: broadcast::Receiver<FleetEvent>) {
    loop {
        match events.recv().await {
            Ok(FleetEvent::Exited { id, generation }) => inner.exited(&id, generation),
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!(
                    missed,
                    "events of the fleet were missed; looking at every sandbox"
                );
                for sandbox in inner.registry.sandboxes() {
                    let gone = inner.fleet.generation(&sandbox.id).is_none();
                    if gone && sandbox.state == State::Running {
                        inner.exited(&sandbox.id, sandbox.generation);
                    }
                }
            }
            Err(RecvError::Closed) => return,
        }
    }
}

async fn prune(inner: Arc<Inner>) {
    loop {
        match inner.store.prune(now() - inner.config.keep_dead).await {
            Ok(0) => {}
            Ok(forgotten) => tracing::debug!(forgotten, "old sandboxes are forgotten"),
            Err(error) => tracing::error!(%error, "cannot forget old sandboxes"),
        }
        tokio::time::sleep(PRUNE_EVERY).await;
    }
}
