//! Brings a new memory image into the page cache as far as the image before it is there.
//!
//! Files that share blocks do not share the page cache: what a new image has not written itself is
//! on the disk only, and the first restore of it would wait for every page that its parent had
//! long in memory.

use std::{fs::File, io, path::Path};

use rustix::{
    fs::{Advice, fadvise},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::{memory::Run, worker::Stop};

/// At most this many bytes are read for one image: what a restore needs, even of large guests. The
/// rest comes when it is asked for.
const MOST: u64 = 512 << 20;
/// Bytes asked for at a time, and mapped at a time to find out what is cached.
const STEP: u64 = 32 << 20;

/// Reads the pages of `image` that are cached of `base`. Returns how many bytes it asked for;
/// reading goes on after that.
pub(crate) fn read_ahead(base: &File, image: &Path, stop: &Stop) -> io::Result<u64> {
    let image = File::open(image)?;
    let len = base.metadata()?.len().min(image.metadata()?.len());
    let mut asked = 0;
    for at in (0..len).step_by(STEP as usize) {
        for run in cached(base, at, STEP.min(len - at))? {
            if stop.is_set() || asked + run.len > MOST {
                return Ok(asked);
            }
            let range = std::num::NonZeroU64::new(run.len);
            fadvise(&image, at + run.offset, range, Advice::WillNeed)?;
            asked += run.len;
        }
    }
    Ok(asked)
}

/// Which pages of a part of a file are in the page cache: runs, relative to `offset`, which is a
/// multiple of the page size.
pub(crate) fn cached(file: &File, offset: u64, len: u64) -> io::Result<Vec<Run>> {
    let page = rustix::param::page_size() as u64;
    let mut present = vec![0_u8; len.div_ceil(page) as usize];
    if present.is_empty() {
        return Ok(Vec::new());
    }
    // SAFETY: a fresh mapping at an address of the kernel's choice, which nobody reads; the vector
    // has one byte for each of its pages, and the mapping is gone before it is.
    unsafe {
        let hint = std::ptr::null_mut();
        let (protection, flags) = (ProtFlags::READ, MapFlags::SHARED);
        let start = mmap(hint, len as usize, protection, flags, file, offset)?;
        let done = libc::mincore(start, len as usize, present.as_mut_ptr());
        let failed = (done != 0).then(io::Error::last_os_error);
        munmap(start, len as usize)?;
        if let Some(error) = failed {
            return Err(error);
        }
    }
    let mut runs: Vec<Run> = Vec::new();
    for (index, flags) in present.into_iter().enumerate() {
        let offset = index as u64 * page;
        match runs.last_mut() {
            _ if flags & 1 == 0 => {}
            Some(last) if last.offset + last.len == offset => last.len += page,
            _ => runs.push(Run { offset, len: page }),
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::FileExt as _,
        time::{Duration, Instant},
    };

    use super::*;

    const LEN: u64 = 64 << 20;

    fn bytes(runs: &[Run]) -> u64 {
        runs.iter().map(|run| run.len).sum()
    }

    /// A file on a disk, not in the page cache.
    fn cold(path: &Path) -> File {
        let file = File::create_new(path).unwrap();
        for at in (0..LEN).step_by(1 << 20) {
            file.write_all_at(&vec![3; 1 << 20], at).unwrap();
        }
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        // What was written is not mapped for reading.
        File::open(path).unwrap()
    }

    #[test]
    fn what_is_cached_of_the_parent_is_cached_of_the_child() {
        // Not in memory as /tmp may be.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let base = cold(&dir.path().join("base"));
        let path = dir.path().join("image");
        let image = cold(&path);
        let all = |file: &File| cached(file, 0, LEN).unwrap();
        assert_eq!(bytes(&all(&base)), 0);
        assert_eq!(read_ahead(&base, &path, &Stop::default()).unwrap(), 0);
        // Two parts in two steps, far enough from each other that nothing reads ahead from one to
        // the other; random access reads what it is asked for.
        fadvise(&base, 0, None, Advice::Random).unwrap();
        let hot = [(5 << 20, 1 << 20), (STEP + (9 << 20), 64 << 10)];
        for (at, len) in hot {
            base.read_exact_at(&mut vec![0; len], at).unwrap();
        }
        let parent = all(&base);
        let asked = read_ahead(&base, &path, &Stop::default()).unwrap();
        assert_eq!(asked, bytes(&parent));
        assert!(
            ((1 << 20) + (64 << 10)..8 << 20).contains(&asked),
            "{asked}"
        );
        let deadline = Instant::now() + Duration::from_secs(20);
        let missing = || {
            parent
                .iter()
                .any(|run| bytes(&cached(&image, run.offset, run.len).unwrap()) < run.len)
        };
        while missing() {
            assert!(Instant::now() < deadline, "not read");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(bytes(&all(&image)) < LEN / 2, "and not all of it");
    }
}
