//! The logs of builds: in the database before anyone sees them, so that following and reading back
//! are the same thing.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::Stream;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::{BuildLine, Templates};
use crate::{
    error::Result,
    fleet::{BuildStep, Level, Output},
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

/// Longest line of a program's output that is kept whole, in bytes.
const MAX_LINE: usize = 4096;
/// Most lines of output that one build keeps.
const MAX_LINES: u64 = 50_000;

/// Where one step of a build writes.
#[derive(Debug, Clone)]
pub(super) struct Log {
    to: Option<mpsc::UnboundedSender<BuildStep>>,
    step: String,
    written: Arc<AtomicU64>,
}

impl Log {
    pub(super) fn new(to: mpsc::UnboundedSender<BuildStep>, step: &str) -> Self {
        Self {
            to: Some(to),
            step: step.to_owned(),
            written: Arc::default(),
        }
    }

    /// The same for another step.
    pub(super) fn of_step(&self, step: &str) -> Self {
        Self {
            step: step.to_owned(),
            ..self.clone()
        }
    }

    /// One that keeps nothing.
    pub(super) fn quiet(&self) -> Self {
        Self {
            to: None,
            ..self.clone()
        }
    }

    /// Where the fleet writes.
    pub(super) fn sender(&self) -> mpsc::UnboundedSender<BuildStep> {
        self.to
            .clone()
            .unwrap_or_else(|| mpsc::unbounded_channel().0)
    }

    pub(super) fn line(&self, level: Level, message: impl Into<String>) {
        let Some(to) = &self.to else { return };
        let step = BuildStep {
            level,
            step: Some(self.step.clone()),
            message: message.into(),
        };
        // Whoever reads it is there as long as the build is.
        let _ = to.send(step);
    }

    fn output(&self, level: Level, line: String) {
        match self.written.fetch_add(1, Ordering::Relaxed) {
            n if n < MAX_LINES => self.line(level, line),
            MAX_LINES => self.line(Level::Warn, "too much output: the rest of it is not kept"),
            _ => {}
        }
    }
}

/// Turns what a program prints into lines of a log.
pub(super) struct Lines<'a> {
    log: &'a Log,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    tail: VecDeque<String>,
}

impl<'a> Lines<'a> {
    /// How many of the last lines are remembered.
    const TAIL: usize = 20;

    pub(super) fn new(log: &'a Log) -> Self {
        Self {
            log,
            stdout: Vec::new(),
            stderr: Vec::new(),
            tail: VecDeque::new(),
        }
    }

    pub(super) fn push(&mut self, output: Output) {
        let (level, bytes) = match output {
            Output::Stdout(bytes) => (Level::Info, bytes),
            Output::Stderr(bytes) => (Level::Warn, bytes),
        };
        let mut pending = std::mem::take(self.pending(level));
        pending.extend_from_slice(&bytes);
        let mut rest = &pending[..];
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            self.line(level, &rest[..end]);
            rest = &rest[end + 1..];
        }
        while rest.len() > MAX_LINE {
            self.line(level, &rest[..MAX_LINE]);
            rest = &rest[MAX_LINE..];
        }
        *self.pending(level) = rest.to_vec();
    }

    /// Ends the last lines; returns the end of all that was printed, at most so many bytes of it.
    pub(super) fn finish(mut self, bytes: usize) -> String {
        for level in [Level::Info, Level::Warn] {
            let rest = std::mem::take(self.pending(level));
            if !rest.is_empty() {
                self.line(level, &rest);
            }
        }
        let tail = Vec::from(self.tail).join("\n");
        let from = tail.ceil_char_boundary(tail.len().saturating_sub(bytes));
        tail[from..].to_owned()
    }

    fn pending(&mut self, level: Level) -> &mut Vec<u8> {
        if level == Level::Info {
            &mut self.stdout
        } else {
            &mut self.stderr
        }
    }

    fn line(&mut self, level: Level, bytes: &[u8]) {
        // An empty line is one, too.
        for bytes in bytes
            .chunks(MAX_LINE)
            .chain(bytes.is_empty().then_some(bytes))
        {
            // What a terminal would have overwritten is of no interest.
            let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
            let bytes = bytes.rsplit(|b| *b == b'\r').next().unwrap_or(bytes);
            let line = String::from_utf8_lossy(bytes).into_owned();
            if self.tail.len() == Self::TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(line.clone());
            self.log.output(level, line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_becomes_lines_however_it_is_cut() {
        let (to, mut written) = mpsc::unbounded_channel();
        let log = Log::new(to, "1");
        let mut lines = Lines::new(&log);
        for part in ["a", "b\nc\r\n", "10%\r20%\n\n"] {
            lines.push(Output::Stdout(part.into()));
        }
        lines.push(Output::Stderr("oops".into()));
        lines.push(Output::Stdout("x".repeat(MAX_LINE + 5).into()));
        assert_eq!(lines.finish(9), "xxxx\noops");
        drop(log);
        let mut all = Vec::new();
        while let Ok(step) = written.try_recv() {
            all.push((step.level, step.message));
        }
        let lines: Vec<_> = all.iter().map(|(_, line)| line.as_str()).collect();
        assert_eq!(lines[..4], ["ab", "c", "20%", ""]);
        assert_eq!((lines[4].len(), lines[5]), (MAX_LINE, "xxxxx"));
        assert_eq!(all.last().map(|(level, _)| *level), Some(Level::Warn));
    }

    #[test]
    fn a_flood_is_cut_short_once() {
        let (to, mut written) = mpsc::unbounded_channel();
        let log = Log::new(to, "1");
        let mut lines = Lines::new(&log);
        let flood = "y\n".repeat(usize::try_from(MAX_LINES).unwrap() + 1000);
        lines.push(Output::Stdout(flood.into()));
        lines.finish(0);
        drop(log);
        let mut count = 0;
        while written.try_recv().is_ok() {
            count += 1;
        }
        assert_eq!(count, MAX_LINES + 1);
    }
}
