//! A VM's memory from capture to capture: where it came from and what has been written since.

use std::{
    fs::File,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cubicle_cow::memory::{
    Base, Buffer, Dirty, PageSums, Source, TierChoice, Tracker, started_from,
};
use cubicle_ids::SandboxId;
use cubicle_vmm::{GuestMemory, Vm};

use crate::error::{Error, Result};

/// The memory of one VM. Cheap to clone; all clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    tracker: Arc<Mutex<Tracker>>,
    /// The image that the VM was started from or last captured as; held open, so that it may be
    /// deleted. `None`: it was booted, and what it has not written is zero.
    image: Option<Arc<Image>>,
    restored: bool,
}

/// What captured pages are laid over.
#[derive(Debug)]
struct Image {
    file: File,
    /// Of the pages that it was captured with; none at first, and none for an image that the VM was
    /// started from.
    sums: Mutex<Arc<PageSums>>,
}

impl Image {
    fn new(file: File) -> Arc<Self> {
        Arc::new(Self {
            file,
            sums: Mutex::default(),
        })
    }

    fn sums(&self) -> Arc<PageSums> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Arc<PageSums>> {
        // They are replaced as a whole.
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was captured, and what has been found out about it.
#[derive(Debug)]
pub(crate) struct CapturedPages {
    pub(crate) dirty: Dirty,
    pub(crate) sums: PageSums,
}

/// The base of one capture, see [`Memory::base`].
#[derive(Debug)]
pub(crate) struct Below {
    image: Option<Arc<Image>>,
    sums: Arc<PageSums>,
}

impl Below {
    pub(crate) fn as_base(&self) -> Base<'_> {
        match &self.image {
            Some(image) => Base::Last(&image.file, &self.sums),
            None => Base::Zeros,
        }
    }
}

impl Memory {
    /// Of a VM that was restored from `image`.
    pub(crate) fn restored(choice: TierChoice, image: &Path) -> Result<Self> {
        let image = File::open(image).map_err(Error::io("open the memory image", image))?;
        Ok(Self {
            tracker: Arc::new(Mutex::new(Tracker::new(choice)?)),
            image: Some(Image::new(image)),
            restored: true,
        })
    }

    /// Of a VM that was booted.
    pub(crate) fn booted(choice: TierChoice) -> Result<Self> {
        Ok(Self {
            tracker: Arc::new(Mutex::new(Tracker::new(choice)?)),
            image: None,
            restored: false,
        })
    }

    /// Of a VM that was restored by an earlier process. `captured` is the image that it was last
    /// captured as; without it, the one that it has mapped, which is there even if it was deleted.
    pub(crate) fn adopted(
        choice: TierChoice,
        id: &SandboxId,
        vm: &dyn Vm,
        captured: Option<&Path>,
    ) -> Result<Self> {
        let image = captured.and_then(|path| File::open(path).ok());
        let image = match image {
            Some(image) => image,
            None => started_from(&source(id, &vm.memory()?)?)?,
        };
        // One that was booted has mapped a device that is all zeros.
        let is_image = image.metadata().is_ok_and(|metadata| metadata.is_file());
        Ok(Self {
            tracker: Arc::new(Mutex::new(Tracker::new(choice)?)),
            image: is_image.then(|| Image::new(image)),
            restored: is_image,
        })
    }

    /// How many bytes a buffer for the next capture should have. Blocking for a millisecond or two;
    /// the VM may run.
    pub(crate) fn room(&self, source: &Source) -> Result<u64> {
        Ok(self.tracker().estimate(source)?.room())
    }

    /// Copies what has been written. Blocking; the VM must stand still.
    pub(crate) fn capture(&self, source: &Source, buffer: Buffer) -> Result<Dirty> {
        Ok(self.tracker().capture(source, buffer)?)
    }

    /// Whether the VM was restored, so that what it has used since is what it needs, and not what its
    /// boot needed.
    pub(crate) fn was_restored(&self) -> bool {
        self.restored
    }

    /// What captured pages are laid over.
    pub(crate) fn base(&self) -> Below {
        let sums = self.image.as_ref().map(|image| image.sums());
        Below {
            image: self.image.clone(),
            sums: sums.unwrap_or_default(),
        }
    }

    /// The last capture has become this image. What is known of it makes the next capture cheap;
    /// the rest is found out in the background.
    pub(crate) fn captured_as(&mut self, image: &Path, pages: CapturedPages) -> Result<()> {
        let opened = File::open(image).map_err(Error::io("open the memory image", image))?;
        let image = Image::new(opened);
        self.image = Some(image.clone());
        self.tracker().imaged();
        tokio::task::spawn_blocking(move || {
            let CapturedPages { dirty, mut sums } = pages;
            sums.complete(&dirty);
            *image.lock() = Arc::new(sums);
        });
        Ok(())
    }

    fn tracker(&self) -> MutexGuard<'_, Tracker> {
        // A capture that panicked leaves a tracker whose next capture copies more.
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guest memory as one range. A driver that reports several has one mapping that the kernel split.
pub(crate) fn source(id: &SandboxId, memory: &GuestMemory) -> Result<Source> {
    let not_one = |reason: &str| {
        Error::Vm(cubicle_vmm::Error::MemoryNotFound {
            id: id.clone(),
            pid: memory.pid,
            reason: reason.to_owned(),
        })
    };
    let pid = u32::try_from(memory.pid).map_err(|_| not_one("the pid is negative"))?;
    let address = memory
        .ranges
        .first()
        .and_then(|first| first.host_address.checked_sub(first.offset))
        .ok_or_else(|| not_one("there is no mapping"))?;
    let mut len = 0;
    for range in &memory.ranges {
        if range.offset != len || range.host_address != address + len {
            return Err(not_one("it is mapped in pieces"));
        }
        len += range.len;
    }
    Ok(Source { pid, address, len })
}

#[cfg(test)]
mod tests {
    use cubicle_vmm::MemoryRange;

    use super::*;

    fn memory(ranges: &[(u64, u64, u64)]) -> GuestMemory {
        let ranges = ranges
            .iter()
            .map(|&(host_address, offset, len)| MemoryRange {
                host_address,
                offset,
                len,
            })
            .collect();
        GuestMemory { pid: 7, ranges }
    }

    #[test]
    fn a_mapping_that_was_split_is_one_source_and_a_scattered_one_is_none() {
        let id = SandboxId::generate();
        let of = |ranges: &[_]| source(&id, &memory(ranges));
        let whole = Source {
            pid: 7,
            address: 0x10000,
            len: 0x3000,
        };
        assert_eq!(of(&[(0x10000, 0, 0x3000)]).unwrap(), whole);
        assert_eq!(
            of(&[(0x10000, 0, 0x1000), (0x11000, 0x1000, 0x2000)]).unwrap(),
            whole
        );
        assert!(of(&[]).is_err());
        assert!(
            of(&[(0x10000, 0, 0x1000), (0x12000, 0x1000, 0x2000)]).is_err(),
            "a gap"
        );
        assert!(
            of(&[(0x11000, 0x1000, 0x1000)]).is_err(),
            "the beginning is missing"
        );
    }
}
