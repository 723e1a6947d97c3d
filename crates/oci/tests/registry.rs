//! A real registry on this machine, and images that the test pushes to it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use cubicle_image::Progress;
use cubicle_oci::{Config, Digest, Error, ImageMap, Images, Limits, PULL, Resolved, UNPACK};
use support::{
    Entry,
    image::{Packed, TestImage, TestLayer, noise},
    place::{Place, files_in, image},
    proxy::Proxy,
    registry::Registry,
};

/// Where what has arrived of a blob is kept.
fn partial(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(format!("{}.partial", digest.hex()))
}

fn run(program: &str, arguments: &[&str], image: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(image)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn by_tag_by_digest_by_both_and_from_files_it_is_one_disk() {
    let registry = Registry::start();
    let image = image();
    registry.push("team/app", "v1", &image).await;
    let (host, digest) = (registry.host(), image.digest());
    let place = Place::with(|config| {
        let files = config.dir.with_file_name("files");
        image.write_layout(&files.join("layout"), &["v0", "v1"]);
        image.write_archive(&files.join("saved.tar"), "team/app:v1");
        let map = r#"
            "from-layout" = "oci:layout:v1"
            "from-archive" = "docker-archive:saved.tar:team/app:v1"
            "#;
        config.map = ImageMap::parse(map, &files).unwrap();
    });
    let (progress, mut events) = Progress::channel();
    let found = place.find(&format!("{host}/team/app:v1")).await;
    assert_eq!(found.digest, digest);
    let pulled = place.images.pull(&found, None, &progress).await.unwrap();
    assert_eq!(pulled.config.user.as_deref(), Some("1000:1000"));
    assert_eq!(pulled.config.workdir.as_deref(), Some("/srv"));
    assert_eq!(pulled.config.entrypoint, ["/bin/serve"]);
    assert_eq!(pulled.config.cmd, ["--port", "80"]);
    assert_eq!(pulled.config.ports, [80]);
    assert_eq!(
        pulled.config.env[1],
        ("GREETING".into(), "hello world".into())
    );
    let disk = place.images.disk(&pulled, 128, &progress).await.unwrap();
    drop(progress);
    let mut steps = Vec::new();
    while let Some(event) = events.recv().await {
        if event.fraction == Some(1.0) {
            steps.push(event.step.name());
        }
    }
    assert_eq!(steps, [PULL.name(), UNPACK.name(), "disk-image"]);

    run("e2fsck", &["-f", "-n"], &disk.image);
    let debugfs = |command: &str| run("debugfs", &["-R", command], &disk.image);
    assert_eq!(debugfs("cat /etc/kept"), "kept");
    assert_eq!(debugfs("cat /cache/b"), "b");
    assert!(!debugfs("ls /etc").contains("old") && !debugfs("ls /cache").contains(" a "));
    assert!(debugfs("stat /etc/kept").contains("User:    12   Group:    34"));
    assert!(debugfs("stat /bin/serve").contains("Mode:  04755"));
    assert!(debugfs("stat /usr/lib/second-name").contains("Links: 2"));
    assert!(debugfs("stat /null").contains("Type: character special"));
    assert!(debugfs("ea_list /etc/new").contains("user.note"));

    for name in [
        format!("{host}/team/app@{digest}"),
        format!("{host}/team/app:v1@{digest}"),
        "from-layout".to_owned(),
        format!("from-layout@{digest}"),
        "from-archive".to_owned(),
    ] {
        let same = place.disk(&name, 128).await.unwrap();
        assert_eq!(same, disk, "{name}");
    }
    let larger = place.disk("from-layout", 192).await.unwrap();
    assert_ne!(larger.fingerprint, disk.fingerprint);

    // Nothing that is in use is removed, everything else is.
    let removed = place
        .images
        .remove_unused(std::time::Duration::ZERO)
        .await
        .unwrap();
    // The archive's layers are other blobs with the same content, but one that was plain before.
    assert_eq!((removed.disks, removed.blobs), (2, 2));
    drop(pulled);
    let removed = place
        .images
        .remove_unused(std::time::Duration::ZERO)
        .await
        .unwrap();
    assert_eq!((removed.disks, removed.blobs), (0, 4));
    assert_eq!(place.files(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_index_it_is_the_image_for_this_machine() {
    let registry = Registry::start();
    let ours = image();
    let layer = || TestLayer::new(&[Entry::file("arm", "arm")], Packed::Gzip);
    let other = TestImage::for_platform(vec![layer()], "arm64");
    let platforms = [(&other, "linux", "arm64"), (&ours, "linux", "amd64")];
    let index = registry.push_index("multi", "latest", &platforms).await;
    registry
        .push_index("arm", "latest", &[(&other, "linux", "arm64")])
        .await;
    registry.push("plain-arm", "latest", &other).await;
    let host = registry.host();
    let place = Place::new();
    for name in [
        format!("{host}/multi"),
        format!("{host}/multi:latest"),
        format!("{host}/multi@{index}"),
        format!("{host}/multi:latest@{index}"),
        format!("{host}/multi@{}", ours.digest()),
    ] {
        assert_eq!(place.find(&name).await.digest, ours.digest(), "{name}");
    }
    let error = place.images.resolve(&format!("{host}/arm"), None).await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, Error::Platform { found, .. } if found == "linux/arm64"),
        "{error}"
    );
    let error = place
        .disk(&format!("{host}/plain-arm"), 64)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Platform { found, .. } if found == "linux/arm64"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_to_be_missing() {
    let registry = Registry::start();
    registry.push("app", "v1", &image()).await;
    let host = registry.host();
    let place = Place::new();
    let nothing = format!("sha256:{}", "0".repeat(64));
    for name in [
        format!("{host}/app:v2"),
        format!("{host}/nobody/knows"),
        format!("{host}/app@{nothing}"),
        format!("{host}/app:v1@{nothing}"),
    ] {
        let error = place.images.resolve(&name, None).await.unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{name}: {error:?}");
    }
    for name in ["", "x/UPPER", "a b", "x:y:z", "../etc/passwd", "oci:/etc"] {
        let error = place.images.resolve(name, None).await.unwrap_err();
        assert!(matches!(error, Error::Name { .. }), "{name}: {error:?}");
    }
    let port = support::registry::free_port();
    let error = place
        .images
        .resolve(&format!("127.0.0.1:{port}/x"), None)
        .await;
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error:?}");
    assert!(error.to_string().contains("refused"), "{error}");
    assert_eq!(place.files(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_cut_short_or_changed_is_refused_and_gone() {
    let registry = Registry::start();
    let place = Place::new();
    for (name, packed) in [("a", Packed::Gzip), ("b", Packed::Plain)] {
        let content = [Entry::file("data", noise(3_000_000, name.len() as u64))];
        let layer = TestLayer::new(&content, packed);
        let image = TestImage::new(vec![layer]);
        registry.push(name, "v1", &image).await;
        let digest = image.layers[0].digest();
        let file = registry.blob_file(&digest);
        let whole = fs_err::read(&file).unwrap();
        let reference = format!("{}/{name}:v1", registry.host());

        fs_err::write(&file, &whole[..whole.len() - 1000]).unwrap();
        let error = place.disk(&reference, 64).await.unwrap_err();
        let Error::Truncated {
            digest: named,
            expected,
            actual,
        } = &error
        else {
            panic!("{error:?}");
        };
        assert_eq!((named, *expected), (&digest, whole.len() as u64));
        assert_eq!(*actual, whole.len() as u64 - 1000, "{error}");
        // The configuration, which was on its way beside it, may be there in part.
        let partial = partial(&digest);
        assert!(!place.files().contains(&partial), "{:?}", place.files());

        let mut changed = whole.clone();
        changed[2_000_000] ^= 1;
        fs_err::write(&file, &changed).unwrap();
        let error = place.disk(&reference, 64).await.unwrap_err();
        assert!(
            matches!(&error, Error::Tampered { expected, actual: Some(_) }
            if *expected == digest),
            "{error:?}"
        );

        fs_err::write(&file, [&*whole, b"more"].concat()).unwrap();
        let error = place.disk(&reference, 64).await.unwrap_err();
        assert!(
            matches!(&error, Error::Tampered { actual: None, .. }),
            "{error:?}"
        );
        let there = Path::new("blobs/sha256").join(digest.hex());
        assert!(!place.files().contains(&there), "{:?}", place.files());

        fs_err::write(&file, &whole).unwrap();
        place.disk(&reference, 64).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_changes_on_this_disk_is_noticed() {
    let registry = Registry::start();
    let layer = TestLayer::new(&[Entry::file("data", noise(100_000, 1))], Packed::Gzip);
    let image = TestImage::new(vec![layer]);
    registry.push("app", "v1", &image).await;
    let place = Place::new();
    let name = format!("{}/app:v1", registry.host());
    let found = place.find(&name).await;
    let silent = Progress::silent();
    let pulled = place.images.pull(&found, None, &silent).await.unwrap();
    let digest = image.layers[0].digest();
    let blob = place
        .directory
        .path()
        .join("images/blobs/sha256")
        .join(digest.hex());
    let mut bytes = fs_err::read(&blob).unwrap();
    bytes[50_000] ^= 1;
    fs_err::write(&blob, bytes).unwrap();
    let error = place.images.disk(&pulled, 64, &silent).await.unwrap_err();
    assert!(matches!(error, Error::Tampered { .. }), "{error:?}");
    assert!(!blob.exists());
    place.disk(&name, 64).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_lies_about_its_layers_is_refused() {
    let registry = Registry::start();
    let mut image = image();
    // What is promised is another image's content; its disk must not become this one's.
    image.layers[0] = TestLayer::new(&[Entry::file("evil", "evil")], Packed::Gzip);
    image.write_manifest();
    registry.push("app", "v1", &image).await;
    let place = Place::new();
    let error = place.disk(&format!("{}/app:v1", registry.host()), 64).await;
    let error = error.unwrap_err();
    assert!(
        error.to_string().contains("promises other content"),
        "{error}"
    );
    let disks = files_in(&place.directory.path().join("images/disks"));
    assert_eq!(disks, Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_gone_on_with() {
    let registry = Registry::start();
    let layer = TestLayer::new(&[Entry::file("data", noise(8_000_000, 3))], Packed::Plain);
    let image = TestImage::new(vec![layer]);
    registry.push("app", "v1", &image).await;
    let size = image.layers[0].blob.len() as u64;

    // Five times it breaks, after 1.5 MB each.
    let proxy = Proxy::start(registry.port, 5, 1_500_000).await;
    let name = format!("127.0.0.1:{}/app:v1", proxy.port);
    let place = Place::new();
    place.disk(&name, 64).await.unwrap();
    assert!(proxy.bytes() < size * 5 / 4, "{} of {size}", proxy.bytes());
    assert_eq!(proxy.cuts_left(), 0);

    // It breaks for good; what has come is used the next time, also by another process.
    let place = Place::new();
    let proxy = Proxy::start(registry.port, u32::MAX, 6_000_000).await;
    let name = format!("127.0.0.1:{}/app:v1", proxy.port);
    let found = place.find(&name).await;
    proxy.refuse_from_now_on_after(1);
    let silent = Progress::silent();
    let error = place.images.pull(&found, None, &silent).await.unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error:?}");
    let partial = partial(&image.layers[0].digest());
    assert!(place.files().contains(&partial), "{:?}", place.files());
    let again = Images::open(Config {
        dir: place.directory.path().join("images"),
        ..Config::default()
    })
    .unwrap();
    let proxy = Proxy::start(registry.port, 0, 0).await;
    let name = format!("127.0.0.1:{}/app:v1", proxy.port);
    let Resolved::Image(found) = again.resolve(&name, None).await.unwrap() else {
        panic!("it is an image");
    };
    again.pull(&found, None, &silent).await.unwrap();
    assert!(proxy.bytes() < size / 2, "{} of {size}", proxy.bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_of_a_blob_need_not_be_right() {
    let registry = Registry::start();
    let layer = TestLayer::new(&[Entry::file("data", noise(2_000_000, 4))], Packed::Plain);
    let image = TestImage::new(vec![layer]);
    registry.push("app", "v1", &image).await;
    let (blob, digest) = (&image.layers[0].blob, image.layers[0].digest());
    for left in [
        blob[..500_000].to_vec(),
        vec![0; 500_000],
        vec![0; 9_000_000],
        [blob, &b"x"[..]].concat(),
        blob.clone(),
        Vec::new(),
    ] {
        let place = Place::new();
        let images = place.directory.path().join("images");
        fs_err::write(images.join(partial(&digest)), &left).unwrap();
        place
            .disk(&format!("{}/app:v1", registry.host()), 64)
            .await
            .unwrap();
        let blobs = images.join("blobs/sha256");
        assert_eq!(fs_err::read(blobs.join(digest.hex())).unwrap(), *blob);
        assert!(
            place
                .files()
                .iter()
                .all(|path| path.extension().is_none_or(|e| e != "partial"))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_at_the_same_time_gets_the_same_and_it_comes_once() {
    let registry = Registry::start();
    let layer = |seed| {
        TestLayer::new(
            &[Entry::file("data", noise(2_000_000, seed))],
            Packed::Plain,
        )
    };
    // The same layer twice in one image is one blob as well.
    let image = TestImage::new(vec![layer(5), layer(6), layer(5)]);
    registry.push("app", "v1", &image).await;
    let proxy = Proxy::start(registry.port, 0, 0).await;
    let name = format!("127.0.0.1:{}/app:v1", proxy.port);
    let place = Place::new();
    let disks = futures::future::join_all((0..10).map(|_| place.disk(&name, 64))).await;
    let first = disks[0].as_ref().unwrap();
    assert!(disks.iter().all(|disk| disk.as_ref().unwrap() == first));
    assert!(proxy.bytes() < 4_500_000, "{}", proxy.bytes());
    let kept: Vec<_> = place.files();
    assert_eq!(
        kept.len(),
        3 + 2,
        "three blobs, a disk and its description: {kept:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_nobody_waits_for_stops_and_is_gone_on_with() {
    let registry = Registry::start();
    let layer = TestLayer::new(&[Entry::file("data", noise(4_000_000, 7))], Packed::Plain);
    let image = TestImage::new(vec![layer]);
    registry.push("app", "v1", &image).await;
    let place = Place::new();
    let name = format!("{}/app:v1", registry.host());
    for patience in [1, 5, 20, 50] {
        let patience = std::time::Duration::from_millis(patience);
        let _ = tokio::time::timeout(patience, place.disk(&name, 64)).await;
    }
    place.disk(&name, 64).await.unwrap();
    let hidden = |path: &PathBuf| path.to_str().unwrap().contains("/.");
    // Whoever was dropped while it unpacked removes what it had before its lock is free.
    assert!(!place.files().iter().any(hidden), "{:?}", place.files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_too_small_says_how_large_it_should_be() {
    let registry = Registry::start();
    let layer = TestLayer::new(&[Entry::file("data", noise(70 << 20, 8))], Packed::Plain);
    registry
        .push("app", "v1", &TestImage::new(vec![layer]))
        .await;
    let place = Place::new();
    let name = format!("{}/app:v1", registry.host());
    let error = place.disk(&name, 64).await.unwrap_err();
    let Error::DoesNotFit {
        needed_mib,
        disk_mib: 64,
    } = error
    else {
        panic!("{error:?}");
    };
    assert!((80..200).contains(&needed_mib), "{needed_mib}");
    let disks = files_in(&place.directory.path().join("images/disks"));
    assert_eq!(disks, Vec::<PathBuf>::new());
    let enough = u32::try_from(needed_mib).unwrap();
    let disk = place.disk(&name, enough).await.unwrap();
    run("e2fsck", &["-f", "-n"], &disk.image);
    assert!(disk.used_bytes < 100 << 20, "{}", disk.used_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_beyond_the_limits_is_refused() {
    let registry = Registry::start();
    registry.push("app", "v1", &image()).await;
    let name = format!("{}/app:v1", registry.host());
    for limits in [
        Limits {
            bytes: 9_000,
            ..Limits::default()
        },
        Limits {
            entries: 10,
            ..Limits::default()
        },
    ] {
        let place = Place::with(|config| config.limits = limits);
        let error = place.disk(&name, 64).await.unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_called_that_and_nothing_is_left_on_it() {
    let registry = Registry::start();
    let layer = TestLayer::new(&[Entry::file("data", noise(6 << 20, 9))], Packed::Gzip);
    let image = TestImage::new(vec![layer]);
    registry.push("app", "v1", &image).await;
    let name = format!("{}/app:v1", registry.host());
    // It was on its way beside the layer, and is kept for the next time.
    let config = partial(&Digest::of(&image.config));
    for (room, during) in [("4m", "the pull"), ("10m", "unpacking"), ("14m", "packing")] {
        let small = support::SmallDisk::new(room);
        let place = Place::with(|config| config.dir = small.path().join("images"));
        let error = place.disk(&name, 512).await.unwrap_err();
        assert!(
            matches!(error, Error::DiskFull { .. }),
            "{during}: {error:?}"
        );
        let left = files_in(&small.path().join("images"));
        let left: Vec<_> = left
            .iter()
            .filter(|path| path.extension().is_some() || path.starts_with("disks"))
            .filter(|path| **path != config)
            .collect();
        assert!(left.is_empty(), "{during}: {left:?}");
        drop(place);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_removes_what_a_crash_left() {
    let place = Place::new();
    let images = place.directory.path().join("images");
    let Place {
        directory,
        images: open,
    } = place;
    let scratch = images.join("disks/.0123456789abcdef.scratch");
    fs_err::create_dir_all(scratch.join("tree/a/b")).unwrap();
    fs_err::write(images.join("disks/.0123456789abcdef.img.partial"), "x").unwrap();
    let config = || Config {
        dir: images.clone(),
        ..Config::default()
    };
    // Not while somebody else is at it, whose work it may be.
    drop(Images::open(config()).unwrap());
    assert!(scratch.exists());
    drop(open);
    drop(Images::open(config()).unwrap());
    assert_eq!(files_in(&images), Vec::<PathBuf>::new());
    assert!(!scratch.exists());
    drop(directory);
}
