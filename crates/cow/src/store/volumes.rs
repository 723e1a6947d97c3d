//! Live disks of sandboxes.

use std::{
    collections::HashSet,
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use cubicle_ids::SandboxId;

use super::{Store, remove_tree};
use crate::{
    error::{Context as _, Error, Result},
    reflink,
    volume::{VolumeName, generation_dir},
};

impl Store {
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
        self.volumes_changed();
        Ok(path)
    }

    /// Removes the volumes of one life of a sandbox; no error if there are none. Blocking.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_volumes(&self, sandbox: &SandboxId, generation: u64) -> Result<()> {
        let dir = generation_dir(&self.inner.volumes, sandbox, generation);
        remove_tree(&dir)?;
        self.volumes_changed();
        // The sandbox's directory goes with its last generation.
        let _ = dir.parent().map(std::fs::remove_dir);
        Ok(())
    }

    /// Removes the volumes of all lives of a sandbox; no error if there are none. Blocking.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_sandbox_volumes(&self, sandbox: &SandboxId) -> Result<()> {
        let removed = remove_tree(&self.inner.volumes.join(sandbox.as_str()));
        self.volumes_changed();
        removed
    }

    /// A volume has come or gone, and with it what snapshots share.
    fn volumes_changed(&self) {
        self.inner.volume_changes.fetch_add(1, Ordering::AcqRel);
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

    pub(super) fn volume_dirs(&self) -> Result<Vec<(SandboxId, u64)>> {
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
}
