//! The half of a memory snapshot that happens while the VM runs on.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::{Base, Dirty, MemoryReport, PageSums, capture::micros};
use crate::{
    error::{Context as _, Error, Result},
    reflink::{DataExtents, Support, allocate_sparingly, clone_into, copy_into, create_new},
};

/// Captured pages are compared and written in pieces of this many bytes.
const WINDOW: usize = 1 << 20;
/// Most bytes between two changed parts that are written along with them, rather than one write, and
/// one more extent of the image, for each.
const GAP: usize = 16 << 10;
/// What pages are compared with.
static ZEROS: [u8; 4096] = [0; 4096];

/// What was written.
#[derive(Debug, Clone, Default)]
pub struct Written {
    /// What it took.
    pub report: MemoryReport,
    /// Hashes of pages that the new image was given, as far as they were needed. For the next
    /// capture, [`PageSums::complete`] makes the others.
    pub sums: PageSums,
}

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
) -> Result<Written> {
    let started = Instant::now();
    let base = base.into();
    let nothing = PageSums::default();
    let known = base.sums().unwrap_or(&nothing);
    let base = base.open()?;
    let target = create_new(to)?;
    fill(support, base.as_ref(), known, dirty, &target, to)
        .map(|mut written| {
            written.report.write_us = micros(started);
            written
        })
        .inspect_err(|_| {
            let _ = std::fs::remove_file(to);
        })
}

fn fill(
    support: &Support,
    base: Option<&(File, PathBuf)>,
    known: &PageSums,
    dirty: &Dirty,
    target: &File,
    to: &Path,
) -> Result<Written> {
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
                Support::Reflink => {
                    allocate_sparingly(target);
                    clone_into(file, target, path)?;
                }
                Support::Copy { .. } => drop(copy_into(file, target, path, to)?),
            }
        }
    }
    let mut writer = Writer {
        target,
        to,
        old: base.map(|(file, path)| Old::new(file, path)),
        // What was not captured now is what it was, if only what changed was captured.
        sums: if dirty.needs_last_image() {
            known.clone()
        } else {
            PageSums::default()
        },
        known,
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
    for (run, content) in dirty.contents() {
        for (index, piece) in content.chunks(WINDOW).enumerate() {
            writer.write(run.offset + (index * WINDOW) as u64, piece)?;
        }
    }
    Ok(Written {
        report: writer.report,
        sums: writer.sums,
    })
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
    /// It is zero, as it was.
    StayHole,
    /// It has become zero where the base held data.
    Punch,
    /// It has to be written.
    Write,
}

struct Writer<'a> {
    target: &'a File,
    to: &'a Path,
    old: Option<Old<'a>>,
    known: &'a PageSums,
    sums: PageSums,
    page: usize,
    report: MemoryReport,
}

impl Writer<'_> {
    /// Writes what differs of a piece of guest memory.
    fn write(&mut self, offset: u64, piece: &[u8]) -> Result<()> {
        let mut at = 0;
        while at < piece.len() {
            // As far as the image need not be read, or has to be.
            let is_known = self.known.knows(offset + at as u64);
            let end = (at..piece.len())
                .step_by(self.page)
                .find(|next| self.known.knows(offset + *next as u64) != is_known)
                .unwrap_or(piece.len());
            let (start, part) = (offset + at as u64, &piece[at..end]);
            match self.old.take() {
                Some(mut old) if !is_known => {
                    let before = old.read(start, part.len())?;
                    self.write_part(start, part, Some(before))?;
                    self.old = Some(old);
                }
                old => {
                    self.write_part(start, part, None)?;
                    self.old = old;
                }
            }
            at = end;
        }
        Ok(())
    }

    fn write_part(&mut self, offset: u64, part: &[u8], old: Option<&[u8]>) -> Result<()> {
        // What has to happen to which bytes, and did not yet.
        let mut pending: Option<(Fate, Range<usize>)> = None;
        for at in (0..part.len()).step_by(self.page) {
            let page = at..(at + self.page).min(part.len());
            let old = old.map(|old| &old[page.clone()]);
            let fate = self.judge(offset + at as u64, &part[page.clone()], old);
            match &mut pending {
                Some((last, range)) if *last == fate && range.end == page.start => {
                    range.end = page.end;
                }
                // What lies between two writes is written too, if that is less work.
                Some((Fate::Write, range))
                    if fate == Fate::Write && page.start - range.end <= GAP =>
                {
                    self.report.bytes_unchanged -= (page.start - range.end) as u64;
                    range.end = page.end;
                }
                _ if fate == Fate::Keep => {}
                _ => {
                    if let Some((fate, range)) = pending.replace((fate, page)) {
                        self.apply(fate, offset + range.start as u64, &part[range])?;
                    }
                }
            }
        }
        match pending {
            Some((fate, range)) => self.apply(fate, offset + range.start as u64, &part[range]),
            None => Ok(()),
        }
    }

    fn judge(&mut self, offset: u64, new: &[u8], old: Option<&[u8]>) -> Fate {
        let zero = is_zero(new);
        if zero {
            self.report.bytes_zero += new.len() as u64;
        }
        let is_known = self.known.knows(offset);
        let is_same = match old {
            Some(old) => old == new,
            None => is_known && self.sums.note(self.known, offset, new),
        };
        if is_same {
            self.report.bytes_unchanged += new.len() as u64;
        }
        match (is_same, zero) {
            (true, false) => Fate::Keep,
            (true, true) => Fate::StayHole,
            (false, true) if is_known || old.is_some() => Fate::Punch,
            // There is no base, and it is a hole already.
            (false, true) => Fate::StayHole,
            (false, false) => Fate::Write,
        }
    }

    fn apply(&mut self, fate: Fate, offset: u64, content: &[u8]) -> Result<()> {
        if matches!(fate, Fate::Keep | Fate::StayHole) {
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
