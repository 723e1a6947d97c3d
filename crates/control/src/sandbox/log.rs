//! The log of each sandbox as a whole: created, its end moved, killed and why.
//!
//! Writing costs its caller nothing: one task writes whatever has queued up in one transaction.
//! Reading waits for what was logged before.

use cubicle_ids::SandboxId;
use sqlx::Row as _;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};

use crate::{
    db::{Db, from_micros, now, to_micros},
    error::{Error, Result},
    fleet::Level,
    sandbox::LogEntry,
};

/// Most entries written in one transaction.
const BATCH: usize = 256;
/// Most entries that one query returns.
pub const MAX_LOG_PAGE: u32 = 1000;

/// Which part of a log to read.
#[derive(Debug, Clone)]
pub struct LogQuery {
    /// Where to begin: entries from then on, or until then when reading backward.
    pub from: Option<OffsetDateTime>,
    /// Most entries, at most [`MAX_LOG_PAGE`].
    pub limit: u32,
    /// Newest first.
    pub backward: bool,
    /// Nothing less grave than this.
    pub level: Level,
    /// Only messages that contain this, case-sensitive.
    pub search: Option<String>,
}

impl Default for LogQuery {
    fn default() -> Self {
        Self {
            from: None,
            limit: MAX_LOG_PAGE,
            backward: false,
            level: Level::Debug,
            search: None,
        }
    }
}

enum Message {
    Line(SandboxId, LogEntry),
    Flushed(oneshot::Sender<()>),
}

/// Where sandboxes' logs go.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    db: Db,
    queue: mpsc::UnboundedSender<Message>,
}

impl Log {
    /// The log, and the task that writes it; the task ends when the last `Log` is dropped.
    pub(crate) fn open(db: Db) -> (Self, impl Future<Output = ()>) {
        let (queue, incoming) = mpsc::unbounded_channel();
        (
            Self {
                db: db.clone(),
                queue,
            },
            write_all(db, incoming),
        )
    }

    /// Queues a line.
    pub(crate) fn line<const N: usize>(
        &self,
        id: &SandboxId,
        level: Level,
        message: impl Into<String>,
        fields: [(&str, String); N],
    ) {
        let entry = LogEntry {
            at: now(),
            level,
            message: message.into(),
            fields: fields
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
        };
        // Without a writer the server is stopping, and nobody can read the line either.
        let _ = self.queue.send(Message::Line(id.clone(), entry));
    }

    /// Reads a part of a sandbox's log.
    pub(crate) async fn read(&self, id: &SandboxId, query: &LogQuery) -> Result<Vec<LogEntry>> {
        let (flushed, wait) = oneshot::channel();
        if self.queue.send(Message::Flushed(flushed)).is_ok() {
            let _ = wait.await;
        }
        let sql = if query.backward {
            "SELECT * FROM sandbox_log WHERE sandbox_id = ?1 AND at <= ?2
                 AND instr('debug info  warn  error', level) >= ?3
                 AND (?4 IS NULL OR instr(message, ?4) > 0)
             ORDER BY seq DESC LIMIT ?5"
        } else {
            "SELECT * FROM sandbox_log WHERE sandbox_id = ?1 AND at >= ?2
                 AND instr('debug info  warn  error', level) >= ?3
                 AND (?4 IS NULL OR instr(message, ?4) > 0)
             ORDER BY seq ASC LIMIT ?5"
        };
        let from = match query.from {
            Some(at) => to_micros(at),
            None if query.backward => i64::MAX,
            None => i64::MIN,
        };
        // The position of a level's word in the list above is its rank.
        let rank = match query.level {
            Level::Debug => 1,
            Level::Info => 7,
            Level::Warn => 13,
            Level::Error => 19,
        };
        let rows = sqlx::query(sql)
            .bind(id.as_str())
            .bind(from)
            .bind(rank)
            .bind(&query.search)
            .bind(query.limit.min(MAX_LOG_PAGE))
            .fetch_all(&self.db.read)
            .await
            .map_err(Error::database("read a sandbox's log"))?;
        rows.into_iter()
            .map(|row| {
                let damaged = |why: String| Error::damaged(format!("the log of {id}"), why);
                let level: String = row.get("level");
                let fields: String = row.get("fields");
                Ok(LogEntry {
                    at: from_micros(row.get("at")),
                    level: Level::parse(&level).ok_or_else(|| damaged(format!("level {level}")))?,
                    message: row.get("message"),
                    fields: serde_json::from_str(&fields).map_err(|e| damaged(e.to_string()))?,
                })
            })
            .collect()
    }
}

async fn write_all(db: Db, mut incoming: mpsc::UnboundedReceiver<Message>) {
    let mut batch = Vec::with_capacity(BATCH);
    while incoming.recv_many(&mut batch, BATCH).await > 0 {
        let mut waiting = Vec::new();
        let mut lines = Vec::new();
        for message in batch.drain(..) {
            match message {
                Message::Line(id, entry) => lines.push((id, entry)),
                Message::Flushed(done) => waiting.push(done),
            }
        }
        if let Err(error) = write(&db, &lines).await {
            tracing::error!(%error, lines = lines.len(), "sandbox log lines are lost");
        }
        for done in waiting {
            let _ = done.send(());
        }
    }
}

async fn write(db: &Db, lines: &[(SandboxId, LogEntry)]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let doing = "write the log of sandboxes";
    let mut tx = db.begin(doing).await?;
    for (id, entry) in lines {
        let fields = serde_json::to_string(&entry.fields).unwrap_or_else(|_| "{}".to_owned());
        sqlx::query(
            // A line about a sandbox that was forgotten meanwhile is forgotten with it.
            "INSERT INTO sandbox_log (sandbox_id, at, level, message, fields)
             SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM sandboxes WHERE id = ?1)",
        )
        .bind(id.as_str())
        .bind(to_micros(entry.at))
        .bind(entry.level.as_str())
        .bind(&entry.message)
        .bind(fields)
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
    }
    tx.commit().await.map_err(Error::database(doing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{store::Store, test_sandbox};

    #[tokio::test]
    async fn what_was_logged_before_is_read_and_filters_hold() {
        let dir = tempfile::tempdir().expect("tempdir");
        let db = Db::open(&dir.path().join("cubicle.db"))
            .await
            .expect("database");
        let sandbox = test_sandbox();
        Store::new(db.clone())
            .insert(&sandbox, None)
            .await
            .expect("row");
        let (log, writer) = Log::open(db);
        let writer = tokio::spawn(writer);
        for n in 0..600 {
            let level = if n % 100 == 0 {
                Level::Warn
            } else {
                Level::Info
            };
            log.line(
                &sandbox.id,
                level,
                format!("line {n}"),
                [("n", n.to_string())],
            );
        }
        log.line(&test_sandbox().id, Level::Info, "nobody's line", []);
        let read = async |query| log.read(&sandbox.id, &query).await.expect("read");

        let all = read(LogQuery::default()).await;
        assert_eq!(all.len(), 600);
        assert_eq!(all[7].message, "line 7");
        assert_eq!(all[7].fields["n"], "7");
        let last = read(LogQuery {
            backward: true,
            limit: 2,
            ..LogQuery::default()
        })
        .await;
        assert_eq!(
            [&last[0].message, &last[1].message],
            ["line 599", "line 598"]
        );
        let warnings = read(LogQuery {
            level: Level::Warn,
            ..LogQuery::default()
        })
        .await;
        assert_eq!(warnings.len(), 6);
        let found = read(LogQuery {
            search: Some("line 59".into()),
            ..LogQuery::default()
        })
        .await;
        assert_eq!(found.len(), 11);
        let later = LogQuery {
            from: Some(now() + time::Duration::HOUR),
            ..LogQuery::default()
        };
        assert!(read(later).await.is_empty());

        drop(log);
        writer.await.expect("the writer ends with the last log");
    }
}
