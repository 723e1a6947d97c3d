//! Names of volumes.

use std::path::{Path, PathBuf};

use cubicle_ids::SandboxId;

/// Names one disk of one life of a sandbox. A rollback restores the next generation beside the
/// running one, so both have volumes for a moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VolumeName {
    /// Whose disk it is.
    pub sandbox: SandboxId,
    /// Which life of the sandbox.
    pub generation: u64,
    /// Which disk, from 0.
    pub disk: u32,
}

impl VolumeName {
    /// Disk `disk` of the given life of a sandbox.
    #[must_use]
    pub fn new(sandbox: SandboxId, generation: u64, disk: u32) -> Self {
        Self {
            sandbox,
            generation,
            disk,
        }
    }

    pub(crate) fn path_in(&self, volumes: &Path) -> PathBuf {
        generation_dir(volumes, &self.sandbox, self.generation).join(disk_file(self.disk))
    }
}

pub(crate) fn generation_dir(volumes: &Path, sandbox: &SandboxId, generation: u64) -> PathBuf {
    volumes.join(sandbox.as_str()).join(generation.to_string())
}

/// File name of a disk, in a volume directory as well as in a snapshot.
pub(crate) fn disk_file(disk: u32) -> String {
    format!("disk-{disk}.img")
}
