//! Templates, their aliases, tags, builds and build logs in the database.

use std::collections::HashMap;

use cubicle_ids::{SnapshotId, TemplateId};
use sqlx::{Row as _, sqlite::SqliteRow};
use uuid::Uuid;

use super::{Build, BuildLine, BuildStatus, DEFAULT_TAG, Reference, Resolved, Template};
use crate::{
    db::{Db, from_micros, now, to_micros},
    error::{Error, Result},
    fleet::{BuildStep, Level},
};

#[derive(Debug, Clone)]
pub(crate) struct Store {
    db: Db,
}

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }

    /// The template that a name stands for: its id, an alias, or a snapshot of it.
    pub(crate) async fn find(&self, name: &str) -> Result<Option<TemplateId>> {
        let id: Option<String> = sqlx::query_scalar(
            "SELECT id FROM templates WHERE id = ?1
             UNION ALL SELECT template_id FROM template_aliases WHERE alias = ?1
             UNION ALL SELECT template_id FROM template_builds WHERE snapshot_id = ?1
             LIMIT 1",
        )
        .bind(name)
        .fetch_optional(&self.db.read)
        .await
        .map_err(Error::database("look up a template"))?;
        id.map(|id| parse("template", &id)).transpose()
    }

    /// The build that a reference stands for, if it has succeeded.
    pub(crate) async fn resolve(&self, reference: &Reference) -> Result<Option<Resolved>> {
        let row = sqlx::query(
            "SELECT b.*, (SELECT alias FROM template_aliases a WHERE a.template_id = b.template_id
                          ORDER BY rowid LIMIT 1) AS alias
             FROM template_builds b
             WHERE b.status = 'ready' AND b.snapshot_id IS NOT NULL AND (
                 b.snapshot_id = ?1
                 OR b.id = (SELECT build_id FROM template_tags t WHERE t.tag = ?2 AND t.template_id =
                     (SELECT id FROM templates WHERE id = ?1
                      UNION ALL SELECT template_id FROM template_aliases WHERE alias = ?1 LIMIT 1)))
             LIMIT 1",
        )
        .bind(&reference.name)
        .bind(reference.tag())
        .fetch_optional(&self.db.read)
        .await
        .map_err(Error::database("resolve a template"))?;
        let Some(row) = row else { return Ok(None) };
        let build = build_from_row(&row)?;
        let Some(snapshot) = build.snapshot else {
            return Ok(None);
        };
        Ok(Some(Resolved {
            template: build.template,
            build: build.id,
            snapshot,
            alias: row.get("alias"),
            cpu_count: build.cpu_count,
            memory_mib: build.memory_mib,
            disk_mib: build.disk_mib,
            envd_version: build.envd_version,
        }))
    }

    /// One template, or all of them, newest first.
    pub(crate) async fn load(&self, only: Option<&TemplateId>) -> Result<Vec<Template>> {
        let doing = "read templates";
        let only = only.map(TemplateId::as_str);
        let rows = sqlx::query(
            "SELECT * FROM templates WHERE ?1 IS NULL OR id = ?1 ORDER BY created_at DESC, id",
        )
        .bind(only)
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database(doing))?;
        let mut aliases: HashMap<String, Vec<String>> = HashMap::new();
        for row in sqlx::query(
            "SELECT alias, template_id FROM template_aliases
             WHERE ?1 IS NULL OR template_id = ?1 ORDER BY rowid",
        )
        .bind(only)
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database(doing))?
        {
            aliases
                .entry(row.get("template_id"))
                .or_default()
                .push(row.get("alias"));
        }
        let mut builds: HashMap<TemplateId, Vec<Build>> = HashMap::new();
        for row in sqlx::query(
            "SELECT * FROM template_builds WHERE ?1 IS NULL OR template_id = ?1
             ORDER BY created_at DESC",
        )
        .bind(only)
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database(doing))?
        {
            let build = build_from_row(&row)?;
            builds
                .entry(build.template.clone())
                .or_default()
                .push(build);
        }
        let mut current: HashMap<String, String> = HashMap::new();
        for row in sqlx::query(
            "SELECT template_id, build_id FROM template_tags
             WHERE tag = ?2 AND (?1 IS NULL OR template_id = ?1)",
        )
        .bind(only)
        .bind(DEFAULT_TAG)
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database(doing))?
        {
            current.insert(row.get("template_id"), row.get("build_id"));
        }
        rows.iter()
            .map(|row| {
                let text: String = row.get("id");
                let id: TemplateId = parse("template", &text)?;
                Ok(Template {
                    aliases: aliases.remove(&text).unwrap_or_default(),
                    public: row.get("public"),
                    created_at: from_micros(row.get("created_at")),
                    updated_at: from_micros(row.get("updated_at")),
                    spawn_count: row.get::<i64, _>("spawn_count").unsigned_abs(),
                    last_spawned_at: row
                        .get::<Option<i64>, _>("last_spawned_at")
                        .map(from_micros),
                    current: current
                        .get(&text)
                        .map(|build| parse("template build", build))
                        .transpose()?,
                    builds: builds.remove(&id).unwrap_or_default(),
                    id,
                })
            })
            .collect()
    }

    /// Writes down a new build, and the template and its alias if they are new. `Err` with the
    /// build that is under way already, if one is.
    pub(crate) async fn begin_build(
        &self,
        alias: &str,
        build: &mut Build,
    ) -> Result<Result<(), Uuid>> {
        let doing = "record a template build";
        let at = to_micros(build.created_at);
        let mut tx = self.db.begin(doing).await?;
        let known: Option<String> =
            sqlx::query_scalar("SELECT template_id FROM template_aliases WHERE alias = ?")
                .bind(alias)
                .fetch_optional(&mut *tx)
                .await
                .map_err(Error::database(doing))?;
        if let Some(known) = known {
            build.template = parse("template", &known)?;
            let running: Option<String> = sqlx::query_scalar(
                "SELECT id FROM template_builds
                 WHERE template_id = ? AND status IN ('waiting', 'building')",
            )
            .bind(&known)
            .fetch_optional(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
            if let Some(running) = running {
                return Ok(Err(parse("template build", &running)?));
            }
        } else {
            sqlx::query("INSERT INTO templates (id, created_at, updated_at) VALUES (?, ?, ?)")
                .bind(build.template.as_str())
                .bind(at)
                .bind(at)
                .execute(&mut *tx)
                .await
                .map_err(Error::database(doing))?;
            sqlx::query("INSERT INTO template_aliases (alias, template_id) VALUES (?, ?)")
                .bind(alias)
                .bind(build.template.as_str())
                .execute(&mut *tx)
                .await
                .map_err(Error::database(doing))?;
        }
        sqlx::query(
            "INSERT INTO template_builds (id, template_id, recipe, status, cpu_count, memory_mib,
                 disk_mib, envd_version, created_at, updated_at)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(build.id.to_string())
        .bind(build.template.as_str())
        .bind(&build.recipe)
        .bind(build.status.as_str())
        .bind(build.cpu_count)
        .bind(build.memory_mib)
        .bind(build.disk_mib)
        .bind(&build.envd_version)
        .bind(at)
        .bind(at)
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(Ok(()))
    }

    /// Writes down that a build is under way.
    pub(crate) async fn building(&self, build: Uuid) -> Result<()> {
        sqlx::query("UPDATE template_builds SET status = 'building', updated_at = ? WHERE id = ?")
            .bind(to_micros(now()))
            .bind(build.to_string())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("record that a build runs"))?;
        Ok(())
    }

    /// Writes down that a build failed.
    pub(crate) async fn build_failed(&self, build: Uuid, reason: &str) -> Result<()> {
        let at = to_micros(now());
        sqlx::query(
            "UPDATE template_builds SET status = 'error', reason = ?, updated_at = ?,
                 finished_at = ? WHERE id = ?",
        )
        .bind(reason)
        .bind(at)
        .bind(at)
        .bind(build.to_string())
        .execute(&self.db.write)
        .await
        .map_err(Error::database("record that a build failed"))?;
        Ok(())
    }

    /// Writes down that a build succeeded and moves the tags to it. Returns the snapshots that no
    /// tag stands for any more.
    pub(crate) async fn build_ready(
        &self,
        build: &Build,
        snapshot: &SnapshotId,
        tags: &[String],
    ) -> Result<Vec<SnapshotId>> {
        let doing = "record that a build succeeded";
        let at = to_micros(now());
        let mut tx = self.db.begin(doing).await?;
        let updated = sqlx::query(
            "UPDATE template_builds SET status = 'ready', snapshot_id = ?, updated_at = ?,
                 finished_at = ? WHERE id = ?",
        )
        .bind(snapshot.as_str())
        .bind(at)
        .bind(at)
        .bind(build.id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        if updated.rows_affected() == 0 {
            // The template was deleted while it was being built.
            return Ok(vec![snapshot.clone()]);
        }
        for tag in tags {
            sqlx::query(
                "INSERT INTO template_tags (template_id, tag, build_id, assigned_at)
                 VALUES (?, ?, ?, ?)
                 ON CONFLICT DO UPDATE SET build_id = excluded.build_id,
                     assigned_at = excluded.assigned_at",
            )
            .bind(build.template.as_str())
            .bind(tag)
            .bind(build.id.to_string())
            .bind(at)
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        }
        sqlx::query("UPDATE templates SET updated_at = ? WHERE id = ?")
            .bind(at)
            .bind(build.template.as_str())
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        let superseded = untagged(&mut tx, &build.template).await?;
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(superseded)
    }

    /// Drops one tag. Returns the snapshots that no tag stands for any more, or `None` if it is
    /// the template's only tag or not one of its tags.
    pub(crate) async fn delete_tag(
        &self,
        template: &TemplateId,
        tag: &str,
    ) -> Result<Option<Vec<SnapshotId>>> {
        let doing = "delete a tag";
        let mut tx = self.db.begin(doing).await?;
        let deleted = sqlx::query(
            "DELETE FROM template_tags WHERE template_id = ?1 AND tag = ?2
                 AND EXISTS (SELECT 1 FROM template_tags WHERE template_id = ?1 AND tag <> ?2)",
        )
        .bind(template.as_str())
        .bind(tag)
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        if deleted.rows_affected() == 0 {
            return Ok(None);
        }
        let superseded = untagged(&mut tx, template).await?;
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(Some(superseded))
    }

    /// Whether a template has this tag.
    pub(crate) async fn has_tag(&self, template: &TemplateId, tag: &str) -> Result<bool> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM template_tags WHERE template_id = ? AND tag = ?)",
        )
        .bind(template.as_str())
        .bind(tag)
        .fetch_one(&self.db.read)
        .await
        .map_err(Error::database("look up a tag"))
    }

    /// Deletes a template with all that belongs to it. Returns its snapshots.
    pub(crate) async fn delete(&self, template: &TemplateId) -> Result<Vec<SnapshotId>> {
        let doing = "delete a template";
        let mut tx = self.db.begin(doing).await?;
        let snapshots: Vec<String> = sqlx::query_scalar(
            "SELECT snapshot_id FROM template_builds
             WHERE template_id = ? AND snapshot_id IS NOT NULL",
        )
        .bind(template.as_str())
        .fetch_all(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        sqlx::query("DELETE FROM templates WHERE id = ?")
            .bind(template.as_str())
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))?;
        snapshots
            .iter()
            .map(|id| parse("template build", id))
            .collect()
    }

    /// Changes whether a template is for everyone.
    pub(crate) async fn set_public(&self, template: &TemplateId, public: bool) -> Result<()> {
        sqlx::query("UPDATE templates SET public = ?, updated_at = ? WHERE id = ?")
            .bind(public)
            .bind(to_micros(now()))
            .bind(template.as_str())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("update a template"))?;
        Ok(())
    }

    /// Counts one more sandbox of a template.
    pub(crate) async fn count_spawn(&self, template: &TemplateId) -> Result<()> {
        sqlx::query(
            "UPDATE templates SET spawn_count = spawn_count + 1, last_spawned_at = ? WHERE id = ?",
        )
        .bind(to_micros(now()))
        .bind(template.as_str())
        .execute(&self.db.write)
        .await
        .map_err(Error::database("count a sandbox of a template"))?;
        Ok(())
    }

    /// Ends every build that a previous run of the server did not.
    pub(crate) async fn fail_unfinished(&self, reason: &str) -> Result<u64> {
        let at = to_micros(now());
        let done = sqlx::query(
            "UPDATE template_builds SET status = 'error', reason = ?, updated_at = ?,
                 finished_at = ? WHERE status IN ('waiting', 'building')",
        )
        .bind(reason)
        .bind(at)
        .bind(at)
        .execute(&self.db.write)
        .await
        .map_err(Error::database("end unfinished builds"))?;
        Ok(done.rows_affected())
    }

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

    /// Lines of a build's log, from the `offset`th on.
    pub(crate) async fn read_log(
        &self,
        build: Uuid,
        offset: u64,
        limit: u32,
    ) -> Result<Vec<BuildLine>> {
        let rows = sqlx::query(
            "SELECT * FROM template_build_log WHERE build_id = ? AND seq >= ? ORDER BY seq LIMIT ?",
        )
        .bind(build.to_string())
        .bind(i64::try_from(offset).unwrap_or(i64::MAX))
        .bind(limit)
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database("read a build's log"))?;
        rows.iter()
            .map(|row| {
                let level: String = row.get("level");
                Ok(BuildLine {
                    seq: row.get::<i64, _>("seq").unsigned_abs(),
                    at: from_micros(row.get("at")),
                    level: Level::parse(&level)
                        .ok_or_else(|| Error::damaged("a build's log", format!("level {level}")))?,
                    step: row.get("step"),
                    message: row.get("message"),
                })
            })
            .collect()
    }
}

/// Takes the snapshot away from every build of a template that no tag stands for.
async fn untagged(
    tx: &mut sqlx::SqliteConnection,
    template: &TemplateId,
) -> Result<Vec<SnapshotId>> {
    let doing = "find superseded builds";
    let rows: Vec<String> = sqlx::query_scalar(
        "SELECT snapshot_id FROM template_builds WHERE template_id = ?1
             AND snapshot_id IS NOT NULL
             AND id NOT IN (SELECT build_id FROM template_tags WHERE template_id = ?1)",
    )
    .bind(template.as_str())
    .fetch_all(&mut *tx)
    .await
    .map_err(Error::database(doing))?;
    for snapshot in &rows {
        sqlx::query("UPDATE template_builds SET snapshot_id = NULL WHERE snapshot_id = ?")
            .bind(snapshot)
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
    }
    rows.iter().map(|id| parse("template build", id)).collect()
}

fn build_from_row(row: &SqliteRow) -> Result<Build> {
    let id: String = row.get("id");
    let what = || format!("template build {id}");
    let status: String = row.get("status");
    let snapshot: Option<String> = row.get("snapshot_id");
    Ok(Build {
        id: parse("template build", &id)?,
        template: parse(what(), &row.get::<String, _>("template_id"))?,
        recipe: row.get("recipe"),
        status: BuildStatus::parse(&status)
            .ok_or_else(|| Error::damaged(what(), format!("status {status}")))?,
        reason: row.get("reason"),
        snapshot: snapshot.map(|id| parse(what(), &id)).transpose()?,
        cpu_count: row.get("cpu_count"),
        memory_mib: row.get("memory_mib"),
        disk_mib: row.get("disk_mib"),
        envd_version: row.get("envd_version"),
        created_at: from_micros(row.get("created_at")),
        updated_at: from_micros(row.get("updated_at")),
        finished_at: row.get::<Option<i64>, _>("finished_at").map(from_micros),
    })
}

fn parse<T: std::str::FromStr>(what: impl Into<String>, text: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e| Error::damaged(what, e))
}
