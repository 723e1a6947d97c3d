use std::{io, path::PathBuf, process::ExitStatus};

/// What can go wrong while an image is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something; `source` names the file.
    #[error("cannot {action}")]
    Io {
        /// What was attempted, to be read after "cannot".
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program that Cubicle calls is not there.
    #[error(
        "cannot {purpose}: the program `{program}` is missing; install the package `{package}`"
    )]
    ProgramMissing {
        /// What it was wanted for.
        purpose: &'static str,
        /// Its file name.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program that Cubicle calls failed.
    #[error("cannot {purpose}: `{program}` ended with {status}{}{}", quoted(.tail), see(.log))]
    Program {
        /// What it was wanted for.
        purpose: &'static str,
        /// Its file name.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it wrote.
        tail: String,
        /// Where all of its output is.
        log: Option<PathBuf>,
    },
    /// The host is not a system whose packages Cubicle knows.
    #[error("cannot use this host's packages: {reason}")]
    Host {
        /// What is missing or unknown, and what to do.
        reason: String,
    },
    /// No configured suite has a kernel package.
    #[error(
        "no package matches `{pattern}` in the configured apt sources; run `apt-get update`, add the \
         distribution's main component, or name a kernel file with --kernel"
    )]
    NoKernelPackage {
        /// What was looked for.
        pattern: &'static str,
    },
    /// A downloaded package is not the one that the package lists promise.
    #[error("package `{package}` has SHA-256 {actual}, the package lists say {expected}")]
    PackageDigest {
        /// Name of the package.
        package: String,
        /// The digest in the signed package lists.
        expected: String,
        /// The digest of what arrived.
        actual: String,
    },
    /// A kernel file or package does not have the expected form.
    #[error("cannot use the kernel `{}`: {reason}", .path.display())]
    Kernel {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be decompressed.
    #[error("cannot decompress {what} ({format})")]
    Decompress {
        /// What was being decompressed.
        what: String,
        /// The compression format.
        format: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A driver that the guest needs is neither in the kernel nor among its modules.
    #[error("the kernel {version} has no driver `{module}`, neither built in nor as a module")]
    DriverMissing {
        /// Release of the kernel.
        version: String,
        /// The module's name.
        module: String,
    },
    /// The file is not a guest daemon.
    #[error("`{}` cannot be the guest daemon: {reason}", .path.display())]
    GuestBinary {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest daemon is not where it should be.
    #[error(
        "the guest daemon `cubicle-guest` is missing: looked at {}; build it with `make guest` or \
         point CUBICLE_GUEST at it",
        paths(.searched)
    )]
    GuestBinaryMissing {
        /// The paths that were tried.
        searched: Vec<PathBuf>,
    },
    /// A recipe asks for something impossible.
    #[error("recipe `{recipe}`: {reason}")]
    Recipe {
        /// Name of the recipe.
        recipe: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was attempted when an `io::Error` becomes an [`Error`].
pub(crate) trait During<T> {
    fn during(self, action: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, action: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Io {
            action: action.into(),
            source: source.into(),
        })
    }
}

fn quoted(tail: &str) -> String {
    if tail.is_empty() {
        String::new()
    } else {
        format!(":\n{tail}")
    }
}

fn see(log: &Option<PathBuf>) -> String {
    log.as_ref()
        .map(|log| format!("\n(all of its output: {})", log.display()))
        .unwrap_or_default()
}

fn paths(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| format!("`{}`", path.display()))
        .collect::<Vec<_>>()
        .join(", ")
}
