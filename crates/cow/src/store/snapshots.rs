//! Snapshots from their beginning to their deletion.

use std::{
    io,
    path::Path,
    sync::{Arc, PoisonError},
};

use cubicle_ids::SnapshotId;
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{Store, remove_tree, uncancelled};
use crate::{
    digest,
    draft::Draft,
    error::{Context as _, Error, Result},
    flush::check,
    manifest::{Manifest, SnapshotKind},
    snapshot::{Snapshot, SnapshotEntry, SnapshotState},
};

impl Store {
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

    /// The snapshot, if it can be restored. Its files are looked at, not read: one that has lost a
    /// file or a part of one is failed from then on.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Failed`] if it must not be restored.
    pub fn snapshot(&self, id: &SnapshotId) -> Result<Snapshot> {
        let snapshot = self.usable(id)?;
        let torn = snapshot.manifest.parts.iter().find_map(|part| {
            digest::damage(&snapshot.dir.join(&part.name), part.size, None, || true)
        });
        let Some(reason) = torn else {
            return Ok(snapshot);
        };
        // It may have been deleted meanwhile, which is not damage.
        self.usable(id)?;
        // The catalog learns it when the store is opened again, which looks at the files, too.
        tracing::error!(snapshot = %id, reason, "a snapshot is unusable");
        self.set_state(
            id,
            SnapshotState::Failed {
                reason: reason.clone(),
            },
        );
        Err(Error::Failed {
            id: id.clone(),
            reason,
        })
    }

    /// The snapshot, if it is not known to be unusable.
    fn usable(&self, id: &SnapshotId) -> Result<Snapshot> {
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

    /// Waits until a snapshot survives a power failure, which a temporary one never does.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Failed`], also if that happens while waiting;
    /// [`Error::Closed`] if the store is closed before.
    pub async fn wait_durable(&self, id: &SnapshotId) -> Result<()> {
        let mut changes = self.inner.changes.subscribe();
        loop {
            self.usable(id)?;
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
        let snapshot = self.usable(id)?;
        let root = self.inner.root.path();
        let parts = self.inner.catalog.parts(id, root).await?;
        let store = self.clone();
        let damage = tokio::task::spawn_blocking(move || {
            store
                .missing(&snapshot.manifest)
                .or_else(|| check(&snapshot.dir, &parts, || true).flatten())
        })
        .await
        .map_err(|_| Error::Closed)?;
        // It may have been deleted meanwhile, which is not damage.
        self.usable(id)?;
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
        self.finish_later(&manifest, true);
        Ok(Snapshot { dir, manifest })
    }
}
