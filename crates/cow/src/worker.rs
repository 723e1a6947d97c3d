//! A thread that does one job after another, at low priority and outside everybody's way.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

/// How much nicer than the rest a worker is: a VM that waits for a CPU goes first.
const NICENESS: i32 = 15;

/// Asked by long work whether it should go on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// Whether the worker has been told to stop.
    pub(crate) fn is_set(&self) -> bool {
        *self.lock()
    }

    /// Waits for that time, or until the worker is told to stop: whether it has been told.
    #[must_use]
    pub(crate) fn is_set_within(&self, time: Duration) -> bool {
        let (_, changed) = &*self.0;
        let waited = changed.wait_timeout_while(self.lock(), time, |set| !*set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn set(&self) {
        *self.lock() = true;
        self.0.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue of jobs and the thread that does them. A thread of its own, because its priority is
/// lowered.
#[derive(Debug)]
pub(crate) struct Worker<J> {
    jobs: Option<mpsc::Sender<J>>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl<J: Send + 'static> Worker<J> {
    /// Starts the thread; `work` is called on it for every job.
    pub(crate) fn start(
        name: &str,
        mut work: impl FnMut(J, &Stop) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let stop = Stop::default();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // On Linux this concerns the calling thread only.
                let _ = rustix::process::setpriority_process(None, NICENESS);
                for job in queue {
                    if stopped.is_set() {
                        break;
                    }
                    work(job, &stopped);
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            stop,
            thread: Some(thread),
        })
    }

    /// Queues a job. It is not done if the worker is stopped before.
    pub(crate) fn push(&self, job: J) {
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }

    /// Stops at the next opportunity; jobs that wait are dropped. Blocking until then.
    pub(crate) fn stop(&mut self) {
        self.stop.set();
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<J> Drop for Worker<J> {
    fn drop(&mut self) {
        self.stop.set();
    }
}
