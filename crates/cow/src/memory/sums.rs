//! What the last image of a VM holds, known without reading it.

use std::{collections::HashMap, hash::BuildHasher as _, hash::RandomState, sync::LazyLock};

use highway::{HighwayHash as _, HighwayHasher, Key};

use super::{Dirty, is_zero};

/// Hashes of pages that an image was given when it was captured from a VM.
///
/// Captures are cumulative: they hold what the VM has written since its start, most of which the
/// last image has already. That image shares its blocks with the one before, but not the page
/// cache, so comparing with it means reading it from the disk. Comparing with its hashes does not.
#[derive(Debug, Clone, Default)]
pub struct PageSums {
    /// By offset in guest memory.
    sums: HashMap<u64, Sum>,
}

/// The hash of a page; zeros for a page of zeros. HighwayHash is as fast as memory and, with a key
/// that no guest knows, nobody finds two pages with the same hash.
type Sum = [u64; 2];

/// The key of all hashes that this process makes; they never leave it.
static KEY: LazyLock<Key> = LazyLock::new(|| {
    let random = RandomState::new();
    Key([0, 1, 2, 3].map(|n: u64| random.hash_one(n)))
});

impl PageSums {
    /// Hashes the captured pages that are not known yet. Blocking: as long as it takes to
    /// read them.
    pub fn complete(&mut self, dirty: &Dirty) {
        let page = rustix::param::page_size();
        for (run, content) in dirty.contents() {
            for (offset, content) in (run.offset..).step_by(page).zip(content.chunks(page)) {
                self.sums.entry(offset).or_insert_with(|| sum(content));
            }
        }
    }

    /// Whether it says what the page at this offset holds.
    pub(super) fn knows(&self, offset: u64) -> bool {
        self.sums.contains_key(&offset)
    }

    /// Notes what a page holds now. Returns whether it held the same before, if that was known.
    pub(super) fn note(&mut self, before: &Self, offset: u64, content: &[u8]) -> bool {
        let sum = sum(content);
        self.sums.insert(offset, sum);
        before.sums.get(&offset) == Some(&sum)
    }
}

fn sum(content: &[u8]) -> Sum {
    match is_zero(content) {
        true => [0; 2],
        false => HighwayHasher::new(*KEY).hash128(content),
    }
}
