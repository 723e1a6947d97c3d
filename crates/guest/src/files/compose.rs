//! `POST /files/compose`.

use std::{fs::File, io::Seek as _, os::unix::fs::MetadataExt as _, path::PathBuf, sync::Arc};

use axum::{
    Json,
    body::Bytes,
    extract::{State as Shared, rejection::BytesRejection},
};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use serde::Deserialize;

use super::{Destination, Error, Written, target::Target};
use crate::{
    access::State,
    blocking::blocking,
    filesystem::{Metadata, resolve},
    http::ApiError,
};

/// Which files to put together.
#[derive(Debug, Deserialize)]
pub(crate) struct ComposeRequest {
    #[serde(default)]
    source_paths: Vec<String>,
    #[serde(default)]
    destination: String,
    username: Option<String>,
}

/// Puts files together into one, and removes them.
pub(crate) async fn compose(
    Shared(state): Shared<Arc<State>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Written>, ApiError> {
    let body = body.map_err(|error| Error::Body(error.body_text()))?;
    let request: ComposeRequest = serde_json::from_slice(&body)
        .map_err(|error| Error::Body(format!("invalid JSON: {error}")))?;
    Ok(Json(blocking(move || concatenate(&state, &request)).await?))
}

struct Source {
    path: PathBuf,
    len: u64,
}

fn concatenate(state: &State, request: &ComposeRequest) -> Result<Written, Error> {
    if request.source_paths.is_empty() {
        return Err(Error::NoSources);
    }
    if request.destination.is_empty() {
        return Err(Error::NoDestination);
    }
    let settings = state.settings();
    let user = state.user(request.username.as_deref().filter(|name| !name.is_empty()))?;
    let path = resolve(&request.destination, &user, &settings)?;
    let existing = std::fs::metadata(&path)
        .ok()
        .map(|found| (found.dev(), found.ino()));

    let mut sources = Vec::with_capacity(request.source_paths.len());
    for name in &request.source_paths {
        let source = resolve(name, &user, &settings)?;
        let found = std::fs::metadata(&source).map_err(Error::io("look at", &source))?;
        if source == path || existing == Some((found.dev(), found.ino())) {
            return Err(Error::SourceIsDestination(name.clone()));
        }
        if !found.is_file() {
            return Err(Error::NotRegular(source));
        }
        sources.push(Source {
            path: source,
            len: found.len(),
        });
    }

    let mut target = Target::open_untruncated(Destination {
        path: path.clone(),
        user,
    })?;
    reserve(target.file(), sources.iter().map(|source| source.len).sum())
        .map_err(|errno| Error::io("reserve space for", &path)(errno.into()))?;
    for source in &sources {
        let mut from = File::open(&source.path).map_err(Error::io("open", &source.path))?;
        // The kernel copies by itself, sharing blocks where the file system can.
        std::io::copy(&mut from, target.file()).map_err(Error::io("write", &path))?;
    }
    let file = target.file();
    let len = file.stream_position().map_err(Error::io("write", &path))?;
    file.set_len(len).map_err(Error::io("write", &path))?;
    let written = target.finish(&Metadata::default())?;
    for source in &sources {
        // One that is gone was removed by somebody else, or is named twice.
        let _ = std::fs::remove_file(&source.path);
    }
    Ok(written)
}

/// Makes sure that there is space for `len` bytes before an existing content is touched.
fn reserve(file: &File, len: u64) -> Result<(), Errno> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, len) {
        // Not every file system can promise that; none can promise nothing.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        result => result,
    }
}
