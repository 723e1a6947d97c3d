//! What can go wrong in the store, in words for the person who reads the log.

use std::{
    io,
    path::{Path, PathBuf},
};

use cubicle_ids::{SandboxId, SnapshotId};

/// Everything that fails in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file system operation failed.
    #[error("cannot {attempt} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb phrase: `clone the volume`.
        attempt: &'static str,
        /// The file or directory it was attempted on.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The store, or the file system that holds it, has no room left. Whatever was being written
    /// has been removed.
    #[error(
        "no space left to {attempt} {}; delete snapshots, or give the store a larger disk or limit",
        path.display()
    )]
    DiskFull {
        /// What was attempted, as a verb phrase.
        attempt: &'static str,
        /// The file it was attempted on.
        path: PathBuf,
    },
    /// The data directory has no reflinks and an image that has them cannot be mounted.
    #[error(
        "{} is on {filesystem}, which cannot share blocks between files, and a loop-mounted XFS image \
         could not be used instead: {reason}. Run as root with access to /dev/loop-control, put the data \
         directory on XFS or Btrfs, or allow full copies explicitly",
        data_dir.display()
    )]
    NoReflink {
        /// The configured data directory.
        data_dir: PathBuf,
        /// Name of its file system.
        filesystem: String,
        /// Why the image could not be used.
        reason: String,
    },
    /// A program that prepares the store failed.
    #[error("{program} failed on {}: {detail}", path.display())]
    Program {
        /// The program, for example `mkfs.xfs`.
        program: &'static str,
        /// The file it worked on.
        path: PathBuf,
        /// Its exit status and what it wrote to standard error.
        detail: String,
    },
    /// Something else is mounted or stored where the store should be.
    #[error("{} is not usable as the store: {reason}", path.display())]
    Foreign {
        /// The path in question.
        path: PathBuf,
        /// What was found there.
        reason: String,
    },
    /// Another process has this store open.
    #[error("the store {} is in use by another process", path.display())]
    Locked {
        /// The store's root.
        path: PathBuf,
    },
    /// A volume with this name exists already.
    #[error("the volume {} exists already", path.display())]
    VolumeExists {
        /// Where it is.
        path: PathBuf,
    },
    /// No snapshot has this id.
    #[error("there is no snapshot {0}")]
    NotFound(SnapshotId),
    /// A snapshot with this id exists already.
    #[error("the snapshot {0} exists already")]
    Exists(SnapshotId),
    /// The snapshot is known but must not be restored.
    #[error("the snapshot {id} is unusable: {reason}")]
    Failed {
        /// Which snapshot.
        id: SnapshotId,
        /// What is wrong with it.
        reason: String,
    },
    /// A draft cannot be published as it is.
    #[error("the snapshot {id} cannot be published: {reason}")]
    Incomplete {
        /// Which snapshot.
        id: SnapshotId,
        /// What is missing or contradictory.
        reason: String,
    },
    /// A manifest was written by a version of the format that this program does not know.
    #[error("the manifest {} has format version {found}; this program reads up to version {known}", path.display())]
    ManifestVersion {
        /// The manifest.
        path: PathBuf,
        /// The version it states.
        found: u32,
        /// [`crate::manifest::FORMAT_VERSION`].
        known: u32,
    },
    /// A manifest is not what this program writes.
    #[error("the manifest {} is malformed: {source}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Where it stopped making sense.
        source: serde_json::Error,
    },
    /// The catalog could not be read or written.
    #[error("cannot {attempt} in the catalog: {source}")]
    Catalog {
        /// What was attempted, as a verb phrase.
        attempt: &'static str,
        /// What SQLite said.
        source: sqlx::Error,
    },
    /// The catalog's schema could not be brought up to date.
    #[error("cannot migrate the catalog {}: {source}", path.display())]
    Migrate {
        /// The catalog's file.
        path: PathBuf,
        /// Which migration failed and why.
        source: sqlx::migrate::MigrateError,
    },
    /// The memory of a VM could not be read from outside.
    #[error("cannot {attempt} of process {pid}: {source}")]
    Memory {
        /// What was attempted, as a verb phrase.
        attempt: &'static str,
        /// The VM's process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no memory to copy a VM's memory into.
    #[error("no memory for a capture of {bytes} bytes: {source}")]
    NoMemory {
        /// How many bytes were asked for.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A way of finding written pages was asked for that does not work here.
    #[error(
        "this kernel cannot find written memory by {tier}: {reason}; choose another tier, or `auto`"
    )]
    TierUnsupported {
        /// Which tier.
        tier: crate::memory::Tier,
        /// What the probe found.
        reason: String,
    },
    /// A memory range or image does not have the shape that was promised.
    #[error("memory image {}: {reason}", path.display())]
    Shape {
        /// The image.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The volumes of a sandbox were asked for by an index that is out of range.
    #[error("sandbox {sandbox} has no disk {disk}")]
    NoDisk {
        /// Which sandbox.
        sandbox: SandboxId,
        /// Which disk.
        disk: u32,
    },
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the reason is a lack of space.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::DiskFull { .. })
    }
}

/// Attaches what was attempted to what the kernel said.
pub(crate) trait Context<T> {
    fn at(self, attempt: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn at(self, attempt: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull {
                attempt,
                path: path.to_owned(),
            },
            _ => Error::Io {
                attempt,
                path: path.to_owned(),
                source,
            },
        })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn at(self, attempt: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).at(attempt, path)
    }
}

impl<T> Context<T> for std::result::Result<T, sqlx::Error> {
    fn at(self, attempt: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| match &source {
            // SQLITE_FULL: the catalog shares the file system with the snapshots.
            sqlx::Error::Database(database) if database.code().as_deref() == Some("13") => {
                Error::DiskFull {
                    attempt,
                    path: path.to_owned(),
                }
            }
            _ => Error::Catalog { attempt, source },
        })
    }
}
