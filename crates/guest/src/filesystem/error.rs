use std::{
    io,
    path::{Path, PathBuf},
};

use connectrpc::{ConnectError, ErrorCode};

use super::{PathError, watch::WatchError};
use crate::access;

/// Why a call of the file system service failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller has no user.
    #[error(transparent)]
    Access(#[from] access::Error),
    /// The path means no file.
    #[error(transparent)]
    Path(#[from] PathError),
    /// There is nothing at the path.
    #[error("path '{}' does not exist", .0.display())]
    NotFound(PathBuf),
    /// A directory is needed and there is something else.
    #[error("path '{}' is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// The directory to be made is there.
    #[error("directory '{}' already exists", .0.display())]
    DirectoryExists(PathBuf),
    /// The directory to be made cannot be: its name is taken.
    #[error("path '{}' already exists and is not a directory", .0.display())]
    NameTaken(PathBuf),
    /// Removing it would remove everything, and was hardly meant.
    #[error("refusing to remove '{}'", .0.display())]
    Precious(PathBuf),
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
    /// Watching failed.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

impl Error {
    /// Makes an error of what the kernel said of `path`.
    pub(super) fn io(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound(path),
            io::ErrorKind::NotADirectory => Self::NotADirectory(path),
            _ => Self::Io {
                attempt,
                path,
                source,
            },
        }
    }
}

impl From<Error> for ConnectError {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Access(access::Error::ReadAccounts { .. }) => ErrorCode::Internal,
            Error::Access(_) => ErrorCode::Unauthenticated,
            Error::Watch(error) => error.code(),
            Error::NotFound(_) => ErrorCode::NotFound,
            Error::DirectoryExists(_) => ErrorCode::AlreadyExists,
            Error::Path(_) | Error::NotADirectory(_) | Error::NameTaken(_) | Error::Precious(_) => {
                ErrorCode::InvalidArgument
            }
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                io::ErrorKind::DirectoryNotEmpty
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::CrossesDevices
                | io::ErrorKind::ResourceBusy
                | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::FailedPrecondition,
                io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput => {
                    ErrorCode::InvalidArgument
                }
                // The standard library's name for it is not stable.
                _ if source.raw_os_error() == Some(libc::ELOOP) => ErrorCode::FailedPrecondition,
                _ => ErrorCode::Internal,
            },
        };
        Self::new(code, error.to_string())
    }
}
