//! What is done for a snapshot after it was published.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    flush::{Check, Done, Flush, Job, Known, begin_write_back, work},
    snapshot::{MEMORY, WORKING_SET},
    worker::Worker,
    working_set,
};

/// Two threads: one makes the next restore and the next snapshot fast, the other makes the snapshot
/// durable, which takes longer. The latter also checks snapshots that may have suffered.
#[derive(Debug)]
pub(super) struct Background {
    warmer: Worker<Published>,
    flusher: Arc<Mutex<Worker<Job>>>,
}

/// How long after it was published a user's snapshot is flushed. A flush keeps a disk busy for tens of
/// milliseconds, and who has just made a snapshot may be restoring it. Others are flushed at once.
pub(super) const FLUSH_DELAY: Duration = Duration::from_millis(300);

/// A snapshot that was just published, or found not to be durable.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) job: Flush,
    /// It was published just now, and may be restored next.
    pub(super) new: bool,
    /// Whether it is to survive its program.
    pub(super) lasting: bool,
}

impl Background {
    /// Starts the threads; `done` is called for every job that was not cut short.
    pub(super) fn start(done: impl Fn(Done) + Send + 'static) -> io::Result<Self> {
        let mut known = Known::default();
        let flusher = Worker::start("snapshot-flush", move |job, stop| {
            if let Some(outcome) = work(job, &mut known, stop) {
                done(outcome);
            }
        })?;
        let flusher = Arc::new(Mutex::new(flusher));
        let next = Arc::clone(&flusher);
        let warmer = Worker::start("snapshot-warm", move |published: Published, stop| {
            let Published { job, new, lasting } = published;
            let image = job.dir.join(MEMORY);
            if new
                && let Err(error) =
                    working_set::read_ahead(&image, &job.dir.join(WORKING_SET), stop)
            {
                // It may have been deleted already.
                tracing::debug!(snapshot = %job.id, %error, "not read ahead");
            }
            begin_write_back(&image);
            if lasting {
                next.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Job::Flush(job));
            }
        })?;
        Ok(Self { warmer, flusher })
    }

    pub(super) fn push(&self, published: Published) {
        self.warmer.push(published);
    }

    pub(super) fn check(&self, check: Check) {
        self.flusher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Job::Check(check));
    }

    /// Stops at the next opportunity; what is not flushed stays "not durable". Blocking.
    pub(super) fn stop(&mut self) {
        self.warmer.stop();
        self.flusher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stop();
    }
}
