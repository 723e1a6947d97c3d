//! Images of the sizes that people have.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::{
    io::{self, Read, Write},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Command,
    time::Instant,
};

use cubicle_image::Progress;
use cubicle_oci::{Config, Digest, Disk, ImageMap, Images, Resolved};
use support::{
    Entry,
    image::{Packed, TestImage, TestLayer, descriptor},
    tar,
};

async fn disk_of(place: &Path, mib: u32) -> Disk {
    let images = Images::open(Config {
        dir: place.join("images"),
        map: ImageMap::parse("\"large\" = \"oci:layout\"", place).unwrap(),
        ..Config::default()
    })
    .unwrap();
    let Resolved::Image(found) = images.resolve("large", None).await.unwrap() else {
        panic!("it is an image");
    };
    let silent = Progress::silent();
    let start = Instant::now();
    let image = images.pull(&found, None, &silent).await.unwrap();
    println!("pulled in {:.1} s", start.elapsed().as_secs_f32());
    let start = Instant::now();
    let disk = images.disk(&image, mib, &silent).await.unwrap();
    let used = disk.used_bytes >> 20;
    println!(
        "on a disk in {:.1} s, {used} MiB",
        start.elapsed().as_secs_f32()
    );
    disk
}

fn check(disk: &Disk) -> String {
    let mut e2fsck = Command::new("e2fsck");
    let output = e2fsck.args(["-f", "-n"]).arg(&disk.image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_small_files() {
    let place = tempfile::tempdir().unwrap();
    // A disk of 1 GiB has 65 536 inodes unless more are asked for.
    let mut entries = Vec::new();
    for directory in 0..1000 {
        entries.push(Entry::dir(format!("node_modules/{directory}")));
        for file in 0..100 {
            let name = format!("node_modules/{directory}/{file}.js");
            entries.push(Entry::file(name, format!("module.exports = {file}")));
        }
    }
    let layer = TestLayer::new(&entries, Packed::Zstd);
    TestImage::new(vec![layer]).write_layout(&place.path().join("layout"), &["latest"]);
    let disk = disk_of(place.path(), 1024).await;
    let report = check(&disk);
    let files: u64 = report
        .lines()
        .find_map(|line| line.split_once(": ")?.1.split_once('/')?.0.parse().ok())
        .unwrap();
    assert!(files > 101_000, "{report}");
}

/// 5 GB of data with little in it, as it is in a layer: what is unpacked is as large, what is on
/// disk is not.
struct Large {
    left: u64,
}

const LENGTH: u64 = 5_000_000_000;

impl Read for Large {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.left).unwrap().min(buffer.len());
        buffer[..n].fill(0);
        // A block of data in each MiB.
        let position = LENGTH - self.left;
        if position.is_multiple_of(1 << 20) && n > 0 {
            buffer[0] = 1 + (position >> 20) as u8 % 250;
        }
        self.left -= n as u64;
        Ok(n)
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes without optimisation"]
async fn a_layer_of_five_gigabytes() {
    let place = tempfile::tempdir().unwrap();
    let blobs = place.path().join("layout/blobs/sha256");
    fs_err::create_dir_all(&blobs).unwrap();
    let packed = place.path().join("packed");
    let out = fs_err::File::create(&packed).unwrap();
    let mut encoder = zstd::stream::write::Encoder::new(out, 1).unwrap();
    let mut header = Entry::file("data", "");
    header.size = Some(LENGTH);
    let whole = tar(&[header]);
    let mut content = whole[..512]
        .chain(Large { left: LENGTH })
        .chain(io::repeat(0).take(LENGTH.wrapping_neg() % 512 + 1024));
    let mut hasher = Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut to_hash = hasher.stdin.take().unwrap();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let mut n = 0;
        while n < buffer.len() {
            match content.read(&mut buffer[n..]).unwrap() {
                0 => break,
                more => n += more,
            }
        }
        if n == 0 {
            break;
        }
        encoder.write_all(&buffer[..n]).unwrap();
        to_hash.write_all(&buffer[..n]).unwrap();
    }
    drop(to_hash);
    encoder.finish().unwrap();
    let hash = hasher.wait_with_output().unwrap().stdout;
    let hash = format!("sha256:{}", std::str::from_utf8(&hash[..64]).unwrap());

    let blob = fs_err::read(&packed).unwrap();
    let config = serde_json::json!({
        "os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [hash]},
    })
    .to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+zstd", &blob)],
    })
    .to_string();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [descriptor("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes())],
    });
    for bytes in [config.as_bytes(), manifest.as_bytes(), &blob] {
        fs_err::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();
    }
    fs_err::write(place.path().join("layout/index.json"), index.to_string()).unwrap();

    let disk = disk_of(place.path(), 6144).await;
    check(&disk);
    let mut debugfs = Command::new("debugfs");
    let stat = debugfs
        .args(["-R", "stat /data"])
        .arg(&disk.image)
        .output()
        .unwrap();
    let stat = String::from_utf8(stat.stdout).unwrap();
    assert!(stat.contains(&format!("Size: {LENGTH}")), "{stat}");
    let meta = fs_err::metadata(&disk.image).unwrap();
    assert_eq!(meta.size(), 6 << 30);
    assert!(meta.blocks() * 512 < 200 << 20, "{}", meta.blocks() * 512);
}
