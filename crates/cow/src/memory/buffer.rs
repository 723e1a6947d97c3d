//! A large buffer that is kept, so that its pages are there when a VM waits for them.

use std::{
    ffi::c_void,
    io,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap},
};

/// Buffers grow in steps of this many bytes, the size of a huge page on x86-64.
const STEP: usize = 2 << 20;

/// Anonymous memory that captures are copied into. A capture takes a buffer and
/// [`crate::memory::Dirty::into_buffer`] gives it back: pages that were touched once need not be
/// faulted in again during the next freeze.
#[derive(Debug, Default)]
pub struct Buffer {
    map: Option<Mapping>,
    /// Where its memory goes when it is dropped.
    home: Weak<Pool>,
}

/// Anonymous memory.
#[derive(Debug)]
struct Mapping {
    start: NonNull<c_void>,
    len: usize,
    /// How many bytes from the start are known to have been present.
    resident: usize,
}

/// Memory of buffers that were dropped, for the buffers to come.
#[derive(Debug)]
pub(crate) struct Pool {
    kept: Mutex<Vec<Kept>>,
    /// Bytes that are kept at most.
    limit: usize,
}

#[derive(Debug)]
struct Kept {
    map: Mapping,
    since: Instant,
}

// SAFETY: each mapping is plain memory that nothing but the pool knows of.
unsafe impl Send for Pool {}
// SAFETY: they are only touched under the lock.
unsafe impl Sync for Pool {}

/// A pool keeps at most this part of the machine's memory, within the limits below.
const SHARE: u64 = 32;
const LEAST: usize = 64 << 20;
const MOST: usize = 1 << 30;
/// How many mappings a pool keeps: there are no more freezes at a time that would be fast.
const COUNT: usize = 4;
/// What nobody has used for this long is given back, down to [`LEAST`].
const IDLE: Duration = Duration::from_secs(60);

impl Default for Pool {
    fn default() -> Self {
        let machine = usize::try_from(machine_memory() / SHARE).unwrap_or(MOST);
        Self {
            kept: Mutex::default(),
            limit: machine.clamp(LEAST, MOST),
        }
    }
}

/// Bytes of memory that this machine has.
fn machine_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    #[allow(
        clippy::useless_conversion,
        reason = "the type depends on the architecture"
    )]
    u64::from(info.totalram).saturating_mul(unit)
}

impl Pool {
    /// A buffer whose memory comes from here and returns to here: the smallest with `len` bytes, or
    /// one without memory.
    pub(crate) fn buffer(self: &Arc<Self>, len: usize) -> Buffer {
        let mut kept = self.lock();
        let fitting = (0..kept.len())
            .filter(|index| kept[*index].map.len >= len)
            .min_by_key(|index| kept[*index].map.len);
        Buffer {
            map: fitting.map(|index| kept.swap_remove(index).map),
            home: Arc::downgrade(self),
        }
    }

    /// The buffer with the most memory.
    pub(crate) fn largest(self: &Arc<Self>) -> Buffer {
        let most = self.lock().iter().map(|kept| kept.map.len).max();
        self.buffer(most.unwrap_or(0))
    }

    /// Gives back what has not been used for a while.
    pub(crate) fn trim(&self, now: Instant) {
        let mut kept = self.lock();
        kept.sort_by_key(|kept| std::cmp::Reverse(kept.map.len));
        let mut total: usize = kept.iter().map(|kept| kept.map.len).sum();
        kept.retain(|kept| {
            let idle = now.saturating_duration_since(kept.since) >= IDLE;
            let goes = idle && total > LEAST;
            if goes {
                total -= kept.map.len;
            }
            !goes
        });
    }

    /// Keeps a mapping if there is room; smaller ones and those that were used longer ago make room.
    fn keep(&self, map: Mapping) {
        if map.len > self.limit {
            return;
        }
        let mut kept = self.lock();
        kept.push(Kept {
            map,
            since: Instant::now(),
        });
        while kept.len() > COUNT || kept.iter().map(|kept| kept.map.len).sum::<usize>() > self.limit
        {
            let oldest = (0..kept.len()).min_by_key(|index| kept[*index].since);
            match oldest {
                Some(index) => drop(kept.remove(index)),
                None => break,
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no slice of it outlives a borrow of the
        // buffer that held it.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}

// SAFETY: the mapping is owned by this value alone and is plain memory; no thread has a special
// relation to it.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer without memory; it grows when it is used.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer whose first `len` bytes are present in memory already.
    ///
    /// # Errors
    /// If the kernel has no memory to give.
    pub fn with_resident(len: usize) -> io::Result<Self> {
        let mut buffer = Self::new();
        buffer.make_resident(len)?;
        Ok(buffer)
    }

    /// How many bytes it holds without growing.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.len)
    }

    /// How many bytes can be filled without waiting for the kernel to find and clear memory.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.resident)
    }

    /// Makes the first `len` bytes present in memory, where they are not. Blocking: 0.1 to 0.3 ms
    /// for each MB, so before a freeze and not in it.
    ///
    /// # Errors
    /// If the kernel has no memory to give.
    pub fn make_resident(&mut self, len: usize) -> io::Result<()> {
        self.prepare(len)?;
        let Some(map) = self.map.as_mut().filter(|map| map.resident < len) else {
            return Ok(());
        };
        // Whole huge pages, one at a time: the kernel holds a lock of the process while it clears what
        // one call asks for, and a freeze that starts a thread meanwhile would wait for it.
        let end = len.next_multiple_of(STEP).min(map.len);
        for at in (map.resident..end).step_by(STEP) {
            let page = map.start.as_ptr().wrapping_byte_add(at);
            // SAFETY: the range lies in the mapping; populating it changes no content.
            let done = unsafe { madvise(page, STEP.min(end - at), Advice::LinuxPopulateWrite) };
            match done {
                // A kernel before 5.14. One write to each page does the same, with more faults.
                Err(Errno::INVAL) => {
                    let first = map.resident;
                    for page in self.prepare(len)?[first..].chunks_mut(4096) {
                        page[0] = 0;
                    }
                    break;
                }
                outcome => outcome?,
            }
        }
        if let Some(map) = &mut self.map {
            map.resident = end;
        }
        Ok(())
    }

    /// At least `len` writable bytes; what they held before is not kept.
    pub(crate) fn prepare(&mut self, len: usize) -> io::Result<&mut [u8]> {
        if self.capacity() < len {
            self.map = None;
            let rounded = len.next_multiple_of(STEP);
            // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
            let start = unsafe {
                mmap_anonymous(
                    std::ptr::null_mut(),
                    rounded,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            }?;
            let start = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at zero"))?;
            // A hint; without huge pages it merely takes more faults.
            // SAFETY: the range is the mapping just made.
            let _ = unsafe { madvise(start.as_ptr(), rounded, Advice::LinuxHugepage) };
            self.map = Some(Mapping {
                start,
                len: rounded,
                resident: 0,
            });
        }
        Ok(match &self.map {
            // SAFETY: the mapping is readable and writable for `capacity >= len` bytes, lives as
            // long as `self`, and is borrowed mutably for as long as the slice.
            Some(map) => unsafe { std::slice::from_raw_parts_mut(map.start.as_ptr().cast(), len) },
            None => &mut [],
        })
    }

    /// Says that the first `len` bytes have been written.
    pub(crate) fn filled(&mut self, len: usize) {
        if let Some(map) = &mut self.map {
            map.resident = map.resident.max(len.min(map.len));
        }
    }

    /// The first `len` bytes, at most the capacity.
    pub(crate) fn bytes(&self, len: usize) -> &[u8] {
        match &self.map {
            // SAFETY: as above, for a shared borrow.
            Some(map) => unsafe {
                std::slice::from_raw_parts(map.start.as_ptr().cast(), len.min(map.len))
            },
            None => &[],
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(map), Some(pool)) = (self.map.take(), self.home.upgrade()) {
            pool.keep(map);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_keeps_its_memory() {
        let mut buffer = Buffer::new();
        assert_eq!(buffer.bytes(10), b"");
        assert!(buffer.prepare(0).unwrap().is_empty());
        buffer.prepare(10).unwrap().copy_from_slice(b"0123456789");
        assert_eq!(buffer.bytes(10), b"0123456789");
        assert_eq!(buffer.capacity(), STEP);
        buffer.prepare(STEP + 1).unwrap()[STEP] = 9;
        assert_eq!(buffer.capacity(), 2 * STEP);
        assert_eq!(buffer.bytes(usize::MAX).len(), 2 * STEP);
    }

    /// Bytes of the buffer that the kernel has given memory for.
    fn present(buffer: &Buffer) -> usize {
        let map = buffer.map.as_ref().unwrap();
        let mut pages = vec![0_u8; map.len / 4096];
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        let done = unsafe { libc::mincore(map.start.as_ptr(), map.len, pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 != 0).count() * 4096
    }

    #[test]
    fn resident_memory_is_there_before_it_is_written() {
        let mut buffer = Buffer::new();
        buffer.prepare(9 * STEP).unwrap();
        assert_eq!((buffer.resident(), present(&buffer)), (0, 0));
        buffer.make_resident(STEP + 1).unwrap();
        assert_eq!((buffer.resident(), present(&buffer)), (2 * STEP, 2 * STEP));
        buffer.make_resident(10).unwrap();
        assert_eq!(buffer.resident(), 2 * STEP);
        buffer.prepare(1).unwrap()[0] = 7;
        buffer.make_resident(4 * STEP).unwrap();
        assert_eq!((buffer.resident(), present(&buffer)), (4 * STEP, 4 * STEP));
        assert_eq!(buffer.bytes(1), [7], "what is there is not lost");
        let other = Buffer::with_resident(12 * STEP).unwrap();
        assert_eq!(present(&other), 12 * STEP);
    }

    fn lens(pool: &Pool) -> Vec<usize> {
        let mut lens: Vec<_> = pool.lock().iter().map(|kept| kept.map.len).collect();
        lens.sort_unstable();
        lens
    }

    fn used(pool: &Arc<Pool>, len: usize) {
        pool.buffer(len).prepare(len).unwrap();
    }

    #[test]
    fn memory_returns_to_the_pool_it_came_from() {
        let pool = Arc::new(Pool::default());
        let mut first = pool.buffer(10);
        first.make_resident(10).unwrap();
        let address = first.bytes(10).as_ptr();
        drop(first);
        let again = pool.buffer(10);
        assert_eq!(
            (again.capacity(), again.resident(), again.bytes(10).as_ptr()),
            (STEP, STEP, address)
        );
        drop(again);
        used(&pool, 3 * STEP);
        assert_eq!(lens(&pool), [STEP, 3 * STEP]);
        // The smallest that fits.
        assert_eq!(pool.buffer(STEP + 1).capacity(), 3 * STEP);
        assert_eq!(pool.buffer(STEP).capacity(), STEP);
        assert_eq!(pool.buffer(4 * STEP).capacity(), 0);
        assert_eq!(pool.largest().capacity(), 3 * STEP);
        let last = pool.buffer(1);
        drop(pool);
        drop(last);
    }

    #[test]
    fn a_pool_is_bounded_and_shrinks_when_idle() {
        let pool = Arc::new(Pool {
            limit: 2 * LEAST,
            ..Pool::default()
        });
        used(&pool, 2 * LEAST + 1);
        assert_eq!(lens(&pool), [0; 0], "too large to be kept");
        let many = [(); COUNT + 2].map(|()| {
            let mut buffer = pool.buffer(1);
            buffer.prepare(1).unwrap();
            buffer
        });
        drop(many);
        assert_eq!(lens(&pool), [STEP; COUNT]);
        used(&pool, 2 * LEAST - STEP);
        assert_eq!(
            lens(&pool),
            [STEP, 2 * LEAST - STEP],
            "older ones make room"
        );
        pool.trim(Instant::now());
        assert_eq!(lens(&pool).len(), 2, "not idle yet");
        pool.trim(Instant::now() + IDLE);
        assert_eq!(lens(&pool), [STEP], "what is little is kept");
    }
}
