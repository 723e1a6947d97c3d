//! The live sandboxes, in memory: what requests on hot paths look at instead of the database.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use cubicle_ids::SandboxId;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::sampler::Meter;
use crate::{
    lifecycle::{Event, State, next},
    sandbox::{
        EndReason, Sample, Sandbox,
        operation::{Operation, Slot, Underway},
    },
};

/// Samples kept per sandbox: half an hour at one every five seconds, 26 KiB.
const SAMPLES: usize = 360;

/// Every sandbox that is not dead, by id.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: RwLock<HashMap<SandboxId, Arc<Entry>>>,
}

/// One live sandbox.
#[derive(Debug)]
pub(crate) struct Entry {
    current: Mutex<Arc<Sandbox>>,
    samples: Mutex<VecDeque<Sample>>,
    /// Whether it has done anything since it was sampled last.
    pub(crate) meter: Meter,
    /// Held while its row is written, so that the last writer writes the latest.
    pub(crate) row: tokio::sync::Mutex<()>,
    /// What is being done with its VM.
    pub(crate) slot: Slot,
    end_reason: Mutex<Option<EndReason>>,
    /// Cancelled once it is dead, released and on record as such.
    pub(crate) dead: CancellationToken,
}

/// A transition that happened.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) from: State,
    pub(crate) sandbox: Arc<Sandbox>,
}

impl Entry {
    pub(crate) fn new(sandbox: Sandbox) -> Self {
        Self {
            current: Mutex::new(Arc::new(sandbox)),
            samples: Mutex::default(),
            meter: Meter::default(),
            row: tokio::sync::Mutex::default(),
            slot: Slot::default(),
            end_reason: Mutex::default(),
            dead: CancellationToken::new(),
        }
    }

    pub(crate) fn sandbox(&self) -> Arc<Sandbox> {
        Arc::clone(&lock(&self.current))
    }

    /// Applies an event; `change` runs with it, as one step. `None`: the state refuses the event.
    pub(crate) fn apply(&self, event: Event, change: impl FnOnce(&mut Sandbox)) -> Option<Moved> {
        self.apply_if(event, |_| true, change)
    }

    /// Like [`Self::apply`], but only while `condition` holds.
    pub(crate) fn apply_if(
        &self,
        event: Event,
        condition: impl FnOnce(&Sandbox) -> bool,
        change: impl FnOnce(&mut Sandbox),
    ) -> Option<Moved> {
        let mut current = lock(&self.current);
        let from = current.state;
        let to = next(from, event)?;
        if !condition(&current) {
            return None;
        }
        let sandbox = Arc::make_mut(&mut current);
        change(sandbox);
        sandbox.state = to;
        Some(Moved {
            from,
            sandbox: Arc::clone(&current),
        })
    }

    /// Changes what is no state. `None`: it has left the states that clients can see.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Sandbox)) -> Option<Arc<Sandbox>> {
        let mut current = lock(&self.current);
        current.state.visible()?;
        change(Arc::make_mut(&mut current));
        Some(Arc::clone(&current))
    }

    /// Remembers why it ends; the first reason stands.
    pub(crate) fn end_reason(&self, reason: EndReason) -> EndReason {
        *lock(&self.end_reason).get_or_insert(reason)
    }

    pub(crate) fn record(&self, sample: Sample) {
        let mut samples = lock(&self.samples);
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    pub(crate) fn samples(
        &self,
        start: Option<OffsetDateTime>,
        end: Option<OffsetDateTime>,
    ) -> Vec<Sample> {
        lock(&self.samples)
            .iter()
            .filter(|s| start.is_none_or(|start| s.at >= start))
            .filter(|s| end.is_none_or(|end| s.at <= end))
            .copied()
            .collect()
    }

    pub(crate) fn latest_sample(&self) -> Option<Sample> {
        lock(&self.samples).back().copied()
    }
}

impl Registry {
    pub(crate) fn insert(&self, sandbox: Sandbox) -> Arc<Entry> {
        self.publish(Entry::new(sandbox))
    }

    /// Like [`Self::insert`], of a sandbox that is just being created.
    pub(crate) fn insert_creating(&self, sandbox: Sandbox) -> (Arc<Entry>, Option<Underway>) {
        let entry = Entry::new(sandbox);
        // Nobody else has seen the entry, so its slot is free.
        let underway = entry.slot.begin(Operation::Create).ok();
        (self.publish(entry), underway)
    }

    fn publish(&self, entry: Entry) -> Arc<Entry> {
        let (id, entry) = (entry.sandbox().id.clone(), Arc::new(entry));
        self.entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, Arc::clone(&entry));
        entry
    }

    pub(crate) fn get(&self, id: &SandboxId) -> Option<Arc<Entry>> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .cloned()
    }

    pub(crate) fn remove(&self, id: &SandboxId) {
        self.entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
    }

    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.values().map(|entry| entry.sandbox()).collect()
    }
}

/// A panic while one of these is held leaves a whole value behind: every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{db::from_micros, fleet::Usage, sandbox::test_sandbox};

    #[test]
    fn the_ring_of_samples_is_bounded_and_answers_ranges() {
        let entry = Entry::new(test_sandbox());
        let usage = Usage {
            cpu_count: 1,
            cpu_used_pct: 0.5,
            mem_used: 1,
            mem_total: 2,
            mem_cache: 0,
            disk_used: 1,
            disk_total: 2,
        };
        let second = |n: i64| from_micros(n * 1_000_000);
        for n in 0..i64::try_from(SAMPLES).expect("fits") + 10 {
            entry.record(Sample {
                at: second(n),
                usage,
            });
        }
        assert_eq!(entry.samples(None, None).len(), SAMPLES);
        assert_eq!(
            entry.samples(None, None)[0].at,
            second(10),
            "the oldest are dropped"
        );
        let some = entry.samples(Some(second(20)), Some(second(22)));
        assert_eq!(
            some.iter().map(|s| s.at).collect::<Vec<_>>(),
            [20, 21, 22].map(second)
        );
        assert!(
            entry
                .samples(Some(second(-100)), Some(second(-50)))
                .is_empty()
        );
    }

    #[test]
    fn a_refused_event_changes_nothing() {
        let entry = Entry::new(test_sandbox());
        assert!(entry.apply(Event::Created, |s| s.generation = 9).is_none());
        assert!(
            entry
                .apply_if(Event::Kill, |_| false, |s| s.generation = 9)
                .is_none()
        );
        assert_eq!(entry.sandbox().generation, test_sandbox().generation);
        let moved = entry.apply(Event::Kill, |_| ()).expect("legal");
        assert_eq!(
            (moved.from, moved.sandbox.state),
            (State::Running, State::Killing)
        );
        assert!(
            entry.change(|_| ()).is_none(),
            "a sandbox that is being killed has no future"
        );
    }
}
