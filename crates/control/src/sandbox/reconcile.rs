//! Intent meets fact: at start, and whenever events of the fleet were missed.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use cubicle_ids::{SandboxId, SnapshotId};
use tokio::sync::broadcast::{self, error::RecvError};

use super::{EndReason, Entry, Inner, Pause, Sandbox, sampler};
use crate::{
    db::now,
    error::Result,
    fleet::{Fact, FleetError, FleetEvent, Level, SnapshotFact},
    lifecycle::{self, Event, State},
    snapshot,
};

/// Pause between two looks for dead sandboxes that are old enough to forget.
const PRUNE_EVERY: std::time::Duration = std::time::Duration::from_secs(3600);

/// What a restart found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Sandboxes that go on, running or paused.
    pub kept: usize,
    /// Sandboxes whose VM is gone.
    pub lost: usize,
    /// VMs that nobody wants, killed.
    pub strays: usize,
    /// Snapshots that nobody wants, deleted.
    pub stray_snapshots: usize,
    /// Snapshots that cannot be used any more.
    pub failed_snapshots: usize,
}

/// What the fleet has of a sandbox when the server starts.
struct Found<'a> {
    vm: Option<&'a Fact>,
    /// The store, if it says what it has.
    snapshots: Option<&'a HashMap<SnapshotId, SnapshotFact>>,
}

impl Found<'_> {
    /// What that means for a sandbox of which this was on record.
    fn event(&self, row: &Sandbox) -> Event {
        let slept = |pause: &Pause| {
            let fact = self.snapshots.and_then(|facts| facts.get(&pause.snapshot));
            fact.is_some_and(|fact| fact.failure.is_none())
        };
        match self.vm {
            Some(_) => Event::Found,
            // Its pause had succeeded, but for the last line on record.
            None if row.state == State::Pausing && row.pause.as_ref().is_some_and(slept) => {
                Event::Paused
            }
            None => Event::Missing,
        }
    }

    /// Brings what is on record in line with the state that follows.
    fn correct(&self, from: State, to: State, sandbox: &mut Sandbox) {
        let switched_to = sandbox.rollback_to.take();
        if let Some(vm) = self.vm {
            if vm.generation != sandbox.generation
                && let Some(snapshot) = switched_to
            {
                sandbox.snapshot = snapshot.clone();
                sandbox.base = snapshot;
            }
            if to == State::Running {
                sandbox.generation = vm.generation;
            }
        }
        match (from, to) {
            (_, State::Running) => sandbox.pause = None,
            (State::Pausing | State::Resuming, State::Paused) => sandbox.end_at = None,
            _ => {}
        }
    }
}

impl Inner {
    /// Loads every sandbox that is not dead, and compares it and all snapshots with what the fleet
    /// has.
    pub(super) async fn reconcile(self: &Arc<Self>) -> Result<Reconciled> {
        let mut vms: HashMap<SandboxId, Fact> = self
            .fleet
            .sandboxes()
            .await?
            .into_iter()
            .map(|f| (f.id.clone(), f))
            .collect();
        let snapshots: Option<HashMap<SnapshotId, SnapshotFact>> =
            match self.fleet.snapshots().await {
                Ok(facts) => Some(facts.into_iter().map(|f| (f.id.clone(), f)).collect()),
                Err(FleetError::Unsupported { .. }) => None,
                Err(error) => return Err(error.into()),
            };
        let mut report = Reconciled::default();
        for row in self.store.alive().await? {
            let vm = vms.remove(&row.id);
            let found = Found {
                vm: vm.as_ref(),
                snapshots: snapshots.as_ref(),
            };
            let event = found.event(&row);
            let from = row.state;
            let entry = self.registry.insert(row);
            let Some(moved) = entry.apply(event, |sandbox| {
                if let Some(to) = lifecycle::next(from, event) {
                    found.correct(from, to, sandbox);
                }
            }) else {
                continue;
            };
            let sandbox = moved.sandbox;
            if let Some(vm) = vm
                && !sandbox.state.may_own_vm()
            {
                vms.insert(vm.id.clone(), vm);
            }
            match sandbox.state {
                State::Dead | State::Killing => {
                    report.lost += usize::from(matches!(from, State::Running | State::Pausing));
                    let reason = match from {
                        State::Creating => EndReason::CreateFailed,
                        State::Killing => EndReason::Killed,
                        _ => EndReason::Lost,
                    };
                    entry.end_reason(reason);
                }
                _ => {
                    report.kept += 1;
                    self.save(&entry).await?;
                    self.follow_end(&entry);
                    if sandbox.state == State::Running {
                        self.confirm_network(&sandbox).await;
                    }
                }
            }
        }
        for stray in vms.into_values() {
            tracing::warn!(sandbox = %stray.id, "a virtual machine that nobody wants is killed");
            report.strays += 1;
            if let Err(error) = self.fleet.kill(&stray.id).await {
                tracing::error!(sandbox = %stray.id, %error, "cannot kill it, trying again");
                let inner = Arc::clone(self);
                self.tasks
                    .spawn(async move { inner.release(&stray.id).await });
            }
        }
        self.bury_the_dead().await;
        if let Some(facts) = snapshots {
            let paused = self.registry.sandboxes();
            let paused = paused.iter().filter_map(|sandbox| sandbox.pause.as_ref());
            let paused: HashSet<_> = paused.map(|pause| pause.snapshot.clone()).collect();
            let swept = snapshot::reconcile(&self.snapshots, &self.trash, facts, &paused).await?;
            report.stray_snapshots = swept.dropped;
            report.failed_snapshots = swept.failed;
            for snapshot in swept.finished {
                let Some(entry) = self.registry.get(&snapshot.sandbox) else {
                    continue;
                };
                if snapshot.parent.as_ref() == Some(&entry.sandbox().base) {
                    entry.change(|sandbox| sandbox.base = snapshot.id);
                    self.save(&entry).await?;
                }
            }
        }
        Ok(report)
    }

    /// Writes down the end of every sandbox that a restart found dead or dying.
    async fn bury_the_dead(&self) {
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

impl Inner {
    /// Ends or pauses a sandbox, unless it was given more time since; then its new end is with the
    /// timer already.
    fn time_is_up(self: &Arc<Self>, entry: &Arc<Entry>) {
        let sandbox = entry.sandbox();
        if !sandbox.is_expired(now()) {
            return;
        }
        match sandbox.state {
            State::Running if sandbox.lifecycle.auto_pause => self.begin_auto_pause(entry),
            State::Pausing | State::Resuming => {
                // What is under way sets its end anew, or leaves it to be looked at again.
                let (inner, entry) = (Arc::clone(self), Arc::clone(entry));
                self.tasks.spawn(async move {
                    if let Some(ongoing) = entry.slot.current() {
                        ongoing.made_room().await;
                    }
                    inner.follow_end(&entry);
                });
            }
            _ => self.begin_end(entry, EndReason::Timeout, |sandbox| {
                let busy = matches!(sandbox.state, State::Pausing | State::Resuming);
                sandbox.is_expired(now()) && !busy
            }),
        }
    }
}

async fn watch_deadlines(inner: Arc<Inner>) {
    loop {
        for id in inner.deadlines.due().await {
            if let Some(entry) = inner.registry.get(&id) {
                inner.time_is_up(&entry);
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
        if let Err(error) = inner.snapshots.prune().await {
            tracing::error!(%error, "cannot forget deleted snapshots");
        }
        tokio::time::sleep(PRUNE_EVERY).await;
    }
}
