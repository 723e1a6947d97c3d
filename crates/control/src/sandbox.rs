//! Sandboxes: created, found, given more time, ended.
//!
//! [`Sandboxes`] keeps every live sandbox in memory and writes each change to the database before
//! it is visible, so that a restart finds what clients were told. Operations on VMs run in tasks of
//! their own: a client that goes away interrupts none of them.

mod create;
mod deadline;
mod end;
mod fork;
mod log;
mod model;
mod network;
pub(crate) mod operation;
mod pause;
mod query;
mod reconcile;
mod registry;
mod resume;
mod rollback;
mod sampler;
pub(crate) mod store;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_ids::{SandboxId, SnapshotId};
use time::OffsetDateTime;
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    create::{CreateSandbox, Creation, Idempotency},
    fork::{ForkSandbox, Forked, MAX_FORKS},
    log::{LogQuery, MAX_LOG_PAGE},
    model::{
        EndReason, LifecycleOptions, Lifetime, LogEntry, MAX_LIFETIME, Pause, PauseMode, Sample,
        Sandbox,
    },
    pause::{PauseSandbox, Paused},
    query::{BadCursor, Cursor, ListQuery, MAX_PAGE, Order, Page},
    reconcile::Reconciled,
    resume::{Connected, ResumeSandbox},
    rollback::RolledBack,
};
pub(crate) use self::{deadline::Deadlines, registry::Entry};
use self::{
    log::Log,
    model::later,
    operation::{Operation, Underway},
    registry::Registry,
    store::Store,
};
use crate::{
    db::{Db, now},
    error::{Error, Result},
    fleet::{CreateOrder, Level, SharedFleet},
    lifecycle::State,
    metrics::Metrics,
    snapshot::{self, Trash},
    template::Templates,
    volume::Volumes,
};

/// How the sandbox service behaves.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// Time between two samples of what a sandbox uses.
    pub sample_every: Duration,
    /// How long the row and the log of a dead sandbox are kept, and its idempotency key honoured.
    pub keep_dead: Duration,
    /// How long a sandbox whose time is up may run on while it cannot be paused.
    pub auto_pause_patience: Duration,
    /// How long a guest may take to write out its caches before only its disks are kept.
    pub quiesce: Duration,
    /// Copies of a fork that are restored at the same time.
    pub fork_at_once: usize,
    /// How long a kill may take before its caller is told that it goes on in the background.
    pub kill_patience: Duration,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            sample_every: Duration::from_secs(5),
            keep_dead: Duration::from_secs(24 * 3600),
            auto_pause_patience: Duration::from_secs(300),
            quiesce: Duration::from_secs(2),
            fork_at_once: 8,
            kill_patience: Duration::from_secs(30),
        }
    }
}

/// The sandboxes of this server. Cheap to clone.
#[derive(Clone)]
pub struct Sandboxes {
    pub(crate) inner: Arc<Inner>,
}

/// What the service shares with its tasks, and with the service of snapshots.
pub(crate) struct Inner {
    config: SandboxConfig,
    pub(crate) fleet: SharedFleet,
    templates: Templates,
    store: Store,
    snapshots: snapshot::Store,
    volumes: Volumes,
    pub(crate) trash: Trash,
    pub(crate) log: Log,
    registry: Registry,
    deadlines: Deadlines<SandboxId>,
    pub(crate) metrics: Arc<Metrics>,
    /// Every task that must end before the server may.
    pub(crate) tasks: TaskTracker,
    pub(crate) stopping: CancellationToken,
}

impl Sandboxes {
    /// Loads the live sandboxes, compares them with what the fleet has, and starts the tasks that
    /// watch over them.
    pub(crate) async fn open(
        config: SandboxConfig,
        db: Db,
        fleet: SharedFleet,
        templates: Templates,
        snapshots: snapshot::Store,
        volumes: Volumes,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Reconciled)> {
        let tasks = TaskTracker::new();
        let stopping = CancellationToken::new();
        let (log, log_writer) = Log::open(db.clone());
        // Not tracked: it ends with the last `Log`, which the tracked tasks hold.
        tokio::spawn(log_writer);
        let this = Self {
            inner: Arc::new(Inner {
                config,
                trash: Trash::new(fleet.clone(), tasks.clone(), stopping.clone()),
                fleet,
                templates,
                store: Store::new(db),
                snapshots,
                volumes,
                log,
                registry: Registry::default(),
                deadlines: Deadlines::default(),
                metrics,
                tasks,
                stopping,
            }),
        };
        // Subscribed before the comparison, so that nothing that happens in between is missed.
        let events = this.inner.fleet.events();
        let reconciled = this.inner.reconcile().await?;
        this.inner.start_tasks(events);
        Ok((this, reconciled))
    }

    /// A sandbox that clients can see.
    pub fn get(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        self.inner.visible(id).map(|entry| entry.sandbox())
    }

    /// Every sandbox that clients can see, in no order. Touches no database: fit for hot paths.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        let mut all = self.inner.registry.sandboxes();
        all.retain(|sandbox| sandbox.state.visible().is_some());
        all
    }

    /// How many sandboxes are in each state, dead ones left out.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts: BTreeMap<_, _> = State::ALL
            .into_iter()
            .filter(|state| *state != State::Dead)
            .map(|state| (state.as_str(), 0))
            .collect();
        for sandbox in self.inner.registry.sandboxes() {
            *counts.entry(sandbox.state.as_str()).or_default() += 1;
        }
        counts
    }

    /// A page of sandboxes.
    pub async fn list(&self, query: &ListQuery) -> Result<Page> {
        let template = match &query.template {
            Some(reference) => self.inner.templates.find_id(reference).await?,
            None => None,
        };
        Ok(query.page(self.inner.registry.sandboxes(), template.as_ref()))
    }

    /// Sets a sandbox's end, measured from now. May shorten its life; zero ends it.
    pub async fn set_lifetime(&self, id: &SandboxId, lifetime: Lifetime) -> Result<Arc<Sandbox>> {
        let entry = self.inner.visible(id)?;
        let sandbox = self.inner.move_end(&entry, |_| lifetime.end(now())).await?;
        let end = sandbox
            .end_at
            .map_or_else(|| "never".to_owned(), |end| end.to_string());
        self.inner
            .log
            .line(id, Level::Info, "timeout set", [("end_at", end)]);
        Ok(sandbox)
    }

    /// Gives a sandbox at least this long from now. Never shortens its life.
    pub async fn extend(&self, id: &SandboxId, lifetime: Lifetime) -> Result<Arc<Sandbox>> {
        let entry = self.inner.visible(id)?;
        self.inner
            .move_end(&entry, |sandbox| later(sandbox.end_at, lifetime.end(now())))
            .await
    }

    /// What a sandbox used, sampled every few seconds, oldest first, both ends included. Half an
    /// hour is kept. One that has done something since its last is sampled now.
    pub async fn metrics(
        &self,
        id: &SandboxId,
        start: Option<OffsetDateTime>,
        end: Option<OffsetDateTime>,
    ) -> Result<Vec<Sample>> {
        let entry = self.inner.visible(id)?;
        sampler::catch_up(&self.inner, [&entry]).await;
        Ok(entry.samples(start, end))
    }

    /// The latest sample of each of these sandboxes, which are sampled now if they have done
    /// something since, or of all that have one.
    pub async fn latest_metrics(&self, ids: Option<&[SandboxId]>) -> BTreeMap<SandboxId, Sample> {
        let entries = match ids {
            Some(ids) => ids
                .iter()
                .filter_map(|id| self.inner.visible(id).ok())
                .collect::<Vec<_>>(),
            None => self.inner.registry.entries(),
        };
        if ids.is_some() {
            sampler::catch_up(&self.inner, &entries).await;
        }
        entries
            .into_iter()
            .filter_map(|entry| {
                let sandbox = entry.sandbox();
                sandbox.state.visible()?;
                Some((sandbox.id.clone(), entry.latest_sample()?))
            })
            .collect()
    }

    /// A part of a sandbox's log. Works for a while after its end, too.
    pub async fn log(&self, id: &SandboxId, query: &LogQuery) -> Result<Vec<LogEntry>> {
        if self.inner.registry.get(id).is_none() && self.inner.store.get(id).await?.is_none() {
            return Err(Error::SandboxNotFound { id: id.clone() });
        }
        self.inner.log.read(id, query).await
    }

    /// Ends the tasks that watch over sandboxes and waits for operations under way. The sandboxes
    /// themselves run on.
    pub(crate) async fn close(&self) {
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

#[cfg(any(test, feature = "testing"))]
impl Sandboxes {
    /// How many sandboxes and deadlines are in memory, for tests that look for leaks.
    #[must_use]
    pub fn in_memory(&self) -> (usize, usize) {
        (
            self.inner.registry.entries().len(),
            self.inner.deadlines.len(),
        )
    }

    /// The ids of all of them, also of those that clients do not see.
    #[must_use]
    pub fn ids_in_memory(&self) -> Vec<SandboxId> {
        self.inner
            .registry
            .sandboxes()
            .iter()
            .map(|sandbox| sandbox.id.clone())
            .collect()
    }
}

impl Inner {
    /// The entry of a sandbox that clients can see.
    fn visible(&self, id: &SandboxId) -> Result<Arc<Entry>> {
        self.registry
            .get(id)
            .filter(|entry| entry.sandbox().state.visible().is_some())
            .ok_or_else(|| Error::SandboxNotFound { id: id.clone() })
    }

    /// Begins to do something with a running sandbox, or says what is in its way.
    pub(crate) fn begin(
        &self,
        id: &SandboxId,
        operation: Operation,
        why: &'static str,
    ) -> Result<(Arc<Entry>, Underway)> {
        if self.stopping.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        let entry = self.visible(id)?;
        let underway = entry.slot.begin(operation).map_err(|ongoing| Error::Busy {
            id: id.clone(),
            doing: ongoing.operation.as_str(),
        })?;
        // From here on only its end changes its state.
        match entry.sandbox().state {
            State::Running => Ok((entry, underway)),
            state if state.visible().is_some() => Err(Error::Conflict {
                id: id.clone(),
                state,
                why,
            }),
            _ => Err(Error::SandboxNotFound { id: id.clone() }),
        }
    }

    /// Sees an operation through in a task of its own, whether or not anybody still waits for it.
    async fn see_through<T, F>(
        self: &Arc<Self>,
        operation: Operation,
        (entry, underway): (Arc<Entry>, Underway),
        work: impl FnOnce(Arc<Self>, Arc<Entry>) -> F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let inner = Arc::clone(self);
        let working = work(Arc::clone(self), Arc::clone(&entry));
        self.tasks.spawn(async move {
            let began = Instant::now();
            let result = working.await;
            drop(underway);
            inner.look_after(&entry);
            inner
                .metrics
                .ended(operation, result.is_ok(), began.elapsed());
            let _ = answer.send(result);
        });
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// How long a guest may take to write out its caches before it is frozen anyway. With its
    /// memory they are kept, too.
    pub(crate) fn quiesce(&self, memory: bool) -> Option<Duration> {
        (!memory).then_some(self.config.quiesce)
    }

    /// Writes a sandbox down as it is now.
    async fn save(&self, entry: &Entry) -> Result<()> {
        let _last_writer_writes_the_latest = entry.row.lock().await;
        self.store.update(&entry.sandbox()).await
    }

    /// Has the timer follow a sandbox's end.
    fn follow_end(&self, entry: &Entry) {
        self.deadlines.set(&entry.sandbox().id, || {
            let sandbox = entry.sandbox();
            sandbox.end_at.filter(|_| sandbox.state.visible().is_some())
        });
    }

    /// Moves the end of a sandbox: in the database first, then in memory and for the timer.
    async fn move_end(
        &self,
        entry: &Entry,
        end: impl FnOnce(&Sandbox) -> Option<OffsetDateTime>,
    ) -> Result<Arc<Sandbox>> {
        let _one_at_a_time = entry.row.lock().await;
        let before = entry.sandbox();
        let not_found = || Error::SandboxNotFound {
            id: before.id.clone(),
        };
        before.state.visible().ok_or_else(not_found)?;
        let end_at = end(&before);
        if end_at == before.end_at {
            return Ok(before);
        }
        self.store.set_end(&before.id, end_at).await?;
        let after = entry
            .change(|sandbox| sandbox.end_at = end_at)
            .ok_or_else(not_found)?;
        self.follow_end(entry);
        Ok(after)
    }
}

/// What a machine needs to restore a sandbox that exists already.
fn order(sandbox: &Sandbox, snapshot: SnapshotId) -> CreateOrder {
    CreateOrder {
        id: sandbox.id.clone(),
        snapshot,
        template: sandbox.template.clone(),
        env_vars: sandbox.defaults.env_with(&sandbox.env_vars),
        user: sandbox.defaults.user.clone(),
        workdir: sandbox.defaults.workdir.clone(),
        dns: sandbox.defaults.dns.clone(),
        envd_token: sandbox.envd_token.clone(),
        network: sandbox.network.clone(),
        transient: false,
        mounts: sandbox.mounts.clone(),
    }
}

/// A running sandbox for tests of this module's parts.
#[cfg(test)]
fn test_sandbox() -> Sandbox {
    use cubicle_ids::TemplateId;
    Sandbox {
        id: SandboxId::generate(),
        template: TemplateId::generate(),
        build: uuid::Uuid::new_v4(),
        snapshot: SnapshotId::generate(),
        alias: None,
        state: State::Running,
        metadata: BTreeMap::new(),
        mounts: Vec::new(),
        network: crate::fleet::NetworkOptions::default(),
        envd_token: "token".into(),
        traffic_token: None,
        envd_version: "0.6.13".into(),
        cpu_count: 1,
        memory_mib: 256,
        disk_mib: 1024,
        defaults: crate::template::Defaults::default(),
        generation: 1,
        started_at: now(),
        end_at: Some(now() + time::Duration::HOUR),
        lifetime: Lifetime::For(Duration::from_secs(3600)),
        lifecycle: LifecycleOptions::default(),
        env_vars: vec![("A".into(), "1".into())],
        base: SnapshotId::generate(),
        pause: None,
        rollback_to: None,
    }
}
