//! Where container images come from.

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use cubicle_oci::{Config, ImageMap, Images, Mirror, Removed};
use tokio::sync::watch;

use crate::error::Error;

/// What `cubicle up` is told about images and registries.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ImageOptions {
    /// File, TOML or JSON, that says what names of images mean here: other names, directories
    /// (`oci:/path`), tarballs (`docker-archive:/path.tar`) or recipes (`recipe:base`)
    #[arg(long, env = "CUBICLE_IMAGE_MAP", value_name = "FILE")]
    pub(crate) image_map: Option<PathBuf>,
    /// Registry that is asked in the place of another one, as `docker.io=host:port/prefix`; may be
    /// repeated
    #[arg(long, value_name = "REGISTRY=HOST")]
    pub(crate) registry_mirror: Vec<Mirror>,
    /// File with certificates (PEM) that registries are trusted by, besides the system's; may be
    /// repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) registry_ca: Vec<PathBuf>,
    /// Registry that is spoken to without encryption, as those on the loopback interface are; may
    /// be repeated
    #[arg(long, value_name = "HOST")]
    pub(crate) registry_insecure: Vec<String>,
    /// How long layers and disks of images are kept that no build uses, in days; templates do not
    /// need them
    #[arg(long, value_name = "DAYS", default_value_t = 7)]
    pub(crate) keep_images: u32,
}

/// How often what is kept too long is looked for.
const EVERY: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// A build that begins with an image has cloned its disk long before.
const LEAST: Duration = Duration::from_secs(60 * 60);

impl ImageOptions {
    /// Opens the images of this machine, below the image directory.
    pub(super) fn open(&self, images: &std::path::Path) -> Result<Arc<Images>, Error> {
        let map = match &self.image_map {
            Some(file) => ImageMap::read(file),
            None => Ok(ImageMap::default()),
        };
        let map = map.map_err(|error| Error::setup("read the map of images", error))?;
        let config = Config {
            dir: images.join("oci"),
            map,
            mirrors: self.registry_mirror.clone(),
            ca_files: self.registry_ca.clone(),
            insecure: self.registry_insecure.clone(),
            ..Config::default()
        };
        let opened = Images::open(config);
        let opened = opened.map_err(|error| Error::setup("open the container images", error))?;
        Ok(Arc::new(opened))
    }

    /// How long what nobody uses is kept.
    pub(super) fn kept_for(&self) -> Duration {
        (DAY * self.keep_images).max(LEAST)
    }
}

/// Removes what was not used for so long, now and from time to time, until the server closes.
pub(super) async fn clean(
    images: Arc<Images>,
    unused: Duration,
    mut closed: watch::Receiver<bool>,
) {
    loop {
        match images.remove_unused(unused).await {
            Ok(Removed {
                blobs: 0, disks: 0, ..
            }) => {}
            Ok(removed) => tracing::info!(?removed, "images that nobody uses are gone"),
            Err(error) => tracing::warn!(%error, "images that nobody uses are still there"),
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            // An error means that the sender is gone, which is the end, too.
            _ = closed.wait_for(|closing| *closing) => return,
        }
    }
}
