//! The logs of builds: in the database before anyone sees them, so that following and reading back
//! are the same thing.

use std::{
    collections::HashMap,
    sync::{MutexGuard, PoisonError},
};

use futures::Stream;
use tokio::sync::watch;
use uuid::Uuid;

use super::{BuildLine, Templates};
use crate::{
    error::Result,
    fleet::{BuildStep, Level},
};

/// Most log lines read from the database at once.
const PAGE: u32 = 100;

/// Which lines of a log to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPage {
    /// How many of those that there are to pass over.
    pub offset: u64,
    /// How many to read at most.
    pub limit: u32,
    /// The least grave that are of interest.
    pub level: Level,
    /// Begin with the last.
    pub newest_first: bool,
}

impl LogPage {
    /// Every line from the `offset`th on, oldest first.
    #[must_use]
    pub const fn from(offset: u64, limit: u32) -> Self {
        Self {
            offset,
            limit,
            level: Level::Debug,
            newest_first: false,
        }
    }
}

impl Templates {
    /// A page of a build's log.
    pub async fn build_log(&self, build: Uuid, page: LogPage) -> Result<Vec<BuildLine>> {
        self.store.read_log(build, page).await
    }

    /// The log of a build, line by line, until it ends.
    pub fn follow(&self, build: Uuid) -> impl Stream<Item = Result<BuildLine>> + Send + use<> {
        let (templates, lines) = (
            self.clone(),
            self.running().get(&build).map(|s| s.subscribe()),
        );
        futures::stream::try_unfold((0, lines, Vec::new().into_iter()), move |state| {
            let templates = templates.clone();
            async move {
                let (mut next, mut lines, mut page): (u64, _, std::vec::IntoIter<BuildLine>) =
                    state;
                loop {
                    if let Some(line) = page.next() {
                        next = line.seq + 1;
                        return Ok(Some((line, (next, lines, page))));
                    }
                    page = templates
                        .store
                        .read_log_from(build, next, PAGE)
                        .await?
                        .into_iter();
                    if page.len() > 0 {
                        continue;
                    }
                    let Some(counter) = &mut lines else {
                        return Ok(None);
                    };
                    // An error means that the build has ended: one more look, then no waiting.
                    if counter.wait_for(|written| *written > next).await.is_err() {
                        lines = None;
                    }
                }
            }
        })
    }

    /// Appends a line and wakes who follows. Returns the number of lines.
    pub(super) async fn write_line(&self, build: Uuid, seq: u64, step: &BuildStep) -> u64 {
        if let Err(error) = self.store.log(build, seq, step).await {
            tracing::warn!(%build, %error, "a line of the build's log is lost");
            return seq;
        }
        if let Some(counter) = self.running().get(&build) {
            counter.send_replace(seq + 1);
        }
        seq + 1
    }

    pub(super) fn running(&self) -> MutexGuard<'_, HashMap<Uuid, watch::Sender<u64>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
