//! The working set of a snapshot: which pages of its memory a VM asks for first.
//!
//! Files that share blocks do not share the page cache: what a new image has not written itself is
//! on the disk only, and a restore would wait for it page by page. Who reads the few thousand pages
//! that matter at once, while the VM's process is started, hardly waits at all.
//!
//! The file `memory.used` holds them as pairs of little-endian 32-bit numbers: the first page of a
//! run and how many pages of 4 KiB follow each other. It is advice: a restore works without it.

use std::{fs::File, io, path::Path};

use rustix::fs::{Advice, fadvise};

use crate::{memory::Run, worker::Stop};

/// At most this many bytes are read for one restore; the rest comes when it is asked for.
const MOST: u64 = 512 << 20;
/// What the numbers in the file count.
const PAGE: u64 = 4096;
/// Bytes of a run in the file.
const ENTRY: usize = 8;

/// The runs as they are kept. Those beyond 16 TiB are left out.
pub(crate) fn encode(runs: &[Run]) -> Vec<u8> {
    let pages = |bytes: u64| u32::try_from(bytes / PAGE).ok();
    runs.iter()
        .filter_map(|run| Some((pages(run.offset)?, pages(run.len)?)))
        .flat_map(|(first, count)| [first.to_le_bytes(), count.to_le_bytes()])
        .flatten()
        .collect()
}

fn decode(bytes: &[u8]) -> impl Iterator<Item = Run> + '_ {
    let number = |word: &[u8]| {
        word.iter()
            .rfold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    bytes.chunks_exact(ENTRY).map(move |entry| {
        let (first, count) = entry.split_at(ENTRY / 2);
        Run {
            offset: number(first) * PAGE,
            len: number(count) * PAGE,
        }
    })
}

/// Has the kernel read the working set of `image` that is kept in `list`. Returns for how many bytes
/// it asked; reading goes on after that.
pub(crate) fn read_ahead(image: &Path, list: &Path, stop: &Stop) -> io::Result<u64> {
    let list = match std::fs::read(list) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let image = File::open(image)?;
    let mut asked = 0;
    for run in decode(&list) {
        // No length would mean all of the rest.
        let Some(len) = std::num::NonZeroU64::new(run.len) else {
            continue;
        };
        if stop.is_set() || asked + run.len > MOST {
            break;
        }
        fadvise(&image, run.offset, Some(len), Advice::WillNeed)?;
        asked += run.len;
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::FileExt as _,
        time::{Duration, Instant},
    };

    use proptest::prelude::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    const LEN: u64 = 64 << 20;

    /// How many bytes of a part of a file are in the page cache.
    fn cached(file: &File, run: Run) -> u64 {
        let mut present = vec![0_u8; run.len.div_ceil(PAGE) as usize];
        // SAFETY: a fresh mapping that nobody reads, gone before the vector is, which has one byte
        // for each of its pages.
        unsafe {
            let (len, flags) = (run.len as usize, MapFlags::SHARED);
            let start = mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                flags,
                file,
                run.offset,
            )
            .unwrap();
            assert_eq!(libc::mincore(start, len, present.as_mut_ptr()), 0);
            munmap(start, len).unwrap();
        }
        present.iter().filter(|flags| **flags & 1 != 0).count() as u64 * PAGE
    }

    proptest! {
        #[test]
        fn runs_are_kept_as_they_are(
            pages in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..50)
        ) {
            let runs: Vec<_> = pages
                .iter()
                .map(|&(first, count)| Run {
                    offset: u64::from(first) * PAGE,
                    len: u64::from(count) * PAGE,
                })
                .collect();
            prop_assert_eq!(decode(&encode(&runs)).collect::<Vec<_>>(), runs);
        }
    }

    #[test]
    fn what_is_listed_is_read_and_the_rest_is_not() {
        // Not in memory as /tmp may be.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (path, list) = (dir.path().join("image"), dir.path().join("list"));
        let written = File::create_new(&path).unwrap();
        for at in (0..LEN).step_by(1 << 20) {
            written.write_all_at(&vec![3; 1 << 20], at).unwrap();
        }
        written.sync_all().unwrap();
        fadvise(&written, 0, None, Advice::DontNeed).unwrap();
        let image = File::open(&path).unwrap();
        let all = Run {
            offset: 0,
            len: LEN,
        };
        assert_eq!(cached(&image, all), 0);
        let go = Stop::default();
        assert_eq!(
            read_ahead(&path, &list, &go).unwrap(),
            0,
            "there is no list"
        );

        let runs = [
            (5 << 20, 1 << 20),
            (40 << 20, 64 << 10),
            (63 << 20, 1 << 20),
        ]
        .map(|(offset, len)| Run { offset, len });
        std::fs::write(&list, encode(&runs)).unwrap();
        let wanted: u64 = runs.iter().map(|run| run.len).sum();
        assert_eq!(read_ahead(&path, &list, &go).unwrap(), wanted);
        let deadline = Instant::now() + Duration::from_secs(20);
        while runs.iter().any(|run| cached(&image, *run) < run.len) {
            assert!(Instant::now() < deadline, "not read");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(cached(&image, all) < LEN / 2, "and not all of it");

        std::fs::write(&list, b"torn").unwrap();
        assert_eq!(read_ahead(&path, &list, &go).unwrap(), 0);
    }
}
