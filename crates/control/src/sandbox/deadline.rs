//! One task for every timeout: the ends of all sandboxes (or snapshots) in order, and a sleep until
//! the first.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use time::OffsetDateTime;
use tokio::sync::Notify;

/// Longest sleep: ends are wall-clock times, and that clock may be set.
const MAX_SLEEP: Duration = Duration::from_secs(30);

/// The end of each thing that has one.
#[derive(Debug)]
pub(crate) struct Deadlines<K> {
    ends: Mutex<Ends<K>>,
    earlier: Notify,
}

#[derive(Debug)]
struct Ends<K> {
    of: HashMap<K, OffsetDateTime>,
    in_order: BTreeSet<(OffsetDateTime, K)>,
}

impl<K> Default for Deadlines<K> {
    fn default() -> Self {
        Self {
            ends: Mutex::new(Ends {
                of: HashMap::new(),
                in_order: BTreeSet::new(),
            }),
            earlier: Notify::new(),
        }
    }
}

impl<K: Clone + Ord + Hash> Deadlines<K> {
    /// Moves an end; `None` is no end. `end` is asked when nobody else can move it, so that of
    /// several that follow one source the last one follows its last word.
    pub(crate) fn set(&self, id: &K, end: impl FnOnce() -> Option<OffsetDateTime>) {
        let mut ends = self.ends();
        if let Some(old) = ends.of.remove(id) {
            ends.in_order.remove(&(old, id.clone()));
        }
        if let Some(end) = end() {
            ends.of.insert(id.clone(), end);
            ends.in_order.insert((end, id.clone()));
            if ends.in_order.first().is_some_and(|(_, first)| first == id) {
                self.earlier.notify_one();
            }
        }
    }

    /// Waits until at least one end has come, and takes those that have.
    pub(crate) async fn due(&self) -> Vec<K> {
        loop {
            let wait = {
                let mut ends = self.ends();
                let now = OffsetDateTime::now_utc();
                let mut due = Vec::new();
                while ends.in_order.first().is_some_and(|(end, _)| *end <= now) {
                    due.extend(ends.in_order.pop_first().map(|(_, id)| id));
                }
                for id in &due {
                    ends.of.remove(id);
                }
                if !due.is_empty() {
                    return due;
                }
                ends.in_order.first().map_or(MAX_SLEEP, |(end, _)| {
                    Duration::try_from(*end - now)
                        .unwrap_or_default()
                        .min(MAX_SLEEP)
                })
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.earlier.notified() => {}
            }
        }
    }

    /// How many have an end.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn len(&self) -> usize {
        self.ends().of.len()
    }

    fn ends(&self) -> MutexGuard<'_, Ends<K>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cubicle_ids::SandboxId;

    use super::*;

    #[tokio::test]
    async fn the_first_end_comes_first_and_an_earlier_one_wakes_the_sleeper() {
        let deadlines = Arc::new(Deadlines::default());
        let (a, b) = (SandboxId::generate(), SandboxId::generate());
        let now = OffsetDateTime::now_utc();
        let far = now + Duration::from_secs(3600);
        deadlines.set(&a, || Some(far));
        let waiter = tokio::spawn({
            let deadlines = Arc::clone(&deadlines);
            async move { deadlines.due().await }
        });
        tokio::task::yield_now().await;
        deadlines.set(&b, || Some(now));
        assert_eq!(waiter.await.expect("due"), [b]);
        deadlines.set(&a, || Some(now));
        assert_eq!(deadlines.due().await, std::slice::from_ref(&a));
        deadlines.set(&a, || Some(far));
        deadlines.set(&a, || None);
        assert_eq!(deadlines.len(), 0, "no end leaves nothing behind");
    }
}
