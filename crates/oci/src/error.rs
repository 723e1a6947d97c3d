use std::{io, path::PathBuf};

use crate::digest::Digest;

/// What can go wrong between the name of an image and its disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name of an image cannot be one.
    #[error("`{name}` is not the name of an image: {reason}")]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A digest has another form than `sha256:` and 64 digits.
    #[error("`{text}` is not a SHA-256 digest")]
    Digest {
        /// What was given.
        text: String,
    },
    /// The map of image names cannot be used.
    #[error("image map{}: {reason}", at(.path))]
    Map {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate file or another setting cannot be used.
    #[error("cannot use {what}: {reason}")]
    Setting {
        /// The setting.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The registry wants a user name and a password, or others than were given.
    #[error(
        "the registry `{registry}` refuses access to `{image}`: {}",
        if *.had_credentials { "the user name or the password is wrong, or has no right to it" }
        else { "it needs a user name and a password, or the image does not exist" }
    )]
    Unauthorized {
        /// Host and port.
        registry: String,
        /// The image.
        image: String,
        /// Whether a user name and a password were given.
        had_credentials: bool,
    },
    /// There is no image of that name.
    #[error("there is no image `{image}` in {place}")]
    NotFound {
        /// The image.
        image: String,
        /// The registry, layout or archive that was asked.
        place: String,
    },
    /// There is an image of that name, but not for this kind of machine.
    #[error("the image `{image}` is not made for linux/amd64, but for {found}")]
    Platform {
        /// The image.
        image: String,
        /// What it is made for.
        found: String,
    },
    /// The registry cannot be reached or answers with an error.
    #[error("cannot {action} from the registry `{registry}`: {reason}")]
    Registry {
        /// What was attempted, to be read after "cannot".
        action: String,
        /// Host and port.
        registry: String,
        /// Why it failed.
        reason: String,
    },
    /// A manifest, index or configuration is not what it should be.
    #[error("{what} of the image `{image}` cannot be used: {reason}")]
    Document {
        /// The document.
        what: &'static str,
        /// The image.
        image: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A blob ends too early.
    #[error("the blob {digest} is cut short: it has {actual} of {expected} bytes")]
    Truncated {
        /// The blob.
        digest: Digest,
        /// Its length by the manifest, in bytes.
        expected: u64,
        /// What there is of it, in bytes.
        actual: u64,
    },
    /// A blob holds something else than it should.
    #[error("the blob {expected} was changed: what arrived {}", match .actual {
        Some(actual) => format!("has the digest {actual}"),
        None => "is longer than the manifest says".to_owned(),
    })]
    Tampered {
        /// The digest that it should have.
        expected: Digest,
        /// The one that it has; none if it was too long to go on.
        actual: Option<Digest>,
    },
    /// A layer cannot be unpacked.
    #[error("cannot unpack {}: {reason}", match .entry {
        Some(entry) => format!("`{entry}`"),
        None => "a layer".to_owned(),
    })]
    Layer {
        /// Name of the entry, where it is about one.
        entry: Option<String>,
        /// What is wrong with it.
        reason: String,
        /// The error below, if there is one.
        source: Option<io::Error>,
    },
    /// The image is more than is allowed.
    #[error("the image has more than {limit} {what}")]
    TooLarge {
        /// What there is too much of, with its unit.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The image has no room on the disk that was asked for.
    #[error(
        "the image needs a disk of about {needed_mib} MiB, {disk_mib} MiB were asked for; ask for a \
         larger disk"
    )]
    DoesNotFit {
        /// An estimate of what would do, in MiB.
        needed_mib: u64,
        /// What was asked for, in MiB.
        disk_mib: u32,
    },
    /// The host's disk is full.
    #[error("cannot {action}: the host's disk is full")]
    DiskFull {
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused something; `source` names the file.
    #[error("cannot {action}")]
    Io {
        /// What was attempted, to be read after "cannot".
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The disk image could not be made.
    #[error(transparent)]
    Image(cubicle_image::Error),
    /// Nobody waits for the result any more.
    #[error("the work on an image was stopped")]
    Stopped,
}

impl From<cubicle_image::Error> for Error {
    fn from(error: cubicle_image::Error) -> Error {
        match error {
            cubicle_image::Error::Io { source, .. } if is_disk_full(&source) => Error::DiskFull {
                action: "make a disk image",
                source,
            },
            other => Error::Image(other),
        }
    }
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was attempted when an `io::Error` becomes an [`Error`].
pub(crate) trait During<T> {
    fn during(self, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, action: &'static str) -> Result<T> {
        self.map_err(|source| {
            let source = source.into();
            if is_disk_full(&source) {
                return Error::DiskFull { action, source };
            }
            let action = action.to_owned();
            Error::Io { action, source }
        })
    }
}

pub(crate) fn is_disk_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn at(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map(|path| format!(" `{}`", path.display()))
        .unwrap_or_default()
}
