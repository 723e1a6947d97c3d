//! The node itself: what it is put together from and what can be asked of it.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cubicle_cow::Store;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_net::{EgressPolicy, SlotPool};
use cubicle_protocol::guest_api::{CopyQuery, LogEntry};
use cubicle_vmm::{Hypervisor, VmUsage};
use http::{Request, Response};
use rustix::fs::{FlockOperation, flock};
use tokio::sync::broadcast;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    adopt,
    config::NodeConfig,
    create,
    error::{Error, Result},
    facts::{
        AdoptionReport, Capacity, CreateSandbox, Created, KillOutcome, NodeEvent, SandboxFact,
        SandboxMetrics, SandboxState, TakeSnapshot, Taken,
    },
    failpoint::FailPoints,
    freeze::Turns,
    guest::Guest,
    journal::{Journal, Key},
    kill,
    link::{Body, GuestStream},
    metrics,
    program::{self, Printed, ProgramEnd, RunProgram},
    registry::Registry,
    restore,
    sandbox::Operation,
    slots::Slots,
    spares::{self, Spares},
    template::{self, BuiltTemplate, TemplateBuild},
};

/// Events that a slow receiver may lag behind before it loses some.
const EVENT_BACKLOG: usize = 4096;

/// File name of the journal, in the data directory.
const JOURNAL: &str = "node.db";

/// The owner of every VM, slot and volume on one machine. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    pub(crate) inner: Arc<Inner>,
}

/// What the node is made of; shared by all its tasks.
pub(crate) struct Inner {
    pub(crate) config: NodeConfig,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) store: Store,
    pub(crate) slots: Slots,
    pub(crate) journal: Journal,
    pub(crate) registry: Registry,
    pub(crate) spares: Spares,
    pub(crate) turns: Turns,
    pub(crate) events: broadcast::Sender<NodeEvent>,
    /// Everything that runs on behalf of a sandbox or a build.
    pub(crate) tasks: TaskTracker,
    /// Builds end and are cleaned up.
    pub(crate) closing: CancellationToken,
    /// Owner tasks let go of what they own and leave it running.
    pub(crate) abandon: CancellationToken,
    pub(crate) failpoints: FailPoints,
    /// Locked for as long as the node is open.
    _lock: File,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("data_dir", &self.inner.config.data_dir)
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Opens the node: takes over the sandboxes whose VM lived on, removes what is left of all
    /// others. `slots` must have been opened and not used yet; without any, sandboxes have no
    /// network.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has it open; or if the journal cannot be read. A
    /// sandbox that cannot be taken over is no error but a line of the report.
    pub async fn open(
        config: NodeConfig,
        hypervisor: Arc<dyn Hypervisor>,
        store: Store,
        slots: Option<SlotPool>,
    ) -> Result<(Self, AdoptionReport)> {
        let lock = prepare_dirs(&config)?;
        let journal = Journal::open(&config.data_dir.join(JOURNAL)).await?;
        let inner = Arc::new(Inner {
            registry: Registry::new(config.limits),
            spares: Spares::new(config.spares),
            turns: Turns::for_host(),
            config,
            hypervisor,
            store,
            slots: Slots::new(slots),
            journal,
            events: broadcast::Sender::new(EVENT_BACKLOG),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            abandon: CancellationToken::new(),
            failpoints: FailPoints::default(),
            _lock: lock,
        });
        let report = adopt::adopt(&inner).await?;
        inner.tasks.spawn(spares::keep_making(inner.clone()));
        Ok((Self { inner }, report))
    }

    /// Makes a sandbox from a snapshot and returns once its guest has answered and knows who it
    /// is. If the returned future is dropped, the sandbox is removed.
    ///
    /// # Errors
    /// [`Error::is_capacity`] errors when there is no room; [`Error::Exists`];
    /// [`Error::Killed`] if a kill overtook it; and whatever fails on the way. After an error
    /// nothing is left of the sandbox.
    pub async fn create(&self, order: CreateSandbox) -> Result<Created> {
        create::create(&self.inner, order).await
    }

    /// Removes a sandbox, whatever it is doing, and returns when nothing of it is left.
    ///
    /// # Errors
    /// [`Error::KillTimeout`] if that takes too long; the removal goes on.
    pub async fn kill(&self, id: &SandboxId) -> Result<KillOutcome> {
        kill::kill(&self.inner, id).await
    }

    /// Freezes a running sandbox, for as long as it takes to copy what it has changed, and publishes
    /// a snapshot of it. The sandbox runs on, also after an error.
    ///
    /// It is seen through even if the returned future is dropped.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Busy`] while another operation on it is under way;
    /// [`Error::Unresponsive`]; and whatever fails on the way.
    pub async fn snapshot(&self, id: &SandboxId, order: TakeSnapshot) -> Result<Taken> {
        let sandbox = self.inner.registry.get(id)?;
        sandbox.ask(|reply| Operation::Snapshot(order, reply)).await
    }

    /// The same, after which the sandbox is removed: the snapshot is all there is of it. After an
    /// error it runs on.
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot).
    pub async fn pause(&self, id: &SandboxId, order: TakeSnapshot) -> Result<Taken> {
        let sandbox = self.inner.registry.get(id)?;
        sandbox.ask(|reply| Operation::Pause(order, reply)).await
    }

    /// Makes a running sandbox what a snapshot holds: restores it beside the running VM, and once
    /// it has answered lets it take that one's place under a new generation. After an error the old
    /// VM goes on as if nothing had been asked.
    ///
    /// It is seen through even if the returned future is dropped.
    ///
    /// # Errors
    /// As [`create`](Self::create); [`Error::Busy`] while another operation on it is under way.
    pub async fn rollback(&self, order: CreateSandbox) -> Result<Created> {
        let sandbox = self.inner.registry.get(&order.id)?;
        sandbox
            .ask(|reply| Operation::Rollback(Box::new(order), reply))
            .await
    }

    /// Replaces what a running sandbox may reach: on return every packet obeys the policy, also
    /// those of connections that exist. After an error the one before is in force. Whoever resumes
    /// or rolls the sandbox back says again what it may reach.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Busy`] while another operation on it is under way; or if the
    /// kernel refuses.
    pub async fn set_egress(&self, id: &SandboxId, policy: EgressPolicy) -> Result<()> {
        let sandbox = self.inner.registry.get(id)?;
        sandbox
            .ask(|reply| Operation::SetEgress(policy, reply))
            .await
    }

    /// Makes a snapshot that sandboxes are created from: image, cold boot, readiness, warm-up,
    /// freeze, and a restore that proves it. If the returned future is dropped, the build is
    /// undone.
    ///
    /// # Errors
    /// Whatever fails on the way; nothing is left of the build then.
    pub async fn build_template(
        &self,
        build: TemplateBuild,
        progress: cubicle_image::Progress,
    ) -> Result<BuiltTemplate> {
        template::build(&self.inner, build, progress).await
    }

    /// The sandboxes on this node, oldest first.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<SandboxFact> {
        self.inner.registry.facts()
    }

    /// One sandbox, if it is on this node.
    #[must_use]
    pub fn sandbox(&self, id: &SandboxId) -> Option<SandboxFact> {
        self.inner.registry.get(id).ok()?.fact()
    }

    /// Which VM a running sandbox has now: connections kept for a lower generation are dead.
    #[must_use]
    pub fn generation(&self, id: &SandboxId) -> Option<u64> {
        let sandbox = self.inner.registry.get(id).ok()?;
        sandbox.live().ok().map(|live| live.generation)
    }

    /// What happens without being asked for, from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<NodeEvent> {
        self.inner.events.subscribe()
    }

    /// Sends a request to the sandbox's guest daemon. Path, query, headers and body arrive as they
    /// are; calls that only the host may make are not told apart here.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::NotReady`], [`Error::Killed`] if it is killed meanwhile,
    /// [`Error::Broken`] if the connection breaks before the answer began.
    pub async fn request(&self, id: &SandboxId, request: Request<Body>) -> Result<Response<Body>> {
        self.inner
            .registry
            .get(id)?
            .live()?
            .link
            .request(request)
            .await
    }

    /// Opens a stream to a TCP port on the sandbox's localhost.
    ///
    /// # Errors
    /// [`Error::PortClosed`] if nothing listens there; otherwise as [`request`](Self::request).
    pub async fn connect(&self, id: &SandboxId, port: u16) -> Result<GuestStream> {
        self.inner
            .registry
            .get(id)?
            .live()?
            .link
            .connect(port)
            .await
    }

    /// Runs a program in a sandbox until it ends; `printed` is told what it prints. When the caller
    /// goes away, the program runs on.
    ///
    /// # Errors
    /// [`Error::NoProgram`] if it is not there, [`Error::Program`] if its end is not known or its
    /// time was up; otherwise as [`request`](Self::request). A program that fails is none.
    pub async fn run(
        &self,
        id: &SandboxId,
        program: &RunProgram,
        printed: impl FnMut(Printed),
    ) -> Result<ProgramEnd> {
        let live = self.inner.registry.get(id)?.live()?;
        program::run(id, &live.link, program, printed).await
    }

    /// Puts the files of an archive (tar) into their places in a sandbox.
    ///
    /// # Errors
    /// [`Error::Copy`]; otherwise as [`request`](Self::request). What was placed before stays.
    pub async fn copy(&self, id: &SandboxId, query: &CopyQuery, archive: Body) -> Result<()> {
        let live = self.inner.registry.get(id)?.live()?;
        program::copy(id, &live.link, query, archive).await
    }

    /// Boots what a template is built from and throws it away: how long a sandbox would take if
    /// nothing were restored.
    ///
    /// # Errors
    /// As [`build_template`](Self::build_template); nothing is left.
    pub async fn measure_boot(&self, build: TemplateBuild) -> Result<Duration> {
        template::measure_boot(&self.inner, build).await
    }

    /// What a sandbox uses, as its guest and as the host see it.
    ///
    /// # Errors
    /// [`Error::NotFound`], or if the guest does not answer.
    pub async fn metrics(&self, id: &SandboxId) -> Result<SandboxMetrics> {
        let live = self.inner.registry.get(id)?.live()?;
        metrics::measure(id, &live).await
    }

    /// CPU time that a running sandbox's VM has used since it was started. Costs next to nothing.
    #[must_use]
    pub fn cpu_time(&self, id: &SandboxId) -> Option<Duration> {
        let live = self.inner.registry.get(id).ok()?.live().ok()?;
        live.vm.cpu_time_us().ok().map(Duration::from_micros)
    }

    /// What a sandbox's VM uses of the host, without asking the guest.
    ///
    /// # Errors
    /// [`Error::NotFound`], or if the VM has just ended.
    pub async fn usage(&self, id: &SandboxId) -> Result<VmUsage> {
        Ok(self.inner.registry.get(id)?.live()?.vm.usage().await?)
    }

    /// The guest daemon's lifecycle log, oldest entry first.
    ///
    /// # Errors
    /// [`Error::NotFound`], or if the guest does not answer.
    pub async fn logs(&self, id: &SandboxId) -> Result<Vec<LogEntry>> {
        let live = self.inner.registry.get(id)?.live()?;
        Guest {
            id,
            link: &live.link,
        }
        .logs()
        .await
    }

    /// How full the node is.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        let registry = &self.inner.registry;
        let promised = registry.promised();
        Capacity {
            creating: registry.count(SandboxState::Creating),
            running: registry.count(SandboxState::Running),
            removing: registry.count(SandboxState::Removing),
            max_sandboxes: registry.limits().max_sandboxes,
            cpus_promised: promised.cpus,
            memory_promised_mib: promised.memory_mib,
            memory_budget_mib: registry.limits().memory_budget_mib,
            slots: self.inner.slots.counts(),
            spares: self.inner.spares.counts(),
        }
    }

    /// Memory that VMs take which wait for sandboxes to come, in bytes. Takes the kernel some
    /// milliseconds to count.
    pub async fn spare_memory(&self) -> u64 {
        self.inner.spares.memory().await
    }

    /// Whether sandboxes can be made from a snapshot here: it is there, and it is of a machine that
    /// this node makes. An upgrade of the hypervisor may end that.
    #[must_use]
    pub fn can_restore(&self, id: &SnapshotId) -> bool {
        self.inner
            .store
            .snapshot(id)
            .is_ok_and(|snapshot| restore::check_machine(&self.inner, &snapshot).is_ok())
    }

    /// Deletes a snapshot, whoever descends from it. Sandboxes made from it run on.
    ///
    /// # Errors
    /// [`cubicle_cow::Error::NotFound`]; or if the store cannot be changed.
    pub async fn delete_snapshot(&self, id: &SnapshotId) -> Result<()> {
        self.inner.spares.forget(id);
        Ok(self.inner.store.delete(id).await?)
    }

    /// The store of snapshots and volumes.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Name of the hypervisor driver.
    #[must_use]
    pub fn hypervisor(&self) -> &'static str {
        self.inner.hypervisor.name()
    }

    /// Points at which tests make this node fail.
    #[cfg(any(test, feature = "failpoints"))]
    #[must_use]
    pub fn failpoints(&self) -> &FailPoints {
        &self.inner.failpoints
    }

    /// Ends the node, all its sandboxes and its slot pool; nothing is left behind but snapshots.
    /// Builds are undone. The store stays open.
    ///
    /// # Errors
    /// [`Error::KillTimeout`] with the first sandbox that would not go; the others are gone.
    pub async fn shutdown(&self) -> Result<()> {
        let sandboxes = self.stop_taking();
        for sandbox in &sandboxes {
            sandbox.stop();
        }
        let patience = self.inner.config.deadlines.kill;
        let mut outcome = Ok(());
        for sandbox in &sandboxes {
            outcome = outcome.and(sandbox.gone(patience).await);
        }
        outcome.and(self.finish().await)
    }

    /// Ends the node but leaves its sandboxes running, for the next [`Node::open`] to adopt.
    /// Sandboxes that are still being made are removed, and builds are undone.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown).
    pub async fn detach(&self) -> Result<()> {
        let patience = self.inner.config.deadlines.kill;
        let mut outcome = Ok(());
        for sandbox in self.stop_taking() {
            if sandbox.state() == Some(SandboxState::Running) {
                continue;
            }
            sandbox.stop();
            outcome = outcome.and(sandbox.gone(patience).await);
        }
        self.inner.abandon.cancel();
        outcome.and(self.finish().await)
    }

    fn stop_taking(&self) -> Vec<Arc<crate::sandbox::Sandbox>> {
        self.inner.closing.cancel();
        self.inner.registry.close()
    }

    async fn finish(&self) -> Result<()> {
        self.inner.abandon.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        let closed = self.inner.slots.close().await;
        self.inner.journal.close().await;
        closed
    }
}

impl Inner {
    /// Directory of one VM's sockets and logs.
    pub(crate) fn vm_run_dir(&self, key: &Key) -> PathBuf {
        self.vms_dir()
            .join(format!("{}.{}", key.sandbox, key.generation))
    }

    /// Where all VMs have their run directories.
    pub(crate) fn vms_dir(&self) -> PathBuf {
        self.config.run_dir.join("vms")
    }

    /// Deletes a snapshot, if there is one.
    pub(crate) async fn delete_snapshot(&self, id: &SnapshotId) -> Result<()> {
        match self.store.delete(id).await {
            Err(cubicle_cow::Error::NotFound(_)) => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    /// Removes the volumes of an instance, if it has any.
    pub(crate) async fn remove_volumes(&self, key: &Key) -> Result<()> {
        let (store, key) = (self.store.clone(), key.clone());
        blocking(move || Ok(store.remove_volumes(&key.sandbox, key.generation)?)).await
    }
}

/// Runs work that waits for disks on a thread that may.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_the_runtime_ends) => Err(Error::Closed),
        },
    }
}

fn prepare_dirs(config: &NodeConfig) -> Result<File> {
    let create =
        |dir: &Path| std::fs::create_dir_all(dir).map_err(Error::io("create the directory", dir));
    create(&config.data_dir)?;
    create(&config.run_dir.join("vms"))?;
    let path = config.data_dir.join("node.lock");
    let lock = File::create(&path).map_err(Error::io("create", &path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked {
            path: config.data_dir.clone(),
        }),
        Err(errno) => Err(Error::io("lock", path)(errno.into())),
    }
}
