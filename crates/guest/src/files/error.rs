use std::{
    io,
    path::{Path, PathBuf},
};

use http::StatusCode;

use crate::{
    access,
    filesystem::{MetadataError, PathError},
    http::ApiError,
};

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller may not, or is nobody.
    #[error(transparent)]
    Access(#[from] access::Error),
    /// The path means no file.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The metadata cannot be stored.
    #[error("invalid metadata: {0}")]
    Metadata(#[from] MetadataError),
    /// The query string makes no sense.
    #[error("invalid query: {0}")]
    Query(String),
    /// There is nothing at the path.
    #[error("path '{}' does not exist", .0.display())]
    NotFound(PathBuf),
    /// There is a directory at the path.
    #[error("path '{}' is a directory", .0.display())]
    IsDirectory(PathBuf),
    /// There is a device, a pipe or a socket at the path.
    #[error("path '{}' is not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// A part of the path is a file.
    #[error("a part of path '{}' is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// The client accepts no encoding that there is.
    #[error("no acceptable encoding found, supported: [identity, gzip]")]
    NotAcceptable,
    /// The body is compressed in a way that is not understood.
    #[error("unsupported Content-Encoding: {0}, supported: [identity, gzip]")]
    ContentEncoding(String),
    /// The body is neither a form nor a file.
    #[error(
        "unsupported content type: {0}, expected multipart/form-data or application/octet-stream"
    )]
    ContentType(String),
    /// An upload names no file.
    #[error("path query parameter is required for raw body upload")]
    NoPath,
    /// A part of a form names no file.
    #[error("a file of the form has no name, and there is no path query parameter")]
    NoFileName,
    /// A form has two files for one place.
    #[error(
        "you cannot upload multiple files to the same path '{}' in one upload request, \
         only the first specified file was uploaded", .0.display()
    )]
    SamePath(PathBuf),
    /// The body ended early or was malformed.
    #[error("cannot read the request's body: {0}")]
    Body(String),
    /// Composing was asked for without parts.
    #[error("source_paths must not be empty")]
    NoSources,
    /// Composing was asked for without a place to put the result.
    #[error("destination is required")]
    NoDestination,
    /// A part is the result.
    #[error("source path '{0}' cannot be the same as destination")]
    SourceIsDestination(String),
    /// The disk is full.
    #[error("not enough disk space available to write '{}'", .0.display())]
    NoSpace(PathBuf),
    /// The kernel refused.
    #[error("cannot {attempt} '{}': {source}", path.display())]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// Makes an error of what the kernel said of `path`.
    pub(super) fn io(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound(path),
            io::ErrorKind::IsADirectory => Self::IsDirectory(path),
            io::ErrorKind::NotADirectory => Self::NotADirectory(path),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace(path),
            _ => Self::Io {
                attempt,
                path,
                source,
            },
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Access(error) => error.status(),
            Error::NotFound(_) => StatusCode::NOT_FOUND,
            Error::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            Error::NoSpace(_) => StatusCode::INSUFFICIENT_STORAGE,
            Error::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::new(status, error.to_string())
    }
}
