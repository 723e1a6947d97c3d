//! One VM's memory, from capture to capture.

use std::{sync::Arc, time::Instant};

use super::{
    Buffer, Dirty, Kernel, SoftDirtyBits, SoftDirtySupport, Source, Tier, TierChoice,
    capture::{anonymous_runs, check, copy, micros, whole},
    probe_soft_dirty, soft_dirty,
};
use crate::error::{Error, Result};

/// What is added to an estimate: what the guest may write between the estimate and the freeze.
const SLACK: u64 = 8 << 20;

/// How much a capture would copy now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// The tier that the capture would be of.
    pub tier: Tier,
    /// Bytes that it would copy.
    pub bytes: u64,
    /// Size of guest memory, in bytes.
    pub limit: u64,
}

impl Estimate {
    /// Bytes that the buffer should have, resident: the estimate, and a quarter and 8 MiB for what
    /// the guest writes until it stands still.
    #[must_use]
    pub fn room(&self) -> u64 {
        (self.bytes + self.bytes / 4 + SLACK).min(self.limit)
    }
}

/// What soft-dirty bits are relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Since {
    /// Nothing that could be used.
    Nothing,
    /// A capture that is not known to have become an image.
    Capture,
    /// The last image.
    Image,
}

/// Follows the memory of one VM, from the start of its process. It decides what the next capture
/// has to copy:
///
/// 1. [`Self::estimate`], and a buffer with that much [room](Estimate::room);
/// 2. with the VM paused, [`Self::capture`];
/// 3. the image is written, over what [`Dirty::needs_last_image`] says, and kept:
///    [`Self::imaged`]. Without that, the next capture is cumulative again, and nothing is lost.
///
/// One that is new, as after a restart of this program, makes the same images, and copies more.
#[derive(Debug)]
pub struct Tracker {
    choice: TierChoice,
    /// `None`: soft-dirty bits are not used.
    bits: Option<Arc<dyn SoftDirtyBits>>,
    since: Since,
}

impl Tracker {
    /// A tracker for a VM whose process is new, by the tiers of this kernel.
    ///
    /// # Errors
    /// [`Error::TierUnsupported`] if the choice is [`TierChoice::SoftDirty`] and the kernel has no
    /// such bits.
    pub fn new(choice: TierChoice) -> Result<Self> {
        let wanted = matches!(choice, TierChoice::Auto | TierChoice::SoftDirty);
        let bits = match wanted.then(probe_soft_dirty) {
            Some(SoftDirtySupport::Supported) => Some(Arc::new(Kernel) as Arc<dyn SoftDirtyBits>),
            Some(SoftDirtySupport::Unsupported { reason }) if choice == TierChoice::SoftDirty => {
                return Err(Error::TierUnsupported {
                    tier: Tier::SoftDirty,
                    reason,
                });
            }
            _ => None,
        };
        Ok(Self {
            choice,
            bits,
            since: Since::Nothing,
        })
    }

    /// A tracker that takes soft-dirty bits from somewhere else than the running kernel.
    #[must_use]
    pub fn with_bits(bits: Arc<dyn SoftDirtyBits>) -> Self {
        Self {
            choice: TierChoice::SoftDirty,
            bits: Some(bits),
            since: Since::Nothing,
        }
    }

    /// The tier of the next capture.
    #[must_use]
    pub fn next_tier(&self) -> Tier {
        match self.choice {
            TierChoice::Full => Tier::Full,
            _ if self.bits.is_some() && self.since == Since::Image => Tier::SoftDirty,
            _ => Tier::AnonymousPages,
        }
    }

    /// How much [`Self::capture`] would copy now. The VM may run meanwhile. Blocking: a millisecond
    /// or two.
    ///
    /// # Errors
    /// [`Error::Memory`] if the process is gone, or may not be looked at.
    pub fn estimate(&self, source: &Source) -> Result<Estimate> {
        let runs = self.find(source)?;
        Ok(Estimate {
            tier: self.next_tier(),
            bytes: runs.iter().map(|run| run.len).sum(),
            limit: source.len,
        })
    }

    /// Copies what has been written, and begins to follow what will be. Blocking: a millisecond or
    /// two, plus 0.2 to 0.4 ms for each MB if the buffer is resident.
    ///
    /// The VM must be paused from before this call until it returns; otherwise the result is torn.
    ///
    /// # Errors
    /// [`Error::Memory`] if the process is gone, may not be read, or the range is not mapped. The
    /// next capture is cumulative then.
    pub fn capture(&mut self, source: &Source, buffer: Buffer) -> Result<Dirty> {
        let started = Instant::now();
        let tier = self.next_tier();
        let found = self.find(source);
        // From here on the bits are relative to this capture, if to anything.
        self.since = Since::Nothing;
        let mut dirty = copy(source, found?, buffer, tier, micros(started))?;
        if let (Some(bits), true) = (&self.bits, tier != Tier::Full) {
            let started = Instant::now();
            match bits.clear(source.pid) {
                Ok(()) => self.since = Since::Capture,
                // The bits that were not cleared only say too much; but not knowing which, they are
                // not used.
                Err(error) => {
                    tracing::warn!(pid = source.pid, %error, "cannot clear the soft-dirty bits");
                }
            }
            dirty.arm_us = micros(started);
        }
        Ok(dirty)
    }

    /// Says that the last capture has become an image that is kept: the next one needs only what
    /// was written since.
    pub fn imaged(&mut self) {
        if self.since == Since::Capture {
            self.since = Since::Image;
        }
    }

    /// Says that the image of the last capture is gone: the next capture is cumulative.
    pub fn forget(&mut self) {
        self.since = Since::Nothing;
    }

    fn find(&self, source: &Source) -> Result<Vec<super::Run>> {
        check(source)?;
        match (self.next_tier(), &self.bits) {
            (Tier::Full, _) => Ok(whole(source)),
            (Tier::SoftDirty, Some(bits)) => {
                let anonymous = anonymous_runs(source)?;
                soft_dirty::written_since(&**bits, source, &anonymous).map_err(|error| {
                    Error::Memory {
                        attempt: "read the soft-dirty bits",
                        pid: source.pid,
                        source: error,
                    }
                })
            }
            _ => anonymous_runs(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forced_is_used_or_refused() {
        let supported = probe_soft_dirty() == SoftDirtySupport::Supported;
        match Tracker::new(TierChoice::SoftDirty) {
            Ok(_) => assert!(supported),
            Err(error) => {
                assert!(!supported);
                assert!(matches!(error, Error::TierUnsupported { .. }), "{error}");
                assert!(error.to_string().contains("soft_dirty"), "{error}");
            }
        }
        let auto = Tracker::new(TierChoice::Auto).unwrap();
        assert_eq!(auto.bits.is_some(), supported);
        assert_eq!(auto.next_tier(), Tier::AnonymousPages);
        let pages = Tracker::new(TierChoice::AnonymousPages).unwrap();
        assert!(pages.bits.is_none());
        let mut full = Tracker::new(TierChoice::Full).unwrap();
        full.imaged();
        assert_eq!(full.next_tier(), Tier::Full);
    }

    #[test]
    fn room_is_more_than_the_estimate_and_never_more_than_the_memory() {
        let estimate = |bytes| Estimate {
            tier: Tier::AnonymousPages,
            bytes,
            limit: 64 << 20,
        };
        assert_eq!(estimate(0).room(), SLACK);
        assert_eq!(estimate(40 << 20).room(), 58 << 20);
        assert_eq!(estimate(60 << 20).room(), 64 << 20);
    }
}
