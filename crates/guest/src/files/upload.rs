//! `POST /files`.

use std::{io, path::PathBuf, pin::Pin, sync::Arc};

use async_compression::tokio::bufread::GzipDecoder;
use axum::{
    Json,
    extract::{Request, State as Shared},
    http::header::CONTENT_TYPE,
};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use mime_guess::{Mime, mime};
use tokio_util::io::{ReaderStream, StreamReader};

use super::{
    CHUNK, Destination, Error, Written, body::Incoming, encoding, query::FileQuery, target::Target,
};
use crate::{
    access::{Operation, Settings, State, User},
    blocking::blocking,
    filesystem::{Metadata, resolve},
    http::ApiError,
};

type Contents = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// Writes the body, or each file of the form that it is.
pub(crate) async fn upload(
    Shared(state): Shared<Arc<State>>,
    query: FileQuery,
    request: Request,
) -> Result<Json<Vec<Written>>, ApiError> {
    Ok(Json(receive(state, query, request).await?))
}

async fn receive(
    state: Arc<State>,
    query: FileQuery,
    request: Request,
) -> Result<Vec<Written>, Error> {
    let (parts, body) = request.into_parts();
    let plain = Incoming::new(body);
    let settings = query.authorize(&state, &parts.headers, Operation::Write)?;
    let metadata = Arc::new(Metadata::from_headers(&parts.headers)?);
    let compressed = encoding::is_compressed(&parts.headers)?;
    let content_type = parts
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let name = query.username().map(str::to_owned);
    let user = blocking(move || state.user(name.as_deref())).await?;
    let upload = Upload {
        user,
        settings,
        metadata,
    };

    let contents: Contents = if compressed {
        let mut decoder = GzipDecoder::new(StreamReader::new(plain));
        decoder.multiple_members(true);
        Box::pin(ReaderStream::with_capacity(decoder, CHUNK))
    } else {
        Box::pin(plain)
    };
    let mime = content_type.parse::<Mime>().ok();
    match mime.as_ref().map(|mime| (mime.type_(), mime.subtype())) {
        Some((mime::APPLICATION, mime::OCTET_STREAM)) => {
            let path = upload.resolve(query.path.as_deref().ok_or(Error::NoPath)?)?;
            Ok(vec![upload.store(path, contents).await?])
        }
        Some((mime::MULTIPART, _)) => {
            upload
                .form(query.path.as_deref(), content_type, contents)
                .await
        }
        _ => Err(Error::ContentType(content_type.to_owned())),
    }
}

struct Upload {
    user: User,
    settings: Arc<Settings>,
    metadata: Arc<Metadata>,
}

impl Upload {
    fn resolve(&self, path: &str) -> Result<PathBuf, Error> {
        Ok(resolve(path, &self.user, &self.settings)?)
    }

    /// Stores the parts named `file` of a form, each where `path` says, or else its own file name.
    async fn form(
        &self,
        path: Option<&str>,
        content_type: &str,
        contents: Contents,
    ) -> Result<Vec<Written>, Error> {
        let broken = |error: multer::Error| Error::Body(explain(&error));
        let boundary = multer::parse_boundary(content_type).map_err(broken)?;
        let mut form = multer::Multipart::new(contents, boundary);
        let mut written: Vec<Written> = Vec::new();
        while let Some(field) = form.next_field().await.map_err(broken)? {
            if field.name() != Some("file") {
                continue;
            }
            let path = path.or(field.file_name().filter(|name| !name.is_empty()));
            let path = self.resolve(path.ok_or(Error::NoFileName)?)?;
            if written
                .iter()
                .any(|file| file.path == path.to_string_lossy())
            {
                return Err(Error::SamePath(path));
            }
            let contents = field.map_err(|error| io::Error::other(explain(&error)));
            written.push(self.store(path, contents.boxed()).await?);
        }
        Ok(written)
    }

    async fn store(&self, path: PathBuf, contents: Contents) -> Result<Written, Error> {
        let broken = |error: io::Error| Error::Body(explain(&error));
        let mut chunks = Chunks { contents };
        let destination = Destination {
            path,
            user: self.user.clone(),
        };
        let mut next = chunks.next().await.map_err(broken)?;
        let mut target = blocking(move || Target::open(destination)).await?;
        while let Some(chunk) = next {
            // If this future is dropped, the target is dropped too, once the chunk is written.
            target = blocking(move || target.write(&chunk).map(|()| target)).await?;
            next = chunks.next().await.map_err(broken)?;
        }
        let metadata = Arc::clone(&self.metadata);
        blocking(move || target.finish(&metadata)).await
    }
}

/// Contents in pieces that are worth a system call.
struct Chunks {
    contents: Contents,
}

impl Chunks {
    /// The next [`CHUNK`] or more, less only at the end; none behind it.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let mut gathered = BytesMut::new();
        while let Some(piece) = self.contents.try_next().await? {
            if gathered.is_empty() && piece.len() >= CHUNK {
                return Ok(Some(piece));
            }
            gathered.extend_from_slice(&piece);
            if gathered.len() >= CHUNK {
                break;
            }
        }
        Ok((!gathered.is_empty()).then(|| gathered.freeze()))
    }
}

/// An error with what caused it: HTTP libraries put the reason there.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        source = error.source();
    }
    text
}
