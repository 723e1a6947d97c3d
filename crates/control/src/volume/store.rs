//! Volumes in the database.

use cubicle_ids::{SandboxId, SnapshotId};
use sqlx::{Row as _, sqlite::SqliteRow};

use super::{Mount, Volume};
use crate::{
    db::{Db, from_micros, to_micros},
    error::{Error, Result},
};

/// Whether a live sandbox has a volume mounted; to be bound: the volume's id.
const USERS: &str = "SELECT s.id FROM sandboxes s, json_each(s.mounts) m
     WHERE s.state <> 'dead' AND json_extract(m.value, '$.source.volume.id') = ?";

/// The `volumes` table.
#[derive(Debug, Clone)]
pub(super) struct Store {
    db: Db,
}

impl Store {
    pub(super) fn new(db: Db) -> Self {
        Self { db }
    }

    /// False: another one has the name.
    pub(super) async fn insert(&self, volume: &Volume) -> Result<bool> {
        // A name may be somebody's id as well: both are used to ask for a volume.
        let done = sqlx::query(
            "INSERT INTO volumes (id, name, token, created_at) SELECT ?1, ?2, ?3, ?4
             WHERE NOT EXISTS (SELECT 1 FROM volumes WHERE name IN (?1, ?2) OR id IN (?1, ?2))",
        )
        .bind(&volume.id)
        .bind(&volume.name)
        .bind(&volume.token)
        .bind(to_micros(volume.created_at))
        .execute(&self.db.write)
        .await
        .map_err(Error::database("record a volume"))?;
        Ok(done.rows_affected() > 0)
    }

    pub(super) async fn list(&self) -> Result<Vec<Volume>> {
        let rows = sqlx::query("SELECT * FROM volumes ORDER BY created_at, id")
            .fetch_all(&self.db.read)
            .await
            .map_err(Error::database("list the volumes"))?;
        Ok(rows.iter().map(from_row).collect())
    }

    pub(super) async fn get(&self, reference: &str) -> Result<Option<Volume>> {
        let row = sqlx::query("SELECT * FROM volumes WHERE id = ?1 OR name = ?1")
            .bind(reference)
            .fetch_optional(&self.db.read)
            .await
            .map_err(Error::database("read a volume"))?;
        Ok(row.as_ref().map(from_row))
    }

    /// Deletes the row unless a sandbox has the volume mounted; whether it did.
    pub(super) async fn delete(&self, id: &str) -> Result<bool> {
        let query = format!("DELETE FROM volumes WHERE id = ? AND NOT EXISTS ({USERS})");
        let done = sqlx::query(sqlx::AssertSqlSafe(query))
            .bind(id)
            .bind(id)
            .execute(&self.db.write)
            .await
            .map_err(Error::database("delete a volume"))?;
        Ok(done.rows_affected() > 0)
    }

    /// A sandbox that has the volume mounted.
    pub(super) async fn user(&self, id: &str) -> Result<Option<SandboxId>> {
        let user: Option<String> = sqlx::query_scalar(USERS)
            .bind(id)
            .fetch_optional(&self.db.write)
            .await
            .map_err(Error::database("look who uses a volume"))?;
        let parsed = user.map(|user| {
            let what = format!("sandbox {user}");
            user.parse().map_err(|why| Error::damaged(what, why))
        });
        parsed.transpose()
    }

    pub(super) async fn of_snapshot(&self, id: &SnapshotId) -> Result<Vec<Mount>> {
        let mounts: Option<String> =
            sqlx::query_scalar("SELECT mounts FROM snapshots WHERE id = ?")
                .bind(id.as_str())
                .fetch_optional(&self.db.read)
                .await
                .map_err(Error::database("read what a snapshot had mounted"))?;
        match mounts {
            Some(json) => serde_json::from_str(&json)
                .map_err(|why| Error::damaged(format!("snapshot {id}"), why)),
            None => Ok(Vec::new()),
        }
    }
}

fn from_row(row: &SqliteRow) -> Volume {
    Volume {
        id: row.get("id"),
        name: row.get("name"),
        token: row.get("token"),
        created_at: from_micros(row.get("created_at")),
    }
}
