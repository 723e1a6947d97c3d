//! Images made by the test, and written down in every form that they come in.

use std::path::Path;

use cubicle_oci::Digest;
use serde_json::{Value, json};

use super::{Entry, gzip, tar, zstd};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed {
    Plain,
    Gzip,
    Zstd,
}

#[derive(Debug, Clone)]
pub(crate) struct TestLayer {
    pub(crate) blob: Vec<u8>,
    pub(crate) content: Vec<u8>,
    pub(crate) media_type: String,
}

impl TestLayer {
    pub(crate) fn new(entries: &[Entry], packed: Packed) -> TestLayer {
        TestLayer::of(tar(entries), packed)
    }

    pub(crate) fn of(content: Vec<u8>, packed: Packed) -> TestLayer {
        let (blob, suffix) = match packed {
            Packed::Plain => (content.clone(), ""),
            Packed::Gzip => (gzip(&content), "+gzip"),
            Packed::Zstd => (zstd(&content), "+zstd"),
        };
        TestLayer {
            blob,
            content,
            media_type: format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
        }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }
}

/// An image for linux/amd64.
#[derive(Debug, Clone)]
pub(crate) struct TestImage {
    pub(crate) layers: Vec<TestLayer>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl TestImage {
    pub(crate) fn new(layers: Vec<TestLayer>) -> TestImage {
        TestImage::for_platform(layers, "amd64")
    }

    pub(crate) fn for_platform(layers: Vec<TestLayer>, architecture: &str) -> TestImage {
        let contents: Vec<_> = layers
            .iter()
            .map(|layer| Digest::of(&layer.content))
            .collect();
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/bin:/bin", "GREETING=hello world"],
                "User": "1000:1000",
                "WorkingDir": "/srv",
                "Entrypoint": ["/bin/serve"],
                "Cmd": ["--port", "80"],
                "ExposedPorts": {"80/tcp": {}},
            },
            "rootfs": {"type": "layers", "diff_ids": contents},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let mut image = TestImage {
            layers,
            config,
            manifest: Vec::new(),
        };
        image.write_manifest();
        image
    }

    /// To be called when something of it was changed.
    pub(crate) fn write_manifest(&mut self) {
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| descriptor(&layer.media_type, &layer.blob))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &self.config),
            "layers": layers,
        });
        self.manifest = serde_json::to_vec(&manifest).unwrap();
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    pub(crate) fn blobs(&self) -> Vec<&[u8]> {
        let layers = self.layers.iter().map(|layer| &*layer.blob);
        layers.chain([&*self.config]).collect()
    }

    /// Writes an OCI layout, where the image is called by each of some tags.
    pub(crate) fn write_layout(&self, path: &Path, tags: &[&str]) {
        let blobs = path.join("blobs/sha256");
        fs_err::create_dir_all(&blobs).unwrap();
        for blob in self.blobs().into_iter().chain([&*self.manifest]) {
            fs_err::write(blobs.join(Digest::of(blob).hex()), blob).unwrap();
        }
        let mut manifests = Vec::new();
        for tag in tags {
            let mut entry =
                descriptor("application/vnd.oci.image.manifest.v1+json", &self.manifest);
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
            manifests.push(entry);
        }
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs_err::write(path.join("index.json"), index.to_string()).unwrap();
        fs_err::write(
            path.join("oci-layout"),
            r#"{"imageLayoutVersion": "1.0.0"}"#,
        )
        .unwrap();
    }

    /// Writes what `docker save` would, with layers as they are without compression.
    pub(crate) fn write_archive(&self, path: &Path, name: &str) {
        let mut entries = Vec::new();
        let mut layers = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let id = Digest::of(&layer.content).hex();
            entries.push(Entry::dir(format!("{id}/")));
            entries.push(Entry::file(format!("{id}/layer.tar"), &layer.content));
            if index == 0 {
                // As for a layer that another image of the file has as well.
                entries.push(Entry::symlink("alias.tar", format!("{id}/layer.tar")));
                layers.push("alias.tar".to_owned());
            } else {
                layers.push(format!("{id}/layer.tar"));
            }
        }
        let config = format!("{}.json", Digest::of(&self.config).hex());
        entries.push(Entry::file(&config, &self.config));
        let list = json!([
            {"Config": "missing.json", "RepoTags": ["other:1"], "Layers": []},
            {"Config": config, "RepoTags": [name], "Layers": layers},
        ]);
        entries.push(Entry::file("manifest.json", list.to_string()));
        fs_err::write(path, tar(&entries)).unwrap();
    }
}

pub(crate) fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(blob), "size": blob.len()})
}

/// An index of images for some platforms.
pub(crate) fn index(images: &[(&TestImage, &str, &str)]) -> Vec<u8> {
    let entry = |(image, os, architecture): &(&TestImage, &str, &str)| {
        let mut entry = descriptor(
            "application/vnd.oci.image.manifest.v1+json",
            &image.manifest,
        );
        entry["platform"] = json!({"os": os, "architecture": architecture});
        entry
    };
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": images.iter().map(entry).collect::<Vec<_>>(),
    });
    serde_json::to_vec(&index).unwrap()
}

/// Bytes that do not compress and are the same each time.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    use rand::{Rng as _, SeedableRng as _};
    let mut bytes = vec![0; length];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}
