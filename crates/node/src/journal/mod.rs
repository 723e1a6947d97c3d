//! The journal: what this node owns, in words that survive it.
//!
//! A row is written before the first resource of an instance is taken and deleted after the last
//! one is given back. What lies between (the slot, the VM's process) is added as it comes to be; a
//! crash before it was added leaves a resource that no row names, which the sweep at the next start
//! removes. So after `kill -9` at any point, rows and sweep together account for everything.

use std::{path::Path, str::FromStr as _, sync::Arc, time::Duration};

use cubicle_cow::Manifest;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_protocol::guest_api::InitRequest;
use cubicle_vmm::VmRecord;
use sqlx::{
    Row as _, SqlitePool,
    migrate::Migrator,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use time::OffsetDateTime;

use crate::{
    error::{Error, Result},
    facts::Shape,
};

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

/// How long a write may wait for another process that reads the file, `sqlite3` for example.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How far an instance has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// It is being made; nobody was told that it exists.
    Creating,
    /// It was handed out.
    Running,
    /// It is being taken apart.
    Removing,
}

impl Step {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Removing => "removing",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Creating, Self::Running, Self::Removing]
            .into_iter()
            .find(|s| s.as_str() == text)
    }
}

/// Names one instance: a sandbox's id and generation, or, for a VM that was made before anybody
/// asked for it, an id that no sandbox has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) sandbox: SandboxId,
    pub(crate) generation: u64,
}

/// All that is known of one instance.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) key: Key,
    /// The sandbox whose VM it is, and which of its VMs.
    pub(crate) serves: Option<(SandboxId, u64)>,
    pub(crate) snapshot: SnapshotId,
    /// Of the snapshot that it was restored from or last captured as; none for one that was booted
    /// from an image.
    pub(crate) origin: Option<Arc<Manifest>>,
    pub(crate) step: Step,
    pub(crate) shape: Shape,
    pub(crate) slot: Option<u32>,
    pub(crate) vm: Option<VmRecord>,
    /// What the guest is told at the start of each life, without clock and entropy.
    pub(crate) identity: InitRequest,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) running_at: Option<OffsetDateTime>,
}

/// The open journal. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    pool: SqlitePool,
}

impl Journal {
    /// Opens or creates the journal at `path`.
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY_TIMEOUT);
        // One connection: SQLite has one writer, and every statement here is short.
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .min_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_with(options)
            .await
            .map_err(attempting("open the database"))?;
        MIGRATIONS
            .run(&pool)
            .await
            .map_err(|source| Error::Migrate {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self { pool })
    }

    /// Writes down that an instance is about to be made.
    pub(crate) async fn begin(&self, row: &Row) -> Result<()> {
        sqlx::query(
            "INSERT INTO instance (sandbox, generation, serves, serves_generation, snapshot, origin, \
             step, cpus, memory_mib, disk_mib, slot, vm, identity, created_at, running_at) \
             VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        )
        .bind(row.key.sandbox.as_str())
        .bind(signed(row.key.generation))
        .bind(row.serves.as_ref().map(|(id, _)| id.as_str()))
        .bind(row.serves.as_ref().map(|(_, generation)| signed(*generation)))
        .bind(row.snapshot.as_str())
        .bind(row.origin.as_ref().map(json))
        .bind(row.step.as_str())
        .bind(row.shape.cpus)
        .bind(row.shape.memory_mib)
        .bind(signed(row.shape.disk_mib))
        .bind(row.slot)
        .bind(row.vm.as_ref().map(json))
        .bind(json(&row.identity))
        .bind(millis(row.created_at))
        .bind(row.running_at.map(millis))
        .execute(&self.pool)
        .await
        .map_err(attempting("announce an instance"))?;
        Ok(())
    }

    /// Adds what the instance has been given.
    pub(crate) async fn started(&self, key: &Key, slot: u32, vm: &VmRecord) -> Result<()> {
        self.update(
            "record a VM",
            sqlx::query(
                "UPDATE instance SET slot = ?, vm = ? WHERE sandbox = ? AND generation = ?",
            )
            .bind(slot)
            .bind(json(vm))
            .bind(key.sandbox.as_str().to_owned())
            .bind(signed(key.generation)),
        )
        .await
    }

    /// Records that the instance is handed out, as which sandbox's VM, and what its guest was told.
    pub(crate) async fn running(
        &self,
        key: &Key,
        serves: (&SandboxId, u64),
        told: &InitRequest,
        at: OffsetDateTime,
    ) -> Result<()> {
        self.update("record a running sandbox", run(key, serves, told, at))
            .await
    }

    /// Records that the instance is handed out and that the one before it is not to be used any
    /// more: both or neither.
    pub(crate) async fn supersede(
        &self,
        old: &Key,
        new: &Key,
        serves: (&SandboxId, u64),
        told: &InitRequest,
    ) -> Result<()> {
        let attempt = "record a change of VMs";
        let mut transaction = self.pool.begin().await.map_err(attempting(attempt))?;
        sqlx::query("UPDATE instance SET step = 'removing' WHERE sandbox = ? AND generation = ?")
            .bind(old.sandbox.as_str())
            .bind(signed(old.generation))
            .execute(&mut *transaction)
            .await
            .map_err(attempting(attempt))?;
        let done = run(new, serves, told, now())
            .execute(&mut *transaction)
            .await
            .map_err(attempting(attempt))?;
        if done.rows_affected() != 1 {
            let source = sqlx::Error::RowNotFound;
            return Err(Error::Journal { attempt, source });
        }
        transaction.commit().await.map_err(attempting(attempt))
    }

    /// Records which snapshot the instance was last captured as.
    pub(crate) async fn captured(&self, key: &Key, origin: &Manifest) -> Result<()> {
        self.update(
            "record a snapshot",
            sqlx::query("UPDATE instance SET origin = ? WHERE sandbox = ? AND generation = ?")
                .bind(json(origin))
                .bind(key.sandbox.as_str().to_owned())
                .bind(signed(key.generation)),
        )
        .await
    }

    /// Records that the instance is not to be used any more. Without a row there is nothing to
    /// record.
    pub(crate) async fn removing(&self, key: &Key) -> Result<()> {
        sqlx::query("UPDATE instance SET step = 'removing' WHERE sandbox = ? AND generation = ?")
            .bind(key.sandbox.as_str())
            .bind(signed(key.generation))
            .execute(&self.pool)
            .await
            .map_err(attempting("record a removal"))?;
        Ok(())
    }

    /// Deletes the row of an instance of which nothing is left.
    pub(crate) async fn forget(&self, key: &Key) -> Result<()> {
        sqlx::query("DELETE FROM instance WHERE sandbox = ? AND generation = ?")
            .bind(key.sandbox.as_str())
            .bind(signed(key.generation))
            .execute(&self.pool)
            .await
            .map_err(attempting("forget an instance"))?;
        Ok(())
    }

    /// All rows, oldest first. A row that cannot be read is reported in its place.
    pub(crate) async fn rows(&self) -> Result<Vec<Result<Row>>> {
        let rows = sqlx::query("SELECT * FROM instance ORDER BY created_at, sandbox, generation")
            .fetch_all(&self.pool)
            .await
            .map_err(attempting("list the instances"))?;
        Ok(rows.iter().map(read).collect())
    }

    /// Deletes a row that cannot be read; whatever it named is left to the sweep.
    pub(crate) async fn discard(&self, sandbox: &str) -> Result<()> {
        sqlx::query("DELETE FROM instance WHERE sandbox = ?")
            .bind(sandbox)
            .execute(&self.pool)
            .await
            .map_err(attempting("discard a damaged row"))?;
        Ok(())
    }

    /// Writes down that a template build begins, which may publish `snapshot`.
    pub(crate) async fn begin_build(&self, snapshot: &SnapshotId) -> Result<()> {
        sqlx::query("INSERT INTO build (snapshot, started_at) VALUES (?, ?)")
            .bind(snapshot.as_str())
            .bind(millis(now()))
            .execute(&self.pool)
            .await
            .map_err(attempting("announce a template build"))?;
        Ok(())
    }

    /// Forgets a build: its snapshot is somebody's now, or gone.
    pub(crate) async fn end_build(&self, snapshot: &SnapshotId) -> Result<()> {
        sqlx::query("DELETE FROM build WHERE snapshot = ?")
            .bind(snapshot.as_str())
            .execute(&self.pool)
            .await
            .map_err(attempting("end a template build"))?;
        Ok(())
    }

    /// Snapshots of builds that have not ended.
    pub(crate) async fn builds(&self) -> Result<Vec<SnapshotId>> {
        let snapshots: Vec<String> = sqlx::query_scalar("SELECT snapshot FROM build")
            .fetch_all(&self.pool)
            .await
            .map_err(attempting("list the template builds"))?;
        // Only ids were ever written.
        Ok(snapshots
            .iter()
            .filter_map(|snapshot| snapshot.parse().ok())
            .collect())
    }

    /// Closes the database; what was written is in the file then.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }

    async fn update(
        &self,
        attempt: &'static str,
        query: sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<()> {
        let done = query
            .execute(&self.pool)
            .await
            .map_err(attempting(attempt))?;
        if done.rows_affected() == 1 {
            Ok(())
        } else {
            Err(Error::Journal {
                attempt,
                source: sqlx::Error::RowNotFound,
            })
        }
    }
}

/// Makes an instance a sandbox's running VM.
fn run(
    key: &Key,
    (id, generation): (&SandboxId, u64),
    told: &InitRequest,
    at: OffsetDateTime,
) -> sqlx::query::Query<'static, sqlx::Sqlite, sqlx::sqlite::SqliteArguments> {
    sqlx::query(
        "UPDATE instance SET step = 'running', running_at = ?, serves = ?, serves_generation = ?, \
         identity = ? WHERE sandbox = ? AND generation = ?",
    )
    .bind(millis(at))
    .bind(id.as_str().to_owned())
    .bind(signed(generation))
    .bind(json(told))
    .bind(key.sandbox.as_str().to_owned())
    .bind(signed(key.generation))
}

/// The wall clock, as exact as the journal keeps it.
pub(crate) fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_millisecond(now.millisecond()).unwrap_or(now)
}

fn attempting(attempt: &'static str) -> impl Fn(sqlx::Error) -> Error {
    move |source| Error::Journal { attempt, source }
}

/// JSON of types of this workspace: maps with text keys, numbers and texts.
fn json<T: serde::Serialize>(value: &T) -> String {
    #[expect(
        clippy::expect_used,
        reason = "no map key in these types is anything but a text"
    )]
    serde_json::to_string(value).expect("journal values serialise")
}

/// SQLite's integers are signed.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn millis(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}

fn read(row: &SqliteRow) -> Result<Row> {
    let sandbox: String = row.try_get("sandbox").map_err(attempting("read a row"))?;
    read_fields(row, &sandbox).map_err(|reason| Error::JournalRow { sandbox, reason })
}

fn read_fields(row: &SqliteRow, sandbox: &str) -> Result<Row, String> {
    fn get<'r, T>(row: &'r SqliteRow, column: &str) -> Result<T, String>
    where
        T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
    {
        row.try_get(column).map_err(|error| error.to_string())
    }
    fn parsed<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T, String> {
        serde_json::from_str(text).map_err(|error| format!("column {column}: {error}"))
    }
    fn time(column: &str, at: i64) -> Result<OffsetDateTime, String> {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(at) * 1_000_000)
            .map_err(|error| format!("column {column}: {error}"))
    }
    let step: String = get(row, "step")?;
    let snapshot: String = get(row, "snapshot")?;
    let generation: i64 = get(row, "generation")?;
    let serves: Option<String> = get(row, "serves")?;
    let serves_generation: Option<i64> = get(row, "serves_generation")?;
    Ok(Row {
        key: Key {
            sandbox: SandboxId::from_str(sandbox).map_err(|error| error.to_string())?,
            generation: generation.unsigned_abs(),
        },
        serves: match (serves, serves_generation) {
            (Some(id), Some(generation)) => Some((
                SandboxId::from_str(&id).map_err(|error| error.to_string())?,
                generation.unsigned_abs(),
            )),
            _ => None,
        },
        snapshot: SnapshotId::from_str(&snapshot).map_err(|error| error.to_string())?,
        origin: get::<Option<String>>(row, "origin")?
            .map(|text| parsed("origin", &text))
            .transpose()?,
        step: Step::parse(&step).ok_or_else(|| format!("unknown step {step}"))?,
        shape: Shape {
            cpus: get(row, "cpus")?,
            memory_mib: get(row, "memory_mib")?,
            disk_mib: get::<i64>(row, "disk_mib")?.unsigned_abs(),
        },
        slot: get(row, "slot")?,
        vm: get::<Option<String>>(row, "vm")?
            .map(|text| parsed("vm", &text))
            .transpose()?,
        identity: parsed("identity", &get::<String>(row, "identity")?)?,
        created_at: time("created_at", get(row, "created_at")?)?,
        running_at: get::<Option<i64>>(row, "running_at")?
            .map(|at| time("running_at", at))
            .transpose()?,
    })
}

#[cfg(test)]
mod tests;
