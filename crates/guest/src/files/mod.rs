//! `/files`: the contents of the sandbox's files over plain HTTP, streamed both ways, so that no
//! file is ever held in memory.
//!
//! Uploads are written in place, as a program would, because others may watch: there is no
//! temporary file to see, and an existing one keeps its identity. Two things limit what an upload
//! that breaks off can spoil: nothing is touched before the first [`CHUNK`] (or a smaller body's
//! end) has arrived, and a file that the upload itself created goes away with it.

mod body;
mod compose;
mod download;
mod encoding;
mod error;
mod query;
mod range;
mod target;
mod upload;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub(crate) use compose::compose;
pub(crate) use download::download;
pub use error::Error;
pub(crate) use upload::upload;

use crate::filesystem::Metadata;

/// How much is read or written at a time, in bytes.
const CHUNK: usize = 256 << 10;

/// A file that was written, as the answer describes it.
#[derive(Debug, Serialize)]
pub(crate) struct Written {
    name: String,
    path: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    metadata: std::collections::BTreeMap<String, String>,
}

impl Written {
    /// Describes the file at `path` with the metadata that it really has.
    fn describe(path: &Path) -> Self {
        Self {
            name: path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            path: path.to_string_lossy().into_owned(),
            r#type: "file",
            metadata: Metadata::read(path),
        }
    }
}

/// Where a request wants to write.
#[derive(Debug, Clone)]
struct Destination {
    path: PathBuf,
    user: crate::access::User,
}
