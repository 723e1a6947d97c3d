//! The logs of builds.

use sqlx::{Row as _, sqlite::SqliteRow};
use uuid::Uuid;

use super::Store;
use crate::{
    db::{from_micros, now, to_micros},
    error::{Error, Result},
    fleet::{BuildStep, Level},
    template::{BuildLine, LogPage},
};

impl Store {
    /// Appends a line to a build's log.
    pub(crate) async fn log(&self, build: Uuid, seq: u64, step: &BuildStep) -> Result<()> {
        sqlx::query(
            "INSERT INTO template_build_log (build_id, seq, at, level, step, message)
             VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(build.to_string())
        .bind(i64::try_from(seq).unwrap_or(i64::MAX))
        .bind(to_micros(now()))
        .bind(step.level.as_str())
        .bind(&step.step)
        .bind(&step.message)
        .execute(&self.db.write)
        .await
        .map_err(Error::database("write a build's log"))?;
        Ok(())
    }

    /// A page of a build's log.
    pub(crate) async fn read_log(&self, build: Uuid, page: LogPage) -> Result<Vec<BuildLine>> {
        let levels = [Level::Debug, Level::Info, Level::Warn, Level::Error];
        let levels: Vec<&str> = levels
            .into_iter()
            .filter(|level| *level >= page.level)
            .map(Level::as_str)
            .collect();
        let order = if page.newest_first { "DESC" } else { "ASC" };
        let query = format!(
            "SELECT * FROM template_build_log WHERE build_id = ?
                 AND level IN (SELECT value FROM json_each(?))
             ORDER BY seq {order} LIMIT ? OFFSET ?"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(query))
            .bind(build.to_string())
            .bind(super::json(&levels))
            .bind(page.limit)
            .bind(i64::try_from(page.offset).unwrap_or(i64::MAX))
            .fetch_all(&self.db.read)
            .await
            .map_err(Error::database("read a build's log"))?;
        rows.iter().map(from_row).collect()
    }

    /// Lines of a build's log from the `seq`th on.
    pub(crate) async fn read_log_from(
        &self,
        build: Uuid,
        seq: u64,
        limit: u32,
    ) -> Result<Vec<BuildLine>> {
        let rows = sqlx::query(
            "SELECT * FROM template_build_log WHERE build_id = ? AND seq >= ? ORDER BY seq LIMIT ?",
        )
        .bind(build.to_string())
        .bind(i64::try_from(seq).unwrap_or(i64::MAX))
        .bind(limit)
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database("read a build's log"))?;
        rows.iter().map(from_row).collect()
    }
}

fn from_row(row: &SqliteRow) -> Result<BuildLine> {
    let level: String = row.get("level");
    Ok(BuildLine {
        seq: row.get::<i64, _>("seq").unsigned_abs(),
        at: from_micros(row.get("at")),
        level: Level::parse(&level)
            .ok_or_else(|| Error::damaged("a build's log", format!("level {level}")))?,
        step: row.get("step"),
        message: row.get("message"),
    })
}
