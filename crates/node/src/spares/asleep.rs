//! VMs of sandboxes that were paused a moment ago.
//!
//! A pause leaves a VM that stands still and is, page by page, what its snapshot holds. An agent that
//! pauses its sandbox at the end of every turn is back in seconds, so that VM is not thrown away at
//! once: it is the spare of one snapshot, for one sandbox, with all its code translated and all its
//! pages in memory. The snapshot does not depend on it: whenever it goes, a resume restores the
//! snapshot.
//!
//! What that may cost is bounded: so many VMs, for so long ([`SparePolicy::asleep`]), and none when
//! the host's memory is short.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_vmm::Vm;
use tokio::time::Instant;

use super::{Offer, Spare, memory_is_short, offer};
use crate::{config::SparePolicy, node::Inner};

/// Those of one node, the longest asleep first.
pub(super) struct Asleep {
    policy: SparePolicy,
    /// `None` once the node closes.
    sleepers: Mutex<Option<VecDeque<Sleeper>>>,
}

struct Sleeper {
    snapshot: SnapshotId,
    sandbox: SandboxId,
    since: Instant,
    offer: Offer,
}

impl Asleep {
    pub(super) fn new(policy: SparePolicy) -> Self {
        Self {
            policy,
            sleepers: Mutex::new(Some(VecDeque::new())),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lock().as_ref().map_or(0, VecDeque::len)
    }

    pub(super) fn vms(&self) -> Vec<Arc<dyn Vm>> {
        let sleepers = self.lock();
        let all = sleepers.iter().flatten();
        all.map(|sleeper| sleeper.offer.vm.clone()).collect()
    }

    /// What the sandbox was when it was paused as that snapshot.
    pub(super) fn claim(&self, snapshot: &SnapshotId, sandbox: &SandboxId) -> Option<Offer> {
        let mut sleepers = self.lock();
        let sleepers = sleepers.as_mut()?;
        let own = |sleeper: &Sleeper| sleeper.snapshot == *snapshot && sleeper.sandbox == *sandbox;
        let index = sleepers.iter().position(own)?;
        Some(sleepers.remove(index)?.offer)
    }

    pub(super) fn forget(&self, snapshot: &SnapshotId) {
        if let Some(sleepers) = self.lock().as_mut() {
            sleepers.retain(|sleeper| sleeper.snapshot != *snapshot);
        }
    }

    /// Sends away those that have slept for too long or have ended; all of them if memory is short.
    pub(super) fn trim(&self, memory_is_short: bool) {
        if let Some(sleepers) = self.lock().as_mut() {
            sleepers.retain(|sleeper| {
                let young = sleeper.since.elapsed() < self.policy.asleep;
                young && !memory_is_short && !sleeper.offer.is_over()
            });
        }
    }

    /// Sends all of them away and takes in no more.
    pub(super) fn close(&self) {
        *self.lock() = None;
    }

    fn may_stay(&self, node: &Inner) -> bool {
        let wanted = self.policy.max > 0 && !self.policy.asleep.is_zero();
        wanted && !memory_is_short(node)
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Sleeper>>> {
        // Every critical section leaves the queue consistent at each point where it could panic.
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the stopped VM of a sandbox that was paused as `snapshot`; gives it back if it cannot stay.
pub(crate) async fn keep(
    node: &Arc<Inner>,
    sandbox: &SandboxId,
    snapshot: &SnapshotId,
    spare: Spare,
) -> Result<(), Spare> {
    let asleep = &node.spares.asleep;
    if !asleep.may_stay(node) {
        return Err(spare);
    }
    // From here on it serves nobody: after a crash it is removed.
    if let Err(error) = node.journal.removing(&spare.held.key).await {
        tracing::warn!(%sandbox, %error, "a paused sandbox keeps no VM");
        return Err(spare);
    }
    let mut sleepers = asleep.lock();
    let Some(sleepers) = sleepers.as_mut() else {
        return Err(spare);
    };
    if sleepers.len() >= asleep.policy.max {
        sleepers.pop_front();
    }
    sleepers.push_back(Sleeper {
        snapshot: snapshot.clone(),
        sandbox: sandbox.clone(),
        since: Instant::now(),
        offer: offer(node, spare),
    });
    Ok(())
}
