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
/// The file system gives back the blocks of deleted files in its own time. For this long after a
/// change, sizes are looked up again as soon as they are [`FRESH`] no more.
const SETTLED: Duration = Duration::from_secs(5);
const FRESH: Duration = Duration::from_millis(500);

/// The space that a snapshot takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of all its data, whoever shares it; holes do not count.
    pub logical_bytes: u64,
    /// Bytes that are its own: what its deletion would give back. Too little before the snapshot is
    /// durable, since what has not been written yet is nobody's.
    pub own_bytes: u64,
}

/// Sizes that were looked up.
#[derive(Debug, Default)]
pub(super) struct SizeCache(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// How many changes there have been to the sets of snapshots and of volumes, and when that
    /// became known here.
    changes: Option<((u64, u64), Instant)>,
    known: HashMap<SnapshotId, (Instant, Sizes)>,
}

impl SizeCache {
    fn get(&self, id: &SnapshotId, changes: (u64, u64)) -> Option<Sizes> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let changed_at = match inner.changes {
            Some((known, at)) if known == changes => at,
            _ => {
                inner.known.clear();
                inner.changes = Some((changes, now));
                now
            }
        };
        let (at, sizes) = *inner.known.get(id)?;
        let valid = if at.duration_since(changed_at) < SETTLED {
            FRESH
        } else {
            AGE
        };
        (now.duration_since(at) < valid).then_some(sizes)
    }

    fn put(&self, id: &SnapshotId, changes: (u64, u64), sizes: Sizes) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.changes.is_some_and(|(known, _)| known == changes) {
            inner.known.insert(id.clone(), (Instant::now(), sizes));
        }
    }
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
        let changes = (
            *self.inner.changes.borrow(),
            self.inner.volume_changes.load(Ordering::Acquire),
        );
        if let Some(sizes) = self.inner.sizes.get(id, changes) {
            return Ok(sizes);
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
        self.inner.sizes.put(id, changes, sizes);
        Ok(sizes)
    }
}
