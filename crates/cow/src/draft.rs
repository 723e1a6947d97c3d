//! A snapshot in the making.

use std::{
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use cubicle_ids::SnapshotId;

use crate::{
    error::{Context as _, Error, Result},
    manifest::{FORMAT_VERSION, Manifest, Part, SnapshotKind},
    memory::{self, Base, Dirty, Run, Written},
    reflink,
    snapshot::{DEVICE_STATE, MANIFEST, MEMORY, Snapshot, WORKING_SET},
    store::{Store, uncancelled},
    volume::disk_file,
    working_set,
};

/// A directory that becomes a snapshot with [`Draft::publish`]. Dropped without that, it is
/// removed with all that is in it.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    id: SnapshotId,
    kind: SnapshotKind,
    dir: PathBuf,
    published: bool,
}

impl Draft {
    pub(crate) fn create(store: Store, id: SnapshotId, kind: SnapshotKind) -> Result<Self> {
        let dir = store.fresh_tmp(id.as_str());
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .at("begin a snapshot in", &dir)?;
        Ok(Self {
            store,
            id,
            kind,
            dir,
            published: false,
        })
    }

    /// The id that the snapshot will have.
    #[must_use]
    pub fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// The directory, on the store's file system. Everything in it belongs to the snapshot.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the image of guest memory goes.
    #[must_use]
    pub fn memory_image(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    /// Where the hypervisor driver writes the device state.
    #[must_use]
    pub fn device_state(&self) -> PathBuf {
        self.dir.join(DEVICE_STATE)
    }

    /// Where the volume of disk `disk` goes.
    #[must_use]
    pub fn disk(&self, disk: u32) -> PathBuf {
        self.dir.join(disk_file(disk))
    }

    /// Clones a live volume into the draft, as disk `disk`. Blocking; part of the freeze.
    ///
    /// # Errors
    /// If the volume cannot be read or the store is full.
    pub fn clone_disk(&self, disk: u32, from: &Path) -> Result<()> {
        reflink::duplicate(self.store.support(), from, &self.disk(disk))
    }

    /// Writes the memory image from captured pages, over `base` (see [`memory::write_image`]): a
    /// path, an open file, or nothing. Blocking; outside the freeze.
    ///
    /// # Errors
    /// As [`memory::write_image`].
    pub fn write_memory<'a>(&self, base: impl Into<Base<'a>>, dirty: &Dirty) -> Result<Written> {
        memory::write_image(self.store.support(), base, dirty, &self.memory_image())
    }

    /// Notes the pages that the VM works with ([`memory::in_use`]), for [`Snapshot::read_ahead`].
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note_working_set(&self, runs: &[Run]) -> Result<()> {
        let path = self.dir.join(WORKING_SET);
        std::fs::write(&path, working_set::encode(runs)).at("write", &path)
    }

    /// Makes the draft a snapshot. It can be restored when this returns; it is made durable in the
    /// background. `parts` of the manifest is filled in.
    ///
    /// # Errors
    /// [`Error::Incomplete`] if a file that the manifest promises is missing or has another size,
    /// [`Error::Exists`] if the id is taken; the draft is removed.
    pub async fn publish(self, mut manifest: Manifest) -> Result<Snapshot> {
        manifest.parts = self.inventory(&manifest)?;
        manifest.write(&self.dir.join(MANIFEST))?;
        uncancelled(async move {
            // All of it moves in here: dropped elsewhere it would remove what is being published.
            let mut draft = self;
            let snapshot = draft.store.publish(&draft.dir, manifest).await?;
            draft.published = true;
            Ok(snapshot)
        })
        .await
    }

    /// Lists the files and compares them with what the manifest says.
    fn inventory(&self, manifest: &Manifest) -> Result<Vec<Part>> {
        let incomplete = |reason: String| Error::Incomplete {
            id: self.id.clone(),
            reason,
        };
        if manifest.id != self.id || manifest.kind != self.kind {
            return Err(incomplete(format!(
                "the manifest is of the {} snapshot {}",
                manifest.kind.as_str(),
                manifest.id
            )));
        }
        if manifest.version != FORMAT_VERSION {
            return Err(incomplete(format!(
                "format version {} is unknown",
                manifest.version
            )));
        }
        let mut parts = Vec::new();
        for entry in std::fs::read_dir(&self.dir).at("list", &self.dir)? {
            let entry = entry.at("list", &self.dir)?;
            let metadata = entry.metadata().at("read the size of", &entry.path())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !metadata.is_file() {
                return Err(incomplete(format!("{name} is not a file")));
            }
            parts.push(Part {
                name,
                size: metadata.len(),
            });
        }
        parts.sort_by(|a, b| a.name.cmp(&b.name));
        let mut expected = Vec::new();
        if manifest.has_memory() {
            let memory = u64::from(manifest.vm.memory_mib) << 20;
            expected.push((MEMORY.to_owned(), Some(memory)));
            expected.push((DEVICE_STATE.to_owned(), None));
        } else if manifest.disks.is_empty() {
            return Err(incomplete("it would hold nothing".to_owned()));
        } else if let Some(part) = parts
            .iter()
            .find(|part| [MEMORY, WORKING_SET, DEVICE_STATE].contains(&part.name.as_str()))
        {
            return Err(incomplete(format!(
                "{} is there, and the manifest says that there is no memory",
                part.name
            )));
        }
        expected.extend(
            (0..)
                .zip(&manifest.disks)
                .map(|(n, disk)| (disk_file(n), Some(disk.size))),
        );
        for (name, size) in expected {
            match (parts.iter().find(|part| part.name == name), size) {
                (None, _) => return Err(incomplete(format!("{name} is missing"))),
                (Some(part), Some(size)) if part.size != size => {
                    return Err(incomplete(format!(
                        "{name} has {} bytes, the manifest says {size}",
                        part.size
                    )));
                }
                _ => {}
            }
        }
        Ok(parts)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = std::fs::remove_dir_all(&self.dir)
        {
            tracing::warn!(%error, dir = %self.dir.display(), "cannot remove an abandoned draft");
        }
    }
}
