//! One task for every timeout: the ends of all sandboxes in order, and a sleep until the first.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cubicle_ids::SandboxId;
use time::OffsetDateTime;
use tokio::sync::Notify;

/// Longest sleep: ends are wall-clock times, and that clock may be set.
const MAX_SLEEP: Duration = Duration::from_secs(30);

/// The end of each sandbox that has one.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    ends: Mutex<BTreeSet<(OffsetDateTime, SandboxId)>>,
    earlier: Notify,
}

impl Deadlines {
    /// Moves a sandbox's end; `None` is no end.
    pub(crate) fn change(
        &self,
        id: &SandboxId,
        old: Option<OffsetDateTime>,
        new: Option<OffsetDateTime>,
    ) {
        let mut ends = self.ends();
        if let Some(old) = old {
            ends.remove(&(old, id.clone()));
        }
        if let Some(new) = new {
            ends.insert((new, id.clone()));
            if ends.first().is_some_and(|(_, first)| first == id) {
                self.earlier.notify_one();
            }
        }
    }

    /// Waits until at least one end has come, and takes those that have.
    pub(crate) async fn due(&self) -> Vec<SandboxId> {
        loop {
            let wait = {
                let mut ends = self.ends();
                let now = OffsetDateTime::now_utc();
                let mut due = Vec::new();
                while ends.first().is_some_and(|(end, _)| *end <= now) {
                    due.extend(ends.pop_first().map(|(_, id)| id));
                }
                if !due.is_empty() {
                    return due;
                }
                ends.first().map_or(MAX_SLEEP, |(end, _)| {
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

    /// How many sandboxes have an end.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn len(&self) -> usize {
        self.ends().len()
    }

    fn ends(&self) -> MutexGuard<'_, BTreeSet<(OffsetDateTime, SandboxId)>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn the_first_end_comes_first_and_an_earlier_one_wakes_the_sleeper() {
        let deadlines = Arc::new(Deadlines::default());
        let (a, b) = (SandboxId::generate(), SandboxId::generate());
        let now = OffsetDateTime::now_utc();
        let far = now + Duration::from_secs(3600);
        deadlines.change(&a, None, Some(far));
        let waiter = tokio::spawn({
            let deadlines = Arc::clone(&deadlines);
            async move { deadlines.due().await }
        });
        tokio::task::yield_now().await;
        deadlines.change(&b, None, Some(now));
        assert_eq!(waiter.await.expect("due"), [b]);
        deadlines.change(&a, Some(far), Some(now));
        assert_eq!(deadlines.due().await, std::slice::from_ref(&a));
        deadlines.change(&a, None, Some(far));
        deadlines.change(&a, Some(far), None);
        assert_eq!(deadlines.len(), 0, "no end leaves nothing behind");
    }
}
