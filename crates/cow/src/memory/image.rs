//! The half of a memory snapshot that happens while the VM runs on.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::{Base, Dirty, MemoryReport, capture::micros};
use crate::{
    error::{Context as _, Error, Result},
    reflink::{DataExtents, Support, clone_into, copy_into, create_new},
};

/// Captured pages are compared and written in pieces of this many bytes.
const WINDOW: usize = 1 << 20;
/// What pages are compared with.
static ZEROS: [u8; 4096] = [0; 4096];

/// Writes the captured pages as a new, whole image `to`: over holes, or over a duplicate of
/// `base`, of which only what differs is written. Blocking.
///
/// `base` must be the image that the VM was started from or one captured from it since; if
/// [`Dirty::needs_last_image`], it must be the image of the capture before. It may have been
/// deleted, if it is given as an open file.
///
/// # Errors
/// If `to` exists, the base has another size than guest memory or is missing where there must be
/// one, or writing fails ([`Error::DiskFull`] for lack of space); `to` is then not there.
pub fn write_image<'a>(
    support: &Support,
    base: impl Into<Base<'a>>,
    dirty: &Dirty,
    to: &Path,
) -> Result<MemoryReport> {
    let started = Instant::now();
    let base = base.into().open()?;
    let target = create_new(to)?;
    fill(support, base.as_ref(), dirty, &target, to)
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
    base: Option<&(File, PathBuf)>,
    dirty: &Dirty,
    target: &File,
    to: &Path,
) -> Result<MemoryReport> {
    match base {
        None if dirty.needs_last_image() => {
            return Err(Error::Shape {
                path: to.to_path_buf(),
                reason: "it would hold what was written since the last capture, and nothing else"
                    .to_owned(),
            });
        }
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
                    path: path.clone(),
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
            arm_us: dirty.arm_us,
            ..MemoryReport::default()
        },
    };
    let mut old = base.map(|(file, path)| Old::new(file, path));
    for (run, content) in dirty.contents() {
        for (index, piece) in content.chunks(WINDOW).enumerate() {
            let offset = run.offset + (index * WINDOW) as u64;
            let old = old.as_mut().map(|old| old.read(offset, piece.len()));
            writer.write(offset, piece, old.transpose()?)?;
        }
    }
    Ok(writer.report)
}

/// The base image, read forwards.
struct Old<'a> {
    file: &'a File,
    path: &'a Path,
    /// The data of the image that is not before what was read last: `None` at its end.
    data: Option<(u64, u64)>,
    extents: DataExtents<'a>,
    window: Vec<u8>,
}

impl<'a> Old<'a> {
    fn new(file: &'a File, path: &'a Path) -> Self {
        Self {
            file,
            path,
            data: Some((0, 0)),
            // Without a limit: what is beyond the end is found not to be there.
            extents: DataExtents::new(file, u64::MAX),
            window: vec![0; WINDOW],
        }
    }

    /// What the base holds at `offset`; offsets never decrease. Its holes are not read: that would
    /// fill the page cache with zeros.
    fn read(&mut self, offset: u64, len: usize) -> Result<&[u8]> {
        let end = offset + len as u64;
        let mut at = offset;
        let attempt = "read the base image";
        while at < end {
            // The extents are looked up from where they are needed, not one after another.
            while let Some((_, data_end)) = self.data.filter(|(_, data_end)| *data_end <= at) {
                self.extents.skip_to(at.max(data_end));
                self.data = self.extents.next().transpose().at(attempt, self.path)?;
            }
            let (data, data_end) = self.data.unwrap_or((end, end));
            let (hole_end, stop) = (data.clamp(at, end), data_end.clamp(at, end));
            let index = |position: u64| (position - offset) as usize;
            self.window[index(at)..index(hole_end)].fill(0);
            let piece = &mut self.window[index(hole_end)..index(stop.max(hole_end))];
            self.file
                .read_exact_at(piece, hole_end)
                .at(attempt, self.path)?;
            at = stop.max(hole_end);
        }
        Ok(&self.window[..len])
    }
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
    // Comparing slices is the C library's `memcmp`, which is as fast as memory in every build.
    bytes
        .chunks(ZEROS.len())
        .all(|piece| piece == &ZEROS[..piece.len()])
}
