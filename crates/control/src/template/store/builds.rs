//! Builds and what they were asked for.

use cubicle_ids::{SnapshotId, TemplateId};
use sqlx::{Row as _, SqliteConnection};
use uuid::Uuid;

use super::{Store, assign_in, build_from_row, json, parse};
use crate::{
    db::{now, to_micros},
    error::{Error, Result},
    template::{Build, BuildSpec, BuildStatus, Defaults, Launch, request::RequestId},
};

/// What came of a build that is to be written down.
pub(crate) enum Begun {
    /// It is on record.
    New,
    /// Its template has a build under way.
    Running(Box<Build>),
    /// A request of this id led to that build.
    Known {
        build: Box<Build>,
        /// Whether it asked for the same.
        same: bool,
    },
}

impl Store {
    /// One build.
    pub(crate) async fn build(&self, id: Uuid) -> Result<Option<Build>> {
        let row = sqlx::query("SELECT * FROM template_builds WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.db.read)
            .await
            .map_err(Error::database("read a template build"))?;
        row.as_ref().map(build_from_row).transpose()
    }

    /// Writes down a new build, and the template and its alias if they are new; unless the request
    /// was made before, or `alone` is said and another one is under way.
    pub(crate) async fn begin_build(
        &self,
        alias: &str,
        build: &mut Build,
        request: Option<&RequestId>,
        alone: bool,
    ) -> Result<Begun> {
        let doing = "record a template build";
        let at = to_micros(build.created_at);
        let mut tx = self.db.begin(doing).await?;
        if let Some(request) = request
            && let Some(known) = known(&mut tx, request).await?
        {
            return Ok(known);
        }
        let template: Option<String> =
            sqlx::query_scalar("SELECT template_id FROM template_aliases WHERE alias = ?")
                .bind(alias)
                .fetch_optional(&mut *tx)
                .await
                .map_err(Error::database(doing))?;
        if let Some(template) = template {
            build.template = parse("template", &template)?;
            if alone && let Some(running) = running(&mut tx, &build.template).await? {
                return Ok(Begun::Running(Box::new(running)));
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
        insert(&mut tx, build).await?;
        if let Some(request) = request {
            sqlx::query(
                "INSERT INTO template_requests (id, body_hash, build_id, created_at)
                 VALUES (?, ?, ?, ?)",
            )
            .bind(&request.id)
            .bind(request.body_hash.as_slice())
            .bind(build.id.to_string())
            .bind(at)
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        }
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(Begun::New)
    }

    /// Says what a build that waits is to be made of. False if that was said before.
    pub(crate) async fn specify(&self, build: Uuid, spec: &BuildSpec) -> Result<bool> {
        let done = sqlx::query(
            "UPDATE template_builds SET spec = ?, updated_at = ?
             WHERE id = ? AND status = 'waiting' AND spec IS NULL",
        )
        .bind(json(spec))
        .bind(to_micros(now()))
        .bind(build.to_string())
        .execute(&self.db.write)
        .await
        .map_err(Error::database("record what a template is made of"))?;
        Ok(done.rows_affected() > 0)
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

    /// Writes down that a build failed, and where.
    pub(crate) async fn build_failed(&self, build: Uuid, step: &str, reason: &str) -> Result<()> {
        let at = to_micros(now());
        sqlx::query(
            "UPDATE template_builds SET status = 'error', reason = ?, failed_step = ?,
                 updated_at = ?, finished_at = ? WHERE id = ?",
        )
        .bind(reason)
        .bind(step)
        .bind(at)
        .bind(at)
        .bind(build.to_string())
        .execute(&self.db.write)
        .await
        .map_err(Error::database("record that a build failed"))?;
        Ok(())
    }

    /// Writes down that a build succeeded and has its tags stand for it. False if its template was
    /// deleted meanwhile.
    pub(crate) async fn build_ready(&self, build: &Build, made: &Made) -> Result<bool> {
        let doing = "record that a build succeeded";
        let at = to_micros(now());
        let mut tx = self.db.begin(doing).await?;
        let updated = sqlx::query(
            "UPDATE template_builds SET status = 'ready', made_id = ?, fingerprint = ?,
                 defaults = ?, launches = ?, disk_mib = ?, updated_at = ?, finished_at = ? WHERE id = ?",
        )
        .bind(made.snapshot.as_str())
        .bind(&made.fingerprint)
        .bind(json(&made.defaults))
        .bind(json(&made.launches))
        .bind(made.disk_mib)
        .bind(at)
        .bind(at)
        .bind(build.id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        if updated.rows_affected() == 0 {
            return Ok(false);
        }
        assign_in(&mut tx, &build.template, build.id, &build.tags).await?;
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(true)
    }

    /// Ends every build that a previous run of the server began and did not end.
    pub(crate) async fn fail_unfinished(&self, reason: &str) -> Result<u64> {
        let at = to_micros(now());
        let done = sqlx::query(
            "UPDATE template_builds SET status = 'error', reason = ?, failed_step = 'base',
                 updated_at = ?, finished_at = ?
             WHERE status = 'building' OR (status = 'waiting' AND spec IS NOT NULL)",
        )
        .bind(reason)
        .bind(at)
        .bind(at)
        .execute(&self.db.write)
        .await
        .map_err(Error::database("end unfinished builds"))?;
        Ok(done.rows_affected())
    }
}

/// What a build led to.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) snapshot: SnapshotId,
    pub(crate) fingerprint: String,
    pub(crate) defaults: Defaults,
    pub(crate) launches: Vec<Launch>,
    pub(crate) disk_mib: u32,
}

async fn insert(tx: &mut SqliteConnection, build: &Build) -> Result<()> {
    // The column of the recipe is older than origins.
    sqlx::query(
        "INSERT INTO template_builds (id, template_id, recipe, spec, tags, status, cpu_count,
             memory_mib, disk_mib, envd_version, created_at, updated_at)
         VALUES (?, ?, '', ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(build.id.to_string())
    .bind(build.template.as_str())
    .bind(build.spec.as_ref().map(json))
    .bind(json(&build.tags))
    .bind(build.status.as_str())
    .bind(build.cpu_count)
    .bind(build.memory_mib)
    .bind(build.disk_mib)
    .bind(&build.envd_version)
    .bind(to_micros(build.created_at))
    .bind(to_micros(build.updated_at))
    .execute(tx)
    .await
    .map_err(Error::database("record a template build"))?;
    Ok(())
}

/// The build that a request led to before.
async fn known(tx: &mut SqliteConnection, request: &RequestId) -> Result<Option<Begun>> {
    let row = sqlx::query(
        "SELECT b.*, r.body_hash FROM template_requests r
         JOIN template_builds b ON b.id = r.build_id WHERE r.id = ?",
    )
    .bind(&request.id)
    .fetch_optional(tx)
    .await
    .map_err(Error::database("look up a request"))?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Begun::Known {
        same: row.get::<Vec<u8>, _>("body_hash") == request.body_hash,
        build: Box::new(build_from_row(&row)?),
    }))
}

/// The build of a template that is under way.
async fn running(tx: &mut SqliteConnection, template: &TemplateId) -> Result<Option<Build>> {
    let row = sqlx::query(
        "SELECT * FROM template_builds WHERE template_id = ?1
             AND (status = ?2 OR (status = ?3 AND spec IS NOT NULL))
         ORDER BY created_at DESC LIMIT 1",
    )
    .bind(template.as_str())
    .bind(BuildStatus::Building.as_str())
    .bind(BuildStatus::Waiting.as_str())
    .fetch_optional(tx)
    .await
    .map_err(Error::database("look for a build under way"))?;
    row.as_ref().map(build_from_row).transpose()
}
