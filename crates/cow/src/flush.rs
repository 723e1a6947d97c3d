//! Makes snapshots durable, one after another, at low priority and outside everybody's way.

use std::{
    fs::File,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use cubicle_ids::SnapshotId;
use rustix::fs::{Advice, fadvise};

use crate::{
    digest::digest,
    error::{Context as _, Result},
    snapshot::{MANIFEST, MEMORY},
};

/// A snapshot to flush.
pub(crate) struct Job {
    pub(crate) id: SnapshotId,
    pub(crate) dir: PathBuf,
    /// File names besides the manifest.
    pub(crate) parts: Vec<String>,
}

/// What came of a job.
pub(crate) struct Flushed {
    pub(crate) id: SnapshotId,
    /// Checksum of every part, or why there is none.
    pub(crate) outcome: Result<Vec<(String, String)>>,
}

/// The thread that flushes. A thread of its own, because its priority is lowered.
pub(crate) struct Flusher {
    jobs: Option<mpsc::Sender<Job>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts the thread; `done` is called on it.
    pub(crate) fn start(done: impl Fn(Flushed) + Send + 'static) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("snapshot-flush".to_owned())
            .spawn(move || {
                // On Linux this concerns the calling thread only. A VM that waits for a CPU goes first.
                let _ = rustix::process::setpriority_process(None, 15);
                for job in queue {
                    if let Some(flushed) = flush(&job, &stopped) {
                        done(flushed);
                    }
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            stop,
            thread: Some(thread),
        })
    }

    pub(crate) fn push(&self, job: Job) {
        // Fails only when the thread is gone; the snapshot then stays "not durable", which is true.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }

    /// Stops at the next opportunity; what is not flushed stays "not durable". Blocking.
    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn flush(job: &Job, stop: &AtomicBool) -> Option<Flushed> {
    let outcome = (|| {
        let mut checksums = Vec::new();
        // Memory first: reading it for the checksum is also what brings it into the page cache, so
        // that the first restore of a fresh image need not wait for the disk.
        let (memory, others) = job
            .parts
            .iter()
            .partition::<Vec<_>, _>(|name| *name == MEMORY);
        for name in memory.into_iter().chain(others) {
            let path = job.dir.join(name);
            let file = File::open(&path).at("open to flush", &path)?;
            match digest(&path, || !stop.load(Ordering::Relaxed))? {
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
    })();
    outcome.transpose().map(|outcome| Flushed {
        id: job.id.clone(),
        outcome,
    })
}
