//! The store: volumes and snapshots under one root.

mod background;
mod sizes;
mod snapshots;
mod sweep;
mod volumes;

use std::{
    collections::HashMap,
    fs::{DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cubicle_ids::{SandboxId, SnapshotId};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

pub use self::sizes::Sizes;
use self::{
    background::{Background, FLUSH_DELAY, Published},
    sizes::SizeCache,
};
use crate::{
    backing::{StoreInfo, StoreRoot},
    catalog::Catalog,
    error::{Context as _, Error, Result},
    flush::{Check, Done, Flush},
    manifest::{Manifest, SnapshotKind},
    memory,
    reflink::Support,
    snapshot::{SnapshotEntry, SnapshotState},
};

/// How often free space is looked at. An image grows in milliseconds and its headroom is some GiB,
/// which no disk fills in this time.
const HEADROOM_INTERVAL: Duration = Duration::from_secs(2);

/// Volumes and snapshots of one machine. Cheap to clone; one process at a time has a store open.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    root: StoreRoot,
    volumes: PathBuf,
    snapshots: PathBuf,
    tmp: PathBuf,
    boot_id: String,
    catalog: Catalog,
    entries: RwLock<HashMap<SnapshotId, SnapshotEntry>>,
    background: Mutex<Background>,
    changes: watch::Sender<u64>,
    volume_changes: AtomicU64,
    sizes: SizeCache,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    unique: AtomicU64,
    buffers: Arc<memory::Pool>,
    /// Locked for as long as the store is open.
    lock: Mutex<Option<File>>,
}

/// What [`Store::open`] found that should not have been there, and what it did about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Snapshots that can be restored.
    pub usable: usize,
    /// Drafts and half-deleted snapshots that were removed.
    pub drafts_removed: usize,
    /// Names in the snapshot directory that no row of the catalog owned; removed.
    pub unowned_removed: Vec<String>,
    /// Temporary snapshots of a program that is gone; deleted.
    pub temporary_removed: Vec<SnapshotId>,
    /// Durable snapshots that are read and compared with their checksums in the background, because
    /// the machine stopped while the store was open.
    pub checking: usize,
    /// Snapshots that were marked failed just now, and why.
    pub failed: Vec<(SnapshotId, String)>,
    /// Sandboxes that have volumes, with the generations of each. The store does not know which
    /// of them still exist: see [`Store::retain_volumes`].
    pub volumes: Vec<(SandboxId, u64)>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("root", &self.inner.root.path())
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store at `root` and brings files and catalog into agreement. Must be called in a
    /// Tokio runtime, which also runs the store's background work.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has it open; [`Error::ManifestVersion`] if a newer
    /// program has written to it; or if files or catalog cannot be read.
    pub async fn open(root: &StoreRoot) -> Result<(Self, SweepReport)> {
        let path = root.path();
        let lock_path = path.join("lock");
        let lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .at("lock", &lock_path)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::Locked {
                    path: path.to_owned(),
                });
            }
            outcome => outcome.at("lock", &lock_path)?,
        }
        let [volumes, snapshots, tmp] = ["volumes", "snapshots", "tmp"].map(|name| path.join(name));
        for dir in [&volumes, &snapshots, &tmp] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .at("create", dir)?;
        }
        let boot_path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = std::fs::read_to_string(boot_path)
            .at("read", boot_path)?
            .trim()
            .to_owned();
        let interrupted = take_over(&lock, &boot_id).at("mark as open", &lock_path)?;
        let catalog = Catalog::open(path).await?;
        let (flushed, outcomes) = mpsc::unbounded_channel();
        let background = Background::start(move |outcome| drop(flushed.send(outcome)))
            .at("start the background threads of", path)?;
        let store = Self {
            inner: Arc::new(Inner {
                root: root.clone(),
                volumes,
                snapshots,
                tmp,
                boot_id,
                catalog,
                entries: RwLock::default(),
                background: Mutex::new(background),
                changes: watch::Sender::new(0),
                volume_changes: AtomicU64::new(0),
                sizes: SizeCache::default(),
                tasks: Mutex::default(),
                unique: AtomicU64::new(0),
                buffers: Arc::default(),
                lock: Mutex::new(Some(lock)),
            }),
        };
        let report = match store.sweep(interrupted).await {
            Ok(report) => report,
            Err(error) => {
                store.close().await;
                return Err(error);
            }
        };
        let tasks = [
            tokio::spawn(record(Arc::downgrade(&store.inner), outcomes)),
            tokio::spawn(keep_headroom(
                root.clone(),
                Arc::downgrade(&store.inner.buffers),
            )),
        ];
        store
            .inner
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(tasks);
        Ok((store, report))
    }

    /// The directory that everything is in.
    #[must_use]
    pub fn root(&self) -> &StoreRoot {
        &self.inner.root
    }

    /// How files are duplicated here.
    #[must_use]
    pub fn support(&self) -> &Support {
        self.inner.root.support()
    }

    /// What holds the store and how much room there is.
    ///
    /// # Errors
    /// If the file system cannot be asked.
    pub fn info(&self) -> Result<StoreInfo> {
        self.inner.root.info()
    }

    /// A buffer for [`memory::capture`], whose memory was used before if possible. Drop
    /// it, or what was captured in it, to give it back.
    #[must_use]
    pub fn buffer(&self) -> memory::Buffer {
        self.inner.buffers.largest()
    }

    /// A buffer whose first `len` bytes (see [`memory::Estimate::room`]) are present in memory, so
    /// that a freeze does not wait for the kernel to find and clear it. Drop the buffer, or what was
    /// captured in it, to give it back. Blocking: up to 0.3 ms for each MB, so before the freeze.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if the machine has none to give.
    pub fn resident_buffer(&self, len: u64) -> Result<memory::Buffer> {
        let failed = |source| Error::NoMemory { bytes: len, source };
        let size = usize::try_from(len).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        let mut buffer = self.inner.buffers.buffer(size);
        buffer.make_resident(size).map_err(failed)?;
        Ok(buffer)
    }

    /// Stops background work and closes the catalog. What is not durable by then is made so after
    /// the next [`Self::open`]. Other clones of this value must not be used any more, but they do not
    /// keep the store locked or its root mounted: [`StoreRoot::close`] may follow.
    pub async fn close(self) {
        let store = self.clone();
        // The flusher may be in an fsync, which takes as long as it takes.
        let _ = tokio::task::spawn_blocking(move || {
            store
                .inner
                .background
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .stop();
        })
        .await;
        let tasks = std::mem::take(
            &mut *self
                .inner
                .tasks
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
        self.inner.catalog.close().await;
        let lock = self
            .inner
            .lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(lock) = lock {
            // If this is lost, more is checked than needed.
            let _ = lock.set_len(0);
        }
    }

    pub(crate) fn fresh_tmp(&self, name: &str) -> PathBuf {
        let number = self.inner.unique.fetch_add(1, Ordering::Relaxed);
        self.inner.tmp.join(format!("{name}.{number}"))
    }

    fn snapshot_dir(&self, id: &SnapshotId) -> PathBuf {
        self.inner.snapshots.join(id.as_str())
    }

    /// Has a snapshot flushed, unless it is temporary, and the working set of its memory read ahead if
    /// it is new.
    fn finish_later(&self, manifest: &Manifest, new: bool) {
        let now = Instant::now();
        let parts = manifest.parts.iter().map(|part| part.name.clone());
        let job = Flush {
            id: manifest.id.clone(),
            dir: self.snapshot_dir(&manifest.id),
            parts: parts.collect(),
            lineage: manifest
                .parent
                .iter()
                .chain(&manifest.lineage)
                .cloned()
                .collect(),
            due: match manifest.kind {
                SnapshotKind::User if new => now + FLUSH_DELAY,
                _ => now,
            },
        };
        let lasting = manifest.kind != SnapshotKind::Temporary;
        self.inner
            .background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Published { job, new, lasting });
    }

    /// Has a snapshot compared with its checksums.
    async fn check_later(&self, id: &SnapshotId) -> Result<()> {
        let check = Check {
            id: id.clone(),
            dir: self.snapshot_dir(id),
            parts: self.inner.catalog.parts(id, self.inner.root.path()).await?,
        };
        self.inner
            .background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .check(check);
        Ok(())
    }

    fn entries_mut<T>(
        &self,
        change: impl FnOnce(&mut HashMap<SnapshotId, SnapshotEntry>) -> T,
    ) -> T {
        let outcome = change(
            &mut self
                .inner
                .entries
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.inner.changes.send_modify(|count| *count += 1);
        outcome
    }

    fn set_state(&self, id: &SnapshotId, state: SnapshotState) {
        self.entries_mut(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                entry.state = state;
            }
        });
    }

    async fn fail(&self, id: &SnapshotId, reason: &str) -> Result<()> {
        tracing::error!(snapshot = %id, reason, "a snapshot is unusable");
        self.set_state(
            id,
            SnapshotState::Failed {
                reason: reason.to_owned(),
            },
        );
        self.inner
            .catalog
            .set_failed(id, reason, self.inner.root.path())
            .await
    }

    async fn record_done(&self, done: Done) -> Result<()> {
        let is_usable = |id| self.entry(id).is_some_and(|entry| entry.is_usable());
        match done {
            // Deleted or failed meanwhile.
            Done::Flushed { id, .. } | Done::Damaged { id, .. } if !is_usable(&id) => Ok(()),
            Done::Flushed {
                id,
                outcome: Ok(checksums),
            } => {
                self.inner
                    .catalog
                    .set_durable(&id, &checksums, self.inner.root.path())
                    .await?;
                self.set_state(&id, SnapshotState::Published { durable: true });
                Ok(())
            }
            Done::Flushed {
                id,
                outcome: Err(error),
            } => self.fail(&id, &error.to_string()).await,
            Done::Damaged { id, reason } => self.fail(&id, &reason).await,
            Done::Intact => Ok(()),
        }
    }
}

/// Marks the store as open during this run of the kernel. Whether another run of it ended, as by a
/// power failure, while the store was open.
fn take_over(lock: &File, boot_id: &str) -> io::Result<bool> {
    let mut last = vec![0; 64];
    let len = lock.read_at(&mut last, 0)?;
    lock.set_len(0)?;
    lock.write_all_at(boot_id.as_bytes(), 0)?;
    lock.sync_all()?;
    Ok(len > 0 && &last[..len] != boot_id.as_bytes())
}

/// Runs to its end even if the caller stops waiting: half of a publication or deletion is never
/// left behind by a request that was abandoned.
pub(crate) async fn uncancelled<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Closed),
        },
    }
}

async fn record(store: Weak<Inner>, mut outcomes: mpsc::UnboundedReceiver<Done>) {
    while let Some(done) = outcomes.recv().await {
        let Some(inner) = store.upgrade() else { break };
        if let Err(error) = (Store { inner }).record_done(done).await {
            tracing::error!(%error, "cannot record what became of a snapshot");
        }
    }
}

async fn keep_headroom(root: StoreRoot, buffers: Weak<memory::Pool>) {
    let mut interval = tokio::time::interval(HEADROOM_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if let Some(buffers) = buffers.upgrade() {
            buffers.trim(Instant::now());
        }
        let root = root.clone();
        match tokio::task::spawn_blocking(move || root.keep_headroom()).await {
            Ok(Err(error)) => tracing::error!(%error, "cannot grow the store"),
            Ok(Ok(_)) => {}
            Err(_) => break, // The runtime is shutting down.
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in self
            .tasks
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            task.abort();
        }
    }
}

/// Removes a file, or a directory with all that is in it; no error if there is none.
fn remove_tree(path: &Path) -> Result<()> {
    let outcome = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.at("remove", path),
    }
}
