//! Freeze: the one way in which a running VM becomes a snapshot.
//!
//! [`freeze`] holds the VM still for as long as it takes to copy what it has changed, and nothing
//! longer; [`publish`] writes it all down while the VM runs on or is gone. Disks and memory belong
//! to the same instant, because both are copied while neither can change.

use std::{
    fmt,
    fs::Permissions,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use cubicle_cow::{
    DiskShape, Draft, Manifest, Snapshot,
    memory::{Buffer, Dirty, Source, in_use},
};
use cubicle_ids::SandboxId;
use cubicle_vmm::{Disk, Vm};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    error::{Error, Result},
    memory::{CapturedPages, Memory, source},
    node::{Inner, blocking},
    sandbox::contained,
};

/// What becomes of the VM after the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It runs on. Also after a freeze that failed.
    Resume,
    /// It stays stopped, and its owner kills it. After a freeze that failed it runs on.
    Stop,
}

/// How long a turn lasts at most: one VM that cannot be stopped must not hold up all.
const LONGEST_TURN: Duration = Duration::from_secs(1);

/// Freezes take turns. Copying memory is work for two processors: of more freezes at once than there
/// are processors for, none is done sooner, and every guest stands still for as long as all of them
/// together.
#[derive(Debug)]
pub(crate) struct Turns(Arc<Semaphore>);

/// Over when it is dropped, or after [`LONGEST_TURN`].
struct Turn {
    _lasts: AbortOnDropHandle<()>,
}

impl Turns {
    pub(crate) fn for_host() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Semaphore::new((cpus / 2).max(1))))
    }

    /// Waits for a turn, in the order in which they were asked for.
    async fn take(&self) -> Turn {
        let permit = self.0.clone().acquire_owned().await;
        let lasts = tokio::spawn(async move {
            tokio::time::sleep(LONGEST_TURN).await;
            drop(permit);
        });
        Turn {
            _lasts: AbortOnDropHandle::new(lasts),
        }
    }
}

/// How long each part of a snapshot took. Device state, disks and memory are copied at the same
/// time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FreezeTimings {
    /// Waiting for other freezes, writing back what is dirty of the disks and making room for the
    /// memory, while the VM runs.
    pub prepare: Duration,
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
            ("prepare", self.prepare),
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

/// Captures `vm` with its `disks` into `draft`, and with its memory and devices if `memory` is
/// given. If it fails the VM runs on and the draft is gone.
pub(crate) async fn freeze(
    node: &Inner,
    id: &SandboxId,
    vm: &Arc<dyn Vm>,
    disks: &[Disk],
    draft: Draft,
    memory: Option<&Memory>,
    after: After,
) -> Result<Frozen> {
    let mut timings = FreezeTimings::default();
    let begun = Instant::now();
    let writable: Vec<PathBuf> = disks
        .iter()
        .filter(|disk| !disk.read_only)
        .map(|disk| disk.path.clone())
        .collect();
    let capture = match memory {
        Some(memory) => Some((memory.clone(), source(id, &vm.memory()?)?)),
        None => None,
    };
    // The disk may be slow with that, and nobody else's turn need wait for it.
    let writable = blocking(move || write_back(&writable).map(|()| writable)).await?;
    let turn = node.turns.take().await;
    let store = node.store.clone();
    let draft = Arc::new(draft);
    let noted = draft.clone();
    let capture = blocking(move || {
        // What was written while it waited.
        write_back(&writable)?;
        let Some((memory, source)) = capture else {
            return Ok(None);
        };
        // A VM that was booted has used much that no restore of it will.
        if memory.was_restored() {
            noted.note_working_set(&in_use(&source)?)?;
        }
        let buffer = store.resident_buffer(memory.room(&source)?)?;
        Ok(Some(Capture {
            memory,
            source,
            buffer,
        }))
    })
    .await?;
    timings.prepare = begun.elapsed();

    let begun = Instant::now();
    let captured = contained(id, async {
        node.failpoints.pass("freeze/pause").await?;
        vm.pause().await?;
        timings.pause = begun.elapsed();
        hold(node, id, vm, disks, &draft, capture, &mut timings).await
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
    drop(turn);
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

/// Memory that is about to be captured, and where to.
struct Capture {
    memory: Memory,
    source: Source,
    buffer: Buffer,
}

/// What happens while the VM stands still: three copies at once.
async fn hold(
    node: &Inner,
    id: &SandboxId,
    vm: &Arc<dyn Vm>,
    disks: &[Disk],
    draft: &Arc<Draft>,
    capture: Option<Capture>,
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
    let with_memory = capture.is_some();
    let (device, disks, memory) = tokio::join!(
        timed(id, async {
            node.failpoints.pass("freeze/device").await?;
            if with_memory {
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
            let Some(capture) = capture else {
                return Ok(None);
            };
            blocking(move || {
                let Capture {
                    memory,
                    source,
                    buffer,
                } = capture;
                memory.capture(&source, buffer).map(Some)
            })
            .await
        }),
    );
    (timings.device, timings.disks, timings.memory) = (device.1, disks.1, memory.1);
    device.0?;
    disks.0?;
    memory.0
}

/// A snapshot that was just made.
pub(crate) struct Published {
    pub(crate) snapshot: Snapshot,
    pub(crate) timings: FreezeTimings,
    /// What was captured of the memory, if that is in it.
    pub(crate) pages: Option<CapturedPages>,
}

/// Writes what was captured of `memory` and makes it a snapshot. Fills in what the manifest says of
/// disks and memory.
pub(crate) async fn publish(
    node: &Inner,
    frozen: Frozen,
    memory: Option<&Memory>,
    mut manifest: Manifest,
) -> Result<Published> {
    let begun = Instant::now();
    let Frozen {
        draft,
        memory: captured,
        disks,
        mut timings,
    } = frozen;
    let below = memory.map(Memory::base).zip(captured);
    node.failpoints.pass("publish/memory").await?;
    let (draft, written) = blocking(move || {
        let Some((below, dirty)) = below else {
            return Ok((draft, None));
        };
        let written = draft.write_memory(below.as_base(), &dirty)?;
        // A VM's process opens it anew from a descriptor, as a user that owns nothing; nobody can
        // reach it by its path. Nobody writes it any more.
        let (image, mode) = (draft.memory_image(), Permissions::from_mode(0o444));
        std::fs::set_permissions(&image, mode).map_err(Error::io("protect", image))?;
        Ok((draft, Some((dirty, written))))
    })
    .await?;
    let pages = written.map(|(dirty, written)| {
        manifest.memory = written.report;
        let sums = written.sums;
        CapturedPages { dirty, sums }
    });
    manifest.disks = disks;
    node.failpoints.pass("publish/rename").await?;
    let snapshot = draft.publish(manifest).await?;
    timings.publish = begun.elapsed();
    Ok(Published {
        snapshot,
        timings,
        pages,
    })
}

/// Starts and awaits the write-back of the files' dirty pages, and no more: not their metadata, and no
/// flush of the disk. Cloning a file does the same first, but then the VM stands still.
fn write_back(paths: &[PathBuf]) -> Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    for path in paths {
        let failed = || Error::io("write back", path);
        let file = std::fs::File::open(path).map_err(failed())?;
        // SAFETY: the call reads its arguments only, and the descriptor is open.
        if unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) } != 0 {
            return Err(failed()(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn freezes_take_turns_and_no_turn_lasts_for_ever() {
        let turns = Turns(Arc::new(Semaphore::new(1)));
        let begun = tokio::time::Instant::now();
        let first = turns.take().await;
        let (_second, ()) = tokio::join!(turns.take(), async {
            tokio::time::sleep(LONGEST_TURN / 2).await;
            drop(first);
        });
        assert_eq!(begun.elapsed(), LONGEST_TURN / 2);
        // The second is never given back.
        let _third = turns.take().await;
        assert_eq!(begun.elapsed(), LONGEST_TURN / 2 + LONGEST_TURN);
    }

    #[test]
    fn writing_back_needs_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert!(
            write_back(std::slice::from_ref(&path))
                .unwrap_err()
                .to_string()
                .contains("write back")
        );
        std::fs::write(&path, vec![1; 100_000]).unwrap();
        write_back(&[path]).unwrap();
    }
}
