//! The kernel's soft-dirty bits: which pages were written since they were last asked to forget.
//!
//! Documentation/admin-guide/mm/soft-dirty.rst: writing `4` to `/proc/PID/clear_refs` clears the
//! bits of a process, bit 55 of a page's entry in `/proc/PID/pagemap` tells whether it was written
//! since. Both files exist without the feature, and then they say nothing: only a real write tells.

use std::{ffi::CStr, fmt, fs::File, io, os::unix::fs::FileExt as _, sync::OnceLock};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::{Run, Source, scan::push};

/// Bit of an entry of /proc/PID/pagemap.
const ENTRY_SOFT_DIRTY: u64 = 1 << 55;
/// What clears the soft-dirty bits when it is written to `clear_refs`.
const CLEAR: &[u8] = b"4";
/// Most entries that are read at a time: those of 32 MiB.
const WINDOW: usize = 8192;

/// Where soft-dirty bits come from.
pub trait SoftDirtyBits: fmt::Debug + Send + Sync {
    /// Reads the pagemap entries of the pages `first..first + into.len()` of a process's address
    /// space, of which bit 55 counts.
    ///
    /// # Errors
    /// If the process is gone or may not be looked at.
    fn entries(&self, pid: u32, first: u64, into: &mut [u64]) -> io::Result<()>;

    /// Clears the bits of all pages of a process.
    ///
    /// # Errors
    /// As for `entries`.
    fn clear(&self, pid: u32) -> io::Result<()>;
}

/// The bits of the running kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kernel;

impl SoftDirtyBits for Kernel {
    fn entries(&self, pid: u32, first: u64, into: &mut [u64]) -> io::Result<()> {
        let mut bytes = vec![0; into.len() * 8];
        File::open(format!("/proc/{pid}/pagemap"))?.read_exact_at(&mut bytes, first * 8)?;
        for (entry, word) in into.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *entry = u64::from_ne_bytes(*word);
        }
        Ok(())
    }

    fn clear(&self, pid: u32) -> io::Result<()> {
        std::fs::write(format!("/proc/{pid}/clear_refs"), CLEAR)
    }
}

/// Of the pages in `runs`, those with the soft-dirty bit; `runs` and the result are ascending.
pub(super) fn written_since(
    bits: &dyn SoftDirtyBits,
    source: &Source,
    runs: &[Run],
) -> io::Result<Vec<Run>> {
    let page = rustix::param::page_size() as u64;
    let mut written = Vec::new();
    let mut entries = vec![0; WINDOW];
    let mut runs = runs.iter().copied().peekable();
    while let Some(first) = runs.peek().map(|run| run.offset) {
        // The window begins at the first page that matters; what of it lies between runs is read
        // and ignored, which is cheaper than a call for every run.
        let window = first..first + WINDOW as u64 * page;
        let mut pieces = Vec::new();
        while let Some(run) = runs.peek_mut().filter(|run| run.offset < window.end) {
            let len = run.len.min(window.end - run.offset);
            pieces.push(Run {
                offset: run.offset,
                len,
            });
            if len == run.len {
                runs.next();
            } else {
                run.offset += len;
                run.len -= len;
            }
        }
        let end = pieces.last().map_or(first, |run| run.offset + run.len);
        let used = &mut entries[..((end - first) / page) as usize];
        bits.entries(source.pid, (source.address + first) / page, used)?;
        for piece in pieces {
            for offset in (piece.offset..piece.offset + piece.len).step_by(page as usize) {
                if used[((offset - first) / page) as usize] & ENTRY_SOFT_DIRTY != 0 {
                    push(&mut written, offset, page);
                }
            }
        }
    }
    Ok(written)
}

/// Whether the running kernel tracks writes by soft-dirty bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SoftDirtySupport {
    /// It does.
    Supported,
    /// It does not.
    Unsupported {
        /// What the probe found, for a person to read.
        reason: String,
    },
}

/// Finds out by real writes to a page, once in the life of this process. Blocking for about a
/// millisecond, the first time.
///
/// `clear_refs` knows processes and not ranges: it would make every page of this program fault
/// again at its next write, and disturb whoever else looks at its bits. So the writes happen in a
/// short-lived child of this process, whose page tables are its own.
#[must_use]
pub fn probe_soft_dirty() -> SoftDirtySupport {
    static PROBED: OnceLock<SoftDirtySupport> = OnceLock::new();
    PROBED
        .get_or_init(|| match probe() {
            Ok(None) => SoftDirtySupport::Supported,
            Ok(Some(reason)) => SoftDirtySupport::Unsupported {
                reason: reason.to_owned(),
            },
            Err(error) => SoftDirtySupport::Unsupported {
                reason: format!("the probe could not run: {error}"),
            },
        })
        .clone()
}

/// What is wrong with the bits, by the exit status of the child.
const FINDINGS: [&str; 4] = [
    "/proc/self/pagemap cannot be read",
    "/proc/self/clear_refs cannot be written",
    "a written page has no soft-dirty bit: the kernel was built without CONFIG_MEM_SOFT_DIRTY",
    "the soft-dirty bits do not clear",
];

fn probe() -> io::Result<Option<&'static str>> {
    let len = rustix::param::page_size();
    // SAFETY: a fresh mapping at an address of the kernel's choice; unmapped below.
    let page = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }?;
    // SAFETY: this process may have other threads, so until it exits the child does nothing but
    // system calls and writes to one page: no allocation, no lock, no unwinding.
    let outcome = match unsafe { libc::fork() } {
        0 => {
            // SAFETY: `page` is mapped, writable, and used by nobody else in this process.
            let status = unsafe { try_bits(page.cast(), len) };
            // SAFETY: ends the child without running anything that the parent has registered.
            unsafe { libc::_exit(status) }
        }
        -1 => Err(io::Error::last_os_error()),
        child => wait(child),
    };
    // SAFETY: the mapping made above; nothing refers to it any more.
    unsafe { munmap(page, len) }?;
    match outcome? {
        0 => Ok(None),
        status => usize::try_from(status - 1)
            .ok()
            .and_then(|index| FINDINGS.get(index))
            .map(|reason| Some(*reason))
            .ok_or_else(|| io::Error::other("its process was killed")),
    }
}

/// The exit status of a child; -1 if it was killed.
fn wait(child: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: writes one int, to `status`.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            let exited = libc::WIFEXITED(status);
            return Ok(if exited {
                libc::WEXITSTATUS(status)
            } else {
                -1
            });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What the child does: writes, looks, clears, looks, writes, looks. 0, or one more than the index
/// of the finding.
///
/// # Safety
/// `page` must point to a writable page of `len` bytes that nobody else uses. Async-signal-safe.
unsafe fn try_bits(page: *mut u8, len: usize) -> libc::c_int {
    const PAGEMAP: &CStr = c"/proc/self/pagemap";
    const CLEAR_REFS: &CStr = c"/proc/self/clear_refs";
    // SAFETY: system calls on constant strings and on locals that outlive them; the page is
    // writable as the caller promises.
    unsafe {
        let pagemap = libc::open(PAGEMAP.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        let clear_refs = libc::open(CLEAR_REFS.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        let at = (page as usize / len * 8) as libc::off_t;
        let is_dirty = || {
            let mut entry = 0_u64;
            let got = libc::pread(pagemap, (&raw mut entry).cast(), 8, at);
            (got == 8).then_some(entry & ENTRY_SOFT_DIRTY != 0)
        };
        page.write_volatile(1);
        match is_dirty() {
            None => return 1,
            Some(false) => return 3,
            Some(true) => {}
        }
        if libc::write(clear_refs, CLEAR.as_ptr().cast(), CLEAR.len()) != CLEAR.len() as isize {
            return 2;
        }
        if is_dirty() != Some(false) {
            return 4;
        }
        page.write_volatile(2);
        if is_dirty() == Some(true) { 0 } else { 3 }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Mutex};

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    /// Bits that a test sets.
    #[derive(Debug, Default)]
    pub(crate) struct Model(Mutex<BTreeSet<u64>>);

    impl SoftDirtyBits for Model {
        fn entries(&self, _: u32, first: u64, into: &mut [u64]) -> io::Result<()> {
            let dirty = self.0.lock().unwrap();
            for (entry, page) in into.iter_mut().zip(first..) {
                // The other bits are noise.
                *entry = page | u64::from(dirty.contains(&page)) << 55 | 1 << 63;
            }
            Ok(())
        }

        fn clear(&self, _: u32) -> io::Result<()> {
            self.0.lock().unwrap().clear();
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn exactly_the_anonymous_pages_that_were_written_are_found(
            anonymous in proptest::collection::btree_set(0_u64..40_000, 0..60),
            lengths in proptest::collection::vec(1_u64..9000, 60),
            dirty in proptest::collection::btree_set(0_u64..50_000, 0..3000),
        ) {
            let source = Source { pid: 1, address: 7 << 30, len: 50_000 * PAGE };
            let mut runs = Vec::new();
            let mut expected = Vec::new();
            let mut next = 0;
            for (first, length) in anonymous.into_iter().zip(lengths) {
                for page in first.max(next)..(first + length).min(50_000) {
                    push(&mut runs, page * PAGE, PAGE);
                    if dirty.contains(&page) {
                        push(&mut expected, page * PAGE, PAGE);
                    }
                }
                next = next.max(first + length);
            }
            let first = source.address / PAGE;
            let model = Model(Mutex::new(dirty.iter().map(|page| first + page).collect()));
            prop_assert_eq!(written_since(&model, &source, &runs).unwrap(), expected);
            model.clear(1).unwrap();
            prop_assert_eq!(written_since(&model, &source, &runs).unwrap(), vec![]);
        }
    }

    /// What the probe says is what the kernel's configuration says, where that can be read.
    #[test]
    fn the_probe_agrees_with_the_kernel() {
        let first = probe_soft_dirty();
        assert_eq!(probe_soft_dirty(), first);
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let config = std::fs::read_to_string(format!("/boot/config-{}", release.trim()));
        let Ok(config) = config else { return };
        let expected = config.contains("CONFIG_MEM_SOFT_DIRTY=y");
        assert_eq!(first == SoftDirtySupport::Supported, expected, "{first:?}");
    }

    #[test]
    fn the_kernels_entries_are_those_of_the_process() {
        let page = rustix::param::page_size();
        let local = std::hint::black_box(vec![1_u8; 3 * page]);
        let mut entries = [0; 2];
        let first = local.as_ptr() as u64 / page as u64 + 1;
        Kernel
            .entries(std::process::id(), first, &mut entries)
            .unwrap();
        assert!(
            entries.iter().all(|entry| entry >> 63 == 1),
            "present: {entries:x?}"
        );
        assert!(Kernel.entries(u32::MAX / 2, first, &mut entries).is_err());
        assert!(Kernel.clear(u32::MAX / 2).is_err());
    }
}
