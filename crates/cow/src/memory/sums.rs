//! What the last image of a VM holds, known without reading it.

use std::collections::HashMap;

use super::{Dirty, is_zero};

/// Hashes of pages that an image was given when it was captured from a VM.
///
/// Captures are cumulative: they hold what the VM has written since its start, most of which the
/// last image has already. That image shares its blocks with the one before, but not the page
/// cache, so comparing with it means reading it from the disk. Comparing with its hashes does not.
#[derive(Debug, Clone, Default)]
pub struct PageSums {
    /// By offset in guest memory. Of BLAKE3, 16 bytes: that two contents of one page have the same
    /// by chance will not happen, and a guest that made it happen would damage its own snapshot.
    sums: HashMap<u64, Sum>,
}

/// The hash of a page; zeros for a page of zeros.
type Sum = [u8; 16];

impl PageSums {
    /// Hashes the captured pages that are not known yet. Blocking: 0.5 ms for each MB of those.
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
    let mut sum = Sum::default();
    if !is_zero(content) {
        sum.copy_from_slice(&blake3::hash(content).as_bytes()[..16]);
    }
    sum
}
