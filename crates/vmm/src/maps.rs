//! What /proc tells about a process's memory.

use std::{fs, io};

use crate::spec::{GuestMemory, MemoryFile, MemoryRange};

/// Finds where guest memory is mapped. The error is what is missing, for a person to read.
pub(crate) fn guest_memory(pid: i32, file: &MemoryFile) -> Result<GuestMemory, String> {
    let path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let ranges = ranges(&maps, file.inode);
    let memory = GuestMemory { pid, ranges };
    let mut offset = 0;
    for range in &memory.ranges {
        if range.offset != offset {
            return Err(format!("its mapping has a gap at offset {offset}"));
        }
        offset += range.len;
    }
    if offset != file.len {
        let (inode, len) = (file.inode, file.len);
        return Err(format!(
            "{offset} of {len} bytes of inode {inode} are mapped"
        ));
    }
    Ok(memory)
}

/// Private writable mappings of an inode, as one range each unless the kernel split one at a
/// boundary between different treatments. Lines are
/// `start-end rw-p offset major:minor inode path`, numbers but the inode in hexadecimal.
///
/// The device is not compared: Btrfs shows another one here than `stat` does. Nothing else that
/// QEMU maps has the inode number of its memory image and such a length.
fn ranges(maps: &str, inode: u64) -> Vec<MemoryRange> {
    let parse = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        if fields.next()? != "rw-p" {
            return None;
        }
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        if fields.nth(1)?.parse::<u64>().ok()? != inode {
            return None;
        }
        let host_address = u64::from_str_radix(start, 16).ok()?;
        let len = u64::from_str_radix(end, 16)
            .ok()?
            .checked_sub(host_address)?;
        Some(MemoryRange {
            host_address,
            offset,
            len,
        })
    };
    let mut ranges: Vec<MemoryRange> = maps.lines().filter_map(parse).collect();
    ranges.sort_unstable_by_key(|range| range.offset);
    ranges
}

/// Resident and private memory of a process, in bytes.
pub(crate) fn footprint(pid: i32) -> io::Result<(u64, u64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let field = |name: &str| -> u64 {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
        kib.unwrap_or(0_u64) << 10
    };
    Ok((
        field("Rss:"),
        // Not `Private_Clean`: pages of files that nobody else has mapped right now, such as those
        // of a memory image with one VM, stay in the page cache when the process is gone.
        field("Private_Dirty:"),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0a00000-55d0c0b00000 r--p 00000000 fe:00 42                         /usr/bin/qemu
7fe233fff000-7fe243fff000 rw-p 10000000 fe:00 42                         /data/memory.img (deleted)
7fe1f3fff000-7fe203fff000 rw-p 00000000 fe:00 42                         /data/memory.img
7fe253fff000-7fe263fff000 rw-p 00000000 00:00 0
7fe263fff000-7fe273fff000 rw-s 00000000 00:06 42                         /dev/shm/other";

    #[test]
    fn guest_memory_is_told_apart_and_put_in_order() {
        let found = ranges(MAPS, 42);
        let offsets: Vec<u64> = found.iter().map(|range| range.offset).collect();
        assert_eq!(offsets, [0, 0x1000_0000]);
        assert_eq!(found[0].host_address, 0x7fe1_f3ff_f000);
        assert_eq!(found.iter().map(|range| range.len).sum::<u64>(), 512 << 20);
    }

    #[test]
    fn own_footprint_is_plausible() {
        let (resident, private) = footprint(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(resident >= private && private > 0, "{resident} {private}");
    }

    #[test]
    fn what_is_not_mapped_is_reported() {
        let own = i32::try_from(std::process::id()).unwrap();
        let error = guest_memory(
            own,
            &MemoryFile {
                inode: u64::MAX,
                len: 4096,
            },
        )
        .unwrap_err();
        assert!(error.contains("0 of 4096"), "{error}");
    }
}
