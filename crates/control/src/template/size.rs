//! How big sandboxes are.

use std::ops::RangeInclusive;

use crate::error::{Error, Result};

const CPUS: RangeInclusive<u32> = 1..=64;
const MEMORY_MIB: RangeInclusive<u32> = 128..=1 << 20;
const DISK_MIB: RangeInclusive<u32> = 512..=1 << 24;

/// Size of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// CPUs.
    pub cpu_count: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Root disk.
    pub disk_mib: u32,
}

impl Size {
    /// Whether there are sandboxes of this size.
    pub(crate) fn check(self) -> Result<()> {
        let check = |field, value, range: RangeInclusive<u32>, unit: &str| {
            if range.contains(&value) {
                return Ok(());
            }
            let (min, max) = range.into_inner();
            Err(Error::invalid(
                field,
                format!("{value} is not between {min} and {max}{unit}"),
            ))
        };
        check("cpuCount", self.cpu_count, CPUS, "")?;
        check("memoryMB", self.memory_mib, MEMORY_MIB, " MiB")?;
        check("diskSizeMB", self.disk_mib, DISK_MIB, " MiB")
    }
}

impl Default for Size {
    /// One CPU and 512 MiB: what a sandbox needs for Python, and little enough to have many. The
    /// disk takes no room until it is written to.
    fn default() -> Self {
        Self {
            cpu_count: 1,
            memory_mib: 512,
            disk_mib: 8 * 1024,
        }
    }
}
