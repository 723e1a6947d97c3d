//! Sandboxes in the database.

use std::time::Duration;

use cubicle_ids::{SandboxId, SnapshotId};
use sqlx::{Row as _, sqlite::SqliteRow};
use time::OffsetDateTime;

use crate::{
    db::{Db, from_micros, now, to_micros},
    error::{Error, Result},
    fleet::NetworkOptions,
    lifecycle::State,
    sandbox::{EndReason, Idempotency, LifecycleOptions, Lifetime, Pause, PauseMode, Sandbox},
};

/// The `sandboxes` and `idempotency_keys` tables.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    db: Db,
}

/// What an idempotency key stands for already.
#[derive(Debug)]
pub(crate) struct FirstUse {
    pub(crate) sandbox: SandboxId,
    pub(crate) body_hash: Vec<u8>,
}

impl Store {
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }

    /// Writes down a sandbox that is about to be created. With an idempotency key that is taken
    /// already nothing is written and the key's first use is returned.
    pub(crate) async fn insert(
        &self,
        sandbox: &Sandbox,
        idempotency: Option<&Idempotency>,
    ) -> Result<Option<FirstUse>> {
        let doing = "record a new sandbox";
        let mut tx = self.db.begin(doing).await?;
        if let Some(idempotency) = idempotency {
            let taken =
                sqlx::query("SELECT sandbox_id, body_hash FROM idempotency_keys WHERE key = ?")
                    .bind(&idempotency.key)
                    .fetch_optional(&mut *tx)
                    .await
                    .map_err(Error::database(doing))?;
            if let Some(row) = taken {
                let id: String = row.get("sandbox_id");
                return Ok(Some(FirstUse {
                    sandbox: parse("sandbox id", &id)?,
                    body_hash: row.get("body_hash"),
                }));
            }
        }
        sqlx::query(
            "INSERT INTO sandboxes (id, template_id, build_id, snapshot_id, alias, state, metadata,
                 network, envd_token, traffic_token, envd_version, cpu_count, memory_mib, disk_mib,
                 generation, started_at, end_at, lifetime, env_vars, base_id, auto_pause,
                 auto_pause_memory, auto_resume, mounts, defaults)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(sandbox.id.as_str())
        .bind(sandbox.template.as_str())
        .bind(sandbox.build.to_string())
        .bind(sandbox.snapshot.as_str())
        .bind(&sandbox.alias)
        .bind(sandbox.state.as_str())
        .bind(json(&sandbox.metadata))
        .bind(json(&sandbox.network))
        .bind(&sandbox.envd_token)
        .bind(&sandbox.traffic_token)
        .bind(&sandbox.envd_version)
        .bind(sandbox.cpu_count)
        .bind(sandbox.memory_mib)
        .bind(sandbox.disk_mib)
        .bind(i64::try_from(sandbox.generation).unwrap_or(i64::MAX))
        .bind(to_micros(sandbox.started_at))
        .bind(sandbox.end_at.map(to_micros))
        .bind(lifetime_micros(sandbox.lifetime))
        .bind(json(&sandbox.env_vars))
        .bind(sandbox.base.as_str())
        .bind(sandbox.lifecycle.auto_pause)
        .bind(sandbox.lifecycle.auto_pause_memory)
        .bind(sandbox.lifecycle.auto_resume)
        .bind(json(&sandbox.mounts))
        .bind(json(&sandbox.defaults))
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        if let Some(idempotency) = idempotency {
            sqlx::query(
                "INSERT INTO idempotency_keys (key, body_hash, sandbox_id, created_at)
                 VALUES (?, ?, ?, ?)",
            )
            .bind(&idempotency.key)
            .bind(idempotency.body_hash.as_slice())
            .bind(sandbox.id.as_str())
            .bind(to_micros(now()))
            .execute(&mut *tx)
            .await
            .map_err(Error::database(doing))?;
        }
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(None)
    }

    /// Writes down all that can change in a life.
    pub(crate) async fn update(&self, sandbox: &Sandbox) -> Result<()> {
        sqlx::query(
            "UPDATE sandboxes SET state = ?, generation = ?, started_at = ?, end_at = ?,
                 snapshot_id = ?, base_id = ?, auto_pause = ?, pause_snapshot = ?, pause_mode = ?,
                 pause_at = ?, rollback_to = ?
             WHERE id = ? AND state <> 'dead'",
        )
        .bind(sandbox.state.as_str())
        .bind(i64::try_from(sandbox.generation).unwrap_or(i64::MAX))
        .bind(to_micros(sandbox.started_at))
        .bind(sandbox.end_at.map(to_micros))
        .bind(sandbox.snapshot.as_str())
        .bind(sandbox.base.as_str())
        .bind(sandbox.lifecycle.auto_pause)
        .bind(sandbox.pause.as_ref().map(|pause| pause.snapshot.as_str()))
        .bind(sandbox.pause.as_ref().map(|pause| pause.mode.as_str()))
        .bind(sandbox.pause.as_ref().map(|pause| to_micros(pause.at)))
        .bind(sandbox.rollback_to.as_ref().map(SnapshotId::as_str))
        .bind(sandbox.id.as_str())
        .execute(&self.db.write)
        .await
        .map_err(Error::database("update a sandbox"))?;
        Ok(())
    }

    /// Writes down when a sandbox's time is up, and nothing else.
    pub(crate) async fn set_end(
        &self,
        id: &SandboxId,
        end_at: Option<OffsetDateTime>,
    ) -> Result<()> {
        sqlx::query("UPDATE sandboxes SET end_at = ? WHERE id = ? AND state <> 'dead'")
            .bind(end_at.map(to_micros))
            .bind(id.as_str())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("move the end of a sandbox"))?;
        Ok(())
    }

    /// Writes down what a sandbox may reach and who may reach it.
    pub(crate) async fn set_network(
        &self,
        id: &SandboxId,
        network: &NetworkOptions,
        traffic_token: Option<&str>,
    ) -> Result<()> {
        sqlx::query(
            "UPDATE sandboxes SET network = ?, traffic_token = ? WHERE id = ? AND state <> 'dead'",
        )
        .bind(json(network))
        .bind(traffic_token)
        .bind(id.as_str())
        .execute(&self.db.write)
        .await
        .map_err(Error::database("change the network of a sandbox"))?;
        Ok(())
    }

    /// Writes down the end of a sandbox and forgets its environment. Its row stays until [`Self::prune`], for its log. One that
    /// never came to life gives its idempotency key back: a retry may succeed.
    pub(crate) async fn bury(&self, id: &SandboxId, reason: EndReason) -> Result<()> {
        let doing = "record the end of a sandbox";
        let mut tx = self.db.begin(doing).await?;
        if matches!(reason, EndReason::CreateFailed | EndReason::Abandoned) {
            sqlx::query("DELETE FROM idempotency_keys WHERE sandbox_id = ?")
                .bind(id.as_str())
                .execute(&mut *tx)
                .await
                .map_err(Error::database(doing))?;
        }
        sqlx::query(
            "UPDATE sandboxes SET state = 'dead', ended_at = ?, end_reason = ?, env_vars = '[]',
                 pause_snapshot = NULL, pause_mode = NULL, pause_at = NULL, rollback_to = NULL
             WHERE id = ?",
        )
        .bind(to_micros(now()))
        .bind(reason.as_str())
        .bind(id.as_str())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))
    }

    /// A sandbox in any state, also a dead one.
    pub(crate) async fn get(&self, id: &SandboxId) -> Result<Option<Sandbox>> {
        let row = sqlx::query("SELECT * FROM sandboxes WHERE id = ?")
            .bind(id.as_str())
            .fetch_optional(&self.db.read)
            .await
            .map_err(Error::database("read a sandbox"))?;
        row.as_ref().map(from_row).transpose()
    }

    /// Every sandbox that is not dead.
    pub(crate) async fn alive(&self) -> Result<Vec<Sandbox>> {
        let rows = sqlx::query("SELECT * FROM sandboxes WHERE state <> 'dead'")
            .fetch_all(&self.db.read)
            .await
            .map_err(Error::database("read the live sandboxes"))?;
        rows.iter().map(from_row).collect()
    }

    /// Forgets sandboxes that ended before `before`, with their logs and idempotency keys.
    pub(crate) async fn prune(&self, before: OffsetDateTime) -> Result<u64> {
        let done = sqlx::query("DELETE FROM sandboxes WHERE state = 'dead' AND ended_at < ?")
            .bind(to_micros(before))
            .execute(&self.db.write)
            .await
            .map_err(Error::database("forget old sandboxes"))?;
        Ok(done.rows_affected())
    }
}

fn from_row(row: &SqliteRow) -> Result<Sandbox> {
    let id: String = row.get("id");
    let what = || format!("sandbox {id}");
    let text = |column: &str| -> String { row.get(column) };
    Ok(Sandbox {
        id: parse("sandbox id", &id)?,
        template: parse(what(), &text("template_id"))?,
        build: parse(what(), &text("build_id"))?,
        snapshot: parse(what(), &text("snapshot_id"))?,
        alias: row.get("alias"),
        state: parse::<State>(what(), &text("state"))?,
        metadata: serde_json::from_str(&text("metadata")).map_err(|e| Error::damaged(what(), e))?,
        mounts: serde_json::from_str(&text("mounts")).map_err(|e| Error::damaged(what(), e))?,
        network: serde_json::from_str(&text("network")).map_err(|e| Error::damaged(what(), e))?,
        envd_token: text("envd_token"),
        traffic_token: row.get("traffic_token"),
        envd_version: text("envd_version"),
        cpu_count: row.get("cpu_count"),
        memory_mib: row.get("memory_mib"),
        disk_mib: row.get("disk_mib"),
        defaults: serde_json::from_str(&text("defaults")).map_err(|e| Error::damaged(what(), e))?,
        generation: row.get::<i64, _>("generation").unsigned_abs(),
        started_at: from_micros(row.get("started_at")),
        end_at: row.get::<Option<i64>, _>("end_at").map(from_micros),
        lifetime: row
            .get::<Option<i64>, _>("lifetime")
            .map_or(Lifetime::Never, |micros| {
                Lifetime::For(Duration::from_micros(micros.unsigned_abs()))
            }),
        lifecycle: LifecycleOptions {
            auto_pause: row.get("auto_pause"),
            auto_pause_memory: row.get("auto_pause_memory"),
            auto_resume: row.get("auto_resume"),
        },
        env_vars: serde_json::from_str(&text("env_vars")).map_err(|e| Error::damaged(what(), e))?,
        base: parse(what(), &text("base_id"))?,
        pause: pause(row, what)?,
        rollback_to: row
            .get::<Option<String>, _>("rollback_to")
            .map(|id| parse(what(), &id))
            .transpose()?,
    })
}

fn pause(row: &SqliteRow, what: impl Fn() -> String) -> Result<Option<Pause>> {
    let (Some(snapshot), Some(mode), Some(at)) = (
        row.get::<Option<String>, _>("pause_snapshot"),
        row.get::<Option<String>, _>("pause_mode"),
        row.get::<Option<i64>, _>("pause_at"),
    ) else {
        return Ok(None);
    };
    Ok(Some(Pause {
        snapshot: parse(what(), &snapshot)?,
        mode: PauseMode::parse(&mode)
            .ok_or_else(|| Error::damaged(what(), format!("pause mode {mode}")))?,
        at: from_micros(at),
    }))
}

/// `None`: never.
fn lifetime_micros(lifetime: Lifetime) -> Option<i64> {
    match lifetime {
        Lifetime::For(span) => Some(i64::try_from(span.as_micros()).unwrap_or(i64::MAX)),
        Lifetime::Never => None,
    }
}

fn parse<T: std::str::FromStr>(what: impl Into<String>, text: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e| Error::damaged(what, e))
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "{}".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::test_sandbox;

    async fn store(dir: &tempfile::TempDir) -> Store {
        Store::new(
            Db::open(&dir.path().join("cubicle.db"))
                .await
                .expect("database"),
        )
    }

    #[tokio::test]
    async fn a_row_says_all_of_a_sandbox_and_follows_its_life() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = store(&dir).await;
        let mut sandbox = test_sandbox();
        sandbox.metadata = [("a b".into(), "c\"&d".into())].into();
        sandbox.traffic_token = Some("t".into());
        assert!(
            store
                .insert(&sandbox, None)
                .await
                .expect("insert")
                .is_none()
        );
        assert_eq!(
            store.get(&sandbox.id).await.expect("get").as_ref(),
            Some(&sandbox)
        );

        sandbox.end_at = None;
        sandbox.generation = 7;
        sandbox.state = State::Paused;
        sandbox.snapshot = SnapshotId::generate();
        sandbox.base = SnapshotId::generate();
        sandbox.lifecycle.auto_pause = true;
        sandbox.rollback_to = Some(SnapshotId::generate());
        sandbox.pause = Some(Pause {
            snapshot: SnapshotId::generate(),
            mode: PauseMode::Filesystem,
            at: now(),
        });
        store.update(&sandbox).await.expect("update");
        assert_eq!(store.alive().await.expect("alive"), [sandbox.clone()]);
        let end_at = Some(now());
        store.set_end(&sandbox.id, end_at).await.expect("end");
        let moved = Sandbox {
            end_at,
            ..sandbox.clone()
        };
        assert_eq!(store.alive().await.expect("alive"), [moved]);

        store
            .bury(&sandbox.id, EndReason::Timeout)
            .await
            .expect("bury");
        assert!(store.alive().await.expect("alive").is_empty());
        store.update(&sandbox).await.expect("a late update");
        let dead = store.get(&sandbox.id).await.expect("get").expect("row");
        assert_eq!(
            dead.state,
            State::Dead,
            "a late update must not raise the dead"
        );
        assert_eq!((dead.env_vars, dead.pause), (Vec::new(), None));

        assert_eq!(
            store
                .prune(now() - time::Duration::HOUR)
                .await
                .expect("prune"),
            0
        );
        assert_eq!(
            store
                .prune(now() + time::Duration::HOUR)
                .await
                .expect("prune"),
            1
        );
        assert!(store.get(&sandbox.id).await.expect("get").is_none());
    }

    #[tokio::test]
    async fn an_idempotency_key_belongs_to_its_first_use_until_that_fails() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = store(&dir).await;
        let key = Idempotency {
            key: "k".into(),
            body_hash: [1; 32],
        };
        let (first, second) = (test_sandbox(), test_sandbox());
        assert!(
            store
                .insert(&first, Some(&key))
                .await
                .expect("first")
                .is_none()
        );
        let taken = store
            .insert(&second, Some(&key))
            .await
            .expect("second")
            .expect("taken");
        assert_eq!(
            (taken.sandbox, taken.body_hash),
            (first.id.clone(), vec![1; 32])
        );
        assert!(
            store.get(&second.id).await.expect("get").is_none(),
            "nothing was written"
        );

        store
            .bury(&first.id, EndReason::CreateFailed)
            .await
            .expect("bury");
        assert!(
            store
                .insert(&second, Some(&key))
                .await
                .expect("again")
                .is_none()
        );
        store
            .bury(&second.id, EndReason::Killed)
            .await
            .expect("bury");
        assert!(
            store
                .insert(&test_sandbox(), Some(&key))
                .await
                .expect("third")
                .is_some()
        );
    }
}
