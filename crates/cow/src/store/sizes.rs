//! How much space snapshots take.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use cubicle_ids::SnapshotId;

use super::Store;
use crate::{
    error::{Error, Result},
    extents::usage,
    snapshot::MANIFEST,
};

/// Sizes are taken to be right for this long while no snapshot or volume comes or goes: a VM that
/// writes to its disk makes blocks of the snapshot that it came from unshared, and says nothing.
const AGE: Duration = Duration::from_secs(30);

/// The space that a snapshot takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of all its data, whoever shares it; holes do not count.
    pub logical_bytes: u64,
    /// Bytes that are its own: what its deletion would give back. Too little before the snapshot is
    /// durable, since what has not been written yet is nobody's.
    pub own_bytes: u64,
}

/// Sizes that were looked up, and when.
#[derive(Debug, Default)]
pub(super) struct SizeCache(Mutex<HashMap<SnapshotId, Known>>);

#[derive(Debug, Clone, Copy)]
struct Known {
    /// How many changes there had been to the sets of snapshots and of volumes.
    changes: (u64, u64),
    at: Instant,
    sizes: Sizes,
}

impl Store {
    /// How much space a snapshot takes, whatever its state. Blocking: some 0.2 us for each extent of
    /// its files, and next to nothing if it was asked before and no snapshot or volume has come or
    /// gone since.
    ///
    /// # Errors
    /// [`Error::NotFound`]; or if its files cannot be asked.
    pub fn sizes(&self, id: &SnapshotId) -> Result<Sizes> {
        let entry = self.entry(id).ok_or_else(|| Error::NotFound(id.clone()))?;
        let cache = &self.inner.sizes.0;
        let changes = (
            *self.inner.changes.borrow(),
            self.inner.volume_changes.load(Ordering::Acquire),
        );
        let known = cache
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .copied();
        if let Some(known) = known
            && known.changes == changes
            && known.at.elapsed() < AGE
        {
            return Ok(known.sizes);
        }
        let dir = self.snapshot_dir(id);
        let mut sizes = Sizes::default();
        let parts = entry.manifest.parts.iter().map(|part| part.name.as_str());
        for name in parts.chain([MANIFEST]) {
            match usage(&dir.join(name)) {
                Ok(usage) => {
                    sizes.logical_bytes += usage.allocated;
                    sizes.own_bytes += usage.own;
                }
                // A snapshot that has failed may lack anything, and takes less for it.
                Err(_) if !entry.is_usable() => {}
                Err(_) if self.entry(id).is_none() => return Err(Error::NotFound(id.clone())),
                Err(error) => return Err(error),
            }
        }
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Known {
            changes,
            at: Instant::now(),
            sizes,
        };
        cache.insert(id.clone(), now);
        Ok(sizes)
    }

    pub(super) fn forget_sizes(&self, id: &SnapshotId) {
        self.inner
            .sizes
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
    }
}
