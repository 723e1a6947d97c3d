//! The half of a memory snapshot that happens while the VM is paused.

use std::{io, time::Instant};

use super::{Buffer, Run, Source, Tier, scan};
use crate::error::{Error, Result};

/// Most ranges that one `process_vm_readv` takes (IOV_MAX).
const RANGES: usize = 1024;
/// Most bytes that one call copies; the kernel's own limit is just below 2 GiB.
const CALL: usize = 1 << 30;
/// Below this many bytes a second thread costs more than it brings: a tenth of a millisecond to
/// start it, and it saves half of 0.25 to 0.8 ms for each MB.
const SHARE: usize = 2 << 20;
/// Most threads that copy; more only compete for memory bandwidth.
const THREADS: usize = 4;

/// Pages of guest memory, as they were when the VM was paused.
#[derive(Debug)]
pub struct Dirty {
    pub(super) runs: Vec<Run>,
    pub(super) buffer: Buffer,
    pub(super) len: u64,
    pub(super) tier: Tier,
    pub(super) scan_us: u64,
    pub(super) copy_us: u64,
    pub(super) arm_us: u64,
}

impl Dirty {
    /// How the pages were found.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Whether these pages make an image over the image of the capture before them only. Others
    /// may as well be laid over the image that the VM was started from.
    #[must_use]
    pub fn needs_last_image(&self) -> bool {
        self.tier == Tier::SoftDirty
    }

    /// The captured runs, ascending, never touching each other.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Number of bytes captured.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Every run with its content.
    pub fn contents(&self) -> impl Iterator<Item = (Run, &[u8])> {
        let all = self.buffer.bytes(self.buffer.capacity());
        let mut at = 0;
        self.runs.iter().map(move |run| {
            let content = &all[at..at + run.len as usize];
            at += content.len();
            (*run, content)
        })
    }

    /// Gives the buffer back, for the next capture.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }
}

/// Copies the pages that a VM has written since it was started. Blocking: a millisecond or two,
/// plus 0.2 to 0.4 ms for each MB written if the buffer is resident. To follow a VM over several
/// captures, use a [`super::Tracker`].
///
/// The VM must be paused from before this call until it returns; otherwise the result is torn.
///
/// # Errors
/// [`Error::Memory`] if the process is gone, may not be read, or the range is not mapped.
pub fn capture(source: &Source, buffer: Buffer) -> Result<Dirty> {
    let started = Instant::now();
    check(source)?;
    let runs = anonymous_runs(source)?;
    copy(source, runs, buffer, Tier::AnonymousPages, micros(started))
}

/// Copies all of guest memory: what is left when the image that the VM was started from is gone.
/// Blocking.
///
/// # Errors
/// As [`capture`].
pub fn capture_all(source: &Source, buffer: Buffer) -> Result<Dirty> {
    check(source)?;
    copy(source, whole(source), buffer, Tier::Full, 0)
}

/// The private anonymous pages of the range.
pub(super) fn anonymous_runs(source: &Source) -> Result<Vec<Run>> {
    scan::dirty_runs(source).map_err(|error| Error::Memory {
        attempt: "find the written pages",
        pid: source.pid,
        source: error,
    })
}

/// The pages that a VM has read or written since it was started, a little more than it needs: what a
/// VM that is restored from its next snapshot will ask for first. The VM may run; what it uses
/// meanwhile may be missing. Blocking for a millisecond or two.
///
/// # Errors
/// [`Error::Memory`] if the process is gone or may not be looked at.
pub fn in_use(source: &Source) -> Result<Vec<Run>> {
    check(source)?;
    scan::used_runs(source).map_err(|error| Error::Memory {
        attempt: "find the pages in use",
        pid: source.pid,
        source: error,
    })
}

/// All of the range.
pub(super) fn whole(source: &Source) -> Vec<Run> {
    let all = Run {
        offset: 0,
        len: source.len,
    };
    Vec::from_iter((all.len > 0).then_some(all))
}

pub(super) fn check(source: &Source) -> Result<()> {
    let page = rustix::param::page_size() as u64;
    let fits = source.address.is_multiple_of(page)
        && source.len.is_multiple_of(page)
        && source.address.checked_add(source.len).is_some();
    if fits {
        return Ok(());
    }
    Err(Error::Memory {
        attempt: "read an unaligned range",
        pid: source.pid,
        source: io::ErrorKind::InvalidInput.into(),
    })
}

pub(super) fn copy(
    source: &Source,
    runs: Vec<Run>,
    mut buffer: Buffer,
    tier: Tier,
    scan_us: u64,
) -> Result<Dirty> {
    let started = Instant::now();
    let failed = |error| Error::Memory {
        attempt: "copy the memory",
        pid: source.pid,
        source: error,
    };
    let total = usize::try_from(runs.iter().map(|run| run.len).sum::<u64>())
        .map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    let target = buffer.prepare(total).map_err(failed)?;
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS);
    let share = (total.div_ceil(threads)).max(SHARE);
    if total <= share {
        read(source, &runs, target).map_err(failed)?;
    } else {
        std::thread::scope(|scope| {
            let workers: Vec<_> = split(&runs, share)
                .into_iter()
                .scan(target, |rest, runs| {
                    let len: u64 = runs.iter().map(|run| run.len).sum();
                    let (mine, others) = std::mem::take(rest).split_at_mut(len as usize);
                    *rest = others;
                    Some((runs, mine))
                })
                .map(|(runs, mine)| scope.spawn(move || read(source, &runs, mine)))
                .collect();
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a copying thread panicked")))
            })
        })
        .map_err(failed)?;
    }
    buffer.filled(total);
    Ok(Dirty {
        runs,
        buffer,
        len: source.len,
        tier,
        scan_us,
        copy_us: micros(started),
        arm_us: 0,
    })
}

/// Cuts the runs into groups of `share` bytes; only the last may be smaller.
fn split(runs: &[Run], share: usize) -> Vec<Vec<Run>> {
    let mut groups = vec![Vec::new()];
    let mut room = share as u64;
    for run in runs {
        let mut rest = *run;
        while rest.len > 0 {
            if room == 0 {
                groups.push(Vec::new());
                room = share as u64;
            }
            let len = rest.len.min(room);
            if let Some(group) = groups.last_mut() {
                group.push(Run {
                    offset: rest.offset,
                    len,
                });
            }
            rest = Run {
                offset: rest.offset + len,
                len: rest.len - len,
            };
            room -= len;
        }
    }
    groups
}

/// Reads the runs one after another into `target`, which they fill exactly.
fn read(source: &Source, runs: &[Run], mut target: &mut [u8]) -> io::Result<()> {
    let pid = libc::pid_t::try_from(source.pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut runs = runs.iter().copied();
    let mut rest: Option<Run> = None;
    while !target.is_empty() {
        let mut ranges: Vec<libc::iovec> = Vec::with_capacity(RANGES);
        let mut want = 0;
        while ranges.len() < RANGES && want < CALL {
            let Some(run) = rest.take().or_else(|| runs.next()) else {
                break;
            };
            let len = (run.len as usize).min(CALL - want);
            ranges.push(libc::iovec {
                iov_base: (source.address + run.offset) as *mut libc::c_void,
                iov_len: len,
            });
            want += len;
            if (len as u64) < run.len {
                rest = Some(Run {
                    offset: run.offset + len as u64,
                    len: run.len - len as u64,
                });
            }
        }
        let (now, later) = target.split_at_mut(want);
        let mut done = 0;
        let mut first = 0;
        while done < want {
            let local = libc::iovec {
                iov_base: now[done..].as_mut_ptr().cast(),
                iov_len: want - done,
            };
            // SAFETY: the local range is the not yet filled rest of `now`, writable and exclusively
            // borrowed; the remote ranges are only read, and the kernel checks them.
            let got = unsafe {
                libc::process_vm_readv(
                    pid,
                    &raw const local,
                    1,
                    ranges[first..].as_ptr(),
                    (ranges.len() - first) as libc::c_ulong,
                    0,
                )
            };
            let mut got = match usize::try_from(got) {
                Err(_) => return Err(io::Error::last_os_error()),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => got,
            };
            done += got;
            // A short read ends at any byte; the next call starts where it ended.
            while got > 0 {
                let range = &mut ranges[first];
                let step = got.min(range.iov_len);
                range.iov_base = range.iov_base.wrapping_byte_add(step);
                range.iov_len -= step;
                got -= step;
                if range.iov_len == 0 {
                    first += 1;
                }
            }
        }
        target = later;
    }
    Ok(())
}

pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let gone = Source {
            pid: u32::MAX / 2,
            address: 4096,
            len: 4096,
        };
        assert!(matches!(
            capture(&gone, Buffer::new()),
            Err(Error::Memory { .. })
        ));
        let unmapped = Source {
            pid: std::process::id(),
            address: 4096,
            len: 4096,
        };
        assert!(matches!(
            capture_all(&unmapped, Buffer::new()),
            Err(Error::Memory { .. })
        ));
        let odd = Source {
            pid: std::process::id(),
            address: 1,
            len: 4096,
        };
        assert!(matches!(
            capture(&odd, Buffer::new()),
            Err(Error::Memory { .. })
        ));
    }

    proptest! {
        #[test]
        fn splitting_keeps_every_byte_in_order(
            lens in proptest::collection::vec(1_u64..100, 0..50), share in 1_usize..200,
        ) {
            let mut at = 0;
            let runs: Vec<Run> = lens.iter().map(|len| {
                let run = Run { offset: at, len: *len };
                at += len + 7;
                run
            }).collect();
            let groups = split(&runs, share);
            let bytes = |runs: &[Run]| -> Vec<u64> {
                runs.iter().flat_map(|run| run.offset..run.offset + run.len).collect()
            };
            prop_assert_eq!(bytes(&groups.concat()), bytes(&runs));
            for group in groups.iter().rev().skip(1) {
                prop_assert_eq!(bytes(group).len(), share);
            }
        }
    }
}
