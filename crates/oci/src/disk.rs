//! From layers to a disk.

use std::{
    collections::HashSet,
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cubicle_image::{
    Fingerprint, Progress, Step,
    workshop::{Packing, Scratch},
};
use serde::{Deserialize, Serialize};

use crate::{
    blobs::blocking,
    digest::Digest,
    error::{During as _, Error, Result},
    images::{Image, Images, Layer, Meter, UNPACK, amount},
    unpack::{Stop, Unpacker},
};

/// Changes whenever the same layers would become another disk.
const LAYOUT: u32 = 1;
/// The smallest disk, in MiB: journal, tables, and a little for the image.
const SMALLEST_MIB: u32 = 64;
const BLOCK: u64 = 4096;
/// What each file takes in the tables of the file system, in bytes.
const INODE: u64 = 256;
/// Journal, descriptors, bitmaps and the odd directory block, in bytes.
const OVERHEAD: u64 = 20 << 20;
/// The file system has an inode for so many bytes unless it is told otherwise.
const BYTES_PER_INODE: u64 = 16 << 10;
/// How many more inodes than the image has files there are at least, for what a sandbox makes.
const SPARE_INODES: u64 = 65_536;
/// Less than this is no room on the host's disk, in bytes: 32 MiB.
const FULL: u64 = 32 << 20;

/// A disk that holds an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// A raw, sparse ext4 image. Never written to again; clone or copy it before
    /// [`Images::remove_unused`] may remove it.
    pub image: PathBuf,
    /// Size of the disk, in MiB.
    pub disk_mib: u32,
    /// Of the layers' content and the size of the disk: however the image came here.
    pub fingerprint: Fingerprint,
    /// What the image takes on the host, in bytes.
    pub used_bytes: u64,
}

#[derive(Serialize)]
struct Description<'a> {
    kind: &'static str,
    layout: u32,
    layers: Vec<&'a Digest>,
    disk_mib: u32,
}

impl Images {
    /// Makes a disk of so many MiB that holds an image, or finds it. The same content gives the
    /// same disk, which is made once, also if it is asked for twice at the same time. Dropping the
    /// future stops the work and removes what there is of it.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`], [`Error::DiskFull`], [`Error::Layer`], [`Error::TooLarge`],
    /// [`Error::Tampered`] if a blob has changed on disk since it was pulled.
    pub async fn disk(&self, image: &Image, disk_mib: u32, progress: &Progress) -> Result<Disk> {
        let fingerprint = Fingerprint::of(&Description {
            kind: "oci",
            layout: LAYOUT,
            layers: image.layers.iter().map(|layer| &layer.content).collect(),
            disk_mib,
        });
        if let Some(found) = self.find_disk(&fingerprint) {
            return Ok(found);
        }
        if disk_mib < SMALLEST_MIB {
            return Err(Error::DoesNotFit {
                needed_mib: SMALLEST_MIB.into(),
                disk_mib,
            });
        }
        let lock = self.disks.lock(&fingerprint, progress).await?;
        if let Some(found) = self.find_disk(&fingerprint) {
            return Ok(found);
        }
        let path = self
            .disks
            .path(&format!(".{}.scratch", fingerprint.short()));
        // On disk: nobody knows yet how much it will be.
        let scratch = blocking(move || {
            let scratch = Scratch::new(path, u64::MAX)?;
            // Nobody but root may reach the set-id programs and devices of somebody else's image.
            let only_root = std::fs::Permissions::from_mode(0o700);
            fs_err::set_permissions(scratch.path(), only_root).during("close a directory")?;
            fs_err::create_dir(scratch.path().join("tree")).during("make a directory")?;
            Ok(Arc::new(scratch))
        })
        .await?;
        let tree = scratch.path().join("tree");
        self.unpack(image, scratch.clone(), progress).await?;

        let measured = tree.clone();
        let size = blocking(move || measure(&measured)).await?;
        let inodes = size.check(disk_mib)?;
        progress.message(Step::DISK_IMAGE, "packing the disk image");
        let log = scratch.path().join("log");
        let draft = self.disks.draft(&lock, ".img")?;
        let packing = Packing {
            tree: &tree,
            bytes: u64::from(disk_mib) << 20,
            inodes,
            identity: &fingerprint,
        };
        let packed = packing.pack(draft.path(), scratch.path(), &log).await;
        packed.map_err(|error| self.explain(error, &size, disk_mib))?;

        let final_path = self.disks.path(&format!("{}.img", fingerprint.short()));
        let disk = blocking(move || {
            drop(scratch);
            let file = fs_err::File::open(draft.path()).during("open the disk image")?;
            file.sync_all().during("write the disk image")?;
            let used_bytes = file.metadata().during("measure the disk image")?.blocks() * 512;
            let disk = Disk {
                image: final_path.clone(),
                disk_mib,
                fingerprint,
                used_bytes,
            };
            let record = serde_json::to_vec_pretty(&disk).map_err(io::Error::other);
            // First, for an image without it is not found.
            let write =
                record.and_then(|record| fs_err::write(final_path.with_extension("json"), record));
            write.during("describe the disk image")?;
            draft.publish(&final_path)?;
            Ok(disk)
        })
        .await?;
        progress.done(
            Step::DISK_IMAGE,
            format!("{} on disk", amount(disk.used_bytes)),
        );
        Ok(disk)
    }

    fn find_disk(&self, fingerprint: &Fingerprint) -> Option<Disk> {
        let name = format!("{}.img", fingerprint.short());
        let image = self.disks.path(&name);
        let record = fs_err::read(image.with_extension("json")).ok()?;
        let found: Disk = serde_json::from_slice(&record).ok()?;
        if found.fingerprint != *fingerprint || !image.exists() {
            return None;
        }
        self.disks.touch(&name);
        // The directory may have been moved since.
        Some(Disk { image, ..found })
    }

    async fn unpack(
        &self,
        image: &Image,
        scratch: Arc<Scratch>,
        progress: &Progress,
    ) -> Result<()> {
        struct StopOnDrop(Stop);
        impl Drop for StopOnDrop {
            fn drop(&mut self) {
                self.0.stop();
            }
        }
        let stop = Stop::default();
        let _guard = StopOnDrop(stop.clone());
        let layers = image.layers.clone();
        let mut blobs = Vec::new();
        for layer in &layers {
            let blob = self.blobs.find(&layer.digest);
            blobs.push(blob.ok_or_else(|| Error::NotFound {
                image: layer.digest.to_string(),
                place: "the blobs of this machine; pull the image again".to_owned(),
            })?);
        }
        let total = layers.iter().map(|layer| layer.size).sum();
        let meter = Meter::new(progress, UNPACK, total);
        let limits = self.limits;
        let progress = progress.clone();
        let unpacked = blocking(move || {
            let mut unpacker = Unpacker::new(&scratch.path().join("tree"), limits, stop)?;
            for (layer, blob) in layers.iter().zip(blobs) {
                let metered = Metered {
                    input: blob,
                    meter: &meter,
                };
                let unpacked = unpacker.layer(metered);
                match unpacked {
                    Ok(unpacked) if unpacked.digest == layer.content => {}
                    Ok(_) => return Ok(Some((layer.clone(), None))),
                    Err(error @ Error::Layer { .. }) => {
                        return Ok(Some((layer.clone(), Some(error))));
                    }
                    Err(other) => return Err(other),
                }
            }
            progress.done(UNPACK, format!("{} entries", unpacker.entries()));
            Ok(None)
        })
        .await?;
        match unpacked {
            None => Ok(()),
            Some((layer, error)) => Err(self.blame(image, layer, error).await?),
        }
    }

    /// Whether it is the blob that has changed since it came, or what came was wrong already.
    async fn blame(&self, image: &Image, layer: Layer, error: Option<Error>) -> Result<Error> {
        let path = self.blobs.path(&layer.digest);
        let actual = blocking(move || Digest::of_file(&path).during("check a blob")).await?;
        if actual != layer.digest {
            self.blobs.discard(&layer.digest);
            return Ok(Error::Tampered {
                expected: layer.digest,
                actual: Some(actual),
            });
        }
        Ok(error.unwrap_or_else(|| Error::Document {
            what: "the configuration",
            image: image.name.clone(),
            reason: format!(
                "it promises other content for the layer {} than that has",
                layer.digest
            ),
        }))
    }

    fn explain(&self, error: cubicle_image::Error, size: &Size, disk_mib: u32) -> Error {
        let cubicle_image::Error::Program { tail, .. } = &error else {
            return error.into();
        };
        let room = rustix::fs::statvfs(&self.disks_path);
        let is_full = room.is_ok_and(|room| room.f_bavail * room.f_frsize < FULL);
        if is_full || tail.contains("No space left on device") {
            return Error::DiskFull {
                action: "make the disk image",
                source: io::ErrorKind::StorageFull.into(),
            };
        }
        // What the program says if there are no blocks, no inodes, or no room for them.
        if [
            "Could not allocate",
            "too small",
            "too many inodes",
            "too big",
        ]
        .iter()
        .any(|sign| tail.contains(sign))
        {
            return size.does_not_fit(disk_mib);
        }
        error.into()
    }
}

/// Passes on how much of a blob was read.
struct Metered<'a> {
    input: fs_err::File,
    meter: &'a Meter,
}

impl io::Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        self.meter.add(n as i64);
        Ok(n)
    }
}

/// What a tree takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Size {
    /// Blocks of files' data, in bytes.
    bytes: u64,
    inodes: u64,
}

impl Size {
    /// How many inodes to ask for, if not as many as there are anyway; an error if the disk is too
    /// small.
    fn check(&self, disk_mib: u32) -> Result<Option<u64>> {
        let disk = u64::from(disk_mib) << 20;
        if self.needed(0) > disk {
            return Err(self.does_not_fit(disk_mib));
        }
        let usual = disk / BYTES_PER_INODE;
        let wanted = self.inodes + SPARE_INODES.min(usual / 2);
        Ok((wanted > usual).then_some(wanted))
    }

    fn needed(&self, spare_inodes: u64) -> u64 {
        self.bytes + (self.inodes + spare_inodes) * INODE + OVERHEAD
    }

    fn does_not_fit(&self, disk_mib: u32) -> Error {
        // A tenth on top, so that what was asked for next will do, and has room to work in.
        let needed = self.needed(SPARE_INODES) / 10 * 11;
        Error::DoesNotFit {
            needed_mib: (needed >> 20).max(u64::from(disk_mib)) + 1,
            disk_mib,
        }
    }
}

fn measure(tree: &Path) -> Result<Size> {
    let mut size = Size::default();
    let mut linked = HashSet::new();
    let mut waiting = vec![tree.to_owned()];
    let mut walk = || {
        while let Some(directory) = waiting.pop() {
            for entry in fs_err::read_dir(&directory)? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino()) {
                    continue;
                }
                size.inodes += 1;
                if metadata.is_dir() {
                    size.bytes += metadata.size().max(1).next_multiple_of(BLOCK);
                    waiting.push(entry.path());
                } else {
                    size.bytes += (metadata.blocks() * 512).next_multiple_of(BLOCK);
                }
            }
        }
        io::Result::Ok(())
    };
    walk().during("measure an image")?;
    Ok(size)
}

/// Removes what is not finished and is nobody's any more.
pub(crate) fn sweep(directory: &Path) -> Result<()> {
    let sweep = || {
        for entry in fs_err::read_dir(directory)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                remove(&entry.path())?;
            }
        }
        io::Result::Ok(())
    };
    sweep().during("remove what an interrupted build left")
}

fn remove(path: &Path) -> io::Result<()> {
    if fs_err::symlink_metadata(path)?.is_dir() {
        fs_err::remove_dir_all(path)
    } else {
        fs_err::remove_file(path)
    }
}

/// Removes disks that were not used for so long; returns their number and bytes.
pub(crate) fn remove_unused(directory: &Path, unused: Duration) -> Result<(usize, u64)> {
    let remove = || {
        let mut removed = (0, 0);
        for entry in fs_err::read_dir(directory)? {
            let path = entry?.path();
            let is_hidden = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b".");
            if path.extension().is_none_or(|kind| kind != "img")
                || path.file_name().is_some_and(is_hidden)
            {
                continue;
            }
            let metadata = fs_err::metadata(&path)?;
            let age = metadata.modified()?.elapsed().unwrap_or_default();
            if age >= unused {
                // The image first: without it the description means nothing.
                fs_err::remove_file(&path)?;
                fs_err::remove_file(path.with_extension("json")).ok();
                removed.0 += 1;
                removed.1 += metadata.blocks() * 512;
            }
        }
        io::Result::Ok(removed)
    };
    remove().during("remove disks")
}
