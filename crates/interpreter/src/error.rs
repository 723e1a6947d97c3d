use std::{io, path::PathBuf};

use http::StatusCode;

use crate::{Language, zmtp};

/// Why something that a client asked for could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image has no kernel for that language.
    #[error(
        "this sandbox has no kernel for {language}: add one to its template ({how}); it has {}",
        list(.available)
    )]
    NoKernel {
        /// The language, as it was asked for.
        language: String,
        /// What adds one.
        how: &'static str,
        /// The languages that there are kernels for.
        available: Vec<String>,
    },
    /// A context can only be in a directory that exists.
    #[error("cannot set the working directory to {}: it is not a directory", .0.display())]
    Directory(PathBuf),
    /// No context has that id.
    #[error("Context {0} not found")]
    NoContext(String),
    /// A request names a context and a language.
    #[error("Only one of context_id or language can be provided")]
    Ambiguous,
    /// No program can have a variable of that name, or that value.
    #[error("'{0}' cannot be the name of an environment variable, or its value holds a NUL")]
    Variable(String),
    /// The kernel's program could not be run.
    #[error("cannot run {program}, the kernel for {language}: {source}")]
    Spawn {
        /// Its program.
        program: String,
        /// The language.
        language: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file or socket that a kernel needs could not be made.
    #[error("cannot {what} for a kernel: {source}")]
    Prepare {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel ended before it answered.
    #[error("the kernel for {language} ended at once ({how}): {said}")]
    Stillborn {
        /// The language.
        language: String,
        /// Exit status or signal.
        how: String,
        /// The last it printed.
        said: String,
    },
    /// The kernel runs and doesn't answer.
    #[error("the kernel for {language} did not answer within {seconds} s: {said}")]
    Silent {
        /// The language.
        language: String,
        /// How long it had.
        seconds: u64,
        /// The last it printed.
        said: String,
    },
    /// A kernel that ran before can't be talked to.
    #[error("cannot talk to the kernel: {0}")]
    Connection(#[from] zmtp::Error),
}

impl Error {
    pub(crate) fn no_kernel(language: &Language, available: Vec<String>) -> Self {
        Self::NoKernel {
            language: language.name().to_owned(),
            how: language.how_to_add(),
            available,
        }
    }

    /// The status that says it to a client.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NoContext(_) => StatusCode::NOT_FOUND,
            Self::Ambiguous | Self::Variable(_) | Self::Directory(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

fn list(available: &[String]) -> String {
    match available {
        [] => "none at all".to_owned(),
        names => names.join(", "),
    }
}
