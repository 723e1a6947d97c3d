//! Guest memory, captured from outside a paused VM.
//!
//! A VM's RAM is a private mapping of a memory image, so the pages that it has written since it
//! was started are exactly the private anonymous pages of that mapping. [`capture`] finds and
//! copies them while the VM is paused; [`write_image`] turns them into an image after the VM runs
//! on. Both halves are separate so that the freeze holds nothing but the first.
//!
//! Invariants:
//! - An image is whole: it depends on no other file, whatever it was made from.
//! - An image has the size of guest memory; pages of zeros are holes where that is possible.
//! - The anonymous pages are cumulative since the VM was started. They may be laid over the image
//!   that the VM was started from, or over any image captured from the same VM since, and give the
//!   same memory. (Nothing may therefore discard pages of a VM, as a balloon would.)
//! - Captured pages are compared with hashes of the last image ([`PageSums`]), or with the image itself
//!   where there are none. The hashes never outlive this process.
//! - What the kernel's soft-dirty bits add is only *when*: the pages written since the last capture,
//!   which may be laid over the image of that capture and no other. A [`Tracker`] knows whether
//!   there is such an image.
//! - A freeze allocates nothing: how much there is to copy is estimated before
//!   ([`Tracker::estimate`]), and the buffer for it is resident by then.

mod base;
mod buffer;
mod capture;
mod image;
mod scan;
mod soft_dirty;
mod sums;
mod tier;
mod tracker;

pub use base::{Base, started_from};
pub use buffer::Buffer;
pub(crate) use buffer::Pool;
pub use capture::{Dirty, capture, capture_all, in_use};
pub use image::{Written, is_zero, write_image};
use serde::{Deserialize, Serialize};
pub use soft_dirty::{Kernel, SoftDirtyBits, SoftDirtySupport, probe_soft_dirty};
pub use sums::PageSums;
pub use tier::{Tier, TierChoice, UnknownTier};
pub use tracker::{Estimate, Tracker};

/// Where the memory of a VM is: a range of addresses in the process that runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The process.
    pub pid: u32,
    /// Address of the first byte in that process; a multiple of the page size.
    pub address: u64,
    /// Length of guest memory, in bytes; a multiple of the page size.
    pub len: u64,
}

/// A run of consecutive pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Run {
    /// Offset of the first byte from the start of guest memory.
    pub offset: u64,
    /// Length in bytes; never 0.
    pub len: u64,
}

/// What a memory image took to make.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryReport {
    /// How the pages were found.
    pub tier: Tier,
    /// Size of guest memory, in bytes.
    pub bytes_scanned: u64,
    /// Bytes copied while the VM was paused.
    pub bytes_dirty: u64,
    /// Bytes written to the image; the rest is shared with the base or a hole.
    pub bytes_written: u64,
    /// Bytes of the copied pages that were zero.
    pub bytes_zero: u64,
    /// Bytes of the copied pages that the base held already.
    pub bytes_unchanged: u64,
    /// Time to find the pages, in microseconds; part of the freeze.
    pub scan_us: u64,
    /// Time to copy the pages, in microseconds; part of the freeze.
    pub copy_us: u64,
    /// Time to clear the soft-dirty bits for the next capture, in microseconds; part of the freeze.
    pub arm_us: u64,
    /// Time to write the image, in microseconds; outside the freeze.
    pub write_us: u64,
}
