//! The documents that describe an image: index, manifest, configuration.

use serde::Deserialize;

use crate::{
    config::{ImageConfig, RawConfig},
    digest::Digest,
    error::{Error, Result},
};

/// No index, manifest or configuration is longer: 4 MiB, which registries enforce as well.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;
/// Images have a few dozen layers; overlay file systems allow for 500.
const MAX_LAYERS: usize = 1000;

/// A blob, as a document refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    /// In bytes.
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

impl Descriptor {
    /// Whether it may be an index or a manifest for this kind of machine.
    fn is_for_us(&self) -> bool {
        match &self.platform {
            Some(platform) => platform.os == "linux" && platform.architecture == "amd64",
            None => true,
        }
    }
}

/// What was found under an image's name.
#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// One image for one kind of machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u32,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Document {
    /// `image` is named in errors.
    pub(crate) fn parse(bytes: &[u8], image: &str) -> Result<Document> {
        let wrong = |reason: String| Error::Document {
            what: "the manifest",
            image: image.to_owned(),
            reason,
        };
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(wrong("it is longer than 4 MiB".to_owned()));
        }
        let raw: RawDocument =
            serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if raw.schema_version != 2 {
            return Err(wrong(format!(
                "it is of version {}, not 2; push the image again with a current program",
                raw.schema_version
            )));
        }
        if let Some(manifests) = raw.manifests {
            return Ok(Document::Index(manifests));
        }
        let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
            return Err(wrong("it names no configuration or no layers".to_owned()));
        };
        if layers.len() > MAX_LAYERS || config.size > MAX_DOCUMENT {
            return Err(wrong(format!(
                "it has {} layers and {} bytes of configuration",
                layers.len(),
                config.size
            )));
        }
        if let Some(layer) = layers.iter().find(|l| l.media_type.contains("encrypted")) {
            return Err(wrong(format!("its layer {} is encrypted", layer.digest)));
        }
        Ok(Document::Manifest(Manifest { config, layers }))
    }
}

/// The entry of an index that is for this kind of machine.
pub(crate) fn choose<'a>(entries: &'a [Descriptor], image: &str) -> Result<&'a Descriptor> {
    // One that says it is for us comes before one that does not say what it is for.
    let certain = entries
        .iter()
        .find(|entry| entry.platform.is_some() && entry.is_for_us());
    let chosen = certain.or_else(|| entries.iter().find(|entry| entry.is_for_us()));
    chosen.ok_or_else(|| {
        let mut found: Vec<_> = entries
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .map(|platform| format!("{}/{}", platform.os, platform.architecture))
            .filter(|platform| platform != "unknown/unknown")
            .collect();
        found.dedup();
        Error::Platform {
            image: image.to_owned(),
            found: if found.is_empty() {
                "nothing".to_owned()
            } else {
                found.join(", ")
            },
        }
    })
}

/// What the configuration document says.
#[derive(Debug)]
pub(crate) struct Configuration {
    /// Of the layers, decompressed, from the lowest on.
    pub(crate) layers: Vec<Digest>,
    pub(crate) config: ImageConfig,
}

#[derive(Deserialize)]
struct RawConfiguration {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    config: Option<RawConfig>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

impl Configuration {
    /// `image` is named in errors; `layers` is how many there must be.
    pub(crate) fn parse(bytes: &[u8], image: &str, layers: usize) -> Result<Configuration> {
        let wrong = |reason: String| Error::Document {
            what: "the configuration",
            image: image.to_owned(),
            reason,
        };
        let raw: RawConfiguration =
            serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        let is_for_us = |found: &str, wanted| found.is_empty() || found == wanted;
        if !is_for_us(&raw.os, "linux") || !is_for_us(&raw.architecture, "amd64") {
            return Err(Error::Platform {
                image: image.to_owned(),
                found: format!("{}/{}", raw.os, raw.architecture),
            });
        }
        let found = raw.rootfs.diff_ids.unwrap_or_default();
        if found.len() != layers {
            return Err(wrong(format!(
                "it describes {} layers, the manifest {layers}",
                found.len()
            )));
        }
        Ok(Configuration {
            layers: found,
            config: raw.config.unwrap_or_default().into(),
        })
    }
}
