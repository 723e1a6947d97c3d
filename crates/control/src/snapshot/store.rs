//! Snapshots in the database.

use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use sqlx::{QueryBuilder, Row as _, Sqlite, SqliteConnection, sqlite::SqliteRow};
use time::OffsetDateTime;

use super::{Report, Snapshot, SnapshotCursor, SnapshotState};
use crate::{
    db::{Db, from_micros, now, to_micros},
    error::{Error, Result},
    sandbox::PauseMode,
    template::{DEFAULT_TAG, Reference, Resolved},
};

/// The `snapshots` table.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    db: Db,
}

/// Which rows to read.
#[derive(Debug, Default)]
pub(crate) struct Filter<'a> {
    pub(crate) sandbox: Option<&'a SandboxId>,
    pub(crate) name: Option<&'a Reference>,
    pub(crate) states: &'a [SnapshotState],
    pub(crate) after: Option<&'a SnapshotCursor>,
    pub(crate) limit: Option<usize>,
}

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }

    /// Writes down a snapshot that is about to be taken. False: there are `max` already.
    pub(crate) async fn insert(&self, snapshot: &Snapshot, max: Option<u64>) -> Result<bool> {
        let max = max.map_or(i64::MAX, |max| i64::try_from(max).unwrap_or(i64::MAX));
        let done = sqlx::query(
            "INSERT INTO snapshots (id, name, tag, build_id, sandbox_id, template_id, parent_id,
                 state, mode, created_at, updated_at, expires_at, cpu_count, memory_mib, disk_mib,
                 envd_version)
             SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
             WHERE (SELECT count(*) FROM snapshots
                    WHERE state IN ('publishing', 'ready', 'failed')) < ?",
        )
        .bind(snapshot.id.as_str())
        .bind(&snapshot.name)
        .bind(&snapshot.tag)
        .bind(snapshot.build.to_string())
        .bind(snapshot.sandbox.as_str())
        .bind(snapshot.template.as_str())
        .bind(snapshot.parent.as_ref().map(SnapshotId::as_str))
        .bind(snapshot.state.as_str())
        .bind(snapshot.mode.as_str())
        .bind(to_micros(snapshot.created_at))
        .bind(to_micros(snapshot.updated_at))
        .bind(snapshot.expires_at.map(to_micros))
        .bind(snapshot.cpu_count)
        .bind(snapshot.memory_mib)
        .bind(snapshot.disk_mib)
        .bind(&snapshot.envd_version)
        .bind(max)
        .execute(&self.db.write)
        .await
        .map_err(Error::database("record a new snapshot"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Writes down that a snapshot was taken, and that its sandbox descends from it now. Returns
    /// when that was.
    pub(crate) async fn ready(
        &self,
        id: &SnapshotId,
        sandbox: &SandboxId,
        report: &Report,
    ) -> Result<OffsetDateTime> {
        let doing = "record that a snapshot was taken";
        let at = now();
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let mut tx = self.db.begin(doing).await?;
        sqlx::query(
            "UPDATE snapshots SET state = 'ready', updated_at = ?, tier = ?, bytes_scanned = ?,
                 bytes_dirty = ?, bytes_written = ?, frozen = ? WHERE id = ?",
        )
        .bind(to_micros(at))
        .bind(&report.tier)
        .bind(bytes(report.bytes_scanned))
        .bind(bytes(report.bytes_dirty))
        .bind(bytes(report.bytes_written))
        .bind(i64::try_from(report.frozen.as_micros()).unwrap_or(i64::MAX))
        .bind(id.as_str())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        sqlx::query("UPDATE sandboxes SET base_id = ? WHERE id = ? AND state <> 'dead'")
            .bind(id.as_str())
            .bind(sandbox.as_str())
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(at)
    }

    /// Forgets a snapshot that was never taken.
    pub(crate) async fn remove(&self, id: &SnapshotId) -> Result<()> {
        sqlx::query("DELETE FROM snapshots WHERE id = ? AND state = 'publishing'")
            .bind(id.as_str())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("forget a snapshot"))?;
        Ok(())
    }

    /// Writes down another state, and the reason for it, of a snapshot that is in one of these.
    /// False: it is not.
    pub(crate) async fn change(
        &self,
        id: &SnapshotId,
        from: &[SnapshotState],
        to: SnapshotState,
        reason: Option<&str>,
    ) -> Result<bool> {
        let mut query = QueryBuilder::<Sqlite>::new("UPDATE snapshots SET state = ");
        query.push_bind(to.as_str());
        query.push(", reason = ").push_bind(reason);
        query.push(", updated_at = ").push_bind(to_micros(now()));
        query.push(" WHERE id = ").push_bind(id.as_str());
        push_states(&mut query, from);
        let done = query
            .build()
            .execute(&self.db.write)
            .await
            .map_err(Error::database("change the state of a snapshot"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Writes down that a snapshot's files are gone. Its place in the tree stays as long as it
    /// holds something together.
    pub(crate) async fn bury(&self, id: &SnapshotId) -> Result<()> {
        let doing = "record the end of a snapshot";
        let mut tx = self.db.begin(doing).await?;
        sqlx::query(
            "UPDATE snapshots SET state = 'deleted', name = NULL, expires_at = NULL, updated_at = ?
             WHERE id = ?",
        )
        .bind(to_micros(now()))
        .bind(id.as_str())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        clear_ends_of_lines(&mut tx)
            .await
            .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))
    }

    /// Forgets the places of deleted snapshots which nothing descends from any more.
    pub(crate) async fn prune(&self) -> Result<()> {
        let doing = "forget deleted snapshots";
        let mut connection = self
            .db
            .write
            .acquire()
            .await
            .map_err(Error::database(doing))?;
        clear_ends_of_lines(&mut connection)
            .await
            .map_err(Error::database(doing))
    }

    /// A snapshot in any state.
    pub(crate) async fn get(&self, id: &str) -> Result<Option<Snapshot>> {
        let row = sqlx::query("SELECT * FROM snapshots WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.db.read)
            .await
            .map_err(Error::database("read a snapshot"))?;
        row.as_ref().map(from_row).transpose()
    }

    /// Snapshots, newest first.
    pub(crate) async fn list(&self, filter: &Filter<'_>) -> Result<Vec<Snapshot>> {
        let mut query = QueryBuilder::<Sqlite>::new("SELECT * FROM snapshots WHERE true");
        push_states(&mut query, filter.states);
        if let Some(sandbox) = filter.sandbox {
            query.push(" AND sandbox_id = ").push_bind(sandbox.as_str());
        }
        if let Some(reference) = filter.name {
            query.push(" AND name = ").push_bind(&reference.name);
            if let Some(tag) = &reference.tag {
                query.push(" AND tag = ").push_bind(tag);
            }
        }
        if let Some(cursor) = filter.after {
            query
                .push(" AND (created_at, id) < (")
                .push_bind(cursor.created_at)
                .push(", ")
                .push_bind(cursor.id.as_str())
                .push(")");
        }
        query.push(" ORDER BY created_at DESC, id DESC");
        if let Some(limit) = filter.limit {
            query
                .push(" LIMIT ")
                .push_bind(i64::try_from(limit).unwrap_or(i64::MAX));
        }
        let rows = query
            .build()
            .fetch_all(&self.db.read)
            .await
            .map_err(Error::database("list snapshots"))?;
        rows.iter().map(from_row).collect()
    }

    /// The snapshot that a reference stands for: by its id, or the newest of that name, one that
    /// can be used before one that cannot.
    pub(crate) async fn find(&self, reference: &Reference) -> Result<Option<Snapshot>> {
        let row = sqlx::query(
            "SELECT * FROM snapshots
             WHERE state IN ('publishing', 'ready', 'failed')
                 AND (id = ?1 AND ?2 IN (tag, ?3) OR name = ?1 AND tag = ?2)
             ORDER BY id = ?1 DESC, state = 'ready' DESC, created_at DESC, id DESC LIMIT 1",
        )
        .bind(&reference.name)
        .bind(reference.tag())
        .bind(DEFAULT_TAG)
        .fetch_optional(&self.db.read)
        .await
        .map_err(Error::database("look up a snapshot"))?;
        row.as_ref().map(from_row).transpose()
    }

    /// What a sandbox is to be made from, if a reference stands for a snapshot that can be used.
    pub(crate) async fn resolve(&self, reference: &Reference) -> Result<Option<Resolved>> {
        let Some(snapshot) = self.find(reference).await? else {
            return Ok(None);
        };
        let unusable = |why: String| Error::SnapshotUnusable {
            reference: snapshot.id.to_string(),
            why,
        };
        match snapshot.state {
            SnapshotState::Ready => {}
            SnapshotState::Publishing => return Err(unusable("it is still being taken".into())),
            _ => {
                let reason = snapshot.reason.clone();
                return Err(unusable(reason.unwrap_or_else(|| "it is damaged".into())));
            }
        }
        let defaults: String = sqlx::query_scalar("SELECT defaults FROM snapshots WHERE id = ?")
            .bind(snapshot.id.as_str())
            .fetch_one(&self.db.read)
            .await
            .map_err(Error::database("look up a snapshot"))?;
        let defaults = serde_json::from_str(&defaults)
            .map_err(|error| Error::damaged(format!("snapshot {}", snapshot.id), error))?;
        Ok(Some(Resolved {
            template: parse(snapshot.id.as_str(), snapshot.id.as_str())?,
            build: snapshot.build,
            snapshot: snapshot.id,
            alias: snapshot.name,
            cpu_count: snapshot.cpu_count,
            memory_mib: snapshot.memory_mib,
            disk_mib: snapshot.disk_mib,
            envd_version: snapshot.envd_version,
            defaults,
        }))
    }

    /// Whether a name stands for a snapshot.
    pub(crate) async fn has_name(&self, name: &str) -> Result<bool> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM snapshots
                 WHERE name = ? AND state IN ('publishing', 'ready', 'failed'))",
        )
        .bind(name)
        .fetch_one(&self.db.read)
        .await
        .map_err(Error::database("look up the name of a snapshot"))
    }

    /// The sandbox that is paused as this snapshot.
    pub(crate) async fn paused_as(&self, snapshot: &str) -> Result<Option<SandboxId>> {
        let id: Option<String> =
            sqlx::query_scalar("SELECT id FROM sandboxes WHERE pause_snapshot = ?")
                .bind(snapshot)
                .fetch_optional(&self.db.read)
                .await
                .map_err(Error::database("look up a paused sandbox"))?;
        id.map(|id| parse(&id, &id)).transpose()
    }

    /// Whether a snapshot was taken of this sandbox, or is what it or one of its snapshots descends
    /// from.
    pub(crate) async fn is_past_of(
        &self,
        sandbox: &SandboxId,
        snapshot: &SnapshotId,
    ) -> Result<bool> {
        // Most often it is the sandbox's own, which takes no look at its whole past.
        sqlx::query_scalar(
            "WITH RECURSIVE past (id) AS (
                 SELECT base_id FROM sandboxes WHERE id = ?1
                 UNION SELECT parent_id FROM snapshots
                     WHERE sandbox_id = ?1 AND parent_id IS NOT NULL
                 UNION SELECT s.parent_id FROM past JOIN snapshots s ON s.id = past.id
                     WHERE s.parent_id IS NOT NULL)
             SELECT EXISTS (SELECT 1 FROM snapshots WHERE id = ?2 AND sandbox_id = ?1)
                 OR EXISTS (SELECT 1 FROM past WHERE id = ?2)",
        )
        .bind(sandbox.as_str())
        .bind(snapshot.as_str())
        .fetch_one(&self.db.read)
        .await
        .map_err(Error::database("look into the past of a sandbox"))
    }

    /// Which of these are snapshots of templates: the template and its first alias.
    pub(crate) async fn templates_of(
        &self,
        snapshots: &[SnapshotId],
    ) -> Result<Vec<(SnapshotId, TemplateId, Option<String>)>> {
        let mut found = Vec::new();
        for snapshot in snapshots {
            let row = sqlx::query(
                "SELECT b.template_id, (SELECT alias FROM template_aliases a
                     WHERE a.template_id = b.template_id ORDER BY rowid LIMIT 1) AS alias
                 FROM template_builds b WHERE b.made_id = ?
                 ORDER BY b.created_at DESC LIMIT 1",
            )
            .bind(snapshot.as_str())
            .fetch_optional(&self.db.read)
            .await
            .map_err(Error::database("look up the template of a snapshot"))?;
            if let Some(row) = row {
                let id: String = row.get("template_id");
                found.push((snapshot.clone(), parse(&id, &id)?, row.get("alias")));
            }
        }
        Ok(found)
    }
}

/// Deletes rows of deleted snapshots which nothing descends from, until there are no more, and
/// those which only one snapshot descends from; that takes their place. What is left is where
/// lines of descent part, and what sandboxes descend from directly: no more than there are of
/// those, however long the lines are.
async fn clear_ends_of_lines(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    loop {
        let done = sqlx::query(
            "DELETE FROM snapshots WHERE state = 'deleted'
                 AND NOT EXISTS (SELECT 1 FROM snapshots c WHERE c.parent_id = snapshots.id)
                 AND NOT EXISTS (SELECT 1 FROM sandboxes b
                     WHERE b.base_id = snapshots.id AND b.state <> 'dead')",
        )
        .execute(&mut *connection)
        .await?;
        if done.rows_affected() == 0 {
            break;
        }
    }
    loop {
        let between: Option<(String, Option<String>)> = sqlx::query_as(
            "SELECT id, parent_id FROM snapshots WHERE state = 'deleted'
                 AND (SELECT count(*) FROM snapshots c WHERE c.parent_id = snapshots.id) = 1
                 AND NOT EXISTS (SELECT 1 FROM sandboxes b
                     WHERE b.base_id = snapshots.id AND b.state <> 'dead')
             LIMIT 1",
        )
        .fetch_optional(&mut *connection)
        .await?;
        let Some((id, parent)) = between else {
            return Ok(());
        };
        sqlx::query("UPDATE snapshots SET parent_id = ? WHERE parent_id = ?")
            .bind(parent)
            .bind(&id)
            .execute(&mut *connection)
            .await?;
        sqlx::query("DELETE FROM snapshots WHERE id = ?")
            .bind(&id)
            .execute(&mut *connection)
            .await?;
    }
}

fn push_states(query: &mut QueryBuilder<Sqlite>, states: &[SnapshotState]) {
    if states.is_empty() {
        return;
    }
    query.push(" AND state IN (");
    let mut list = query.separated(", ");
    for state in states {
        list.push_bind(state.as_str());
    }
    query.push(")");
}

fn from_row(row: &SqliteRow) -> Result<Snapshot> {
    let id: String = row.get("id");
    let damaged = |why: String| Error::damaged(format!("snapshot {id}"), why);
    let text = |column: &str| -> String { row.get(column) };
    let bytes = |column: &str| {
        row.get::<Option<i64>, _>(column)
            .unwrap_or(0)
            .unsigned_abs()
    };
    let (state, mode) = (text("state"), text("mode"));
    let report = row.get::<Option<String>, _>("tier").map(|tier| Report {
        tier,
        bytes_scanned: bytes("bytes_scanned"),
        bytes_dirty: bytes("bytes_dirty"),
        bytes_written: bytes("bytes_written"),
        frozen: std::time::Duration::from_micros(bytes("frozen")),
    });
    Ok(Snapshot {
        id: parse(&id, &id)?,
        name: row.get("name"),
        tag: text("tag"),
        build: parse(&id, &text("build_id"))?,
        sandbox: parse(&id, &text("sandbox_id"))?,
        template: parse(&id, &text("template_id"))?,
        parent: row
            .get::<Option<String>, _>("parent_id")
            .map(|parent| parse(&id, &parent))
            .transpose()?,
        state: SnapshotState::parse(&state).ok_or_else(|| damaged(format!("state {state}")))?,
        reason: row.get("reason"),
        mode: PauseMode::parse(&mode).ok_or_else(|| damaged(format!("mode {mode}")))?,
        created_at: from_micros(row.get("created_at")),
        updated_at: from_micros(row.get("updated_at")),
        expires_at: row.get::<Option<i64>, _>("expires_at").map(from_micros),
        cpu_count: row.get("cpu_count"),
        memory_mib: row.get("memory_mib"),
        disk_mib: row.get("disk_mib"),
        envd_version: text("envd_version"),
        report,
        stored: None,
    })
}

fn parse<T: std::str::FromStr>(of: &str, text: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|e| Error::damaged(format!("snapshot {of}"), e))
}
