//! The store: volumes and snapshots under one root.

use std::{
    collections::{HashMap, HashSet},
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cubicle_ids::{SandboxId, SnapshotId};
use rustix::{
    fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with},
    io::Errno,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::{
    backing::{StoreInfo, StoreRoot},
    catalog::{Catalog, Row},
    digest,
    draft::Draft,
    error::{Context as _, Error, Result},
    flush::{Flushed, Flusher, Job},
    manifest::{Manifest, SnapshotKind},
    memory,
    reflink::{self, Support},
    snapshot::{MANIFEST, Snapshot, SnapshotEntry, SnapshotState},
    volume::{VolumeName, generation_dir},
};

/// How often free space is looked at. An image grows in milliseconds and its headroom is some GiB,
/// which no disk fills in this time.
const HEADROOM_INTERVAL: Duration = Duration::from_secs(2);
const FAILED_BEFORE_DURABLE: &str =
    "the machine stopped before the snapshot had reached the disk; its files cannot be trusted";

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
    flusher: Mutex<Flusher>,
    changes: watch::Sender<u64>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    unique: AtomicU64,
    buffers: Arc<memory::Pool>,
    /// Locked for as long as the store is open.
    _lock: File,
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
        let lock = File::create(&lock_path).at("lock", &lock_path)?;
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
        let catalog = Catalog::open(path).await?;
        let (flushed, outcomes) = mpsc::unbounded_channel();
        let flusher = Flusher::start(move |outcome| drop(flushed.send(outcome)))
            .at("start the flushing thread of", path)?;
        let store = Self {
            inner: Arc::new(Inner {
                root: root.clone(),
                volumes,
                snapshots,
                tmp,
                boot_id,
                catalog,
                entries: RwLock::default(),
                flusher: Mutex::new(flusher),
                changes: watch::Sender::new(0),
                tasks: Mutex::default(),
                unique: AtomicU64::new(0),
                buffers: Arc::default(),
                _lock: lock,
            }),
        };
        let report = match store.sweep().await {
            Ok(report) => report,
            Err(error) => {
                store.close().await;
                return Err(error);
            }
        };
        let tasks = [
            tokio::spawn(record(Arc::downgrade(&store.inner), outcomes)),
            tokio::spawn(keep_headroom(root.clone())),
        ];
        store
            .inner
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(tasks);
        Ok((store, report))
    }

    async fn sweep(&self) -> Result<SweepReport> {
        let inner = &self.inner;
        let mut report = SweepReport::default();
        for entry in std::fs::read_dir(&inner.tmp).at("list", &inner.tmp)? {
            remove_tree(&entry.at("list", &inner.tmp)?.path())?;
            report.drafts_removed += 1;
        }
        let rows = inner.catalog.rows(inner.root.path()).await?;
        for entry in std::fs::read_dir(&inner.snapshots).at("list", &inner.snapshots)? {
            let entry = entry.at("list", &inner.snapshots)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name
                .parse()
                .ok()
                .is_none_or(|id: SnapshotId| !rows.contains_key(&id))
            {
                remove_tree(&entry.path())?;
                report.unowned_removed.push(name);
            }
        }
        for (id, Row { mut entry, boot_id }) in rows {
            let SnapshotState::Published { durable } = entry.state else {
                self.entries_mut(|entries| entries.insert(id, entry));
                continue;
            };
            let torn = (!durable && boot_id != inner.boot_id)
                .then(|| FAILED_BEFORE_DURABLE.to_owned())
                .or_else(|| self.missing(&entry.manifest));
            match torn {
                Some(reason) => {
                    inner
                        .catalog
                        .set_failed(&id, &reason, inner.root.path())
                        .await?;
                    entry.state = SnapshotState::Failed {
                        reason: reason.clone(),
                    };
                    report.failed.push((id.clone(), reason));
                }
                None => {
                    report.usable += 1;
                    if !durable {
                        self.flush_later(&entry.manifest);
                    }
                }
            }
            self.entries_mut(|entries| entries.insert(id, entry));
        }
        report.volumes = self.volume_dirs()?;
        Ok(report)
    }

    /// What the files of a snapshot lack, by their sizes alone.
    fn missing(&self, manifest: &Manifest) -> Option<String> {
        let dir = self.snapshot_dir(&manifest.id);
        let path = dir.join(MANIFEST);
        let found = std::fs::read(&path)
            .at("read the manifest", &path)
            .and_then(|text| Manifest::parse(&text, &path));
        match found {
            Ok(found) if found == *manifest => {}
            Ok(_) => return Some(format!("{MANIFEST} is not the one that was published")),
            Err(error) => return Some(error.to_string()),
        }
        manifest
            .parts
            .iter()
            .find_map(|part| digest::damage(&dir.join(&part.name), part.size, None))
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

    // ---- volumes

    /// Where a volume is, or would be.
    #[must_use]
    pub fn volume(&self, name: &VolumeName) -> PathBuf {
        name.path_in(&self.inner.volumes)
    }

    /// Makes the volume `to` a clone of a disk of this store: of a snapshot's, or of another
    /// volume. Blocking, but brief.
    ///
    /// # Errors
    /// [`Error::VolumeExists`]; [`Error::DiskFull`]; or if `from` is not on the store's file system.
    pub fn clone_volume(&self, from: &Path, to: &VolumeName) -> Result<PathBuf> {
        self.make_volume(to, |path| reflink::duplicate(self.support(), from, path))
    }

    /// Makes the volume `to` of a file that may be on another file system, in which case its data
    /// is copied. Returns the path and how many bytes were copied. Blocking.
    ///
    /// # Errors
    /// [`Error::VolumeExists`]; [`Error::DiskFull`]; or if `from` cannot be read.
    pub fn import_volume(&self, from: &Path, to: &VolumeName) -> Result<(PathBuf, u64)> {
        let mut copied = 0;
        let path = self.make_volume(to, |path| {
            if self.support().is_reflink() && reflink::clone_file(from, path).is_ok() {
                return Ok(());
            }
            copied = reflink::copy_file(from, path)?;
            Ok(())
        })?;
        Ok((path, copied))
    }

    fn make_volume(
        &self,
        name: &VolumeName,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.volume(name);
        if path.exists() {
            return Err(Error::VolumeExists { path });
        }
        let dir = generation_dir(&self.inner.volumes, &name.sandbox, name.generation);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .at("create", &dir)?;
        make(&path).inspect_err(|_| {
            // Only if nothing else is in there.
            let _ = std::fs::remove_dir(&dir);
            let _ = dir.parent().map(std::fs::remove_dir);
        })?;
        Ok(path)
    }

    /// Removes the volumes of one life of a sandbox; no error if there are none. Blocking.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_volumes(&self, sandbox: &SandboxId, generation: u64) -> Result<()> {
        let dir = generation_dir(&self.inner.volumes, sandbox, generation);
        remove_tree(&dir)?;
        // The sandbox's directory goes with its last generation.
        let _ = dir.parent().map(std::fs::remove_dir);
        Ok(())
    }

    /// Removes the volumes of all lives of a sandbox; no error if there are none. Blocking.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_sandbox_volumes(&self, sandbox: &SandboxId) -> Result<()> {
        remove_tree(&self.inner.volumes.join(sandbox.as_str()))
    }

    /// Removes all volumes but those of the given lives. Returns what was removed. For the start,
    /// when it has become known which sandboxes still run. Blocking.
    ///
    /// # Errors
    /// If a volume cannot be removed.
    pub fn retain_volumes(
        &self,
        live: &HashSet<(SandboxId, u64)>,
    ) -> Result<Vec<(SandboxId, u64)>> {
        let mut removed = self.volume_dirs()?;
        removed.retain(|life| !live.contains(life));
        for (sandbox, generation) in &removed {
            self.remove_volumes(sandbox, *generation)?;
        }
        Ok(removed)
    }

    fn volume_dirs(&self) -> Result<Vec<(SandboxId, u64)>> {
        let mut found = Vec::new();
        let volumes = &self.inner.volumes;
        for entry in std::fs::read_dir(volumes).at("list", volumes)? {
            let entry = entry.at("list", volumes)?;
            let path = entry.path();
            let Ok(sandbox) = entry.file_name().to_string_lossy().parse::<SandboxId>() else {
                tracing::warn!(path = %path.display(), "not a sandbox's volumes; left alone");
                continue;
            };
            for generation in std::fs::read_dir(&path).at("list", &path)? {
                let name = generation.at("list", &path)?.file_name();
                if let Ok(generation) = name.to_string_lossy().parse() {
                    found.push((sandbox.clone(), generation));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    // ---- snapshots

    /// A buffer for [`memory::capture`], whose memory was used before if possible: a freeze does
    /// not wait for pages to be zeroed then. Drop it, or what was captured in it, to give it back.
    #[must_use]
    pub fn buffer(&self) -> memory::Buffer {
        self.inner.buffers.buffer()
    }

    /// Begins a snapshot: an empty directory that becomes one by [`Draft::publish`].
    ///
    /// # Errors
    /// [`Error::Exists`] if the id is taken; or if the directory cannot be created.
    pub fn begin_snapshot(&self, id: SnapshotId, kind: SnapshotKind) -> Result<Draft> {
        if self.entry(&id).is_some() {
            return Err(Error::Exists(id));
        }
        Draft::create(self.clone(), id, kind)
    }

    /// The snapshot, if it can be restored.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Failed`] if it must not be restored.
    pub fn snapshot(&self, id: &SnapshotId) -> Result<Snapshot> {
        let entry = self.entry(id).ok_or_else(|| Error::NotFound(id.clone()))?;
        match entry.state {
            SnapshotState::Failed { reason } => Err(Error::Failed {
                id: id.clone(),
                reason,
            }),
            SnapshotState::Published { .. } => Ok(Snapshot {
                dir: self.snapshot_dir(id),
                manifest: entry.manifest,
            }),
        }
    }

    /// What the catalog knows about a snapshot, whatever its state.
    #[must_use]
    pub fn entry(&self, id: &SnapshotId) -> Option<SnapshotEntry> {
        self.inner
            .entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .cloned()
    }

    /// All snapshots, oldest first, also those that must not be restored.
    #[must_use]
    pub fn list(&self) -> Vec<SnapshotEntry> {
        let entries = self
            .inner
            .entries
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = entries.values().cloned().collect();
        drop(entries);
        list.sort_by(|a, b| {
            (a.manifest.created_at, &a.manifest.id).cmp(&(b.manifest.created_at, &b.manifest.id))
        });
        list
    }

    /// Waits until a snapshot survives a power failure.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Failed`], also if that happens while waiting;
    /// [`Error::Closed`] if the store is closed before.
    pub async fn wait_durable(&self, id: &SnapshotId) -> Result<()> {
        let mut changes = self.inner.changes.subscribe();
        loop {
            self.snapshot(id)?;
            let state = self.entry(id).map(|entry| entry.state);
            if state == Some(SnapshotState::Published { durable: true }) {
                return Ok(());
            }
            changes.changed().await.map_err(|_| Error::Closed)?;
        }
    }

    /// Reads all of a snapshot and compares it with its checksums; one that is damaged is marked
    /// failed. Before it is durable there are no checksums, and only sizes are compared.
    ///
    /// # Errors
    /// [`Error::Failed`] if it is damaged, [`Error::NotFound`], or if the catalog cannot be read.
    pub async fn verify(&self, id: &SnapshotId) -> Result<()> {
        let snapshot = self.snapshot(id)?;
        let root = self.inner.root.path();
        let parts = self.inner.catalog.parts(id, root).await?;
        let store = self.clone();
        let damage = tokio::task::spawn_blocking(move || {
            store.missing(&snapshot.manifest).or_else(|| {
                parts.iter().find_map(|part| {
                    let size = u64::try_from(part.size).unwrap_or_default();
                    digest::damage(
                        &snapshot.dir.join(&part.name),
                        size,
                        part.checksum.as_deref(),
                    )
                })
            })
        })
        .await
        .map_err(|_| Error::Closed)?;
        // It may have been deleted meanwhile, which is not damage.
        self.snapshot(id)?;
        let Some(reason) = damage else { return Ok(()) };
        self.fail(id, &reason).await?;
        Err(Error::Failed {
            id: id.clone(),
            reason,
        })
    }

    /// Deletes a snapshot, whatever its state and whoever descends from it. Whoever has mapped or
    /// opened its files keeps them until it lets go.
    ///
    /// # Errors
    /// [`Error::NotFound`]; or if catalog or files cannot be changed.
    pub async fn delete(&self, id: &SnapshotId) -> Result<()> {
        let (store, id) = (self.clone(), id.clone());
        uncancelled(async move {
            let inner = &store.inner;
            if !inner.catalog.delete(&id, inner.root.path()).await? {
                return Err(Error::NotFound(id));
            }
            store.entries_mut(|entries| entries.remove(&id));
            let (dir, grave) = (store.snapshot_dir(&id), store.fresh_tmp(id.as_str()));
            match std::fs::rename(&dir, &grave) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                outcome => outcome.at("delete", &dir)?,
            }
            tokio::task::spawn_blocking(move || remove_tree(&grave))
                .await
                .map_err(|_| Error::Closed)?
        })
        .await
    }

    /// Stops background work and closes the catalog. What is not durable by then is made so after
    /// the next [`Self::open`]. Other clones of this value must not be used any more.
    pub async fn close(self) {
        let store = self.clone();
        // The flusher may be in an fsync, which takes as long as it takes.
        let _ = tokio::task::spawn_blocking(move || {
            store
                .inner
                .flusher
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
    }

    // ---- for the modules of this crate

    pub(crate) fn fresh_tmp(&self, name: &str) -> PathBuf {
        let number = self.inner.unique.fetch_add(1, Ordering::Relaxed);
        self.inner.tmp.join(format!("{name}.{number}"))
    }

    /// Moves a complete draft into place and records it.
    pub(crate) async fn publish(&self, draft: &Path, manifest: Manifest) -> Result<Snapshot> {
        let inner = &self.inner;
        let manifest = Arc::new(manifest);
        let id = &manifest.id;
        if self.entry(id).is_some() {
            return Err(Error::Exists(id.clone()));
        }
        let dir = self.snapshot_dir(id);
        match renameat_with(CWD, draft, CWD, &dir, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(Error::Exists(id.clone())),
            outcome => outcome.at("publish", &dir)?,
        }
        if let Err(error) = inner
            .catalog
            .insert(&manifest, &inner.boot_id, inner.root.path())
            .await
        {
            // Back to where the draft removes it.
            std::fs::rename(&dir, draft).at("withdraw", &dir)?;
            return Err(error);
        }
        let entry = SnapshotEntry {
            manifest: Arc::clone(&manifest),
            state: SnapshotState::Published { durable: false },
        };
        self.entries_mut(|entries| entries.insert(id.clone(), entry));
        self.flush_later(&manifest);
        Ok(Snapshot { dir, manifest })
    }

    fn snapshot_dir(&self, id: &SnapshotId) -> PathBuf {
        self.inner.snapshots.join(id.as_str())
    }

    fn flush_later(&self, manifest: &Manifest) {
        self.inner
            .flusher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Job {
                id: manifest.id.clone(),
                dir: self.snapshot_dir(&manifest.id),
                parts: manifest
                    .parts
                    .iter()
                    .map(|part| part.name.clone())
                    .collect(),
            });
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

    async fn record_flush(&self, flushed: Flushed) -> Result<()> {
        let Flushed { id, outcome } = flushed;
        if self.entry(&id).is_none_or(|entry| !entry.is_usable()) {
            return Ok(()); // Deleted or failed while it was being flushed.
        }
        match outcome {
            Ok(checksums) => {
                self.inner
                    .catalog
                    .set_durable(&id, &checksums, self.inner.root.path())
                    .await?;
                self.set_state(&id, SnapshotState::Published { durable: true });
                Ok(())
            }
            Err(error) => self.fail(&id, &error.to_string()).await,
        }
    }
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

async fn record(store: Weak<Inner>, mut outcomes: mpsc::UnboundedReceiver<Flushed>) {
    while let Some(flushed) = outcomes.recv().await {
        let Some(inner) = store.upgrade() else { break };
        if let Err(error) = (Store { inner }).record_flush(flushed).await {
            tracing::error!(%error, "cannot record a flushed snapshot");
        }
    }
}

async fn keep_headroom(root: StoreRoot) {
    let mut interval = tokio::time::interval(HEADROOM_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
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
