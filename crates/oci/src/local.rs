//! Images in files: OCI layouts, and what `docker save` writes.

use std::{
    collections::HashMap,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use futures::{StreamExt as _, TryStreamExt as _};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::io::ReaderStream;

use crate::{
    blobs::{Incoming, Source},
    digest::Digest,
    document::{Descriptor, Document, MAX_DOCUMENT, Manifest, choose},
    error::{During as _, Error, Result},
};

/// Files in an archive of images: a few for each layer.
const MAX_MEMBERS: usize = 100_000;
/// What a layout calls an image.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const IMAGE_NAME: &str = "io.containerd.image.name";
const BUFFER: usize = 1 << 18;

/// An image whose blobs are parts of files.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) digest: Digest,
    pub(crate) manifest: Manifest,
    blobs: Blobs,
}

#[derive(Debug, Clone)]
enum Blobs {
    Layout(PathBuf),
    Parts {
        file: PathBuf,
        parts: HashMap<Digest, Part>,
    },
}

/// A stretch of a file, in bytes.
#[derive(Debug, Clone, Copy)]
struct Part {
    start: u64,
    length: u64,
}

/// Finds an image in a layout. `wanted` is the digest that it, or an index that has it, must have.
pub(crate) fn find_in_layout(
    path: &Path,
    tag: Option<&str>,
    wanted: Option<&Digest>,
    image: &str,
) -> Result<Local> {
    let index = read_document(&path.join("index.json"))?;
    let Document::Index(mut entries) = Document::parse(&index, image)? else {
        return Err(Error::Document {
            what: "the index",
            image: image.to_owned(),
            reason: format!("`{}` is not the index of a layout", path.display()),
        });
    };
    let missing = || Error::NotFound {
        image: tag.map_or_else(|| image.to_owned(), |tag| format!("{image} (as `{tag}`)")),
        place: format!("the layout `{}`", path.display()),
    };
    if let Some(tag) = tag {
        entries.retain(|entry| {
            let annotation = |key| Some(entry.annotations.as_ref()?.get(key)?.as_str());
            annotation(REF_NAME) == Some(tag) || annotation(IMAGE_NAME) == Some(tag)
        });
    }
    if entries.is_empty() {
        return Err(missing());
    }
    let mut seen = wanted.is_none();
    for _ in 0..4 {
        let entry = match wanted.filter(|_| !seen) {
            Some(wanted) => entries.iter().find(|entry| entry.digest == *wanted),
            None => None,
        };
        let entry = match entry {
            Some(entry) => entry,
            None => choose(&entries, image)?,
        };
        seen |= Some(&entry.digest) == wanted;
        let bytes = read_document(&blob_path(path, &entry.digest))?;
        verify(&bytes, &entry.digest)?;
        match Document::parse(&bytes, image)? {
            Document::Index(inner) => entries = inner,
            Document::Manifest(_) if !seen => return Err(missing()),
            Document::Manifest(manifest) => {
                return Ok(Local {
                    digest: entry.digest.clone(),
                    manifest,
                    blobs: Blobs::Layout(path.to_owned()),
                });
            }
        }
    }
    Err(Error::Document {
        what: "the index",
        image: image.to_owned(),
        reason: "it is nested too deep".to_owned(),
    })
}

/// One image in the list of what `docker save` wrote.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Finds an image in a file of `docker save`. This reads all of its layers once.
pub(crate) fn find_in_archive(path: &Path, name: Option<&str>, image: &str) -> Result<Local> {
    let wrong = |reason: String| Error::Document {
        what: "the archive",
        image: image.to_owned(),
        reason: format!("`{}` {reason}", path.display()),
    };
    let mut file = fs_err::File::open(path).during("open an archive of images")?;
    let mut start = [0; 4];
    let length = file.read(&mut start).during("read an archive of images")?;
    if start[..length].starts_with(b"\x1f\x8b") || start[..length] == *b"\x28\xb5\x2f\xfd" {
        return Err(wrong("is compressed; decompress it first".to_owned()));
    }
    let members = Members::list(&mut file).map_err(&wrong)?;
    let part = |name: &str| {
        let part = members.find(name);
        part.ok_or_else(|| wrong(format!("lacks its member `{name}`")))
    };
    let list = members
        .find("manifest.json")
        .ok_or_else(|| wrong("was not written by `docker save`".to_owned()))?;
    let list = read_part(&mut file, list)?;
    let list: Vec<Saved> =
        serde_json::from_slice(&list).map_err(|error| wrong(format!("has a bad list: {error}")))?;
    let is_named = |saved: &&Saved| {
        let tags = saved.repo_tags.as_deref().unwrap_or_default();
        name.is_none_or(|name| {
            let with_tag = format!("{name}:latest");
            tags.iter().any(|tag| *tag == name || *tag == with_tag)
        })
    };
    let saved = list.iter().find(is_named).ok_or_else(|| Error::NotFound {
        image: name.unwrap_or(image).to_owned(),
        place: format!("the archive `{}`", path.display()),
    })?;
    let mut parts = HashMap::new();
    let mut describe = |name: &str| {
        let part = part(name)?;
        let digest = hash_part(&mut file, part)?;
        parts.insert(digest.clone(), part);
        Ok::<_, Error>(Descriptor {
            media_type: String::new(),
            digest,
            size: part.length,
            platform: None,
            annotations: None,
        })
    };
    let config = describe(&saved.config)?;
    if config.size > MAX_DOCUMENT {
        return Err(wrong("has a configuration of more than 4 MiB".to_owned()));
    }
    let layers = saved.layers.iter().map(|name| describe(name));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    // There is no manifest in such a file. Its own digest stands for one.
    let names: Vec<&Digest> = std::iter::once(&config)
        .chain(&layers)
        .map(|blob| &blob.digest)
        .collect();
    let names = names.iter().map(ToString::to_string).collect::<Vec<_>>();
    Ok(Local {
        digest: Digest::of(names.join("\n").as_bytes()),
        manifest: Manifest { config, layers },
        blobs: Blobs::Parts {
            file: path.to_owned(),
            parts,
        },
    })
}

impl Source for Local {
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Option<Incoming>> {
        let (path, part) = match &self.blobs {
            Blobs::Layout(layout) => {
                let path = blob_path(layout, &blob.digest);
                let length = fs_err::metadata(&path).during("find a blob")?.len();
                (path, Part { start: 0, length })
            }
            Blobs::Parts { file, parts } => {
                let part = parts.get(&blob.digest).copied();
                let part = part.ok_or_else(|| Error::NotFound {
                    image: blob.digest.to_string(),
                    place: self.place(),
                })?;
                (file.clone(), part)
            }
        };
        if offset > 0 && offset >= part.length {
            return Ok(None);
        }
        let mut file = tokio::fs::File::open(&path).await.during("open a blob")?;
        let start = SeekFrom::Start(part.start + offset);
        file.seek(start).await.during("read a blob")?;
        let rest = file.take(part.length - offset);
        let bytes = ReaderStream::with_capacity(rest, BUFFER).into_stream();
        Ok(Some(Incoming {
            from: offset,
            bytes: bytes.boxed(),
        }))
    }

    fn place(&self) -> String {
        match &self.blobs {
            Blobs::Layout(path) | Blobs::Parts { file: path, .. } => path.display().to_string(),
        }
    }
}

/// The regular files in a tar archive, by name.
struct Members {
    parts: HashMap<PathBuf, Part>,
    links: HashMap<PathBuf, PathBuf>,
}

impl Members {
    fn list(file: &mut fs_err::File) -> Result<Members, String> {
        let unreadable = |error: std::io::Error| format!("is not a readable tar archive: {error}");
        file.rewind().map_err(unreadable)?;
        let mut members = Members {
            parts: HashMap::new(),
            links: HashMap::new(),
        };
        let mut archive = tar::Archive::new(file);
        for entry in archive.entries_with_seek().map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let path = plain(&entry.path().map_err(unreadable)?);
            let kind = entry.header().entry_type();
            if kind.is_file() {
                let part = Part {
                    start: entry.raw_file_position(),
                    length: entry.size(),
                };
                members.parts.insert(path, part);
            } else if let (true, Ok(Some(link))) =
                (kind.is_symlink() || kind.is_hard_link(), entry.link_name())
            {
                // Layers that images share are links to one another's directories.
                let link = if kind.is_symlink() {
                    path.parent().unwrap_or(Path::new("")).join(link)
                } else {
                    link.into_owned()
                };
                members.links.insert(path, plain(&link));
            }
            if members.parts.len() + members.links.len() > MAX_MEMBERS {
                return Err("has too many members".to_owned());
            }
        }
        Ok(members)
    }

    fn find(&self, name: &str) -> Option<Part> {
        let mut path = &plain(Path::new(name));
        for _ in 0..8 {
            if let Some(part) = self.parts.get(path) {
                return Some(*part);
            }
            path = self.links.get(path)?;
        }
        None
    }
}

/// A path without `.` and `..`, by its letters alone: it names a member, not a file.
fn plain(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut found = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => found.push(name),
            Component::ParentDir => {
                found.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    found
}

fn read_part(file: &mut fs_err::File, part: Part) -> Result<Vec<u8>> {
    let mut read = || {
        file.seek(SeekFrom::Start(part.start))?;
        let mut bytes = Vec::new();
        file.take(part.length.min(MAX_DOCUMENT))
            .read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    read().during("read a member of an archive of images")
}

fn hash_part(file: &mut fs_err::File, part: Part) -> Result<Digest> {
    let mut hash = || {
        file.seek(SeekFrom::Start(part.start))?;
        Digest::of_reader(file.take(part.length))
    };
    hash().during("read a layer in an archive of images")
}

fn read_document(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        let mut bytes = Vec::new();
        let file = fs_err::File::open(path)?;
        file.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    read().during("read an OCI layout")
}

fn verify(bytes: &[u8], digest: &Digest) -> Result<()> {
    let actual = Digest::of(bytes);
    if actual == *digest {
        return Ok(());
    }
    Err(Error::Tampered {
        expected: digest.clone(),
        actual: Some(actual),
    })
}

fn blob_path(layout: &Path, digest: &Digest) -> PathBuf {
    layout.join("blobs/sha256").join(digest.hex())
}
