//! A large buffer that is kept, so that its pages are there when a VM waits for them.

use std::{ffi::c_void, io, ptr::NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Buffers grow in steps of this many bytes, the size of a huge page on x86-64.
const STEP: usize = 2 << 20;

/// Anonymous memory that captures are copied into. A capture takes a buffer and
/// [`crate::memory::Dirty::into_buffer`] gives it back: pages that were touched once need not be
/// faulted in again during the next freeze.
#[derive(Debug, Default)]
pub struct Buffer {
    map: Option<(NonNull<c_void>, usize)>,
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
        if let Some((start, len)) = self.map.take() {
            // SAFETY: the mapping is ours, and no slice of it outlives a borrow of `self`.
            let _ = unsafe { munmap(start.as_ptr(), len) };
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
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
}
