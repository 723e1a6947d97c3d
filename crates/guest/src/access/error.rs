use std::{io, path::PathBuf};

use connectrpc::ConnectError;
use http::StatusCode;

/// Why a call was refused, or why its user could not be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that says who there is could not be read.
    #[error("cannot read {}: {source}", path.display())]
    ReadAccounts {
        /// `/etc/passwd` or `/etc/group`.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The call names no user, and the sandbox has no default one.
    #[error("no user specified")]
    NoUser,
    /// The call names a user that the sandbox doesn't have.
    #[error("invalid username: '{0}'")]
    UnknownUser(String),
    /// The call names no user, and the sandbox doesn't have its default one.
    #[error("invalid default user: '{0}'")]
    UnknownDefaultUser(String),
    /// The access token is missing or wrong.
    #[error(
        "unauthorized access, please provide a valid access token or method signing if supported"
    )]
    Unauthorized,
    /// `X-Access-Token` is there but wrong.
    #[error("access token present in header but does not match")]
    WrongToken,
    /// There is neither a token nor a signature.
    #[error("missing signature query parameter")]
    MissingSignature,
    /// The signature is not the one of this request.
    #[error("invalid signature")]
    InvalidSignature,
    /// The signature was right once.
    #[error("signature is already expired")]
    ExpiredSignature,
}

impl Error {
    /// The status of an HTTP response that reports it.
    pub(crate) const fn status(&self) -> StatusCode {
        match self {
            Self::ReadAccounts { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NoUser => StatusCode::BAD_REQUEST,
            _ => StatusCode::UNAUTHORIZED,
        }
    }
}

impl From<Error> for ConnectError {
    fn from(error: Error) -> Self {
        match error {
            Error::ReadAccounts { .. } => Self::internal(error.to_string()),
            _ => Self::unauthenticated(error.to_string()),
        }
    }
}
