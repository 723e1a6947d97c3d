//! Frequency of the host's time stamp counter.
//!
//! Under software emulation the guest reads the host's counter, and a `microvm` without a
//! programmable interval timer gives its kernel nothing to measure it with: the frequency has to
//! be told on the kernel command line.

use std::{
    arch::x86_64::{__cpuid, _rdtsc},
    sync::OnceLock,
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// Time between the two readings. Each is off by less than 100 ns, so the result is good to a few
/// parts in a million; crystals are not better.
const BASELINE: Duration = Duration::from_millis(40);

/// Readings tried at each end; the one that took the least time is used.
const TRIES: usize = 16;

/// Frequency of the time stamp counter in kHz; measured at the first call, which blocks for 40 ms
/// where the hypervisor beneath the host does not tell.
#[must_use]
pub fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| told_by_hypervisor().unwrap_or_else(measure))
}

/// The timing leaf that KVM, VMware and others offer: EAX of 0x4000_0010 in kHz, if the highest
/// hypervisor leaf (EAX of 0x4000_0000) reaches that far. Bit 31 of ECX of leaf 1 says that there
/// is a hypervisor.
///
/// The leaves of the processor itself (0x15, 0x16) are not used: hypervisors pass them through
/// after scaling or moving to another machine, when they are no longer true.
fn told_by_hypervisor() -> Option<u64> {
    if __cpuid(1).ecx >> 31 == 0 || __cpuid(0x4000_0000).eax < 0x4000_0010 {
        return None;
    }
    let khz = u64::from(__cpuid(0x4000_0010).eax);
    // A nested hypervisor may answer for another machine than the one we run on.
    let measured = measure();
    (khz.abs_diff(measured) < measured / 1000).then_some(khz)
}

fn measure() -> u64 {
    let (ticks, nanos) = reading();
    std::thread::sleep(BASELINE);
    let (later_ticks, later_nanos) = reading();
    let nanos = u128::from(later_nanos - nanos).max(1);
    let khz = u128::from(later_ticks.wrapping_sub(ticks)) * 1_000_000 / nanos;
    u64::try_from(khz).unwrap_or(u64::MAX)
}

/// Counter and raw monotonic clock in nanoseconds at the same moment.
fn reading() -> (u64, u64) {
    let one = || {
        // SAFETY: every x86-64 processor has the instruction, and it reads nothing but a counter.
        let before = unsafe { _rdtsc() };
        let time = clock_gettime(ClockId::MonotonicRaw);
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        let took = after.wrapping_sub(before);
        let nanos = time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs();
        (took, before.wrapping_add(took / 2), nanos)
    };
    let best = (1..TRIES).fold(one(), |best, _| {
        let next = one();
        if next.0 < best.0 { next } else { best }
    });
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (first, second) = (measure(), measure());
        assert!(first > 100_000, "{first} kHz is no processor of today");
        // Parts in a million; a busy test machine may be preempted between two instructions.
        assert!(
            first.abs_diff(second) * 1_000_000 / first < 200,
            "{first} and {second} kHz"
        );
        assert!(khz().abs_diff(first) * 1000 < first);
    }
}
