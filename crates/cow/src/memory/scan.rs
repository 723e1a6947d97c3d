//! Which pages of a private file mapping are no longer the file's.

use std::{fs::File, io, os::fd::AsRawFd as _, os::unix::fs::FileExt as _};

use super::{Run, Source};

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `PAGEMAP_SCAN`, `_IOWR('f', 16, struct pm_scan_arg)`; Linux 6.7 and later.
const PAGEMAP_SCAN: libc::c_ulong = libc::_IOWR::<ScanArgument>(b'f' as u32, 16);
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_FILE_OR_SHARED: u64 = 1 << 61;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_PRESENT: u64 = 1 << 63;

/// Runs returned by one call of the scan.
const REGIONS: usize = 4096;

/// Which pages of a private mapping of a file are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Those that were written, and are the process's own; one that was swapped out is no less so.
    Written,
    /// Those that are in memory, written or only read.
    Used,
}

/// The private anonymous pages of the range, as runs in ascending order that never touch.
pub(super) fn dirty_runs(source: &Source) -> io::Result<Vec<Run>> {
    find(source, Which::Written)
}

/// The pages of the range that have been used and are in memory, as such runs. With them come some of
/// their neighbours, which the kernel maps along.
pub(super) fn used_runs(source: &Source) -> io::Result<Vec<Run>> {
    find(source, Which::Used)
}

fn find(source: &Source, which: Which) -> io::Result<Vec<Run>> {
    let pagemap = File::open(format!("/proc/{}/pagemap", source.pid))?;
    match by_ioctl(&pagemap, source, which) {
        // The kernel is older than the request.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            by_entries(&pagemap, source, which)
        }
        outcome => outcome,
    }
}

fn by_ioctl(pagemap: &File, source: &Source, which: Which) -> io::Result<Vec<Run>> {
    let (inverted, mask, any_of) = match which {
        Which::Written => (
            PAGE_IS_FILE,
            PAGE_IS_FILE,
            PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ),
        Which::Used => (0, PAGE_IS_PRESENT, 0),
    };
    let end = source.address + source.len;
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut runs = Vec::new();
    let mut at = source.address;
    while at < end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: inverted,
            category_mask: mask,
            category_anyof_mask: any_of,
            // Regions are merged only while what is returned is equal: ask for what all share.
            return_mask: mask,
            ..ScanArgument::default()
        };
        // SAFETY: the argument has the layout and size that the kernel expects, and `vec` points to
        // `vec_len` writable regions that outlive the call.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        if found < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        let found = &regions[..usize::try_from(found).unwrap_or(0).min(REGIONS)];
        for region in found {
            push(
                &mut runs,
                region.start - source.address,
                region.end - region.start,
            );
        }
        // `walk_end` is no help: after more regions than the kernel collects at a time (512), it is
        // where one of those batches ended, and not the scan. But a scan ends early only when there
        // is no more room for regions.
        match found.last() {
            Some(last) if found.len() == REGIONS => at = last.end,
            _ => break,
        }
    }
    Ok(runs)
}

fn by_entries(pagemap: &File, source: &Source, which: Which) -> io::Result<Vec<Run>> {
    let page = rustix::param::page_size() as u64;
    let (first, count) = (source.address / page, source.len / page);
    let mut entries = vec![0_u8; 8 << 16];
    let mut runs = Vec::new();
    let mut done = 0;
    while done < count {
        let want = usize::try_from(count - done)
            .unwrap_or(usize::MAX)
            .min(entries.len() / 8);
        let chunk = &mut entries[..want * 8];
        pagemap.read_exact_at(chunk, (first + done) * 8)?;
        for (index, entry) in chunk.chunks_exact(8).enumerate() {
            let mut word = [0; 8];
            word.copy_from_slice(entry);
            let entry = u64::from_ne_bytes(word);
            if which.is(entry) {
                push(&mut runs, (done + index as u64) * page, page);
            }
        }
        done += want as u64;
    }
    Ok(runs)
}

impl Which {
    /// Whether a page is one of these, by its entry.
    fn is(self, entry: u64) -> bool {
        match self {
            Self::Written => {
                entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE_OR_SHARED == 0
            }
            Self::Used => entry & ENTRY_PRESENT != 0,
        }
    }
}

pub(super) fn push(runs: &mut Vec<Run>, offset: u64, len: u64) {
    match runs.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += len,
        _ => runs.push(Run { offset, len }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    const PAGES: usize = 64;

    /// A private mapping of a file in this process, some pages read, some written.
    fn scan_of(
        which: Which,
        pages: usize,
        read: &[usize],
        written: &[usize],
    ) -> (Vec<Run>, Vec<Run>) {
        let page = rustix::param::page_size();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; pages * page]).unwrap();
        // SAFETY: a fresh private mapping; unmapped below, after its last use.
        unsafe {
            let start = mmap(
                std::ptr::null_mut(),
                pages * page,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
                &file,
                0,
            )
            .unwrap()
            .cast::<u8>();
            for index in read {
                std::hint::black_box(start.add(index * page).read_volatile());
            }
            for index in written {
                start.add(index * page + 9).write_volatile(2);
            }
            let source = Source {
                pid: std::process::id(),
                address: start as u64,
                len: (pages * page) as u64,
            };
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            let found = (
                by_ioctl(&pagemap, &source, which).expect("Linux 6.7 or later runs the tests"),
                by_entries(&pagemap, &source, which).unwrap(),
            );
            munmap(start.cast(), pages * page).unwrap();
            found
        }
    }

    /// Entries as pagemap.rst describes them: what else they hold does not matter.
    #[test]
    fn an_entry_tells_what_is_anonymous() {
        let swapped_out = ENTRY_SWAPPED | 5 | 77 << 5;
        for (entry, expected) in [
            (0, false),
            (ENTRY_PRESENT | 1234, true),
            (ENTRY_PRESENT | ENTRY_FILE_OR_SHARED | 1234, false),
            (swapped_out, true),
            (swapped_out | ENTRY_FILE_OR_SHARED, false),
            (ENTRY_PRESENT | 1 << 55 | 1 << 56, true),
            (1 << 55, false),
        ] {
            assert_eq!(Which::Written.is(entry), expected, "{entry:x}");
        }
    }

    /// As many runs as take the kernel several batches, and us several calls.
    #[test]
    fn many_runs_are_found_once() {
        let page = rustix::param::page_size();
        for written in [511, 512, 513, 800, REGIONS - 1, REGIONS, REGIONS + 1, 9001] {
            let pages: Vec<_> = (0..written).map(|index| 2 * index).collect();
            let (ioctl, entries) = scan_of(Which::Written, 2 * written + 7, &[], &pages);
            let expected: Vec<_> = pages
                .iter()
                .map(|index| Run {
                    offset: (index * page) as u64,
                    len: page as u64,
                })
                .collect();
            assert!(ioctl == expected, "{written}: {} runs", ioctl.len());
            assert!(entries == expected, "{written}: {} runs", entries.len());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn both_ways_find_exactly_the_written_pages(
            read in proptest::collection::vec(0..PAGES, 0..PAGES),
            written in proptest::collection::btree_set(0..PAGES, 0..PAGES),
        ) {
            let page = rustix::param::page_size() as u64;
            let mut expected = Vec::new();
            for index in &written {
                push(&mut expected, *index as u64 * page, page);
            }
            let written: Vec<_> = written.into_iter().collect();
            let (ioctl, entries) = scan_of(Which::Written, PAGES, &read, &written);
            prop_assert_eq!(&ioctl, &expected);
            prop_assert_eq!(&entries, &expected);
        }

        /// What is read brings neighbours along, so that more may be found, and never less.
        #[test]
        fn both_ways_find_every_page_in_use(
            read in proptest::collection::btree_set(0..PAGES, 0..PAGES),
            written in proptest::collection::btree_set(0..PAGES, 0..PAGES),
        ) {
            let page = rustix::param::page_size() as u64;
            let (reads, writes) = (Vec::from_iter(read.clone()), Vec::from_iter(written.clone()));
            let (ioctl, entries) = scan_of(Which::Used, PAGES, &reads, &writes);
            prop_assert_eq!(&ioctl, &entries);
            let found = |index: usize| {
                let at = index as u64 * page;
                ioctl.iter().any(|run| (run.offset..run.offset + run.len).contains(&at))
            };
            prop_assert!(read.union(&written).all(|index| found(*index)));
            if read.is_empty() {
                prop_assert_eq!(ioctl.iter().map(|run| run.len / page).sum::<u64>(), written.len() as u64);
            }
        }
    }
}
