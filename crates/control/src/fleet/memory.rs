//! A fleet without machines, for tests of what is above it: it obeys, counts, and fails on demand.
//!
//! It keeps the contract of [`Fleet`](super::Fleet) to the letter, so that leaks show: a sandbox that is created
//! twice, or a snapshot that is missing, is refused; what is not killed or deleted is still there
//! at the end. Every operation passes through [`Step`]s, at each of which it can be slow or fail.

mod builds;
mod contract;

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cubicle_ids::{SandboxId, SnapshotId};
use time::OffsetDateTime;
use tokio::sync::broadcast;

use super::{
    CreateOrder, Created, FleetError, FleetEvent, FreezeKind, FreezeOrder, Phase, SnapshotFact,
    SnapshotKind, SnapshotTaken,
};

/// Machines that exist in memory only.
#[derive(Debug)]
pub struct MemoryFleet {
    state: Mutex<MemoryState>,
    events: broadcast::Sender<FleetEvent>,
    creates: AtomicU64,
    kills: AtomicU64,
}

/// A point that an operation passes. What is said of it has happened when it is passed; a failure
/// at it leaves just that behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A create has begun.
    Create,
    /// A kill has begun.
    Kill,
    /// A snapshot or a pause has begun.
    Freeze,
    /// The snapshot is published; its sandbox runs.
    Published,
    /// The VM of a paused sandbox is gone.
    Dropped,
    /// A resume has begun.
    Resume,
    /// The VM of a resumed sandbox is there.
    Resumed,
    /// A rollback has begun.
    Rollback,
    /// The VM of a rolled back sandbox is another.
    Switched,
    /// The deletion of a snapshot has begun.
    Delete,
    /// A look at the origin of a template has begun.
    Origin,
    /// Booting an image has begun.
    Boot,
    /// What was booted is published.
    Booted,
    /// Running a program has begun.
    Run,
    /// Copying files has begun.
    Copy,
    /// A look at whether a port answers has begun.
    Probe,
    /// A change of a network has begun.
    Network,
}

impl Step {
    /// Every step.
    pub const ALL: [Self; 17] = [
        Self::Create,
        Self::Kill,
        Self::Freeze,
        Self::Published,
        Self::Dropped,
        Self::Resume,
        Self::Resumed,
        Self::Rollback,
        Self::Switched,
        Self::Delete,
        Self::Origin,
        Self::Boot,
        Self::Booted,
        Self::Run,
        Self::Copy,
        Self::Probe,
        Self::Network,
    ];
}

#[derive(Debug, Default)]
struct MemoryState {
    sandboxes: HashMap<SandboxId, Vm>,
    orders: HashMap<SandboxId, CreateOrder>,
    snapshots: HashMap<SnapshotId, SnapshotFact>,
    deaf: Vec<SandboxId>,
    takes: HashMap<Step, Duration>,
    failures: HashMap<Step, Vec<FleetError>>,
    reached: HashMap<Step, u64>,
    work: Duration,
    worked: Duration,
    fail_kills: u32,
    fail_builds: Option<String>,
    room_for: Option<usize>,
    /// What was done to what snapshots were taken of.
    contents: HashMap<SnapshotId, Vec<String>>,
    boots: u64,
    image: u64,
}

/// One VM.
#[derive(Debug, Clone)]
struct Vm {
    generation: u64,
    /// What it was restored from.
    base: Option<SnapshotId>,
    /// Something is being done with it.
    busy: bool,
    /// What was done to it, and to what it was restored from.
    done: Vec<String>,
}

/// Memory that a VM has dirtied by the time it is frozen, in bytes.
const DIRTY: u64 = 7 << 20;

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
    /// How long this step takes from now on.
    pub fn takes(&self, step: Step, time: Duration) {
        self.lock().takes.insert(step, time);
    }

    /// The next operation that comes to this step fails there. Several calls queue up, the last
    /// one first.
    pub fn fail_at(&self, step: Step, error: FleetError) {
        self.lock().failures.entry(step).or_default().push(error);
    }

    /// Takes back what was said to [`Self::fail_at`] and [`Self::takes`].
    pub fn behave(&self) {
        let mut state = self.lock();
        state.failures.clear();
        state.takes.clear();
        state.fail_kills = 0;
    }

    /// How many operations have come to this step.
    pub fn reached(&self, step: Step) -> u64 {
        self.lock().reached.get(&step).copied().unwrap_or_default()
    }

    /// How long each create takes from now on.
    pub fn create_takes(&self, time: Duration) {
        self.takes(Step::Create, time);
    }

    /// How long each kill takes from now on.
    pub fn kill_takes(&self, time: Duration) {
        self.takes(Step::Kill, time);
    }

    /// The next create fails like this. Several calls queue up, the last one first.
    pub fn fail_next_create(&self, error: FleetError) {
        self.fail_at(Step::Create, error);
    }

    /// From now on each sandbox uses so much CPU time at every look.
    pub fn work(&self, per_look: Duration) {
        self.lock().work = per_look;
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

    /// From now on the guest of this sandbox answers nobody.
    pub fn deafen(&self, id: &SandboxId) {
        self.lock().deaf.push(id.clone());
    }

    /// Damages a snapshot's files.
    pub fn damage(&self, id: &SnapshotId) {
        if let Some(fact) = self.lock().snapshots.get_mut(id) {
            fact.failure = Some("a checksum does not match".to_owned());
        }
    }

    /// Ends a VM as if it had crashed.
    pub fn crash(&self, id: &SandboxId) {
        let ended = self.lock().sandboxes.remove(id);
        if let Some(vm) = ended {
            let _ = self.events.send(FleetEvent::Exited {
                id: id.clone(),
                generation: vm.generation,
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
        let vm = Vm {
            generation: 1,
            base: None,
            busy: false,
            done: Vec::new(),
        };
        self.lock().sandboxes.insert(id.clone(), vm);
        id
    }

    /// Whatever a server that was killed had under way ends with it.
    pub fn forget_operations(&self) {
        for vm in self.lock().sandboxes.values_mut() {
            vm.busy = false;
        }
    }

    /// A snapshot that nobody asked for.
    pub fn stray_snapshot(&self, kind: SnapshotKind) -> SnapshotId {
        let id = SnapshotId::generate();
        let fact = fact(id.clone(), kind, None, Vec::new(), true);
        self.lock().snapshots.insert(id.clone(), fact);
        id
    }

    /// Loses a snapshot and tells nobody.
    pub fn lose_snapshot(&self, id: &SnapshotId) {
        self.lock().snapshots.remove(id);
    }

    /// The VMs that exist.
    pub fn alive(&self) -> Vec<SandboxId> {
        self.lock().sandboxes.keys().cloned().collect()
    }

    /// The life that a sandbox's VM is in.
    pub fn generation_of(&self, id: &SandboxId) -> Option<u64> {
        Some(self.lock().sandboxes.get(id)?.generation)
    }

    /// The ids of the snapshots that exist.
    pub fn snapshot_ids(&self) -> Vec<SnapshotId> {
        self.lock().snapshots.keys().cloned().collect()
    }

    /// The snapshots of this kind that exist.
    pub fn snapshots_of(&self, kind: SnapshotKind) -> Vec<SnapshotId> {
        let state = self.lock();
        let of_kind = state.snapshots.values().filter(|fact| fact.kind == kind);
        of_kind.map(|fact| fact.id.clone()).collect()
    }

    /// What a sandbox was created, resumed or rolled back with last.
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

    async fn reach(&self, step: Step) -> Result<(), FleetError> {
        let takes = {
            let mut state = self.lock();
            *state.reached.entry(step).or_default() += 1;
            state.takes.get(&step).copied().unwrap_or_default()
        };
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let failure = self.lock().failures.get_mut(&step).and_then(Vec::pop);
        failure.map_or(Ok(()), Err)
    }

    /// Marks a VM as busy until the guard is dropped.
    fn begin(&self, id: &SandboxId) -> Result<Doing<'_>, FleetError> {
        let mut state = self.lock();
        let no_sandbox = || FleetError::NoSandbox { id: id.clone() };
        let vm = state.sandboxes.get_mut(id).ok_or_else(no_sandbox)?;
        if vm.busy {
            return Err(FleetError::Busy { id: id.clone() });
        }
        vm.busy = true;
        Ok(Doing {
            fleet: self,
            id: id.clone(),
        })
    }

    async fn freeze(&self, order: &FreezeOrder) -> Result<SnapshotTaken, FleetError> {
        self.reach(Step::Freeze).await?;
        let parent = {
            let mut state = self.lock();
            if order.require_healthy && state.deaf.contains(&order.id) {
                return Err(FleetError::Unresponsive {
                    id: order.id.clone(),
                });
            }
            let no_sandbox = || FleetError::NoSandbox {
                id: order.id.clone(),
            };
            let vm = state.sandboxes.get(&order.id).ok_or_else(no_sandbox)?;
            let parent = vm.base.clone();
            let mut lineage: Vec<_> = parent.iter().cloned().collect();
            if let Some(known) = parent.as_ref().and_then(|id| state.snapshots.get(id)) {
                lineage.extend(known.lineage.iter().cloned());
            }
            let done = vm.done.clone();
            let kind = match order.kind {
                FreezeKind::Template => SnapshotKind::Template,
                kind => SnapshotKind::Frozen(kind),
            };
            let fact = fact(
                order.snapshot.clone(),
                kind,
                parent.clone(),
                lineage,
                order.memory,
            );
            if state
                .snapshots
                .insert(order.snapshot.clone(), fact)
                .is_some()
            {
                return Err(FleetError::Failed {
                    doing: format!("publish {}", order.snapshot),
                    why: "it exists already".into(),
                });
            }
            state.contents.insert(order.snapshot.clone(), done);
            parent
        };
        self.reach(Step::Published).await?;
        Ok(SnapshotTaken {
            snapshot: order.snapshot.clone(),
            tier: if order.memory {
                "anonymous_pages"
            } else {
                "none"
            },
            bytes_scanned: 512 << 20,
            bytes_dirty: DIRTY,
            bytes_written: DIRTY,
            frozen: Duration::from_millis(5),
            phases: ["freeze", "publish", "total"]
                .map(|name| Phase {
                    name,
                    took: Duration::from_millis(5),
                })
                .into(),
            parent,
        })
    }

    /// Puts a VM in its place, unless the snapshot cannot be restored.
    fn restore(&self, order: CreateOrder, generation: u64) -> Result<Created, FleetError> {
        let mut state = self.lock();
        match state.snapshots.get(&order.snapshot) {
            None => return Err(FleetError::NoSnapshot { id: order.snapshot }),
            Some(SnapshotFact {
                failure: Some(reason),
                ..
            }) => {
                return Err(FleetError::Damaged {
                    reason: reason.clone(),
                    id: order.snapshot,
                });
            }
            Some(_) => {}
        }
        let is_new = !state.sandboxes.contains_key(&order.id);
        let full = state
            .room_for
            .is_some_and(|room| state.sandboxes.len() >= room);
        if is_new && full {
            return Err(FleetError::Capacity {
                why: "every place is taken".into(),
            });
        }
        let vm = Vm {
            generation,
            base: Some(order.snapshot.clone()),
            busy: !is_new,
            done: state
                .contents
                .get(&order.snapshot)
                .cloned()
                .unwrap_or_default(),
        };
        state.sandboxes.insert(order.id.clone(), vm);
        let took = state.takes.get(&Step::Create).copied().unwrap_or_default();
        state.orders.insert(order.id.clone(), order);
        let phases = ["restore", "total"].map(|name| Phase { name, took });
        Ok(Created {
            generation,
            phases: phases.into(),
        })
    }
}

/// A VM that is busy.
struct Doing<'a> {
    fleet: &'a MemoryFleet,
    id: SandboxId,
}

impl Drop for Doing<'_> {
    fn drop(&mut self) {
        if let Some(vm) = self.fleet.lock().sandboxes.get_mut(&self.id) {
            vm.busy = false;
        }
    }
}

fn fact(
    id: SnapshotId,
    kind: SnapshotKind,
    parent: Option<SnapshotId>,
    lineage: Vec<SnapshotId>,
    memory: bool,
) -> SnapshotFact {
    SnapshotFact {
        id,
        kind,
        parent,
        lineage,
        created_at: OffsetDateTime::now_utc(),
        logical_bytes: 1536 << 20,
        own_bytes: DIRTY,
        durable: true,
        failure: None,
        memory,
        memory_mib: 512,
        cpus: 2,
        disk_mib: 1024,
    }
}
