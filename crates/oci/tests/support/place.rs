//! Where a test keeps its images, and what they are.

use std::path::{Path, PathBuf};

use cubicle_image::Progress;
use cubicle_oci::{Config, Disk, Error, Found, Images, Resolved};
use tempfile::TempDir;

use super::{
    Entry,
    image::{Packed, TestImage, TestLayer, noise},
};

pub(crate) struct Place {
    pub(crate) directory: TempDir,
    pub(crate) images: Images,
}

impl Place {
    pub(crate) fn new() -> Place {
        Place::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Place {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config {
            dir: directory.path().join("images"),
            ..Config::default()
        };
        change(&mut config);
        let images = Images::open(config).unwrap();
        Place { directory, images }
    }

    pub(crate) async fn find(&self, name: &str) -> Found {
        match self.images.resolve(name, None).await.unwrap() {
            Resolved::Image(found) => found,
            Resolved::Recipe(recipe) => panic!("{name} is the recipe {recipe}"),
        }
    }

    pub(crate) async fn disk(&self, name: &str, mib: u32) -> Result<Disk, Error> {
        let found = self.find(name).await;
        let silent = Progress::silent();
        let image = self.images.pull(&found, None, &silent).await?;
        self.images.disk(&image, mib, &silent).await
    }

    /// All files but the lock, relative to the directory.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let root = self.directory.path().join("images");
        files_in(&root)
    }
}

pub(crate) fn files_in(root: &Path) -> Vec<PathBuf> {
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
pub(crate) fn image() -> TestImage {
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
