//! Freeze: the one way in which a running VM becomes a snapshot.
//!
//! [`freeze`] holds the VM still for as long as it takes to copy what it has changed, and nothing
//! longer; [`publish`] writes it all down while the VM runs on or is gone. Disks and memory belong
//! to the same instant, because both are copied while neither can change.

use std::{
    fmt,
    fs::Permissions,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_cow::{
    DiskShape, Draft, Manifest, Snapshot,
    memory::{Dirty, MemoryReport, Source, capture, capture_all},
};
use cubicle_ids::SandboxId;
use cubicle_vmm::{Disk, GuestMemory, Vm};

use crate::{
    error::{Error, Result},
    node::{Inner, blocking},
    sandbox::contained,
};

/// How much of memory is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// What the VM has written since it was started.
    Changed,
    /// Everything: what it was started from is lost.
    All,
    /// Nothing: the snapshot is of the disks.
    None,
}

/// What becomes of the VM after the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It runs on. Also after a freeze that failed.
    Resume,
    /// It stays stopped, and its owner kills it. After a freeze that failed it runs on.
    Stop,
}

/// How long each part of a snapshot took. Device state, disks and memory are copied at the same
/// time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FreezeTimings {
    /// Writing back what is dirty of the disks, while the VM runs.
    pub flush: Duration,
    /// Stopping the CPUs and draining the disks.
    pub pause: Duration,
    /// Saving the device state.
    pub device: Duration,
    /// Cloning the disks.
    pub disks: Duration,
    /// Finding and copying the memory that was written.
    pub memory: Duration,
    /// How long the guest stood still, all in all.
    pub frozen: Duration,
    /// Writing the memory image and publishing, while the VM runs on.
    pub publish: Duration,
}

impl FreezeTimings {
    /// Name and duration of each part, in the order in which they begin.
    #[must_use]
    pub fn phases(&self) -> [(&'static str, Duration); 7] {
        [
            ("flush", self.flush),
            ("pause", self.pause),
            ("device", self.device),
            ("disks", self.disks),
            ("memory", self.memory),
            ("frozen", self.frozen),
            ("publish", self.publish),
        ]
    }
}

impl fmt::Display for FreezeTimings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (name, took)) in self.phases().into_iter().enumerate() {
            let gap = if n == 0 { "" } else { " " };
            write!(f, "{gap}{name}={:.1}ms", took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

/// A VM at one instant, held in memory and in a draft.
pub(crate) struct Frozen {
    draft: Draft,
    /// `None`: the snapshot is of the disks.
    memory: Option<Dirty>,
    disks: Vec<DiskShape>,
    pub(crate) timings: FreezeTimings,
}

/// Captures `vm` with its `disks` into `draft`. If it fails the VM runs on and the draft is gone.
pub(crate) async fn freeze(
    node: &Inner,
    id: &SandboxId,
    vm: &Arc<dyn Vm>,
    disks: &[Disk],
    draft: Draft,
    extent: Extent,
    after: After,
) -> Result<Frozen> {
    let mut timings = FreezeTimings::default();
    let memory = Memory {
        source: memory_source(id, &vm.memory()?)?,
        extent,
    };

    let begun = Instant::now();
    let writable: Vec<PathBuf> = disks
        .iter()
        .filter(|disk| !disk.read_only)
        .map(|disk| disk.path.clone())
        .collect();
    blocking(move || writable.iter().try_for_each(|path| write_back(path))).await?;
    timings.flush = begun.elapsed();

    let draft = Arc::new(draft);
    let begun = Instant::now();
    let captured = contained(id, async {
        node.failpoints.pass("freeze/pause").await?;
        vm.pause().await?;
        timings.pause = begun.elapsed();
        hold(node, id, vm, disks, &draft, memory, &mut timings).await
    })
    .await;
    if captured.is_err() || after == After::Resume {
        let resumed = vm.resume().await;
        if captured.is_ok() {
            resumed?;
        } else if let Err(error) = resumed {
            tracing::error!(sandbox = %id, %error, "a VM does not run on after a failed freeze");
        }
    }
    timings.frozen = begun.elapsed();
    let memory = captured?;

    let disks = disks
        .iter()
        .zip(0..)
        .map(|(disk, n)| {
            let path = draft.disk(n);
            let size = std::fs::metadata(&path)
                .map_err(Error::io("read the size of", path))?
                .len();
            Ok(DiskShape {
                size,
                read_only: disk.read_only,
            })
        })
        .collect::<Result<_>>()?;
    // The tasks that shared it have ended with `hold`.
    let draft = Arc::into_inner(draft).ok_or(Error::Closed)?;
    Ok(Frozen {
        draft,
        memory,
        disks,
        timings,
    })
}

/// Which memory is captured, and how much of it.
struct Memory {
    source: Source,
    extent: Extent,
}

/// What happens while the VM stands still: three copies at once.
async fn hold(
    node: &Inner,
    id: &SandboxId,
    vm: &Arc<dyn Vm>,
    disks: &[Disk],
    draft: &Arc<Draft>,
    memory: Memory,
    timings: &mut FreezeTimings,
) -> Result<Option<Dirty>> {
    async fn timed<T>(
        id: &SandboxId,
        work: impl Future<Output = Result<T>>,
    ) -> (Result<T>, Duration) {
        let begun = Instant::now();
        let done = contained(id, work).await;
        (done, begun.elapsed())
    }
    let paths: Vec<PathBuf> = disks.iter().map(|disk| disk.path.clone()).collect();
    let (device, disks, memory) = tokio::join!(
        timed(id, async {
            node.failpoints.pass("freeze/device").await?;
            if memory.extent != Extent::None {
                vm.save_device_state(&draft.device_state()).await?;
            }
            Ok(())
        }),
        timed(id, async {
            node.failpoints.pass("freeze/disks").await?;
            let draft = draft.clone();
            blocking(move || {
                paths
                    .iter()
                    .zip(0..)
                    .try_for_each(|(path, n)| Ok(draft.clone_disk(n, path)?))
            })
            .await
        }),
        timed(id, async {
            node.failpoints.pass("freeze/memory").await?;
            let (source, buffer) = (memory.source, node.store.buffer());
            blocking(move || {
                Ok(match memory.extent {
                    Extent::Changed => Some(capture(&source, buffer)?),
                    Extent::All => Some(capture_all(&source, buffer)?),
                    Extent::None => None,
                })
            })
            .await
        }),
    );
    (timings.device, timings.disks, timings.memory) = (device.1, disks.1, memory.1);
    device.0?;
    disks.0?;
    memory.0
}

/// Writes what was captured and makes it a snapshot. `base` is the image that the VM was started
/// from, none for a cold boot. Fills in what the manifest says of disks and memory.
pub(crate) async fn publish(
    node: &Inner,
    frozen: Frozen,
    base: Option<PathBuf>,
    mut manifest: Manifest,
) -> Result<(Snapshot, FreezeTimings)> {
    let begun = Instant::now();
    let Frozen {
        draft,
        memory,
        disks,
        mut timings,
    } = frozen;
    node.failpoints.pass("publish/memory").await?;
    let (draft, report) = blocking(move || {
        let Some(memory) = memory else {
            return Ok((draft, MemoryReport::default()));
        };
        let report = draft.write_memory(base.as_deref(), &memory)?;
        // A VM's process opens it anew from a descriptor, as a user that owns nothing; nobody can
        // reach it by its path. Nobody writes it any more.
        let (image, mode) = (draft.memory_image(), Permissions::from_mode(0o444));
        std::fs::set_permissions(&image, mode).map_err(Error::io("protect", image))?;
        Ok((draft, report))
    })
    .await?;
    manifest.memory = report;
    manifest.disks = disks;
    node.failpoints.pass("publish/rename").await?;
    let snapshot = draft.publish(manifest).await?;
    timings.publish = begun.elapsed();
    Ok((snapshot, timings))
}

/// Guest memory as one range. A driver that reports several has one mapping that the kernel split.
fn memory_source(id: &SandboxId, memory: &GuestMemory) -> Result<Source> {
    let not_one = |reason: &str| {
        Error::Vm(cubicle_vmm::Error::MemoryNotFound {
            id: id.clone(),
            pid: memory.pid,
            reason: reason.to_owned(),
        })
    };
    let pid = u32::try_from(memory.pid).map_err(|_| not_one("the pid is negative"))?;
    let address = memory
        .ranges
        .first()
        .and_then(|first| first.host_address.checked_sub(first.offset))
        .ok_or_else(|| not_one("there is no mapping"))?;
    let mut len = 0;
    for range in &memory.ranges {
        if range.offset != len || range.host_address != address + len {
            return Err(not_one("it is mapped in pieces"));
        }
        len += range.len;
    }
    Ok(Source { pid, address, len })
}

/// Starts and awaits the write-back of a file's dirty pages, and no more: not its metadata, and no
/// flush of the disk. Cloning a file does the same first, but then the VM stands still.
fn write_back(path: &Path) -> Result<()> {
    let failed = || Error::io("write back", path);
    let file = std::fs::File::open(path).map_err(failed())?;
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call reads its arguments only, and the descriptor is open.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
    if done == 0 {
        Ok(())
    } else {
        Err(failed()(std::io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use cubicle_vmm::MemoryRange;

    use super::*;

    fn memory(ranges: &[(u64, u64, u64)]) -> GuestMemory {
        let ranges = ranges
            .iter()
            .map(|&(host_address, offset, len)| MemoryRange {
                host_address,
                offset,
                len,
            })
            .collect();
        GuestMemory { pid: 7, ranges }
    }

    #[test]
    fn a_mapping_that_was_split_is_one_source_and_a_scattered_one_is_none() {
        let id = SandboxId::generate();
        let source = |ranges: &[_]| memory_source(&id, &memory(ranges));
        let whole = Source {
            pid: 7,
            address: 0x10000,
            len: 0x3000,
        };
        assert_eq!(source(&[(0x10000, 0, 0x3000)]).unwrap(), whole);
        assert_eq!(
            source(&[(0x10000, 0, 0x1000), (0x11000, 0x1000, 0x2000)]).unwrap(),
            whole
        );
        assert!(source(&[]).is_err());
        assert!(
            source(&[(0x10000, 0, 0x1000), (0x12000, 0x1000, 0x2000)]).is_err(),
            "a gap"
        );
        assert!(
            source(&[(0x11000, 0x1000, 0x1000)]).is_err(),
            "the beginning is missing"
        );
    }

    #[test]
    fn writing_back_needs_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert!(
            write_back(&path)
                .unwrap_err()
                .to_string()
                .contains("write back")
        );
        std::fs::write(&path, vec![1; 100_000]).unwrap();
        write_back(&path).unwrap();
    }
}
