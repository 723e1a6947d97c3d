//! The manifest: what a snapshot says about itself.

use std::{collections::BTreeMap, path::Path};

use cubicle_ids::SnapshotId;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::{
    error::{Context as _, Error, Result},
    memory::MemoryReport,
};

/// The version of the manifest's format that this program writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Why a snapshot exists. The kind decides who may delete it, never how it is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// Taken after an image booted and its readiness probe passed; what sandboxes are made from.
    Template,
    /// Taken of a running sandbox because a user asked.
    User,
    /// Holds a paused sandbox; deleted when the sandbox is killed or has been resumed.
    Pause,
}

impl SnapshotKind {
    /// The kind as it is written in manifests and in the catalog.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::User => "user",
            Self::Pause => "pause",
        }
    }
}

/// What the VM looked like. A restore must build exactly this machine again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmShape {
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Size of guest memory, in MiB. The memory image has exactly this size.
    pub memory_mib: u32,
    /// Name of the hypervisor driver whose device state this is, for example `qemu`.
    pub hypervisor: String,
    /// Driver options that must match at a restore (machine type, accelerator, CPU model, ...).
    pub options: BTreeMap<String, String>,
}

/// One disk of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShape {
    /// Size of the raw volume, in bytes.
    pub size: u64,
    /// Whether the VM may only read it.
    pub read_only: bool,
}

/// One file of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// File name inside the snapshot's directory.
    pub name: String,
    /// Logical size, in bytes.
    pub size: u64,
}

/// What a snapshot says about itself: `manifest.json` in its directory. Never changed once it is
/// published; facts that come later (durability, checksums, failure) live in the catalog.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// The snapshot this manifest belongs to.
    pub id: SnapshotId,
    /// Why it exists.
    pub kind: SnapshotKind,
    /// When the VM was frozen, by the host's wall clock.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// The snapshot that the frozen VM was last restored from or last captured as; none for a VM
    /// that was booted cold. The parent may have been deleted since: no data depends on it.
    pub parent: Option<SnapshotId>,
    /// All ancestors, nearest first, so that lineage outlives the deletion of any of them.
    #[serde(default)]
    pub lineage: Vec<SnapshotId>,
    /// The machine.
    pub vm: VmShape,
    /// Fingerprint of the kernel and initramfs that run in the memory image.
    pub kernel: String,
    /// The VM's disks; disk `n` is the part `disk-<n>.img`.
    pub disks: Vec<DiskShape>,
    /// How the memory image was made, and how much it took.
    pub memory: MemoryReport,
    /// The value that the guest daemon held in RAM when it was frozen: proof after a restore that
    /// this snapshot was restored and no other. Lower-case hexadecimal.
    pub guest_nonce: String,
    /// Facts that other parts of the system want to keep with the snapshot.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// All files but the manifest. Filled in by [`crate::Draft::publish`].
    #[serde(default)]
    pub parts: Vec<Part>,
}

impl Manifest {
    /// A manifest of a VM frozen now, without parent, disks and labels; fill in what applies.
    #[must_use]
    pub fn new(id: SnapshotId, kind: SnapshotKind, vm: VmShape, kernel: impl Into<String>) -> Self {
        Self {
            version: FORMAT_VERSION,
            id,
            kind,
            created_at: OffsetDateTime::now_utc(),
            parent: None,
            lineage: Vec::new(),
            vm,
            kernel: kernel.into(),
            disks: Vec::new(),
            memory: MemoryReport::default(),
            guest_nonce: String::new(),
            labels: BTreeMap::new(),
            parts: Vec::new(),
        }
    }

    /// Makes `parent` this snapshot's parent and extends its lineage.
    #[must_use]
    pub fn child_of(mut self, parent: &Self) -> Self {
        self.parent = Some(parent.id.clone());
        self.lineage = std::iter::once(&parent.id)
            .chain(&parent.lineage)
            .cloned()
            .collect();
        self
    }

    /// Parses the text of a manifest; `path` is where it came from, for messages.
    ///
    /// # Errors
    /// [`Error::ManifestVersion`] for any other version than [`FORMAT_VERSION`], whatever else the
    /// text holds; [`Error::Manifest`] if it is malformed.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let malformed = |source| Error::Manifest {
            path: path.to_owned(),
            source,
        };
        // The version is read first and alone: another format may differ in everything else.
        let Version { version } = serde_json::from_slice(text).map_err(malformed)?;
        if version != FORMAT_VERSION {
            return Err(Error::ManifestVersion {
                path: path.to_owned(),
                found: version,
                known: FORMAT_VERSION,
            });
        }
        serde_json::from_slice(text).map_err(malformed)
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|source| Error::Manifest {
            path: path.to_owned(),
            source,
        })?;
        std::fs::write(path, text).at("write the manifest", path)
    }
}
