//! Spares: VMs that were restored before anybody asked for them.
//!
//! What takes long in a create is the restore, and under software emulation even more the first
//! steps of the restored guest, whose code has to be translated. A spare has both behind it: its
//! guest has answered once, under an identity that nobody will ever hear of. A create claims it,
//! tells it who it is now, and is done. Only snapshots that sandboxes are being made from have
//! spares, as many as there have been creates lately and at most as many as the policy says; when
//! nobody asks any more they go.
//!
//! A spare is owned by a task of its own until it is claimed. It reaches no network, and it is in
//! the journal as an instance that serves nobody, so that it does not survive its node.
//!
//! A sandbox that was paused a moment ago leaves a spare, too: its VM, which stands still and is what
//! the snapshot of the pause holds. See [`asleep`].

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cubicle_cow::{Snapshot, SnapshotKind};
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_net::EgressPolicy;
use cubicle_protocol::guest_api::InitRequest;
use cubicle_vmm::Vm;
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

use crate::{
    config::{SparePolicy, meminfo_mib},
    create::random_hex,
    error::Result,
    facts::SpareCounts,
    guest::Guest,
    holdings::Holdings,
    journal::{self, Key},
    link::Identity,
    node::Inner,
    restore::{Restore, restore},
    sandbox::{Live, Origin, contained},
};

mod asleep;

use asleep::Asleep;
pub(crate) use asleep::keep;

/// How far back creates count as demand.
const DEMAND_WINDOW: Duration = Duration::from_secs(10);

/// How many creates within [`DEMAND_WINDOW`] make a user's snapshot worth a spare. A template is
/// worth one from its first.
const HOT: usize = 3;

/// How often it is looked whether there are more spares than anybody needs; more often where the
/// policy counts in less.
const TRIM_INTERVAL: Duration = Duration::from_secs(5);
const TRIM_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Pause after a spare that could not be made.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);

/// The spares of one node.
pub(crate) struct Spares {
    policy: SparePolicy,
    lines: Mutex<HashMap<SnapshotId, Line>>,
    asleep: Asleep,
    /// Something is to be made, or to be looked at.
    work: Notify,
    /// Creates under way, which go first.
    creating: watch::Sender<usize>,
}

/// The spares of one snapshot.
struct Line {
    /// Whether one create is reason enough for a spare.
    template: bool,
    ready: VecDeque<Offer>,
    making: bool,
    demand: VecDeque<Instant>,
    last_demand: Instant,
}

/// A spare that waits. Who drops it sends the spare away.
struct Offer {
    claim: oneshot::Sender<oneshot::Sender<Spare>>,
    vm: Arc<dyn Vm>,
}

impl Offer {
    /// Takes the spare from its owner, unless it has ended.
    async fn take(self) -> Option<Spare> {
        let (give, given) = oneshot::channel();
        self.claim.send(give).ok()?;
        given.await.ok()
    }

    /// Whether it has ended.
    fn is_over(&self) -> bool {
        self.claim.is_closed()
    }
}

/// A VM that serves nobody, and all that goes with it.
pub(crate) struct Spare {
    pub(crate) live: Arc<Live>,
    pub(crate) origin: Origin,
    pub(crate) held: Holdings,
}

impl Spares {
    pub(crate) fn new(policy: SparePolicy) -> Self {
        Self {
            policy,
            lines: Mutex::default(),
            asleep: Asleep::new(policy),
            work: Notify::new(),
            creating: watch::Sender::new(0),
        }
    }

    /// A create begins; it ends when what is returned is dropped.
    pub(crate) fn create_begins(&self) -> impl Drop + use<'_> {
        struct Creating<'a>(&'a Spares);
        impl Drop for Creating<'_> {
            fn drop(&mut self) {
                self.0.creating.send_modify(|count| *count -= 1);
            }
        }
        self.creating.send_modify(|count| *count += 1);
        Creating(self)
    }

    /// A spare of that snapshot, if one is ready. Notes the demand, so that others are made.
    pub(crate) async fn claim(&self, snapshot: &Snapshot) -> Option<Spare> {
        let kind = snapshot.manifest().kind;
        // Others are restored once.
        let reused = matches!(kind, SnapshotKind::Template | SnapshotKind::User);
        if self.policy.max == 0 || !reused || !snapshot.has_memory() {
            return None;
        }
        let mut offers = {
            let now = Instant::now();
            let mut lines = self.lock();
            let line = lines.entry(snapshot.id().clone()).or_insert_with(|| Line {
                template: kind == SnapshotKind::Template,
                ready: VecDeque::new(),
                making: false,
                demand: VecDeque::new(),
                last_demand: now,
            });
            line.note(now);
            line.ready.pop_front()
        };
        self.work.notify_one();
        // One that ended while it waited is as good as none.
        while let Some(offer) = offers {
            if let Some(spare) = offer.take().await {
                return Some(spare);
            }
            offers = self.lock().get_mut(snapshot.id())?.ready.pop_front();
        }
        None
    }

    /// The VM that a sandbox had when it was paused as that snapshot, if it is still there.
    pub(crate) async fn wake(&self, snapshot: &SnapshotId, sandbox: &SandboxId) -> Option<Spare> {
        self.asleep.claim(snapshot, sandbox)?.take().await
    }

    /// Sends the spares of a snapshot away.
    pub(crate) fn forget(&self, snapshot: &SnapshotId) {
        self.lock().remove(snapshot);
        self.asleep.forget(snapshot);
    }

    pub(crate) fn counts(&self) -> SpareCounts {
        let lines = self.lock();
        SpareCounts {
            ready: lines.values().map(|line| line.ready.len()).sum(),
            max: self.policy.max,
            asleep: self.asleep.len(),
        }
    }

    /// Memory that is there for spares only, in bytes.
    pub(crate) async fn memory(&self) -> u64 {
        let mut vms = self.asleep.vms();
        {
            let lines = self.lock();
            let ready = lines.values().flat_map(|line| &line.ready);
            vms.extend(ready.map(|offer| offer.vm.clone()));
        }
        let used = vms.iter().map(|vm| vm.usage());
        // One that has ended meanwhile uses nothing.
        let used = futures::future::join_all(used).await;
        used.into_iter()
            .flatten()
            .map(|used| used.private_bytes)
            .sum()
    }

    /// The snapshot that lacks a spare most.
    fn wanted(&self) -> Option<SnapshotId> {
        let now = Instant::now();
        let mut lines = self.lock();
        let total: usize = lines.values().map(|line| line.ready.len()).sum();
        if total >= self.policy.max {
            return None;
        }
        let max = self.policy.max;
        let (id, line) = lines
            .iter_mut()
            .map(|(id, line)| {
                (
                    line.target(now, max).saturating_sub(line.ready.len()),
                    id,
                    line,
                )
            })
            .filter(|(missing, ..)| *missing > 0)
            .max_by_key(|(missing, ..)| *missing)
            .map(|(_, id, line)| (id, line))?;
        line.making = true;
        Some(id.clone())
    }

    /// Sends away what nobody needs any more.
    fn trim(&self) {
        let now = Instant::now();
        let max = self.policy.max;
        self.lock().retain(|_, line| {
            let target = line.target(now, max);
            line.ready.truncate(target.max(1));
            line.making || now.duration_since(line.last_demand) < self.policy.idle
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SnapshotId, Line>> {
        // Every critical section leaves the map consistent at each point where it could panic.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn note(&mut self, now: Instant) {
        self.demand.push_back(now);
        self.last_demand = now;
    }

    /// How many spares are worth having: one for each create of late. A template that was used
    /// lately keeps one.
    fn target(&mut self, now: Instant, max: usize) -> usize {
        while let Some(oldest) = self.demand.front()
            && now.duration_since(*oldest) > DEMAND_WINDOW
        {
            self.demand.pop_front();
        }
        let lately = self.demand.len();
        let target = if self.template {
            lately.max(1)
        } else if lately >= HOT {
            lately
        } else {
            0
        };
        target.min(max)
    }
}

/// Makes spares one at a time, whenever one is wanted and no create is under way, until the node
/// closes.
pub(crate) async fn keep_making(node: Arc<Inner>) {
    let spares = &node.spares;
    if spares.policy.max == 0 {
        return;
    }
    let trimmed = TRIM_INTERVAL.min(spares.policy.asleep.max(TRIM_INTERVAL_MIN));
    let mut trim = tokio::time::interval(trimmed);
    trim.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = spares.work.notified() => {}
            _ = trim.tick() => {
                spares.trim();
                spares.asleep.trim(memory_is_short(&node));
            }
            () = node.closing.cancelled() => break,
        }
        let mut creating = spares.creating.subscribe();
        loop {
            tokio::select! {
                // The sender lives in the node.
                _ = creating.wait_for(|count| *count == 0) => {}
                () = node.closing.cancelled() => break,
            }
            let Some(snapshot) = spares.wanted() else {
                break;
            };
            let made = make(&node, &snapshot).await;
            if let Some(line) = spares.lock().get_mut(&snapshot) {
                line.making = false;
            }
            if let Err(error) = made {
                tracing::warn!(%snapshot, %error, "could not make a spare");
                tokio::select! {
                    () = tokio::time::sleep(FAILURE_PAUSE) => {}
                    () = node.closing.cancelled() => {}
                }
                break;
            }
        }
    }
    // Sends all of them away.
    spares.lock().clear();
    spares.asleep.close();
}

/// Whether the host has no memory for VMs that nobody uses.
fn memory_is_short(node: &Inner) -> bool {
    let least = 2 * node.registry.limits().memory_reserve_mib;
    // A host that does not tell has none to spare.
    meminfo_mib("MemAvailable:").map_or(true, |available| available < least)
}

/// Makes one spare and leaves it with its owner.
async fn make(node: &Arc<Inner>, snapshot: &SnapshotId) -> Result<()> {
    if memory_is_short(node) {
        tracing::debug!("memory is too short for a spare");
        return Ok(());
    }
    let snapshot = match node.store.snapshot(snapshot) {
        Ok(snapshot) => snapshot,
        Err(_) => {
            node.spares.forget(snapshot);
            return Ok(());
        }
    };
    let mut held = Holdings::new(Key {
        sandbox: SandboxId::generate(),
        generation: 1,
    });
    let id = held.key.sandbox.clone();
    let restoring = async {
        let nonce = snapshot.manifest().guest_nonce.clone();
        let identity = Identity {
            init: InitRequest {
                sandbox_id: Some(id.clone()),
                hostname: Some(id.to_string()),
                machine_id: Some(random_hex()),
                nonce: Some(random_hex()),
                ..InitRequest::default()
            },
            restored: (!nonce.is_empty()).then(|| (snapshot.id().clone(), nonce)),
        };
        let order = Restore {
            serves: None,
            snapshot: &snapshot,
            identity,
            egress: Some(EgressPolicy::deny_all()),
            limits: None,
            kernel: None,
            started_at: journal::now(),
        };
        let restored = restore(node, order, &mut held, &node.closing).await?;
        // The first request of its life is as much work as the rest together.
        let link = &restored.live.link;
        Guest { id: &id, link }.health().await?;
        Ok(restored)
    };
    let restored = match contained(&id, restoring).await {
        Ok(restored) => restored,
        Err(error) => {
            held.release_for_sure(node, |_| ()).await;
            return Err(error);
        }
    };
    let spare = Spare {
        live: Arc::new(restored.live),
        origin: restored.origin,
        held,
    };
    let offer = offer(node, spare);
    if let Some(line) = node.spares.lock().get_mut(snapshot.id()) {
        line.ready.push_back(offer);
    }
    Ok(())
}

/// Leaves a spare with an owner of its own.
fn offer(node: &Arc<Inner>, spare: Spare) -> Offer {
    let (claim, claimed) = oneshot::channel();
    let vm = spare.live.vm.clone();
    node.tasks.spawn(own(node.clone(), spare, claimed));
    Offer { claim, vm }
}

/// Owns a spare until it is claimed, sent away, or ends by itself.
async fn own(node: Arc<Inner>, spare: Spare, claimed: oneshot::Receiver<oneshot::Sender<Spare>>) {
    let vm = spare.live.vm.clone();
    let taker = tokio::select! {
        taker = claimed => taker.ok(),
        () = vm.exited() => None,
    };
    let mut left = match taker {
        // Nobody waits any more if the create was given up at this very moment.
        Some(taker) => match taker.send(spare) {
            Ok(()) => return,
            Err(spare) => spare,
        },
        None => spare,
    };
    left.live.link.close();
    left.held.release_for_sure(&node, |_| ()).await;
}
