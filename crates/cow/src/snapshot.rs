//! Published snapshots, as handles.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use cubicle_ids::SnapshotId;

use crate::{
    error::{Context as _, Result},
    manifest::Manifest,
    volume::disk_file,
    worker::Stop,
    working_set,
};

/// File names in a snapshot's directory.
pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const MEMORY: &str = "memory.img";
pub(crate) const WORKING_SET: &str = "memory.used";
pub(crate) const DEVICE_STATE: &str = "device.state";

/// A snapshot that can be restored. A handle only: it does not keep the files from deletion, and
/// whoever has opened or mapped them is not disturbed by it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub(crate) dir: PathBuf,
    pub(crate) manifest: Arc<Manifest>,
}

impl Snapshot {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &SnapshotId {
        &self.manifest.id
    }

    /// What it says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it holds memory and device state. If not, a restore boots from its disks.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.manifest.has_memory()
    }

    /// The image of guest memory; not there unless [`Self::has_memory`].
    #[must_use]
    pub fn memory_image(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    /// Has the kernel read what a restore asks for first, as far as that is known and not in the page
    /// cache. Returns for how many bytes it asked; reading goes on after that. Blocking for some
    /// milliseconds: meant to be done while the VM's process is started.
    ///
    /// # Errors
    /// If the image or the list of pages cannot be read. A restore works without.
    pub fn read_ahead(&self) -> Result<u64> {
        let image = self.memory_image();
        working_set::read_ahead(&image, &self.dir.join(WORKING_SET), &Stop::default())
            .at("read ahead", &image)
    }

    /// The state of the VM's devices, in the hypervisor driver's own format; not there unless
    /// [`Self::has_memory`].
    #[must_use]
    pub fn device_state(&self) -> PathBuf {
        self.dir.join(DEVICE_STATE)
    }

    /// The raw volume of disk `disk`; clone it, never write it.
    #[must_use]
    pub fn disk(&self, disk: u32) -> PathBuf {
        self.dir.join(disk_file(disk))
    }
}

/// What has become of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotState {
    /// It can be restored.
    Published {
        /// Whether it survives a power failure: flushed, checksummed, and recorded as such.
        durable: bool,
    },
    /// It must not be restored; it can only be deleted.
    Failed {
        /// What is wrong with it, for a person to read.
        reason: String,
    },
}

/// One row of the catalog.
#[derive(Debug, Clone)]
pub struct SnapshotEntry {
    /// What the snapshot said about itself when it was published.
    pub manifest: Arc<Manifest>,
    /// What has become of it.
    pub state: SnapshotState,
}

impl SnapshotEntry {
    /// Whether it can be restored.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self.state, SnapshotState::Published { .. })
    }
}
