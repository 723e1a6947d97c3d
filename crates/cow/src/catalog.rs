//! The catalog: which snapshots exist, and what is known about their files.

use std::{collections::HashMap, path::Path, sync::Arc};

use cubicle_ids::SnapshotId;
use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use crate::{
    error::{Context as _, Error, Result},
    manifest::Manifest,
    snapshot::{SnapshotEntry, SnapshotState},
};

/// File name of the catalog, in the store's root.
pub(crate) const FILE: &str = "catalog.db";

pub(crate) struct Catalog {
    /// Commits without waiting for the disk.
    quick: SqlitePool,
    /// Commits that are on the disk when they return, together with all earlier ones: both pools
    /// append to one write-ahead log.
    durable: SqlitePool,
}

/// A row as it was read.
pub(crate) struct Row {
    pub(crate) entry: SnapshotEntry,
    pub(crate) boot_id: String,
}

/// A part's row.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct PartRow {
    pub(crate) name: String,
    pub(crate) size: i64,
    pub(crate) checksum: Option<String>,
}

impl Catalog {
    pub(crate) async fn open(root: &Path) -> Result<Self> {
        let path = root.join(FILE);
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .foreign_keys(true);
        let pool = |synchronous| {
            SqlitePoolOptions::new()
                .max_connections(1)
                .idle_timeout(None)
                .max_lifetime(None)
                .connect_with(options.clone().synchronous(synchronous))
        };
        let quick = pool(SqliteSynchronous::Normal).await.at("open it", &path)?;
        sqlx::migrate!("./migrations")
            .run(&quick)
            .await
            .map_err(|source| Error::Migrate {
                path: path.clone(),
                source,
            })?;
        let durable = pool(SqliteSynchronous::Full).await.at("open it", &path)?;
        Ok(Self { quick, durable })
    }

    pub(crate) async fn close(&self) {
        self.durable.close().await;
        self.quick.close().await;
    }

    pub(crate) async fn rows(&self, root: &Path) -> Result<HashMap<SnapshotId, Row>> {
        let path = root.join(FILE);
        let rows: Vec<(String, String, String, bool, Option<String>)> =
            sqlx::query_as("SELECT id, manifest, boot_id, durable, failure FROM snapshots")
                .fetch_all(&self.quick)
                .await
                .at("list the snapshots", &path)?;
        rows.into_iter()
            .map(|(id, manifest, boot_id, durable, failure)| {
                let manifest = Manifest::parse(manifest.as_bytes(), &path)?;
                debug_assert_eq!(manifest.id.as_str(), id);
                let state = match failure {
                    Some(reason) => SnapshotState::Failed { reason },
                    None => SnapshotState::Published { durable },
                };
                let entry = SnapshotEntry {
                    manifest: Arc::new(manifest),
                    state,
                };
                Ok((entry.manifest.id.clone(), Row { entry, boot_id }))
            })
            .collect()
    }

    pub(crate) async fn insert(
        &self,
        manifest: &Manifest,
        boot_id: &str,
        path: &Path,
    ) -> Result<()> {
        let attempt = "record the snapshot";
        let text = serde_json::to_string(manifest).map_err(|source| Error::Manifest {
            path: path.to_owned(),
            source,
        })?;
        let created_at = manifest.created_at.unix_timestamp_nanos().to_string();
        let mut transaction = self.quick.begin().await.at(attempt, path)?;
        sqlx::query(
            "INSERT INTO snapshots (id, kind, parent, created_at, manifest, boot_id)
             VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(manifest.id.as_str())
        .bind(manifest.kind.as_str())
        .bind(manifest.parent.as_ref().map(SnapshotId::as_str))
        .bind(created_at)
        .bind(text)
        .bind(boot_id)
        .execute(&mut *transaction)
        .await
        .at(attempt, path)?;
        for part in &manifest.parts {
            sqlx::query("INSERT INTO parts (snapshot, name, size) VALUES (?, ?, ?)")
                .bind(manifest.id.as_str())
                .bind(&part.name)
                .bind(i64::try_from(part.size).unwrap_or(i64::MAX))
                .execute(&mut *transaction)
                .await
                .at(attempt, path)?;
        }
        transaction.commit().await.at(attempt, path)
    }

    /// Whether there was such a row.
    pub(crate) async fn delete(&self, id: &SnapshotId, path: &Path) -> Result<bool> {
        let outcome = sqlx::query("DELETE FROM snapshots WHERE id = ?")
            .bind(id.as_str())
            .execute(&self.quick)
            .await
            .at("delete the snapshot", path)?;
        Ok(outcome.rows_affected() > 0)
    }

    pub(crate) async fn set_failed(
        &self,
        id: &SnapshotId,
        reason: &str,
        path: &Path,
    ) -> Result<()> {
        sqlx::query("UPDATE snapshots SET failure = ? WHERE id = ?")
            .bind(reason)
            .bind(id.as_str())
            .execute(&self.durable)
            .await
            .at("mark the snapshot failed", path)?;
        Ok(())
    }

    /// Records the checksums `(part, checksum)`; on the disk when it returns.
    pub(crate) async fn set_durable(
        &self,
        id: &SnapshotId,
        checksums: &[(String, String)],
        path: &Path,
    ) -> Result<()> {
        let attempt = "record the checksums";
        let mut transaction = self.durable.begin().await.at(attempt, path)?;
        for (name, checksum) in checksums {
            sqlx::query("UPDATE parts SET checksum = ? WHERE snapshot = ? AND name = ?")
                .bind(checksum)
                .bind(id.as_str())
                .bind(name)
                .execute(&mut *transaction)
                .await
                .at(attempt, path)?;
        }
        sqlx::query("UPDATE snapshots SET durable = 1 WHERE id = ?")
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await
            .at(attempt, path)?;
        transaction.commit().await.at(attempt, path)
    }

    pub(crate) async fn parts(&self, id: &SnapshotId, path: &Path) -> Result<Vec<PartRow>> {
        sqlx::query_as("SELECT name, size, checksum FROM parts WHERE snapshot = ? ORDER BY name")
            .bind(id.as_str())
            .fetch_all(&self.quick)
            .await
            .at("read the parts", path)
    }
}
