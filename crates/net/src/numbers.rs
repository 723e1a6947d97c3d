//! Numbers for slots: the lowest free one each time, so that they stay small.

use std::collections::BTreeSet;

use crate::SlotIndex;

/// Which numbers are free.
#[derive(Debug)]
pub(crate) struct Numbers {
    /// All numbers from here on are free.
    next: u32,
    /// Free numbers below `next`.
    free: BTreeSet<u32>,
}

impl Numbers {
    /// All numbers but these are free.
    pub(crate) fn except(taken: &BTreeSet<SlotIndex>) -> Self {
        let next = taken.last().map_or(0, |last| last.0.saturating_add(1));
        let free = (0..next)
            .filter(|number| !taken.contains(&SlotIndex(*number)))
            .collect();
        Self { next, free }
    }

    /// The lowest free number.
    pub(crate) fn take(&mut self) -> SlotIndex {
        SlotIndex(self.free.pop_first().unwrap_or_else(|| {
            let number = self.next;
            self.next += 1;
            number
        }))
    }

    /// Makes a number free again.
    pub(crate) fn give_back(&mut self, index: SlotIndex) {
        self.free.insert(index.0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_lowest_free_number_each_time(
            taken in prop::collection::btree_set(0_u32..20, 0..8),
            steps in prop::collection::vec(prop::option::of(0_usize..20), 1..60),
        ) {
            let mut used: BTreeSet<SlotIndex> = taken.into_iter().map(SlotIndex).collect();
            let mut numbers = Numbers::except(&used);
            for step in steps {
                match step.and_then(|nth| used.iter().nth(nth).copied()) {
                    Some(index) => {
                        used.remove(&index);
                        numbers.give_back(index);
                    }
                    None => {
                        let index = numbers.take();
                        let lowest = (0..).map(SlotIndex).find(|n| !used.contains(n)).unwrap();
                        prop_assert_eq!(index, lowest);
                        used.insert(index);
                    }
                }
            }
        }
    }
}
