//! Pages that the host has swapped out are as written as any other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{ffi::CString, fs::File, os::fd::AsRawFd as _, os::unix::fs::FileExt as _, path::Path};

use common::{
    DataDir,
    model::{self, Model, PAGE, PAGES, Write, base_image, same},
};
use cubicle_cow::memory::{Base, Buffer, Source, TierChoice, Tracker, capture_all, write_image};

#[test]
fn model_process() {
    model::play();
}

/// Swap space of the machine's, or some that is made for the test and goes with it.
struct Swap(Option<CString>);

impl Swap {
    fn new(dir: &Path) -> std::io::Result<Self> {
        if std::fs::read_to_string("/proc/swaps")?.lines().count() > 1 {
            return Ok(Self(None));
        }
        const SPACE: u32 = 4096;
        let path = dir.join("swap");
        let file = File::create(&path)?;
        // `union swap_header` of linux/swap.h: version, last page, bad pages; and the signature.
        let mut header = vec![0; PAGE];
        header[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        header[1028..1032].copy_from_slice(&(SPACE - 1).to_ne_bytes());
        header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
        file.write_all_at(&vec![0; SPACE as usize * PAGE], 0)?;
        file.write_all_at(&header, 0)?;
        file.sync_all()?;
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a path that ends with a zero.
        match unsafe { libc::swapon(path.as_ptr(), 0) } {
            0 => Ok(Self(Some(path))),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // SAFETY: a path that ends with a zero.
            let done = unsafe { libc::swapoff(path.as_ptr()) };
            assert!(done == 0 || std::thread::panicking());
        }
    }
}

/// Has the kernel write the memory of another process to its swap space.
fn page_out(source: &Source) {
    let pid = rustix::process::Pid::from_raw(source.pid as i32).unwrap();
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let range = libc::iovec {
        iov_base: source.address as *mut libc::c_void,
        iov_len: source.len as usize,
    };
    // SAFETY: advice about a range of the other process, which changes none of its content.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            &raw const range,
            1_usize,
            libc::MADV_PAGEOUT,
            0_u32,
        )
    };
    assert_eq!(
        done,
        source.len as i64,
        "{}",
        std::io::Error::last_os_error()
    );
}

/// How many pages are not in memory but in swap space.
fn swapped(source: &Source) -> usize {
    let mut entries = vec![0; PAGES * 8];
    let first = source.address / PAGE as u64 * 8;
    File::open(format!("/proc/{}/pagemap", source.pid))
        .unwrap()
        .read_exact_at(&mut entries, first)
        .unwrap();
    entries
        .chunks(8)
        .filter(|entry| entry[7] & 0x40 != 0)
        .count()
}

#[test]
fn swapped_pages_count() {
    // On a disk: not every file system can hold swap space.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let _swap = match Swap::new(dir.path()) {
        Ok(swap) => swap,
        Err(error) => return eprintln!("not tested: there is no swap space to be had: {error}"),
    };
    let data = DataDir::new();
    let root = data.prepare();
    let start = root.path().join("start.img");
    base_image(&start);
    let mut model = Model::start(&start);
    for page in (0..PAGES).step_by(3) {
        model.apply(page, Write::Fill(page as u8));
        model.apply(page, Write::Byte(17, 99));
    }
    let mut tracker = Tracker::new(TierChoice::AnonymousPages).unwrap();
    let resident = tracker.estimate(&model.source).unwrap().bytes;
    page_out(&model.source);
    let out = swapped(&model.source);
    assert!(out > PAGES / 6, "{out} pages were swapped out");
    assert_eq!(tracker.estimate(&model.source).unwrap().bytes, resident);

    let dirty = tracker.capture(&model.source, Buffer::new()).unwrap();
    assert_eq!(dirty.bytes(), resident);
    let image = root.path().join("image.img");
    write_image(root.support(), start.as_path(), &dirty, &image).unwrap();
    same(&image, &model.content);
    page_out(&model.source);
    let all = capture_all(&model.source, Buffer::new()).unwrap();
    let full = root.path().join("full.img");
    write_image(root.support(), Base::Zeros, &all, &full).unwrap();
    same(&full, &model.content);
}
