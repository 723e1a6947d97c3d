//! A fleet without machines, for tests of what is above it: it obeys, counts, and fails on demand.
//!
//! It keeps the contract of [`Fleet`] to the letter, so that leaks show: a sandbox that is created
//! twice, or a snapshot that is missing, is refused; what is not killed is still there at the end.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::*;

/// Machines that exist in memory only.
#[derive(Debug)]
pub struct MemoryFleet {
    state: Mutex<MemoryState>,
    events: broadcast::Sender<FleetEvent>,
    creates: AtomicU64,
    kills: AtomicU64,
}

#[derive(Debug, Default)]
struct MemoryState {
    sandboxes: HashMap<SandboxId, u64>,
    orders: HashMap<SandboxId, CreateOrder>,
    snapshots: HashSet<SnapshotId>,
    create_takes: Duration,
    kill_takes: Duration,
    fail_creates: Vec<FleetError>,
    fail_kills: u32,
    fail_builds: Option<String>,
    room_for: Option<usize>,
}

impl Default for MemoryFleet {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            events: broadcast::Sender::new(1024),
            creates: AtomicU64::new(0),
            kills: AtomicU64::new(0),
        }
    }
}

impl MemoryFleet {
    /// How long each create takes from now on.
    pub fn create_takes(&self, time: Duration) {
        self.lock().create_takes = time;
    }

    /// How long each kill takes from now on.
    pub fn kill_takes(&self, time: Duration) {
        self.lock().kill_takes = time;
    }

    /// The next create fails like this. Several calls queue up, the last one first.
    pub fn fail_next_create(&self, error: FleetError) {
        self.lock().fail_creates.push(error);
    }

    /// The next `times` kills fail.
    pub fn fail_kills(&self, times: u32) {
        self.lock().fail_kills = times;
    }

    /// The next build fails with this text.
    pub fn fail_next_build(&self, why: &str) {
        self.lock().fail_builds = Some(why.to_owned());
    }

    /// Room for this many sandboxes.
    pub fn room_for(&self, sandboxes: usize) {
        self.lock().room_for = Some(sandboxes);
    }

    /// Ends a VM as if it had crashed.
    pub fn crash(&self, id: &SandboxId) {
        if let Some(generation) = self.lock().sandboxes.remove(id) {
            let _ = self.events.send(FleetEvent::Exited {
                id: id.clone(),
                generation,
            });
        }
    }

    /// Ends a VM and tells nobody, as while the server is down.
    pub fn vanish(&self, id: &SandboxId) {
        self.lock().sandboxes.remove(id);
    }

    /// A VM that nobody asked for.
    pub fn stray(&self) -> SandboxId {
        let id = SandboxId::generate();
        self.lock().sandboxes.insert(id.clone(), 1);
        id
    }

    /// The VMs that exist.
    pub fn alive(&self) -> Vec<SandboxId> {
        self.lock().sandboxes.keys().cloned().collect()
    }

    /// The snapshots that exist.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.lock().snapshots.iter().cloned().collect()
    }

    /// What a sandbox was created with.
    pub fn order(&self, id: &SandboxId) -> Option<CreateOrder> {
        self.lock().orders.get(id).cloned()
    }

    /// How many creates and kills it was asked for.
    pub fn calls(&self) -> (u64, u64) {
        (
            self.creates.load(Ordering::Relaxed),
            self.kills.load(Ordering::Relaxed),
        )
    }

    fn lock(&self) -> MutexGuard<'_, MemoryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Fleet for MemoryFleet {
    async fn create(&self, order: CreateOrder) -> Result<Created, FleetError> {
        self.creates.fetch_add(1, Ordering::Relaxed);
        let takes = self.lock().create_takes;
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let mut state = self.lock();
        if let Some(error) = state.fail_creates.pop() {
            return Err(error);
        }
        if !state.snapshots.contains(&order.snapshot) {
            return Err(FleetError::NoSnapshot { id: order.snapshot });
        }
        if state
            .room_for
            .is_some_and(|room| state.sandboxes.len() >= room)
        {
            return Err(FleetError::Capacity {
                why: "every place is taken".into(),
            });
        }
        if state.sandboxes.insert(order.id.clone(), 1).is_some() {
            return Err(FleetError::Failed {
                doing: format!("create {}", order.id),
                why: "it exists already".into(),
            });
        }
        state.orders.insert(order.id.clone(), order);
        let phases = ["restore", "total"].map(|name| Phase { name, took: takes });
        Ok(Created {
            generation: 1,
            phases: phases.into(),
        })
    }

    async fn kill(&self, id: &SandboxId) -> Result<bool, FleetError> {
        self.kills.fetch_add(1, Ordering::Relaxed);
        let takes = self.lock().kill_takes;
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let mut state = self.lock();
        if state.fail_kills > 0 {
            state.fail_kills -= 1;
            let doing = format!("kill {id}");
            return Err(FleetError::Failed {
                doing,
                why: "told to fail".into(),
            });
        }
        state.orders.remove(id);
        Ok(state.sandboxes.remove(id).is_some())
    }

    async fn sandboxes(&self) -> Result<Vec<Fact>, FleetError> {
        let state = self.lock();
        let fact = |(id, generation): (&SandboxId, &u64)| Fact {
            id: id.clone(),
            generation: *generation,
        };
        Ok(state.sandboxes.iter().map(fact).collect())
    }

    fn generation(&self, id: &SandboxId) -> Option<u64> {
        self.lock().sandboxes.get(id).copied()
    }

    async fn usage(&self, id: &SandboxId) -> Result<Usage, FleetError> {
        if self.generation(id).is_none() {
            return Err(FleetError::NoSandbox { id: id.clone() });
        }
        Ok(Usage {
            cpu_count: 2,
            cpu_used_pct: 12.5,
            mem_used: 64 << 20,
            mem_total: 512 << 20,
            mem_cache: 32 << 20,
            disk_used: 1 << 30,
            disk_total: 2 << 30,
        })
    }

    async fn host_usage(&self, id: &SandboxId) -> Result<HostUsage, FleetError> {
        if self.generation(id).is_none() {
            return Err(FleetError::NoSandbox { id: id.clone() });
        }
        Ok(HostUsage {
            cpu_time_us: 1_000,
            private_bytes: 16 << 20,
            resident_bytes: 64 << 20,
        })
    }

    async fn measure_boot(&self, _: BuildOrder) -> Result<Duration, FleetError> {
        Ok(Duration::from_secs(1))
    }

    async fn build(
        &self,
        order: BuildOrder,
        progress: mpsc::UnboundedSender<BuildStep>,
    ) -> Result<Built, FleetError> {
        let step = |step: &str, message: String| BuildStep {
            level: Level::Info,
            step: Some(step.to_owned()),
            message,
        };
        let _ = progress.send(step("rootfs", format!("recipe {}", order.recipe)));
        tokio::task::yield_now().await;
        if let Some(why) = self.lock().fail_builds.take() {
            return Err(FleetError::Failed {
                doing: format!("build {}", order.build),
                why,
            });
        }
        let _ = progress.send(step("snapshot", "published".to_owned()));
        let snapshot = SnapshotId::generate();
        self.lock().snapshots.insert(snapshot.clone());
        Ok(Built { snapshot })
    }

    async fn delete_snapshot(&self, id: &SnapshotId) -> Result<bool, FleetError> {
        Ok(self.lock().snapshots.remove(id))
    }

    fn events(&self) -> broadcast::Receiver<FleetEvent> {
        self.events.subscribe()
    }

    async fn machines(&self) -> Result<Vec<Machine>, FleetError> {
        let used = u32::try_from(self.lock().sandboxes.len()).unwrap_or(u32::MAX);
        Ok(vec![Machine {
            id: "memory".into(),
            address: Ipv4Addr::LOCALHOST,
            cpu_milli: 4000,
            cpu_milli_used: u64::from(used) * 2000,
            memory_mib: 8192,
            memory_mib_used: u64::from(used) * 512,
            slots: 100,
            slots_used: used,
            slots_ready: 4,
            hypervisor: "memory".into(),
            cpu_model: "none".into(),
            kernel: "none".into(),
            heartbeat: OffsetDateTime::now_utc(),
        }])
    }
}
