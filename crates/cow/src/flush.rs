//! Makes snapshots durable, and checks those that are.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    time::Instant,
};

use cubicle_ids::SnapshotId;
use rustix::fs::{Advice, fadvise};

use crate::{
    catalog::PartRow,
    digest::{Sums, damage, sums},
    error::{Context as _, Result},
    snapshot::{MANIFEST, MEMORY},
    worker::Stop,
};

/// A snapshot to flush.
#[derive(Debug)]
pub(crate) struct Flush {
    pub(crate) id: SnapshotId,
    pub(crate) dir: PathBuf,
    /// File names besides the manifest.
    pub(crate) parts: Vec<String>,
    /// Its ancestors, nearest first, whether they are there or not.
    pub(crate) lineage: Vec<SnapshotId>,
    /// Not to be flushed before.
    pub(crate) due: Instant,
}

/// A snapshot to compare with its checksums.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) id: SnapshotId,
    pub(crate) dir: PathBuf,
    pub(crate) parts: Vec<PartRow>,
}

/// What there is to do.
#[derive(Debug)]
pub(crate) enum Job {
    Flush(Flush),
    Check(Check),
}

/// What came of a job.
#[derive(Debug)]
pub(crate) enum Done {
    Flushed {
        id: SnapshotId,
        /// Checksum of every part, or why there is none.
        outcome: Result<Vec<(String, String)>>,
    },
    Damaged {
        id: SnapshotId,
        reason: String,
    },
    Intact,
}

/// Hashes of snapshots that were flushed lately, which the next ones share most blocks with.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Those that were used last are last.
    snapshots: Vec<(SnapshotId, HashMap<String, Sums>)>,
}

/// Most blocks whose hashes are kept, of 64 KiB and 40 bytes each: those of 16 GiB, in 10 MiB.
const MOST_KNOWN: usize = 256 << 10;

impl Known {
    fn keep(&mut self, id: SnapshotId, sums: HashMap<String, Sums>) {
        let len = |sums: &HashMap<_, Sums>| sums.values().map(Sums::len).sum::<usize>();
        self.snapshots.push((id, sums));
        let mut total: usize = self.snapshots.iter().map(|(_, sums)| len(sums)).sum();
        while total > MOST_KNOWN && !self.snapshots.is_empty() {
            total -= len(&self.snapshots.remove(0).1);
        }
    }

    /// The nearest ancestor that is known, with the directory that it has in `snapshots`.
    fn nearest(
        &mut self,
        lineage: &[SnapshotId],
        snapshots: &Path,
    ) -> Option<(PathBuf, &HashMap<String, Sums>)> {
        let index = lineage
            .iter()
            .find_map(|id| self.snapshots.iter().position(|known| known.0 == *id))?;
        let used = self.snapshots.remove(index);
        self.snapshots.push(used);
        let (id, sums) = self.snapshots.last()?;
        Some((snapshots.join(id.as_str()), sums))
    }
}

/// Does a job. `None` if it was told to stop.
pub(crate) fn work(job: Job, known: &mut Known, stop: &Stop) -> Option<Done> {
    match job {
        Job::Flush(job) => {
            if stop.is_set_within(job.due.saturating_duration_since(Instant::now())) {
                return None;
            }
            let outcome = flush(&job, known, stop).transpose()?;
            Some(Done::Flushed {
                id: job.id,
                outcome,
            })
        }
        Job::Check(job) => match check(&job.dir, &job.parts, || !stop.is_set())? {
            Some(reason) => Some(Done::Damaged { id: job.id, reason }),
            None => Some(Done::Intact),
        },
    }
}

/// What is wrong with the parts of a snapshot. `None` if `go_on` said no before all were read.
pub(crate) fn check(
    dir: &Path,
    parts: &[PartRow],
    go_on: impl Fn() -> bool,
) -> Option<Option<String>> {
    for part in parts {
        let size = u64::try_from(part.size).unwrap_or_default();
        let path = dir.join(&part.name);
        if let Some(reason) = damage(&path, size, part.checksum.as_deref(), &go_on) {
            return Some(Some(reason));
        }
        if !go_on() {
            return None;
        }
    }
    Some(None)
}

/// Asks for a file's dirty pages to be written, and does not wait until they are. What is on its
/// way early does not hold up the next snapshot, which clones the file and has to wait for it.
pub(crate) fn begin_write_back(path: &Path) {
    let Ok(file) = File::open(path) else { return };
    // SAFETY: the call reads its arguments only, and the descriptor is open. That it fails where it
    // is not supported is no loss: the file is flushed later anyway.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Flushes a snapshot and makes its checksums: of its parts' blocks, those that it shares with an
/// ancestor are not read again. `None` if it was told to stop.
fn flush(job: &Flush, known: &mut Known, stop: &Stop) -> Result<Option<Vec<(String, String)>>> {
    let mut made = HashMap::new();
    let ancestor = job
        .dir
        .parent()
        .and_then(|snapshots| known.nearest(&job.lineage, snapshots));
    // Memory first: the next snapshot waits for it.
    let (memory, others) = job
        .parts
        .iter()
        .partition::<Vec<_>, _>(|name| *name == MEMORY);
    for name in memory.into_iter().chain(others) {
        let path = job.dir.join(name);
        let file = File::open(&path).at("open to flush", &path)?;
        file.sync_all().at("flush", &path)?;
        // An ancestor that is not there any more is none.
        let base = ancestor.as_ref().and_then(|(dir, sums)| {
            let file = File::open(dir.join(name)).ok()?;
            Some((file, sums.get(name)?))
        });
        let base = base.as_ref().map(|(file, sums)| (file, *sums));
        match sums(&path, base, || !stop.is_set())? {
            Some(sums) => made.insert(name.clone(), sums),
            None => return Ok(None),
        };
        if name != MEMORY {
            // Nobody reads a snapshot's disk, only clones of it, which cache on their own.
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
        }
    }
    // The manifest, the names in the directory, and the directory's own name.
    let manifest = job.dir.join(MANIFEST);
    for path in [Some(manifest.as_path()), Some(&job.dir), job.dir.parent()]
        .into_iter()
        .flatten()
    {
        File::open(path)
            .and_then(|file| file.sync_all())
            .at("flush", path)?;
    }
    let checksums = made
        .iter()
        .map(|(name, sums)| (name.clone(), sums.checksum()));
    let checksums = checksums.collect();
    known.keep(job.id.clone(), made);
    Ok(Some(checksums))
}
