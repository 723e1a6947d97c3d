//! The image seen from two mount namespaces. A process of its own: a new namespace begins with a copy
//! of all mounts, and would keep those of other tests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use common::{DataDir, loop_devices_of, mounts_below};
use cubicle_cow::backing::Closed;
use rustix::{
    mount::{MountPropagationFlags, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

#[test]
fn another_mount_namespace_gets_the_same_device() {
    let data = DataDir::new();
    std::thread::scope(|scope| {
        let (ready, begun) = std::sync::mpsc::channel();
        let (finish, end) = std::sync::mpsc::channel::<()>();
        let data = &data;
        let elsewhere = scope.spawn(move || {
            // SAFETY: a mount namespace says nothing about memory; the thread ends with the test.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            let root = data.prepare();
            std::fs::write(root.path().join("there"), "1").unwrap();
            ready.send(()).unwrap();
            end.recv().unwrap();
            assert_eq!(
                std::fs::read_to_string(root.path().join("here")).unwrap(),
                "2"
            );
            assert_eq!(root.close().unwrap(), Closed::Unmounted);
        });
        begun.recv().unwrap();
        assert_eq!(mounts_below(data.path()), 0, "the mount is not seen here");
        // Attached a second time, the two mounts would destroy the file system.
        let root = data.prepare();
        assert_eq!(loop_devices_of(data.path()).len(), 1);
        assert_eq!(
            std::fs::read_to_string(root.path().join("there")).unwrap(),
            "1"
        );
        std::fs::write(root.path().join("here"), "2").unwrap();
        finish.send(()).unwrap();
        elsewhere.join().unwrap();
    });
}
