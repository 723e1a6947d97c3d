//! Network slots, with or without a network.
//!
//! A sandbox always has a slot: its number gives the VM's process a user id of its own. On a node
//! without a pool that number is all there is to it, and the guest's network card is unplugged.

use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use cubicle_net::{EgressPolicy, SlotIndex, SlotPool};

use crate::{error::Result, facts::SlotCounts};

/// Where slots come from.
pub(crate) enum Slots {
    Pool(SlotPool),
    Numbers(Arc<Numbers>),
}

/// A slot that is held.
pub(crate) enum Slot {
    Network(cubicle_net::Slot),
    Number(Number),
}

/// What a VM gets of its slot.
pub(crate) struct Attachment {
    pub(crate) tap: Option<OwnedFd>,
    pub(crate) netns: Option<OwnedFd>,
}

impl Slots {
    pub(crate) fn new(pool: Option<SlotPool>) -> Self {
        pool.map_or_else(|| Self::Numbers(Arc::default()), Self::Pool)
    }

    pub(crate) async fn acquire(&self) -> Result<Slot> {
        Ok(match self {
            Self::Pool(pool) => Slot::Network(pool.acquire().await?),
            Self::Numbers(numbers) => Slot::Number(numbers.take(None)),
        })
    }

    /// Takes the slot that a VM from before has.
    pub(crate) async fn adopt(&self, index: u32) -> Result<Slot> {
        Ok(match self {
            Self::Pool(pool) => Slot::Network(pool.adopt(SlotIndex(index)).await?),
            Self::Numbers(numbers) => Slot::Number(numbers.take(Some(index))),
        })
    }

    /// Removes what is left of slots that were not adopted.
    pub(crate) async fn sweep(&self) -> Result<usize> {
        match self {
            Self::Pool(pool) => Ok(pool.sweep().await?.removed.len()),
            Self::Numbers(_) => Ok(0),
        }
    }

    /// Removes every slot that no VM uses, and gives out no more.
    pub(crate) async fn close(&self) -> Result<()> {
        match self {
            Self::Pool(pool) => {
                let report = pool.clone().close().await?;
                if !report.left.is_empty() {
                    tracing::info!(
                        slots = report.left.len(),
                        "network slots stay with their VMs"
                    );
                }
                Ok(())
            }
            Self::Numbers(_) => Ok(()),
        }
    }

    /// Takes back a slot whose VM is gone.
    pub(crate) async fn release(&self, slot: Slot) -> Result<()> {
        match (self, slot) {
            (Self::Pool(pool), Slot::Network(slot)) => pool.release(slot).await?,
            // Its number is free when it is dropped.
            (_, slot) => drop(slot),
        }
        Ok(())
    }

    pub(crate) fn counts(&self) -> SlotCounts {
        match self {
            Self::Pool(pool) => {
                let counts = pool.counts();
                SlotCounts {
                    ready: counts.ready,
                    used: counts.leased,
                }
            }
            Self::Numbers(numbers) => SlotCounts {
                ready: 0,
                used: numbers.lock().len(),
            },
        }
    }
}

impl Slot {
    pub(crate) fn index(&self) -> u32 {
        match self {
            Self::Network(slot) => slot.index().0,
            Self::Number(number) => number.index,
        }
    }

    /// What the VM gets. The tap can be taken once.
    pub(crate) fn attach(&mut self) -> Result<Attachment> {
        Ok(match self {
            Self::Network(slot) => Attachment {
                netns: Some(slot.netns_fd()?),
                tap: slot.take_tap(),
            },
            Self::Number(_) => Attachment {
                tap: None,
                netns: None,
            },
        })
    }

    /// Puts a policy in force. Without a network, nothing is reachable under any policy.
    pub(crate) async fn set_egress(&self, policy: &EgressPolicy) -> Result<()> {
        match self {
            Self::Network(slot) => Ok(slot.set_policy(policy).await?),
            Self::Number(_) => Ok(()),
        }
    }
}

/// Numbers in use.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    used: Mutex<BTreeSet<u32>>,
}

/// A number that is held until it is dropped.
#[derive(Debug)]
pub(crate) struct Number {
    index: u32,
    of: Arc<Numbers>,
}

impl Numbers {
    /// `wanted`, which its holder from before knows to be its own, or the lowest that is free.
    fn take(self: &Arc<Self>, wanted: Option<u32>) -> Number {
        let mut used = self.lock();
        let index = wanted.unwrap_or_else(|| (0..).find(|n| !used.contains(n)).unwrap_or(u32::MAX));
        used.insert(index);
        Number {
            index,
            of: self.clone(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        self.of.lock().remove(&self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_held_by_one_and_free_after_it_was_dropped() {
        let numbers = Arc::<Numbers>::default();
        let (a, b) = (numbers.take(None), numbers.take(None));
        assert_eq!((a.index, b.index), (0, 1));
        let adopted = numbers.take(Some(2));
        assert_eq!(
            numbers.take(None).index,
            3,
            "the adopted number is not given out again"
        );
        drop(a);
        assert_eq!(numbers.take(None).index, 0);
        drop((b, adopted));
        assert!(numbers.lock().is_empty());
    }
}
