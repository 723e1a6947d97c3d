//! A large buffer that is kept, so that its pages are there when a VM waits for them.

use std::{
    ffi::c_void,
    io,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

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

/// Address and length of anonymous memory.
type Mapping = (NonNull<c_void>, usize);

/// Memory of buffers that were dropped, for the buffers to come.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Mapping>>);

// SAFETY: each mapping is plain memory that nothing but the pool knows of.
unsafe impl Send for Pool {}
// SAFETY: they are only touched under the lock.
unsafe impl Sync for Pool {}

/// How many mappings a pool keeps, and how large each may be. Sandboxes that are idle have written
/// some 10 MB; what a freeze of larger ones gains is not worth keeping more from everybody else.
const KEPT: usize = 2;
const KEPT_BYTES: usize = 64 << 20;

impl Pool {
    /// A buffer whose memory comes from here and returns to here.
    pub(crate) fn buffer(self: &Arc<Self>) -> Buffer {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Buffer {
            map,
            home: Arc::downgrade(self),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for mapping in self
            .0
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            unmap(mapping);
        }
    }
}

fn unmap((start, len): Mapping) {
    // SAFETY: whoever calls this owns the mapping and forgets it; no slice of it outlives a borrow
    // of the buffer that it belonged to.
    let _ = unsafe { munmap(start.as_ptr(), len) };
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
        for page in buffer.prepare(len)?.chunks_mut(4096) {
            page[0] = 0;
        }
        Ok(buffer)
    }

    /// How many bytes it holds without growing.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.map.map_or(0, |(_, len)| len)
    }

    /// At least `len` writable bytes; what they held before is not kept.
    pub(crate) fn prepare(&mut self, len: usize) -> io::Result<&mut [u8]> {
        if self.capacity() < len {
            self.release();
            let rounded = len.div_ceil(STEP) * STEP;
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
            self.map = Some((start, rounded));
        }
        Ok(match self.map {
            // SAFETY: the mapping is readable and writable for `capacity >= len` bytes, lives as
            // long as `self`, and is borrowed mutably for as long as the slice.
            Some((start, _)) => unsafe {
                std::slice::from_raw_parts_mut(start.as_ptr().cast(), len)
            },
            None => &mut [],
        })
    }

    /// The first `len` bytes, at most the capacity.
    pub(crate) fn bytes(&self, len: usize) -> &[u8] {
        match self.map {
            // SAFETY: as above, for a shared borrow.
            Some((start, capacity)) => unsafe {
                std::slice::from_raw_parts(start.as_ptr().cast(), len.min(capacity))
            },
            None => &[],
        }
    }

    fn release(&mut self) {
        if let Some(mapping) = self.map.take() {
            unmap(mapping);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.capacity() <= KEPT_BYTES
            && let Some(pool) = self.home.upgrade()
        {
            let mut kept = pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < KEPT {
                kept.extend(self.map.take());
            }
        }
        self.release();
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

    #[test]
    fn memory_returns_to_the_pool_it_came_from() {
        let pool = Arc::new(Pool::default());
        let mut first = pool.buffer();
        first.prepare(10).unwrap().fill(7);
        let address = first.bytes(10).as_ptr();
        drop(first);
        let again = pool.buffer();
        assert_eq!(
            (again.capacity(), again.bytes(10).as_ptr()),
            (STEP, address)
        );
        let mut others = [(); KEPT + 1].map(|()| pool.buffer());
        for buffer in &mut others {
            assert_eq!(buffer.capacity(), 0);
            buffer.prepare(1).unwrap();
        }
        others[0].prepare(KEPT_BYTES + 1).unwrap();
        drop(others);
        assert_eq!(
            pool.0.lock().unwrap().len(),
            KEPT,
            "no more, and none that is too large"
        );
        assert!(pool.0.lock().unwrap().iter().all(|(_, len)| *len == STEP));
        drop(pool);
        drop(again);
    }
}
