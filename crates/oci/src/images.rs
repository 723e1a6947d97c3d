//! The face of this crate.

use std::{
    io::Read as _,
    path::PathBuf,
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant},
};

use cubicle_image::{Progress, Step, workshop::Cache};
use futures::{StreamExt as _, TryStreamExt as _};
use oci_client::Reference;
use rustix::fs::{FlockOperation, flock};

use crate::{
    blobs::{Blobs, Pins, Source, blocking},
    config::{Auth, Config, ImageConfig},
    digest::Digest,
    disk,
    document::{Configuration, Descriptor, MAX_DOCUMENT, Manifest},
    error::{During as _, Error, Result},
    local::{self, Local},
    map::{ImageMap, Target},
    registry::{Registries, Remote},
    unpack::Limits,
};

/// Fetching an image's blobs.
pub const PULL: Step = Step::new("pull");
/// Putting its layers over one another.
pub const UNPACK: Step = Step::new("unpack");

/// How many blobs of an image are fetched at the same time.
const AT_ONCE: usize = 3;
/// How often progress is reported, at most.
const REPORT: Duration = Duration::from_millis(100);
/// Names in the map may lead to names in the map, but not for ever.
const MAX_STEPS: usize = 8;

/// The images of this machine.
#[derive(Debug)]
pub struct Images {
    pub(crate) blobs: Blobs,
    pub(crate) disks: Cache,
    pub(crate) disks_path: PathBuf,
    pub(crate) limits: Limits,
    map: ImageMap,
    registries: Registries,
    /// Shared with all processes that use the directory.
    _lock: fs_err::File,
}

/// What a name means.
#[derive(Debug, Clone)]
pub enum Resolved {
    /// The recipe of this name.
    Recipe(String),
    /// An image.
    Image(Found),
}

/// An image that exists.
#[derive(Debug, Clone)]
pub struct Found {
    /// The name that it was found by.
    pub name: String,
    /// Of its manifest for linux/amd64.
    pub digest: Digest,
    /// The blobs to fetch, in bytes; those that are here already included.
    pub bytes: u64,
    origin: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    Remote(Box<Remote>),
    Local(Box<Local>),
}

impl Found {
    fn manifest(&self) -> &Manifest {
        match &self.origin {
            Origin::Remote(remote) => &remote.manifest,
            Origin::Local(local) => &local.manifest,
        }
    }
}

/// An image all of whose blobs are here, and stay while this exists.
#[derive(Debug)]
pub struct Image {
    /// The name that it was found by.
    pub name: String,
    /// Of its manifest for linux/amd64.
    pub digest: Digest,
    /// From the lowest on.
    pub layers: Vec<Layer>,
    /// How it is to be run.
    pub config: ImageConfig,
    _pins: Pins,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Of the blob.
    pub digest: Digest,
    /// Length of the blob, in bytes.
    pub size: u64,
    /// Of what is in the blob, decompressed.
    pub content: Digest,
}

/// What [`Images::remove_unused`] has removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Removed {
    /// How many blobs.
    pub blobs: usize,
    /// How many disks.
    pub disks: usize,
    /// How much room both took on the host, in bytes.
    pub bytes: u64,
}

impl Images {
    /// Opens the directory, and removes what a crash left there if no other process uses it.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Setting`] for certificates that cannot be used.
    pub fn open(config: Config) -> Result<Images> {
        let registries = Registries::new(&config)?;
        fs_err::create_dir_all(&config.dir).during("make the directory of images")?;
        let blobs = Blobs::open(&config.dir)?;
        let disks = Cache::open(&config.dir, "disks")?;
        let disks_path = disks.path("");
        let lock = fs_err::File::create(config.dir.join(".lock")).during("make a lock file")?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            blobs.sweep()?;
            disk::sweep(&disks_path)?;
        }
        flock(&lock, FlockOperation::LockShared).during("share the directory of images")?;
        Ok(Images {
            blobs,
            disks,
            disks_path,
            limits: config.limits,
            map: config.map,
            registries,
            _lock: lock,
        })
    }

    /// Finds out what a name means: by the map, or else in the registry that it names.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::NotFound`], [`Error::Unauthorized`], [`Error::Platform`],
    /// [`Error::Registry`], [`Error::Document`].
    pub async fn resolve(&self, reference: &str, auth: Option<&Auth>) -> Result<Resolved> {
        let parse = |name: &str| {
            Reference::try_from(name).map_err(|error| Error::Name {
                name: name.to_owned(),
                reason: error.to_string(),
            })
        };
        let named = parse(reference)?;
        let wanted = named.digest().map(str::parse::<Digest>).transpose()?;
        let mut name = reference.to_owned();
        let mut auth = auth;
        for _ in 0..MAX_STEPS {
            let local = match self.map.find(&name) {
                Some(Target::Recipe(recipe)) => return Ok(Resolved::Recipe(recipe)),
                Some(Target::Registry(to)) if to != name => {
                    // Credentials are for the registry that the user named.
                    if parse(&to)?.resolve_registry() != named.resolve_registry() {
                        auth = None;
                    }
                    name = to;
                    continue;
                }
                Some(Target::Layout { path, tag }) => {
                    let (image, wanted) = (reference.to_owned(), wanted.clone());
                    blocking(move || {
                        local::find_in_layout(&path, tag.as_deref(), wanted.as_ref(), &image)
                    })
                    .await?
                }
                Some(Target::Archive { path, name }) => {
                    let image = reference.to_owned();
                    blocking(move || local::find_in_archive(&path, name.as_deref(), &image)).await?
                }
                Some(Target::Registry(_)) | None => {
                    let mut target = parse(&name)?;
                    if let (None, Some(wanted)) = (target.digest(), &wanted) {
                        target = target.clone_with_digest(wanted.to_string());
                    }
                    let remote = self.registries.resolve(&target, auth).await?;
                    let digest = remote.digest.clone();
                    let origin = Origin::Remote(Box::new(remote));
                    return Ok(Resolved::Image(found(reference, digest, origin)));
                }
            };
            let digest = local.digest.clone();
            let origin = Origin::Local(Box::new(local));
            return Ok(Resolved::Image(found(reference, digest, origin)));
        }
        Err(Error::Map {
            path: None,
            reason: format!("`{reference}` leads around in a circle"),
        })
    }

    /// Brings an image's blobs here, except those that are here already. Dropping the future stops
    /// it; what has arrived is there for the next time.
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::Tampered`], [`Error::DiskFull`], [`Error::Unauthorized`],
    /// [`Error::NotFound`], [`Error::Registry`], [`Error::Document`]; nothing is left then of the
    /// blob that it is about, unless a connection broke off.
    pub async fn pull(
        &self,
        image: &Found,
        auth: Option<&Auth>,
        progress: &Progress,
    ) -> Result<Image> {
        match &image.origin {
            Origin::Local(local) => self.pull_from(image, &**local, progress).await,
            Origin::Remote(remote) => {
                let session = self.registries.blobs(remote, auth).await?;
                self.pull_from(image, &session, progress).await
            }
        }
    }

    async fn pull_from(
        &self,
        image: &Found,
        source: &impl Source,
        progress: &Progress,
    ) -> Result<Image> {
        let manifest = image.manifest();
        let mut wanted: Vec<&Descriptor> = vec![&manifest.config];
        for layer in &manifest.layers {
            if !wanted.iter().any(|blob| blob.digest == layer.digest) {
                wanted.push(layer);
            }
        }
        let pins = wanted.iter().map(|blob| blob.digest.clone()).collect();
        let pins = self.blobs.pin(pins);
        let total: u64 = wanted.iter().map(|blob| blob.size).sum();
        let meter = Meter::new(progress, PULL, total);
        let arrived = |more: i64| meter.add(more);
        let fetches = wanted
            .iter()
            .map(|blob| self.blobs.fetch(blob, source, &arrived));
        // In a list: the compiler does not see of a lazy one that it may move between threads.
        futures::stream::iter(fetches.collect::<Vec<_>>())
            .buffer_unordered(AT_ONCE)
            .try_collect::<Vec<()>>()
            .await?;
        let config = self.read_config(image).await?;
        progress.done(PULL, amount(total));
        let layers = manifest.layers.iter().zip(config.layers);
        let layers = layers.map(|(blob, content)| Layer {
            digest: blob.digest.clone(),
            size: blob.size,
            content,
        });
        Ok(Image {
            name: image.name.clone(),
            digest: image.digest.clone(),
            layers: layers.collect(),
            config: config.config,
            _pins: pins,
        })
    }

    async fn read_config(&self, image: &Found) -> Result<Configuration> {
        let manifest = image.manifest();
        let path = self.blobs.path(&manifest.config.digest);
        let read = move || {
            let mut bytes = Vec::new();
            let file = fs_err::File::open(path)?;
            file.take(MAX_DOCUMENT).read_to_end(&mut bytes)?;
            std::io::Result::Ok(bytes)
        };
        let bytes = blocking(move || read().during("read the configuration of an image")).await?;
        Configuration::parse(&bytes, &image.name, manifest.layers.len())
    }

    /// Removes blobs and disks that were not used for so long, except the blobs of an [`Image`]
    /// that still exists. Disks in use are to be cloned or opened before that.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn remove_unused(&self, unused: Duration) -> Result<Removed> {
        let (blobs, mut bytes) = self.blobs.remove_unused(unused)?;
        let directory = self.disks_path.clone();
        let disks = blocking(move || disk::remove_unused(&directory, unused)).await?;
        bytes += disks.1;
        Ok(Removed {
            blobs,
            disks: disks.0,
            bytes,
        })
    }
}

fn found(name: &str, digest: Digest, origin: Origin) -> Found {
    let mut found = Found {
        name: name.to_owned(),
        digest,
        bytes: 0,
        origin,
    };
    let manifest = found.manifest();
    let layers = manifest.layers.iter().map(|layer| layer.size);
    found.bytes = layers.fold(manifest.config.size, u64::saturating_add);
    found
}

/// Tells how many of so many bytes are done, not too often.
#[derive(Debug)]
pub(crate) struct Meter {
    progress: Progress,
    step: Step,
    total: u64,
    done: AtomicI64,
    began: Instant,
    /// Milliseconds since then.
    reported: AtomicI64,
}

impl Meter {
    pub(crate) fn new(progress: &Progress, step: Step, total: u64) -> Meter {
        progress.fraction(step, amount(total), 0.0);
        Meter {
            progress: progress.clone(),
            step,
            total,
            done: AtomicI64::new(0),
            began: Instant::now(),
            reported: AtomicI64::new(0),
        }
    }

    pub(crate) fn add(&self, more: i64) {
        let done = self.done.fetch_add(more, Ordering::Relaxed) + more;
        let now = self.began.elapsed().as_millis() as i64;
        let last = self.reported.load(Ordering::Relaxed);
        if now - last < REPORT.as_millis() as i64 {
            return;
        }
        let swap = self
            .reported
            .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed);
        if swap.is_ok() {
            let done = done.max(0).cast_unsigned();
            let message = format!("{} of {}", amount(done), amount(self.total));
            let fraction = done as f32 / self.total.max(1) as f32;
            // One says that a step has ended.
            self.progress
                .fraction(self.step, message, fraction.min(0.999));
        }
    }
}

/// Bytes for people.
pub(crate) fn amount(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(dead_code, reason = "it is compiled, which is the test")]
    fn the_work_may_move_between_threads(images: &Images, found: &Found, image: &Image) {
        fn is_send<T: Send>(_: T) {}
        let progress = Progress::silent();
        is_send(images.resolve("", None));
        is_send(images.pull(found, None, &progress));
        is_send(images.disk(image, 0, &progress));
        is_send(images.remove_unused(Duration::ZERO));
    }
}
