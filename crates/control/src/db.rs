//! `cubicle.db`: where intent and history survive a restart.
//!
//! WAL, `synchronous = NORMAL`: a commit costs no fsync, a power cut may lose the last commits but
//! never the file. One connection writes, so writers queue in memory instead of polling a busy
//! file; the others read.

use std::{path::Path, time::Duration};

use sqlx::{
    Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use time::OffsetDateTime;

use crate::error::{Error, Result};

/// Connections that only read.
const READERS: u32 = 4;

/// The two pools of the database file.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    /// The one connection that writes.
    pub(crate) write: SqlitePool,
    /// Connections for everything else.
    pub(crate) read: SqlitePool,
}

impl Db {
    /// Opens (or makes) the file, readable for its owner only, and brings its schema up to date.
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        create_private(path).map_err(|source| Error::Database {
            doing: "create the file",
            source: source.into(),
        })?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5));
        let write = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options.clone())
            .await
            .map_err(Error::database("open the file"))?;
        sqlx::migrate!("./migrations")
            .run(&write)
            .await
            .map_err(|source| Error::Migrate {
                path: path.to_owned(),
                source,
            })?;
        let read = SqlitePoolOptions::new()
            .max_connections(READERS)
            .connect_with(options.read_only(true))
            .await
            .map_err(Error::database("open the file for reading"))?;
        Ok(Self { write, read })
    }

    /// Begins a transaction that writes; `doing` says what for. It is undone unless it is
    /// committed.
    pub(crate) async fn begin(&self, doing: &'static str) -> Result<Transaction<'static, Sqlite>> {
        self.write.begin().await.map_err(Error::database(doing))
    }

    pub(crate) async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }
}

/// Makes the file with mode 0600 before SQLite does with the umask's: it holds access tokens.
fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map(drop)
}

/// A time as the database and the wire keep it: whole microseconds.
pub(crate) fn now() -> OffsetDateTime {
    from_micros(to_micros(OffsetDateTime::now_utc()))
}

/// Microseconds since 1970.
pub(crate) fn to_micros(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / 1_000).unwrap_or(i64::MAX)
}

/// The inverse of [`to_micros`]; a number outside what a calendar can say becomes 1970.
pub(crate) fn from_micros(micros: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_fresh_file_is_private_in_wal_mode_and_opens_twice() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("cubicle.db");
        Db::open(&path).await.expect("first open").close().await;
        let db = Db::open(&path).await.expect("second open");
        let mode = std::fs::metadata(&path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let journal: String = sqlx::query_scalar("PRAGMA journal_mode")
            .fetch_one(&db.read)
            .await
            .expect("pragma");
        assert_eq!(journal, "wal");
        assert!(
            sqlx::query("DELETE FROM api_keys")
                .execute(&db.read)
                .await
                .is_err(),
            "a reader must not write"
        );
    }

    #[tokio::test]
    async fn what_an_older_server_wrote_is_understood() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("cubicle.db");
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true);
        let old = SqlitePool::connect_with(options).await.expect("open");
        let mut first = sqlx::migrate!("./migrations");
        first.migrations = first.migrations.iter().take(1).cloned().collect();
        first.run(&old).await.expect("the schema of then");
        sqlx::query(
            "INSERT INTO sandboxes (id, template_id, build_id, snapshot_id, state, metadata,
                 network, envd_token, envd_version, cpu_count, memory_mib, disk_mib, started_at)
             VALUES ('iold', 'tpl-t', '7f9c24e8-3b12-4fef-91e0-5e6ba4b6a0c5', 'snap-s', 'running',
                 '{}', '{}', 'token', '0.6.13', 1, 256, 1024, 0)",
        )
        .execute(&old)
        .await
        .expect("a row of then");
        old.close().await;
        let db = Db::open(&path).await.expect("brought up to date");
        let alive = crate::sandbox::store::Store::new(db)
            .alive()
            .await
            .expect("read");
        let [sandbox] = &alive[..] else {
            panic!("{alive:?}")
        };
        assert_eq!(sandbox.base, sandbox.snapshot);
        assert_eq!(
            sandbox.lifecycle,
            crate::sandbox::LifecycleOptions::default()
        );
        assert_eq!((&sandbox.pause, &sandbox.env_vars), (&None, &Vec::new()));
    }

    #[test]
    fn times_survive_the_database() {
        let at = now();
        assert_eq!(from_micros(to_micros(at)), at);
    }
}
