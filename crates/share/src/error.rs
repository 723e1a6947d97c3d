use std::{io, path::PathBuf};

/// Why a share could not be opened or served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory cannot be used.
    #[error("cannot share {}: {source}", path.display())]
    Directory {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest sent what no guest of ours sends.
    #[error("the guest's requests make no sense: {0}")]
    Protocol(#[from] cubicle_protocol::share::Error),
    /// The stream of requests broke off: the life of the channel is over.
    #[error("the connection to the guest broke: {0}")]
    Broken(String),
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
