//! Templates, their aliases and tags in the database; their builds, the layers of those, and the
//! logs of builds in the modules below.

mod aliases;
mod builds;
mod layers;
mod log;

use std::collections::HashMap;

use cubicle_ids::TemplateId;
use serde::de::DeserializeOwned;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};
use uuid::Uuid;

pub(crate) use self::builds::{Begun, Made};
use super::{Build, BuildStatus, DEFAULT_TAG, Reference, Resolved, Tag, Template};
use crate::{
    db::{Db, from_micros, now, to_micros},
    error::{Error, Result},
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
             UNION ALL SELECT template_id FROM template_builds WHERE made_id = ?1
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
             WHERE b.status = 'ready' AND b.made_id IS NOT NULL AND (
                 b.made_id = ?1
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
            defaults: build.defaults,
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

    /// The tags of a template, newest first.
    pub(crate) async fn tags(&self, template: &TemplateId) -> Result<Vec<Tag>> {
        let rows = sqlx::query(
            "SELECT tag, build_id, assigned_at FROM template_tags WHERE template_id = ?
             ORDER BY assigned_at DESC, tag",
        )
        .bind(template.as_str())
        .fetch_all(&self.db.read)
        .await
        .map_err(Error::database("read the tags of a template"))?;
        let tag = |row: &SqliteRow| {
            Ok(Tag {
                tag: row.get("tag"),
                build: parse("tag", &row.get::<String, _>("build_id"))?,
                assigned_at: from_micros(row.get("assigned_at")),
            })
        };
        rows.iter().map(tag).collect()
    }

    /// Has tags stand for a build.
    pub(crate) async fn assign(
        &self,
        template: &TemplateId,
        build: Uuid,
        tags: &[String],
    ) -> Result<()> {
        let doing = "assign tags";
        let mut tx = self.db.begin(doing).await?;
        assign_in(&mut tx, template, build, tags).await?;
        tx.commit().await.map_err(Error::database(doing))
    }

    /// Drops one tag, unless it is the template's only tag or not one of its tags. Returns whether
    /// it was dropped.
    pub(crate) async fn delete_tag(&self, template: &TemplateId, tag: &str) -> Result<bool> {
        let deleted = sqlx::query(
            "DELETE FROM template_tags WHERE template_id = ?1 AND tag = ?2
                 AND EXISTS (SELECT 1 FROM template_tags WHERE template_id = ?1 AND tag <> ?2)",
        )
        .bind(template.as_str())
        .bind(tag)
        .execute(&self.db.write)
        .await
        .map_err(Error::database("delete a tag"))?;
        Ok(deleted.rows_affected() > 0)
    }

    /// Drops those of these tags that a template has. Returns whether it had one.
    pub(crate) async fn drop_tags(&self, template: &TemplateId, tags: &[String]) -> Result<bool> {
        let doing = "delete tags";
        let mut tx = self.db.begin(doing).await?;
        let mut dropped = 0;
        for tag in tags {
            let deleted =
                sqlx::query("DELETE FROM template_tags WHERE template_id = ? AND tag = ?")
                    .bind(template.as_str())
                    .bind(tag)
                    .execute(&mut *tx)
                    .await
                    .map_err(Error::database(doing))?;
            dropped += deleted.rows_affected();
        }
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(dropped > 0)
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

    /// Deletes a template with its aliases, tags, builds and their logs.
    pub(crate) async fn delete(&self, template: &TemplateId) -> Result<()> {
        sqlx::query("DELETE FROM templates WHERE id = ?")
            .bind(template.as_str())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("delete a template"))?;
        Ok(())
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
}

/// Has tags stand for a build, as a part of something.
async fn assign_in(
    tx: &mut SqliteConnection,
    template: &TemplateId,
    build: Uuid,
    tags: &[String],
) -> Result<()> {
    let (doing, at) = ("assign tags", to_micros(now()));
    for tag in tags {
        sqlx::query(
            "INSERT INTO template_tags (template_id, tag, build_id, assigned_at)
             VALUES (?, ?, ?, ?)
             ON CONFLICT DO UPDATE SET build_id = excluded.build_id,
                 assigned_at = excluded.assigned_at",
        )
        .bind(template.as_str())
        .bind(tag)
        .bind(build.to_string())
        .bind(at)
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
    }
    sqlx::query("UPDATE templates SET updated_at = ? WHERE id = ?")
        .bind(at)
        .bind(template.as_str())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
    Ok(())
}

fn build_from_row(row: &SqliteRow) -> Result<Build> {
    let id: String = row.get("id");
    let what = || format!("template build {id}");
    let status: String = row.get("status");
    let snapshot: Option<String> = row.get("made_id");
    let spec: Option<String> = row.get("spec");
    Ok(Build {
        id: parse("template build", &id)?,
        template: parse(what(), &row.get::<String, _>("template_id"))?,
        spec: spec.map(|spec| from_json(what(), &spec)).transpose()?,
        tags: from_json(what(), &row.get::<String, _>("tags"))?,
        status: BuildStatus::parse(&status)
            .ok_or_else(|| Error::damaged(what(), format!("status {status}")))?,
        reason: row.get("reason"),
        failed_step: row.get("failed_step"),
        fingerprint: row.get("fingerprint"),
        defaults: from_json(what(), &row.get::<String, _>("defaults"))?,
        launches: from_json(what(), &row.get::<String, _>("launches"))?,
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

fn from_json<T: DeserializeOwned>(what: impl Into<String>, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::damaged(what, error))
}

/// JSON of a type of this crate, none of which can fail to be written.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
