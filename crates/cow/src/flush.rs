//! Makes snapshots durable, and checks those that are.

use std::{
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use cubicle_ids::SnapshotId;
use rustix::fs::{Advice, fadvise};

use crate::{
    catalog::PartRow,
    digest::{damage, digest},
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

/// Does a job. `None` if it was told to stop.
pub(crate) fn work(job: Job, stop: &Stop) -> Option<Done> {
    match job {
        Job::Flush(job) => {
            let outcome = flush(&job, stop).transpose()?;
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

/// Flushes a snapshot and reads it for its checksums. `None` if it was told to stop.
fn flush(job: &Flush, stop: &Stop) -> Result<Option<Vec<(String, String)>>> {
    let mut checksums = Vec::new();
    // Memory first: reading it for the checksum also brings the rest of it into the page cache.
    let (memory, others) = job
        .parts
        .iter()
        .partition::<Vec<_>, _>(|name| *name == MEMORY);
    for name in memory.into_iter().chain(others) {
        let path = job.dir.join(name);
        let file = File::open(&path).at("open to flush", &path)?;
        match digest(&path, || !stop.is_set())? {
            Some(checksum) => checksums.push((name.clone(), checksum)),
            None => return Ok(None),
        }
        file.sync_all().at("flush", &path)?;
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
    Ok(Some(checksums))
}
