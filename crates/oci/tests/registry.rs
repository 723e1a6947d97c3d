//! A real registry on this machine, and images that the test pushes to it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use cubicle_image::Progress;
use cubicle_oci::{
    Auth, Config, Disk, Error, Found, ImageMap, Images, Limits, PULL, Resolved, UNPACK,
};
use support::{
    Entry,
    image::{Packed, TestImage, TestLayer, noise},
    proxy::Proxy,
    registry::Registry,
};
use tempfile::TempDir;

struct Place {
    directory: TempDir,
    images: Images,
}

impl Place {
    fn new() -> Place {
        Place::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Place {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config {
            dir: directory.path().join("images"),
            ..Config::default()
        };
        change(&mut config);
        let images = Images::open(config).unwrap();
        Place { directory, images }
    }

    async fn find(&self, name: &str) -> Found {
        match self.images.resolve(name, None).await.unwrap() {
            Resolved::Image(found) => found,
            Resolved::Recipe(recipe) => panic!("{name} is the recipe {recipe}"),
        }
    }

    async fn disk(&self, name: &str, mib: u32) -> Result<Disk, Error> {
        let found = self.find(name).await;
        let silent = Progress::silent();
        let image = self.images.pull(&found, None, &silent).await?;
        self.images.disk(&image, mib, &silent).await
    }

    /// All files but the lock, relative to the directory.
    fn files(&self) -> Vec<PathBuf> {
        let root = self.directory.path().join("images");
        files_in(&root)
    }
}

fn files_in(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs_err::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(root).unwrap().to_owned();
            if path.is_dir() {
                waiting.push(path);
            } else if relative != Path::new(".lock") {
                found.push(relative);
            }
        }
    }
    found.sort();
    found
}

/// Three layers, each packed in another way, that say something about one another.
fn image() -> TestImage {
    let lowest = [
        Entry::dir("bin/"),
        Entry::file("bin/serve", "#!/bin/sh\n").mode(0o4755),
        Entry::dir("etc"),
        Entry::file("etc/old", "old"),
        Entry::file("etc/kept", "kept").owner(12, 34),
        Entry::dir("cache"),
        Entry::file("cache/a", "a"),
        Entry::symlink("lib", "usr/lib"),
        Entry::dir("usr/lib"),
    ];
    let middle = [
        Entry::file("etc/.wh.old", ""),
        Entry::file("cache/.wh..wh..opq", ""),
        Entry::file("cache/b", "b"),
        Entry::file("lib/through-link", noise(10_000, 1)),
        Entry::hard_link("lib/second-name", "usr/lib/through-link"),
    ];
    let highest = [
        Entry::file("etc/new", "new").xattr("user.note", "hi"),
        Entry::device("null", b'3', 1, 3),
        Entry::new(b'6', "pipe"),
    ];
    TestImage::new(vec![
        TestLayer::new(&lowest, Packed::Gzip),
        TestLayer::new(&middle, Packed::Zstd),
        TestLayer::new(&highest, Packed::Plain),
    ])
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
    assert_eq!(place.files(), [Path::new(""); 0]);
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
    assert_eq!(place.files(), [Path::new(""); 0]);
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
        let is_partial = |path: &PathBuf| path.extension().is_some_and(|end| end == "partial");
        assert!(!place.files().iter().any(is_partial), "{:?}", place.files());

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
    assert_eq!(disks, [Path::new(""); 0]);
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
    assert_eq!(
        place
            .files()
            .iter()
            .filter(|path| path.extension().is_some())
            .count(),
        1
    );
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
        let blobs = place.directory.path().join("images/blobs/sha256");
        fs_err::write(blobs.join(format!("{}.partial", digest.hex())), &left).unwrap();
        place
            .disk(&format!("{}/app:v1", registry.host()), 64)
            .await
            .unwrap();
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
    assert_eq!(disks, [Path::new(""); 0]);
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
    registry
        .push("app", "v1", &TestImage::new(vec![layer]))
        .await;
    let name = format!("{}/app:v1", registry.host());
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
    assert_eq!(files_in(&images), [Path::new(""); 0]);
    assert!(!scratch.exists());
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_asked_for_and_checked() {
    let registry = support::secured::with_password("alice", "correct horse");
    let name = format!("{}/app:v1", registry.host());
    let mut pusher = support::registry::Pusher::new(format!("http://{}", registry.host()));
    pusher.auth = Some(("alice".into(), "correct horse".into()));
    pusher.push("app", "v1", &image()).await;
    check_credentials(&name, "alice", "correct horse").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_with_the_password() {
    let (registry, tokens) = support::secured::with_tokens("bob", "hunter2").await;
    let name = format!("{}/team/app:v1", registry.host());
    let mut pusher = support::registry::Pusher::new(format!("http://{}", registry.host()));
    pusher.auth = Some((tokens.for_everything(), String::new()));
    pusher.push("team/app", "v1", &image()).await;
    check_credentials(&name, "bob", "hunter2").await;
}

async fn check_credentials(name: &str, username: &str, password: &str) {
    let auth = |password: &str| Auth {
        username: username.to_owned(),
        password: password.to_owned(),
    };
    let place = Place::new();
    for (given, had) in [(None, false), (Some(auth("wrong")), true)] {
        let error = place
            .images
            .resolve(name, given.as_ref())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Unauthorized { had_credentials, .. }
            if *had_credentials == had),
            "{error:?}"
        );
        assert!(
            !format!("{error} {error:?}").contains("wrong\""),
            "{error:?}"
        );
    }
    let right = auth(password);
    let Resolved::Image(found) = place.images.resolve(name, Some(&right)).await.unwrap() else {
        panic!("it is an image");
    };
    let silent = Progress::silent();
    for given in [None, Some(auth("wrong"))] {
        let error = place.images.pull(&found, given.as_ref(), &silent).await;
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
        assert_eq!(place.files(), [Path::new(""); 0]);
    }
    let image = place
        .images
        .pull(&found, Some(&right), &silent)
        .await
        .unwrap();
    place.images.disk(&image, 64, &silent).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_ones_own_is_trusted_if_it_is_named() {
    let (registry, ca) = support::secured::with_tls();
    let mut pusher = support::registry::Pusher::new(format!("https://{}", registry.host()));
    pusher.client = ca.client();
    pusher.push("app", "v1", &image()).await;
    let name = format!("{}/app:v1", registry.host());

    let stranger = Place::new();
    let error = stranger.images.resolve(&name, None).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let place = Place::with(|config| config.ca_files = vec![ca.file()]);
    place.disk(&name, 64).await.unwrap();

    let config = Config {
        dir: place.directory.path().join("other"),
        ca_files: vec!["/etc/hostname".into()],
        ..Config::default()
    };
    let error = Images::open(config).unwrap_err();
    assert!(matches!(error, Error::Setting { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_and_the_map_lead_elsewhere() {
    let registry = Registry::start();
    let image = image();
    registry.push("hub/library/python", "3", &image).await;
    registry.push("local/node", "latest", &image).await;
    let host = registry.host();
    let nowhere = format!("127.0.0.1:{}", support::registry::free_port());
    let place = Place::with(|config| {
        config.mirrors = vec![
            format!("docker.io={nowhere}").parse().unwrap(),
            format!("docker.io={host}/hub").parse().unwrap(),
        ];
        let map = format!(
            r#"{{"node:*": "{host}/local/node", "debian": "recipe:base", "a": "b", "b": "a"}}"#
        );
        config.map = ImageMap::parse(&map, Path::new("/")).unwrap();
    });
    for name in [
        "python:3",
        "docker.io/library/python:3",
        "node:22",
        "docker.io/library/node:1",
    ] {
        assert_eq!(place.find(name).await.digest, image.digest(), "{name}");
    }
    place.disk("python:3", 64).await.unwrap();
    let recipe = place.images.resolve("debian", None).await.unwrap();
    assert!(matches!(recipe, Resolved::Recipe(name) if name == "base"));
    let error = place.images.resolve("a", None).await.unwrap_err();
    assert!(error.to_string().contains("circle"), "{error}");
    // Who asks for a digest gets that or nothing, whatever the map says.
    let other = format!("node:22@sha256:{}", "1".repeat(64));
    let error = place.images.resolve(&other, None).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error:?}");
}
