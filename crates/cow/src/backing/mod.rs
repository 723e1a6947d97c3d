//! Where the store lives: on the data directory's own file system if that can share blocks between
//! files, else on a sparse XFS image that is loop-mounted with direct I/O.
//!
//! Invariants:
//! - [`prepare`] is idempotent. A mount left by a process that was killed is adopted, with the VMs
//!   that still use it; an image is never attached twice.
//! - The image grows before it is full, and never by more than its host file system can hold: a
//!   file system whose lower layer runs out of space shuts down, one that is full merely says so.
//! - Full copies instead of shared blocks happen only where the configuration allows them.

mod loopdev;
mod mounts;
mod xfs;

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FlockOperation, flock, statvfs},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use crate::{
    error::{Context as _, Error, Result},
    reflink::{self, Support},
};

/// The store's directory, in the data directory; also the mount point of the image.
const DIRECTORY: &str = "store";
/// The image's file name, in the data directory.
const IMAGE: &str = "store.xfs";
/// The smallest image worth making; mkfs.xfs refuses below 300 MB.
const SMALLEST: u64 = 512 << 20;
/// Image sizes are multiples of this.
const GRAIN: u64 = 16 << 20;

/// How the store may use the data directory. Sizes are in bytes.
#[derive(Debug, Clone)]
pub struct BackingConfig {
    /// Size of a new image. The image is sparse: it takes only what is written to it.
    pub initial_size: u64,
    /// The image never grows beyond this.
    pub max_size: u64,
    /// What is left free on the data directory's file system, whatever the store needs.
    pub host_reserve: u64,
    /// The image grows when less than this is free in it.
    pub headroom: u64,
    /// Whether full copies may stand in for shared blocks, where there is no other way.
    pub allow_copy: bool,
}

impl Default for BackingConfig {
    fn default() -> Self {
        Self {
            initial_size: 16 << 30,
            max_size: 4 << 40,
            host_reserve: 1 << 30,
            headroom: 4 << 30,
            allow_copy: false,
        }
    }
}

/// What kind of file system holds the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreKind {
    /// The data directory's own, with reflinks.
    Native {
        /// Its name, for example `xfs`.
        filesystem: String,
    },
    /// An XFS image, loop-mounted.
    Loop {
        /// The image.
        image: PathBuf,
        /// The loop device it is attached to.
        device: PathBuf,
        /// Size of the image, in bytes.
        size: u64,
        /// Bytes of it that take space on the data directory's file system.
        allocated: u64,
        /// Whether the loop device bypasses the page cache of the host file system.
        direct_io: bool,
    },
    /// The data directory's own, without reflinks: every clone is a full copy.
    Copy {
        /// Its name, for example `ext4`.
        filesystem: String,
        /// Why an image could not be used instead.
        reason: String,
    },
}

/// What `doctor` says about the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreInfo {
    /// The store's root directory.
    pub path: PathBuf,
    /// What holds it.
    pub kind: StoreKind,
    /// Size of its file system, in bytes.
    pub total_bytes: u64,
    /// Free bytes in its file system.
    pub free_bytes: u64,
    /// Bytes that can still be stored: what is free now and what the image may grow by.
    pub available_bytes: u64,
}

/// What became of the mount when the store's root was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// There was none.
    NotMounted,
    /// It is gone, and so is its loop device, unless a VM has a mount namespace that began with a
    /// copy of it; then the next [`prepare`] finds the device.
    Unmounted,
    /// Something still uses it, for example a VM. The next [`prepare`] adopts it.
    InUse,
}

/// A directory that is ready for a store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct StoreRoot {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    support: Support,
    place: Place,
    config: BackingConfig,
}

#[derive(Debug)]
enum Place {
    Own {
        filesystem: String,
        reason: Option<String>,
    },
    Image {
        image: PathBuf,
        device: PathBuf,
    },
}

/// Makes `data_dir` ready: creates it, finds out whether its file system shares blocks, and
/// otherwise creates and mounts the image, or adopts the mount that is there. Blocking; about
/// 0.1 s when an image has to be made.
///
/// # Errors
/// [`Error::NoReflink`] if neither way works and full copies are not allowed;
/// [`Error::Foreign`] if something else is mounted where the store belongs.
pub fn prepare(data_dir: &Path, config: &BackingConfig) -> Result<StoreRoot> {
    std::fs::create_dir_all(data_dir).at("create the data directory", data_dir)?;
    let data_dir = data_dir
        .canonicalize()
        .at("resolve the data directory", data_dir)?;
    let path = data_dir.join(DIRECTORY);
    let image = data_dir.join(IMAGE);
    let lock = File::create(data_dir.join("store.lock")).at("lock", &data_dir)?;
    flock(&lock, FlockOperation::LockExclusive).at("lock", &data_dir)?;
    std::fs::create_dir_all(&path).at("create the store", &path)?;

    let filesystem = mounts::filesystem_of(&data_dir)?;
    let done = |support, place| {
        Ok(StoreRoot {
            inner: Arc::new(Inner {
                path: path.clone(),
                support,
                place,
                config: config.clone(),
            }),
        })
    };
    // An image that exists holds the store, even if the data directory has learnt to share blocks.
    if !image.exists() && mounts::mounted_at(&path)?.is_none() {
        let Support::Copy { .. } = reflink::probe(&path)? else {
            return done(
                Support::Reflink,
                Place::Own {
                    filesystem,
                    reason: None,
                },
            );
        };
    }
    match mount_image(&image, &path, config) {
        Ok(device) => done(Support::Reflink, Place::Image { image, device }),
        Err(error @ (Error::Foreign { .. } | Error::DiskFull { .. })) => Err(error),
        Err(error) if config.allow_copy && !image.exists() => {
            let reason = error.to_string();
            let support = Support::Copy {
                reason: reason.clone(),
            };
            done(
                support,
                Place::Own {
                    filesystem,
                    reason: Some(reason),
                },
            )
        }
        Err(error) => Err(Error::NoReflink {
            data_dir,
            filesystem,
            reason: error.to_string(),
        }),
    }
}

/// The loop device that is mounted at `path` when this returns.
fn mount_image(image: &Path, path: &Path, config: &BackingConfig) -> Result<PathBuf> {
    if let Some(found) = mounts::mounted_at(path)? {
        let foreign = |reason: String| Error::Foreign {
            path: path.to_owned(),
            reason,
        };
        if found.filesystem != "xfs" {
            return Err(foreign(format!("{} is mounted there", found.filesystem)));
        }
        let device = PathBuf::from(found.source);
        let file = File::open(image).at("open the image", image)?;
        if loopdev::status(&device).is_none_or(|status| !status.is_of(&file)) {
            return Err(foreign(format!(
                "{} is mounted there, which is not a loop device of {}",
                device.display(),
                image.display()
            )));
        }
        return Ok(device);
    }
    if !image.exists() {
        make_image(image, config)?;
    }
    let attached = loopdev::attach(image)?;
    mount(
        attached.path(),
        path,
        "xfs",
        MountFlags::NOATIME | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC,
        // What is deleted in the store is given back to the host's file system.
        Some(c"discard"),
    )
    .at("mount the image on", path)?;
    // The device was attached so that it goes when its last user does: from here on, the mount.
    Ok(attached.path().to_owned())
}

fn make_image(image: &Path, config: &BackingConfig) -> Result<()> {
    let free = host_free(image)?.saturating_sub(config.host_reserve);
    let size = config.initial_size.min(config.max_size).min(free) / GRAIN * GRAIN;
    if size < SMALLEST {
        return Err(Error::DiskFull {
            attempt: "make an image of at least 512 MiB,",
            path: image.to_owned(),
        });
    }
    // Under another name until it is a file system: a half-made image must not be found later.
    let draft = image.with_extension("xfs.tmp");
    let _ = std::fs::remove_file(&draft);
    let made = reflink::create_new(&draft)
        .and_then(|file| file.set_len(size).at("set the size of the image", &draft))
        .and_then(|()| xfs::make(&draft))
        .and_then(|()| std::fs::rename(&draft, image).at("rename the image", &draft));
    made.inspect_err(|_| {
        let _ = std::fs::remove_file(&draft);
    })
}

/// Free bytes of the file system that holds `image`.
fn host_free(image: &Path) -> Result<u64> {
    let dir = image.parent().unwrap_or(image);
    let host = statvfs(dir).at("read the free space of", dir)?;
    Ok(host.f_bavail * host.f_frsize)
}

impl StoreRoot {
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// How files are duplicated in it.
    #[must_use]
    pub fn support(&self) -> &Support {
        &self.inner.support
    }

    /// What holds the store and how much room there is.
    ///
    /// # Errors
    /// If the file system cannot be asked.
    pub fn info(&self) -> Result<StoreInfo> {
        let path = self.inner.path.clone();
        let own = statvfs(&path).at("read the free space of", &path)?;
        let (total_bytes, free_bytes) = (own.f_blocks * own.f_frsize, own.f_bavail * own.f_frsize);
        let mut available_bytes = free_bytes;
        let kind = match &self.inner.place {
            Place::Own {
                filesystem,
                reason: None,
            } => StoreKind::Native {
                filesystem: filesystem.clone(),
            },
            Place::Own {
                filesystem,
                reason: Some(reason),
            } => StoreKind::Copy {
                filesystem: filesystem.clone(),
                reason: reason.clone(),
            },
            Place::Image { image, device } => {
                let metadata = image.metadata().at("read the size of the image", image)?;
                let (size, allocated) = (metadata.len(), allocated(&metadata));
                let limit = self.largest(image, allocated)?;
                available_bytes = (free_bytes + limit.saturating_sub(size))
                    .min(host_free(image)?.saturating_sub(self.inner.config.host_reserve));
                StoreKind::Loop {
                    image: image.clone(),
                    device: device.clone(),
                    size,
                    allocated,
                    direct_io: loopdev::status(device).is_some_and(|status| status.direct_io()),
                }
            }
        };
        Ok(StoreInfo {
            path,
            kind,
            total_bytes,
            free_bytes,
            available_bytes,
        })
    }

    /// How large the image may be without promising more than its host can hold.
    fn largest(&self, image: &Path, allocated: u64) -> Result<u64> {
        let room = host_free(image)?.saturating_sub(self.inner.config.host_reserve);
        Ok((allocated + room).min(self.inner.config.max_size) / GRAIN * GRAIN)
    }

    /// Grows the image until at least `bytes` are free in the store, or it cannot grow further.
    /// Returns whether that many are free now. Costs microseconds if there is nothing to do.
    ///
    /// # Errors
    /// If the image cannot be grown for another reason than lack of space.
    pub fn ensure_free(&self, bytes: u64) -> Result<bool> {
        let free = || -> Result<u64> {
            let own = statvfs(self.path()).at("read the free space of", self.path())?;
            Ok(own.f_bavail * own.f_frsize)
        };
        let now = free()?;
        let Place::Image { image, device } = &self.inner.place else {
            return Ok(now >= bytes);
        };
        if now >= bytes {
            return Ok(true);
        }
        let file = File::options()
            .write(true)
            .open(image)
            .at("open the image", image)?;
        flock(&file, FlockOperation::LockExclusive).at("lock the image", image)?;
        let metadata = file.metadata().at("read the size of the image", image)?;
        let size = metadata.len();
        // By half again at least: each step adds allocation groups, which should stay few. A
        // sixteenth more, since the new groups hold metadata, too.
        let missing = (bytes - now).saturating_add((bytes - now) / 16 + GRAIN);
        let wanted = size.saturating_add(missing.max(size / 2));
        let target = wanted
            .next_multiple_of(GRAIN)
            .min(self.largest(image, allocated(&metadata))?);
        if target > size {
            file.set_len(target).at("grow the image", image)?;
            loopdev::refresh_size(device)?;
            xfs::grow(self.path(), target)?;
            tracing::info!(image = %image.display(), from = size, to = target, "grew the store");
        }
        Ok(free()? >= bytes)
    }

    /// [`Self::ensure_free`] of the configured headroom.
    ///
    /// # Errors
    /// As [`Self::ensure_free`].
    pub fn keep_headroom(&self) -> Result<bool> {
        self.ensure_free(self.inner.config.headroom)
    }

    /// Unmounts the image, if there is one and nothing uses it. The loop device goes with it.
    ///
    /// # Errors
    /// If unmounting fails for another reason than use.
    pub fn close(self) -> Result<Closed> {
        let Place::Image { .. } = &self.inner.place else {
            return Ok(Closed::NotMounted);
        };
        match unmount(self.path(), UnmountFlags::NOFOLLOW) {
            Ok(()) => Ok(Closed::Unmounted),
            Err(Errno::BUSY) => Ok(Closed::InUse),
            Err(Errno::INVAL) => Ok(Closed::NotMounted),
            Err(errno) => Err(errno).at("unmount", self.path()),
        }
    }
}

fn allocated(metadata: &std::fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    metadata.blocks() * 512
}
