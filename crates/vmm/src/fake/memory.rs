//! Guest memory of a fake VM: a private mapping in our own process.

use std::{
    ffi::c_void,
    fs::File,
    io, ptr,
    sync::{Mutex, PoisonError},
};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Private memory, zeroed or over an image. Unmapped when dropped.
#[derive(Debug)]
pub(super) struct Memory {
    address: *mut c_void,
    len: usize,
    /// Held while the mapping is read or written through this type.
    access: Mutex<()>,
}

// SAFETY: the mapping belongs to the value and does not depend on the thread it is used from;
// accesses through the value are serialised by `access`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory.
    pub(super) fn empty(len: u64) -> io::Result<Self> {
        let len = length(len)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing.
        let address = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, flags) }?;
        Ok(Self {
            address,
            len,
            access: Mutex::default(),
        })
    }

    /// Memory with the content of an image, which it never changes.
    pub(super) fn of(image: &File, len: u64) -> io::Result<Self> {
        let len = length(len)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as above; the image is as long as the mapping and, being part of a snapshot,
        // stays so.
        let address = unsafe { mmap(ptr::null_mut(), len, protection, flags, image, 0) }?;
        Ok(Self {
            address,
            len,
            access: Mutex::default(),
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.address as u64
    }

    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Copies `bytes` to `offset`; `None` if they do not fit.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) -> Option<()> {
        self.check(offset, bytes.len())?;
        let _access = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the destination was checked to be within the mapping, no reference into the
        // mapping exists, and the lock keeps other copies away.
        unsafe {
            ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.address.cast::<u8>().add(offset),
                bytes.len(),
            );
        }
        Some(())
    }

    /// Copies `len` bytes from `offset`; `None` if there are not as many.
    pub(super) fn read(&self, offset: usize, len: usize) -> Option<Vec<u8>> {
        self.check(offset, len)?;
        let mut bytes = vec![0; len];
        let _access = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as in `write`, with the mapping as the source.
        unsafe {
            ptr::copy_nonoverlapping(
                self.address.cast::<u8>().add(offset),
                bytes.as_mut_ptr(),
                len,
            );
        }
        Some(bytes)
    }

    fn check(&self, offset: usize, len: usize) -> Option<()> {
        (offset.checked_add(len)? <= self.len).then_some(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.address, self.len) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own can be unmapped");
    }
}

fn length(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn an_image_is_seen_and_never_written() {
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(&[7; 8192]).unwrap();
        let memory = Memory::of(&image, 8192).unwrap();
        memory.write(4090, b"0123456789").unwrap();
        assert_eq!(memory.read(4088, 4).unwrap(), [7, 7, b'0', b'1']);
        let other = Memory::of(&image, 8192).unwrap();
        assert_eq!(other.read(4090, 2).unwrap(), [7, 7]);
        assert_eq!(memory.read(8190, 3), None);
        assert_eq!(memory.write(usize::MAX, b"x"), None);
    }
}
