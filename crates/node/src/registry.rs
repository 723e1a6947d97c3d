//! Which sandboxes are here, and what has been promised to them.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cubicle_ids::SandboxId;

use crate::{
    config::{NodeLimits, meminfo_mib},
    error::{Error, Result},
    facts::{SandboxFact, SandboxState},
    sandbox::Sandbox,
};

/// The sandboxes of one node. A sandbox is in here from before anything of it exists until nothing
/// of it is left.
#[derive(Debug)]
pub(crate) struct Registry {
    limits: NodeLimits,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sandboxes: HashMap<SandboxId, Arc<Sandbox>>,
    memory_mib: u64,
    cpus: u64,
    closed: bool,
}

/// Sums over all sandboxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Promised {
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u64,
}

impl Registry {
    pub(crate) fn new(limits: NodeLimits) -> Self {
        Self {
            limits,
            inner: Mutex::default(),
        }
    }

    pub(crate) fn limits(&self) -> &NodeLimits {
        &self.limits
    }

    /// Takes in a new sandbox if there is room for it.
    pub(crate) fn admit(&self, sandbox: Arc<Sandbox>) -> Result<()> {
        let available_mib = meminfo_mib("MemAvailable:")?;
        let mut inner = self.lock();
        if inner.closed {
            return Err(Error::Closed);
        }
        if inner.sandboxes.contains_key(sandbox.id()) {
            return Err(Error::Exists {
                id: sandbox.id().clone(),
            });
        }
        if inner.sandboxes.len() >= self.limits.max_sandboxes {
            return Err(Error::TooManySandboxes {
                limit: self.limits.max_sandboxes,
            });
        }
        let needed_mib = u64::from(sandbox.shape().memory_mib);
        if inner.memory_mib + needed_mib > self.limits.memory_budget_mib {
            return Err(Error::OutOfMemory {
                needed_mib,
                used_mib: inner.memory_mib,
                budget_mib: self.limits.memory_budget_mib,
            });
        }
        if available_mib < self.limits.memory_reserve_mib {
            let reserve_mib = self.limits.memory_reserve_mib;
            return Err(Error::HostMemory {
                available_mib,
                reserve_mib,
            });
        }
        inner.insert(sandbox);
        Ok(())
    }

    /// Takes in a sandbox that exists already, room or not.
    pub(crate) fn adopt(&self, sandbox: Arc<Sandbox>) {
        self.lock().insert(sandbox);
    }

    pub(crate) fn get(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        let found = self.lock().sandboxes.get(id).cloned();
        found.ok_or_else(|| Error::NotFound { id: id.clone() })
    }

    /// Lets go of a sandbox of which nothing is left.
    pub(crate) fn remove(&self, sandbox: &Arc<Sandbox>) {
        let mut inner = self.lock();
        if let Entry::Occupied(entry) = inner.sandboxes.entry(sandbox.id().clone())
            && Arc::ptr_eq(entry.get(), sandbox)
        {
            entry.remove();
            inner.memory_mib -= u64::from(sandbox.shape().memory_mib);
            inner.cpus -= u64::from(sandbox.shape().cpus);
        }
    }

    /// Takes in no more sandboxes; returns those that are here.
    pub(crate) fn close(&self) -> Vec<Arc<Sandbox>> {
        let mut inner = self.lock();
        inner.closed = true;
        inner.sandboxes.values().cloned().collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Sandbox>> {
        self.lock().sandboxes.values().cloned().collect()
    }

    /// Facts about all sandboxes, in the order in which they were made.
    pub(crate) fn facts(&self) -> Vec<SandboxFact> {
        let mut facts: Vec<_> = self
            .all()
            .iter()
            .filter_map(|sandbox| sandbox.fact())
            .collect();
        facts.sort_by(|a, b| (a.started_at, &a.id).cmp(&(b.started_at, &b.id)));
        facts
    }

    pub(crate) fn promised(&self) -> Promised {
        let inner = self.lock();
        Promised {
            memory_mib: inner.memory_mib,
            cpus: inner.cpus,
        }
    }

    /// How many sandboxes are in `state`.
    pub(crate) fn count(&self, state: SandboxState) -> usize {
        let here = self.all();
        here.iter()
            .filter(|sandbox| sandbox.state() == Some(state))
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every critical section leaves the map consistent at each point where it could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn insert(&mut self, sandbox: Arc<Sandbox>) {
        self.memory_mib += u64::from(sandbox.shape().memory_mib);
        self.cpus += u64::from(sandbox.shape().cpus);
        self.sandboxes.insert(sandbox.id().clone(), sandbox);
    }
}
