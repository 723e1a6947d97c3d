use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Error, running::Process};
use crate::proto::process::{ProcessSelector, process_selector::Selector};

/// How many ended processes are remembered, and for how long.
const MAX_ENDED: usize = 128;
const REMEMBER: Duration = Duration::from_secs(10 * 60);

/// Every process that was started here and runs, and those that ended lately: who asks for one of
/// them a little late still learns how it ended.
#[derive(Default)]
pub(super) struct Table {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    by_pid: HashMap<u32, Arc<Process>>,
    /// Ended, the earliest first. A pid that has been used again is in `by_pid` for its new owner.
    ended: VecDeque<(Instant, Arc<Process>)>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, process: Arc<Process>) {
        let mut inner = self.lock();
        inner.forget();
        inner.by_pid.insert(process.pid, process);
    }

    /// Notes that the process has ended.
    pub(super) fn ended(&self, process: &Arc<Process>) {
        let mut inner = self.lock();
        inner.ended.push_back((Instant::now(), Arc::clone(process)));
        inner.forget();
    }

    /// Those that run, by pid.
    pub(super) fn running(&self) -> Vec<Arc<Process>> {
        let inner = self.lock();
        let running = inner.by_pid.values().filter(|process| process.is_running());
        let mut running: Vec<_> = running.cloned().collect();
        running.sort_unstable_by_key(|process| process.pid);
        running
    }

    /// The process that is meant, whether or not it still runs.
    pub(super) fn find(&self, selector: &ProcessSelector) -> Result<Arc<Process>, Error> {
        let inner = self.lock();
        match &selector.selector {
            Some(Selector::Pid(pid)) => inner.by_pid.get(pid).cloned().ok_or(Error::NoPid(*pid)),
            Some(Selector::Tag(tag)) => {
                let tagged = inner
                    .by_pid
                    .values()
                    .filter(|p| p.tag.as_ref() == Some(tag));
                tagged
                    .max_by_key(|process| process.is_running())
                    .cloned()
                    .ok_or_else(|| Error::NoTag(tag.clone()))
            }
            None => Err(Error::Missing("process")),
        }
    }

    /// The process that is meant, if it runs.
    pub(super) fn find_running(&self, selector: &ProcessSelector) -> Result<Arc<Process>, Error> {
        let process = self.find(selector)?;
        if process.is_running() {
            return Ok(process);
        }
        Err(match &selector.selector {
            Some(Selector::Tag(tag)) => Error::NoTag(tag.clone()),
            _ => Error::NoPid(process.pid),
        })
    }
}

impl Inner {
    fn forget(&mut self) {
        while let Some((since, process)) = self.ended.front()
            && (self.ended.len() > MAX_ENDED || since.elapsed() > REMEMBER)
        {
            let pid = process.pid;
            if self
                .by_pid
                .get(&pid)
                .is_some_and(|current| Arc::ptr_eq(current, process))
            {
                self.by_pid.remove(&pid);
            }
            self.ended.pop_front();
        }
    }
}
