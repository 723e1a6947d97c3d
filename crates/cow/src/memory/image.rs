//! The half of a memory snapshot that happens while the VM runs on.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Instant};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::{Dirty, MemoryReport, capture::micros};
use crate::{
    error::{Context as _, Error, Result},
    reflink::{Support, clone_into, copy_into, create_new},
};

/// The base image is read in pieces of this many bytes.
const WINDOW: usize = 1 << 20;

/// Writes the captured pages as a new, whole image `to`: over holes, or over a duplicate of
/// `base`, of which only what differs is written. Blocking.
///
/// `base` must be the image that the VM was started from or one captured from it since. It may be
/// given as `/proc/self/fd/N`, which works after it has been deleted.
///
/// # Errors
/// If `to` exists, the base has another size than guest memory, or writing fails
/// ([`Error::DiskFull`] for lack of space); `to` is then not there.
pub fn write_image(
    support: &Support,
    base: Option<&Path>,
    dirty: &Dirty,
    to: &Path,
) -> Result<MemoryReport> {
    let started = Instant::now();
    let target = create_new(to)?;
    fill(support, base, dirty, &target, to)
        .map(|report| MemoryReport {
            write_us: micros(started),
            ..report
        })
        .inspect_err(|_| {
            let _ = std::fs::remove_file(to);
        })
}

fn fill(
    support: &Support,
    base: Option<&Path>,
    dirty: &Dirty,
    target: &File,
    to: &Path,
) -> Result<MemoryReport> {
    let base = base.map(|path| {
        File::open(path)
            .at("open the base image", path)
            .map(|f| (f, path))
    });
    let base = base.transpose()?;
    match &base {
        None => target
            .set_len(dirty.len)
            .at("set the size of the memory image", to)?,
        Some((file, path)) => {
            let size = file
                .metadata()
                .at("read the size of the base image", path)?
                .len();
            if size != dirty.len {
                return Err(Error::Shape {
                    path: path.to_path_buf(),
                    reason: format!("it has {size} bytes, the VM's memory has {}", dirty.len),
                });
            }
            match support {
                Support::Reflink => clone_into(file, target, path)?,
                Support::Copy { .. } => drop(copy_into(file, target, path, to)?),
            }
        }
    }
    let mut writer = Writer {
        target,
        to,
        page: rustix::param::page_size(),
        report: MemoryReport {
            tier: dirty.tier,
            bytes_scanned: dirty.len,
            bytes_dirty: dirty.bytes(),
            scan_us: dirty.scan_us,
            copy_us: dirty.copy_us,
            ..MemoryReport::default()
        },
    };
    let mut window = vec![0; if base.is_some() { WINDOW } else { 0 }];
    for (run, content) in dirty.contents() {
        for (index, piece) in content.chunks(WINDOW).enumerate() {
            let offset = run.offset + (index * WINDOW) as u64;
            let old = match &base {
                None => None,
                Some((file, path)) => {
                    let old = &mut window[..piece.len()];
                    file.read_exact_at(old, offset)
                        .at("read the base image", path)?;
                    Some(&*old)
                }
            };
            writer.write(offset, piece, old)?;
        }
    }
    Ok(writer.report)
}

/// What has to happen to a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The target holds this already.
    Keep,
    /// It has become zero where the base held data.
    Punch,
    /// It has to be written.
    Write,
}

struct Writer<'a> {
    target: &'a File,
    to: &'a Path,
    page: usize,
    report: MemoryReport,
}

impl Writer<'_> {
    fn write(&mut self, offset: u64, piece: &[u8], old: Option<&[u8]>) -> Result<()> {
        let mut start = 0;
        let mut fate = Fate::Keep;
        for at in (0..piece.len()).step_by(self.page) {
            let end = (at + self.page).min(piece.len());
            let next = self.judge(&piece[at..end], old.map(|old| &old[at..end]));
            if next != fate {
                self.apply(fate, offset + start as u64, &piece[start..at])?;
                (start, fate) = (at, next);
            }
        }
        self.apply(fate, offset + start as u64, &piece[start..])
    }

    fn judge(&mut self, new: &[u8], old: Option<&[u8]>) -> Fate {
        let zero = is_zero(new);
        if zero {
            self.report.bytes_zero += new.len() as u64;
        }
        match old {
            Some(old) if old == new => {
                self.report.bytes_unchanged += new.len() as u64;
                Fate::Keep
            }
            Some(_) if zero => Fate::Punch,
            None if zero => Fate::Keep,
            _ => Fate::Write,
        }
    }

    fn apply(&mut self, fate: Fate, offset: u64, content: &[u8]) -> Result<()> {
        if content.is_empty() || fate == Fate::Keep {
            return Ok(());
        }
        if fate == Fate::Punch {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(self.target, hole, offset, content.len() as u64) {
                // A file system without holes gets the zeros written.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                outcome => return outcome.at("punch a hole into the memory image", self.to),
            }
        }
        self.target
            .write_all_at(content, offset)
            .at("write the memory image", self.to)?;
        self.report.bytes_written += content.len() as u64;
        Ok(())
    }
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // In blocks without an early exit inside, so that the compiler uses vector instructions.
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}
