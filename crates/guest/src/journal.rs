//! What happened in the sandbox lately: the starts and ends of processes, for `GET /logs`.
//!
//! A ring in memory. It holds lines about programs, never what they wrote.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, extract::State, response::IntoResponse, routing::get};
use cubicle_protocol::guest_api::{LOGS_PATH, LogEntry, Timestamp};
use http::header::CONTENT_TYPE;

/// How many lines are kept.
const CAPACITY: usize = 512;
/// Longest value of a field, in characters.
const MAX_FIELD: usize = 256;

/// How serious a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Info,
    /// A program failed.
    Warn,
    /// The daemon failed.
    Error,
}

impl Level {
    const fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// The last few hundred lines.
#[derive(Debug, Default)]
pub struct Journal {
    entries: Mutex<VecDeque<LogEntry>>,
}

impl Journal {
    /// Adds a line, and drops the oldest one if there are too many.
    pub fn note<const N: usize>(
        &self,
        level: Level,
        message: &str,
        fields: [(&'static str, String); N],
    ) {
        let fields = fields.map(|(name, mut value)| {
            if let Some((end, _)) = value.char_indices().nth(MAX_FIELD) {
                value.truncate(end);
                value.push('…');
            }
            (name.to_owned(), value)
        });
        let entry = LogEntry {
            timestamp: Timestamp::now(),
            level: level.name().to_owned(),
            message: message.to_owned(),
            fields: fields.into(),
        };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() == CAPACITY {
            entries.pop_front();
        }
        entries.push_back(entry);
    }

    /// One JSON object per line, oldest first.
    #[must_use]
    pub fn to_json_lines(&self) -> String {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // Texts, times and maps of texts always have a JSON form.
        let lines = entries
            .iter()
            .filter_map(|entry| serde_json::to_string(entry).ok());
        lines.fold(String::new(), |all, line| all + &line + "\n")
    }

    /// The route that serves it, for the host only.
    pub fn router(self: Arc<Self>) -> Router {
        Router::new().route(LOGS_PATH, get(serve)).with_state(self)
    }
}

async fn serve(State(journal): State<Arc<Journal>>) -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "application/x-ndjson")],
        journal.to_json_lines(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_lines_are_kept_and_long_fields_cut() {
        let journal = Journal::default();
        for i in 0..CAPACITY + 3 {
            journal.note(
                Level::Info,
                &format!("line {i}"),
                [("cmd", "ä".repeat(300))],
            );
        }
        let text = journal.to_json_lines();
        let lines: Vec<LogEntry> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), CAPACITY);
        assert_eq!(lines[0].message, "line 3");
        assert_eq!(lines[0].level, "info");
        assert_eq!(lines[0].fields["cmd"].chars().count(), MAX_FIELD + 1);
    }
}
