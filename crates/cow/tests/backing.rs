//! The loop-mounted image: made, adopted, grown, and taken down again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::{fs::File, path::Path};

use common::{DataDir, SMALL, loop_devices_of, mounts_below};
use cubicle_cow::{
    BackingConfig, Error, Store, StoreKind,
    backing::{self, Closed},
    reflink,
};

#[test]
fn an_image_is_made_mounted_adopted_and_unmounted() {
    let data = DataDir::new();
    let root = data.prepare();
    let info = root.info().unwrap();
    let StoreKind::Loop {
        image,
        device,
        size,
        allocated,
        direct_io,
    } = &info.kind
    else {
        panic!("/tmp of the machine that runs the tests has no reflinks, yet: {info:?}");
    };
    assert_eq!(image, &data.image());
    assert_eq!(*size, SMALL);
    assert!(
        *allocated < SMALL / 4,
        "a new image is sparse, {allocated} bytes are not"
    );
    assert!(direct_io);
    assert!(info.free_bytes > SMALL / 2 && info.total_bytes <= SMALL);
    assert!(root.support().is_reflink());
    assert!(reflink::probe(root.path()).unwrap().is_reflink());

    // Killed and started again: the same mount on the same device.
    let marker = root.path().join("marker");
    std::fs::write(&marker, "here").unwrap();
    std::mem::forget(root);
    let again = data.prepare();
    let StoreKind::Loop {
        device: adopted, ..
    } = again.info().unwrap().kind
    else {
        panic!()
    };
    assert_eq!(&adopted, device);
    assert_eq!(mounts_below(data.path()), 1);

    // What is in use stays mounted, as for a VM that outlives the server.
    let open = File::open(&marker).unwrap();
    assert_eq!(again.close().unwrap(), Closed::InUse);
    let third = data.prepare();
    drop(open);
    assert_eq!(third.clone().close().unwrap(), Closed::Unmounted);
    assert_eq!(third.close().unwrap(), Closed::NotMounted);
    assert_eq!(
        (
            mounts_below(data.path()),
            loop_devices_of(data.path()).len()
        ),
        (0, 0)
    );

    // And the content is there after the next mount.
    let fourth = data.prepare();
    assert_eq!(
        std::fs::read_to_string(fourth.path().join("marker")).unwrap(),
        "here"
    );
}

#[test]
fn many_at_once_share_one_mount() {
    let data = DataDir::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| data.prepare());
        }
    });
    assert_eq!(mounts_below(data.path()), 1);
    assert_eq!(loop_devices_of(data.path()).len(), 1);
}

#[test]
fn the_image_grows_until_its_limit() {
    let mut data = DataDir::new();
    data.config.max_size = 3 << 30;
    let root = data.prepare();
    std::fs::write(root.path().join("kept"), vec![7; 1 << 20]).unwrap();
    assert!(root.ensure_free(100 << 20).unwrap());
    assert_eq!(
        root.info().unwrap().total_bytes.next_multiple_of(SMALL),
        SMALL,
        "nothing to do"
    );
    assert!(root.ensure_free(1 << 30).unwrap());
    let info = root.info().unwrap();
    assert!(info.free_bytes >= 1 << 30, "{info:?}");
    assert!(info.available_bytes > info.free_bytes);
    assert!(!root.ensure_free(10 << 30).unwrap(), "there is a limit");
    let StoreKind::Loop { size, .. } = root.info().unwrap().kind else {
        panic!()
    };
    assert_eq!(size, 3 << 30);
    // The new room is real, and the old content is intact.
    let big = File::create(root.path().join("big")).unwrap();
    rustix::fs::fallocate(&big, rustix::fs::FallocateFlags::empty(), 0, 2 << 30).unwrap();
    assert!(
        std::fs::read(root.path().join("kept"))
            .unwrap()
            .iter()
            .all(|byte| *byte == 7)
    );
}

#[test]
fn deleting_gives_space_back_to_the_host() {
    let data = DataDir::new();
    let root = data.prepare();
    let allocated = || match root.info().unwrap().kind {
        StoreKind::Loop { allocated, .. } => allocated,
        other => panic!("{other:?}"),
    };
    let before = allocated();
    let path = root.path().join("data");
    let file = File::create(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![3; 100 << 20], 0).unwrap();
    file.sync_all().unwrap();
    let full = allocated();
    assert!(
        full >= before + (96 << 20),
        "{before} bytes were taken before, {full} are now"
    );
    drop(file);
    std::fs::remove_file(&path).unwrap();
    // Discards follow the log; unmounting waits for both.
    assert_eq!(root.clone().close().unwrap(), Closed::Unmounted);
    let root = data.prepare();
    let StoreKind::Loop { allocated, .. } = root.info().unwrap().kind else {
        panic!()
    };
    assert!(
        allocated < before + (16 << 20),
        "{allocated} bytes are still taken, {before} before"
    );
}

#[test]
fn a_foreign_mount_is_refused() {
    let data = DataDir::new();
    let point = data.path().join("store");
    std::fs::create_dir(&point).unwrap();
    let none = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &point, "tmpfs", none, None).unwrap();
    let error = backing::prepare(data.path(), &data.config).unwrap_err();
    rustix::mount::unmount(&point, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("tmpfs"), "{error}");
}

#[test]
fn no_room_for_an_image_is_said() {
    let data = DataDir::new();
    let config = BackingConfig {
        host_reserve: u64::MAX,
        ..data.config.clone()
    };
    let error = backing::prepare(data.path(), &config).unwrap_err();
    assert!(error.is_disk_full(), "{error}");
    assert!(!data.image().exists());
}

#[test]
fn without_any_other_way_copies_are_made_only_when_allowed() {
    // procfs-like places cannot be a data directory; an unmountable image is made by hand: a
    // directory where mkfs.xfs should write.
    let data = DataDir::new();
    std::fs::create_dir_all(data.path().join("store.xfs.tmp/occupied")).unwrap();
    let error = backing::prepare(data.path(), &data.config).unwrap_err();
    assert!(matches!(error, Error::NoReflink { .. }), "{error}");
    let config = BackingConfig {
        allow_copy: true,
        ..data.config.clone()
    };
    let root = backing::prepare(data.path(), &config).unwrap();
    let info = root.info().unwrap();
    assert!(
        matches!(&info.kind, StoreKind::Copy { reason, .. } if !reason.is_empty()),
        "{info:?}"
    );
    assert!(!root.support().is_reflink());
    std::fs::remove_dir_all(data.path().join("store.xfs.tmp")).unwrap();
    std::fs::remove_dir_all(root.path()).unwrap();
}

#[tokio::test]
async fn a_native_reflink_file_system_is_used_as_it_is() {
    let outer = DataDir::new();
    let root = outer.prepare();
    let inside: &Path = &root.path().join("data");
    let native = backing::prepare(inside, &outer.config).unwrap();
    assert_eq!(
        native.info().unwrap().kind,
        StoreKind::Native {
            filesystem: "xfs".to_owned()
        }
    );
    assert!(!inside.join("store.xfs").exists());
    let (store, _) = Store::open(&native).await.unwrap();
    assert!(matches!(
        Store::open(&native).await,
        Err(Error::Locked { .. })
    ));
    store.close().await;
    assert_eq!(native.close().unwrap(), Closed::NotMounted);
}
