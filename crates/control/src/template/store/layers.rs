//! Layers: snapshots that builds are made of, found by what they hold.

use cubicle_ids::SnapshotId;
use sqlx::Row as _;
use uuid::Uuid;

use super::{Store, parse};
use crate::{
    db::{now, to_micros},
    error::{Error, Result},
};

impl Store {
    /// The newest layer of a fingerprint that is ready. It stays as long as the build does.
    pub(crate) async fn use_layer(
        &self,
        build: Uuid,
        fingerprint: &str,
    ) -> Result<Option<SnapshotId>> {
        let doing = "look for a layer";
        let mut tx = self.db.begin(doing).await?;
        let found: Option<String> = sqlx::query_scalar(
            "SELECT snapshot_id FROM template_layers WHERE fingerprint = ? AND ready
             ORDER BY created_at DESC, rowid DESC LIMIT 1",
        )
        .bind(fingerprint)
        .fetch_optional(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        let Some(found) = found else { return Ok(None) };
        // The build's row may be gone: its template was deleted.
        sqlx::query(
            "INSERT OR IGNORE INTO template_build_layers (build_id, snapshot_id)
             SELECT id, ?2 FROM template_builds WHERE id = ?1",
        )
        .bind(build.to_string())
        .bind(&found)
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))?;
        parse("template layer", &found).map(Some)
    }

    /// The same, for who needs it for a moment.
    pub(crate) async fn find_layer(&self, fingerprint: &str) -> Result<Option<SnapshotId>> {
        let found: Option<String> = sqlx::query_scalar(
            "SELECT snapshot_id FROM template_layers WHERE fingerprint = ? AND ready
             ORDER BY created_at DESC, rowid DESC LIMIT 1",
        )
        .bind(fingerprint)
        .fetch_optional(&self.db.read)
        .await
        .map_err(Error::database("look for a layer"))?;
        found.map(|id| parse("template layer", &id)).transpose()
    }

    /// Writes down that a build is about to make a layer. False if the build's row is gone.
    pub(crate) async fn begin_layer(
        &self,
        build: Uuid,
        fingerprint: &str,
        snapshot: &SnapshotId,
    ) -> Result<bool> {
        let doing = "record a layer";
        let mut tx = self.db.begin(doing).await?;
        sqlx::query(
            "INSERT INTO template_layers (snapshot_id, fingerprint, ready, created_at)
             VALUES (?, ?, 0, ?)",
        )
        .bind(snapshot.as_str())
        .bind(fingerprint)
        .bind(to_micros(now()))
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        let linked = sqlx::query(
            "INSERT INTO template_build_layers (build_id, snapshot_id)
             SELECT id, ?2 FROM template_builds WHERE id = ?1",
        )
        .bind(build.to_string())
        .bind(snapshot.as_str())
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        if linked.rows_affected() == 0 {
            return Ok(false);
        }
        tx.commit().await.map_err(Error::database(doing))?;
        Ok(true)
    }

    /// Writes down that a layer can be used.
    pub(crate) async fn layer_ready(&self, snapshot: &SnapshotId) -> Result<()> {
        sqlx::query("UPDATE template_layers SET ready = 1 WHERE snapshot_id = ?")
            .bind(snapshot.as_str())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("record that a layer is ready"))?;
        Ok(())
    }

    /// Forgets a layer: it was not made, or is lost. Builds that were made from it are no more to
    /// be restored.
    pub(crate) async fn forget_layer(&self, snapshot: &SnapshotId) -> Result<()> {
        sqlx::query("DELETE FROM template_layers WHERE snapshot_id = ?")
            .bind(snapshot.as_str())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("forget a layer"))?;
        Ok(())
    }

    /// Forgets every layer that a previous run of the server did not finish.
    pub(crate) async fn forget_unfinished_layers(&self) -> Result<()> {
        sqlx::query("DELETE FROM template_layers WHERE NOT ready")
            .execute(&self.db.write)
            .await
            .map_err(Error::database("forget unfinished layers"))?;
        Ok(())
    }

    /// Forgets what nothing uses: builds that no tag stands for have no snapshot any more; layers
    /// stay as long as a build is made of them that is tagged, is under way, or is its template's
    /// latest and has failed, so that the next one can go on from there. Returns their snapshots.
    pub(crate) async fn forget_unused(&self) -> Result<Vec<SnapshotId>> {
        let doing = "look for unused layers";
        let mut tx = self.db.begin(doing).await?;
        sqlx::query(
            "UPDATE template_builds SET made_id = NULL WHERE made_id IS NOT NULL
                 AND id NOT IN (SELECT build_id FROM template_tags)",
        )
        .execute(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        let rows = sqlx::query(
            "DELETE FROM template_layers WHERE snapshot_id NOT IN (
                 SELECT l.snapshot_id FROM template_build_layers l
                 JOIN template_builds b ON b.id = l.build_id
                 WHERE b.status IN ('waiting', 'building')
                     OR b.id IN (SELECT build_id FROM template_tags)
                     OR (b.status = 'error' AND NOT EXISTS (
                         SELECT 1 FROM template_builds later
                         WHERE later.template_id = b.template_id
                             AND (later.created_at, later.id) > (b.created_at, b.id))))
             RETURNING snapshot_id",
        )
        .fetch_all(&mut *tx)
        .await
        .map_err(Error::database(doing))?;
        tx.commit().await.map_err(Error::database(doing))?;
        rows.iter()
            .map(|row| parse("template layer", &row.get::<String, _>("snapshot_id")))
            .collect()
    }

    /// The snapshots of all layers.
    pub(crate) async fn layers(&self) -> Result<Vec<SnapshotId>> {
        let rows: Vec<String> = sqlx::query_scalar("SELECT snapshot_id FROM template_layers")
            .fetch_all(&self.db.read)
            .await
            .map_err(Error::database("read the layers"))?;
        rows.iter().map(|id| parse("template layer", id)).collect()
    }
}
