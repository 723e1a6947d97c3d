//! The manifest: what a snapshot says about itself.

use std::{collections::BTreeMap, path::Path};

use cubicle_ids::SnapshotId;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::{
    error::{Context as _, Error, Result},
    memory::MemoryReport,
};

/// The version of the manifest's format that this program writes. Version 2 added snapshots without
/// memory, and temporary ones.
pub const FORMAT_VERSION: u32 = 2;

/// The oldest version that this program reads.
const OLDEST_VERSION: u32 = 1;

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
    /// Belongs to the program that made it, as what a fork is restored from, and to nobody else:
    /// no such snapshot outlives that program.
    Temporary,
}

impl SnapshotKind {
    /// The kind as it is written in manifests and in the catalog.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::User => "user",
            Self::Pause => "pause",
            Self::Temporary => "temporary",
        }
    }
}

/// What a snapshot holds of its VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// Memory, device state and disks: a restore goes on where the VM stood still.
    #[default]
    Full,
    /// The disks alone: a restore boots.
    Disks,
}

impl Contents {
    fn is_full(&self) -> bool {
        *self == Self::Full
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
    /// What it holds.
    #[serde(default, skip_serializing_if = "Contents::is_full")]
    pub contents: Contents,
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
    /// How the memory image was made, and how much it took; all zero if there is none.
    #[serde(default)]
    pub memory: MemoryReport,
    /// The value that the guest daemon held in RAM when it was frozen: proof after a restore that
    /// this snapshot was restored and no other. Lower-case hexadecimal; empty without memory.
    #[serde(default)]
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
            contents: Contents::Full,
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

    /// Makes this the manifest of a snapshot that holds disks and nothing else.
    #[must_use]
    pub fn of_disks(mut self) -> Self {
        self.contents = Contents::Disks;
        self.memory = MemoryReport::default();
        self.guest_nonce.clear();
        self
    }

    /// Whether the snapshot holds memory and device state.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.contents.is_full()
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
    /// [`Error::ManifestVersion`] for a version that is newer than [`FORMAT_VERSION`] or unknown,
    /// whatever else the text holds; [`Error::Manifest`] if it is malformed.
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
        if !(OLDEST_VERSION..=FORMAT_VERSION).contains(&version) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let vm = VmShape {
            cpus: 2,
            memory_mib: 512,
            hypervisor: "qemu".to_owned(),
            options: BTreeMap::new(),
        };
        Manifest::new(SnapshotId::generate(), SnapshotKind::Temporary, vm, "k")
    }

    fn parse(manifest: &serde_json::Value) -> Result<Manifest> {
        Manifest::parse(manifest.to_string().as_bytes(), Path::new("manifest.json"))
    }

    #[test]
    fn what_is_written_is_read() {
        for written in [manifest(), manifest().of_disks()] {
            let json = serde_json::to_value(&written).unwrap();
            assert_eq!(json.get("contents").is_some(), !written.has_memory());
            assert_eq!(json["kind"], "temporary");
            assert_eq!(parse(&json).unwrap(), written);
        }
    }

    #[test]
    fn an_older_manifest_is_one_with_memory() {
        // As version 1 wrote it.
        let old = serde_json::json!({
            "version": 1, "id": SnapshotId::generate(), "kind": "user",
            "created_at": "2026-01-02T03:04:05Z", "parent": null, "lineage": [],
            "vm": { "cpus": 1, "memory_mib": 4, "hypervisor": "qemu", "options": {} },
            "kernel": "k", "disks": [{ "size": 7, "read_only": true }],
            "memory": {
                "tier": "anonymous_pages", "bytes_scanned": 9, "bytes_dirty": 8, "bytes_written": 7,
                "bytes_zero": 1, "bytes_unchanged": 0, "scan_us": 1, "copy_us": 2, "write_us": 3,
            },
            "guest_nonce": "00", "labels": { "a": "b" }, "parts": [{ "name": "memory.img", "size": 9 }],
        });
        let parsed = parse(&old).unwrap();
        assert!(parsed.has_memory());
        assert_eq!((parsed.memory.bytes_written, parsed.memory.arm_us), (7, 0));
        // It stays what it is: a program that is as old could still read it.
        let again = serde_json::to_value(&parsed).unwrap();
        assert_eq!(
            (&again["version"], again.get("contents")),
            (&1.into(), None)
        );
    }

    #[test]
    fn other_versions_are_refused_before_anything_else_is_read() {
        for version in [0, FORMAT_VERSION + 1] {
            let error = parse(&serde_json::json!({ "version": version, "novel": 1 })).unwrap_err();
            let Error::ManifestVersion { found, .. } = error else {
                panic!("{error}")
            };
            assert_eq!(found, version);
        }
    }
}
