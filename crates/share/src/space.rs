//! A guest may fill a disk only so far.

use std::{
    os::fd::AsFd,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    fs::{StatVfs, fstatvfs},
    io::Errno,
};

/// What is left to the host, as a part of the disk, and at most.
const RESERVED_PART: u64 = 20;
const RESERVED_AT_MOST: u64 = 1 << 30;

/// How much may be written, and for how long, before the disk is looked at again.
const UNCHECKED: u64 = 32 << 20;
const UNCHECKED_TIME: Duration = Duration::from_millis(200);

/// Watches over the space that is left.
#[derive(Debug, Default)]
pub(crate) struct Space {
    checked: Mutex<Option<Checked>>,
}

#[derive(Debug)]
struct Checked {
    at: Instant,
    /// How much may still be written without another look.
    allowance: u64,
}

impl Space {
    /// Asks for `bytes` of the file system that `fd` is on.
    pub(crate) fn take(&self, fd: impl AsFd, bytes: u64) -> rustix::io::Result<()> {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(checked) = &mut *checked
            && checked.at.elapsed() < UNCHECKED_TIME
            && let Some(left) = checked.allowance.checked_sub(bytes)
        {
            checked.allowance = left;
            return Ok(());
        }
        let spare = spare(&fstatvfs(fd)?);
        let allowance = spare.checked_sub(bytes).ok_or(Errno::NOSPC)?;
        *checked = Some(Checked {
            at: Instant::now(),
            allowance: allowance.min(UNCHECKED),
        });
        Ok(())
    }
}

/// How many bytes of a file system guests may fill.
pub(crate) fn spare(usage: &StatVfs) -> u64 {
    let size = usage.f_blocks.saturating_mul(usage.f_frsize);
    let available = usage.f_bavail.saturating_mul(usage.f_frsize);
    available.saturating_sub((size / RESERVED_PART).min(RESERVED_AT_MOST))
}
