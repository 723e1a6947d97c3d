//! Unpacking layers, which may have been made by anybody, into one directory tree.
//!
//! Invariants:
//! - **INSIDE**: nothing outside of the tree is created, changed, removed, linked to or looked at,
//!   whatever names and links the layers have ([`tree`] says how).
//! - **BOUNDED**: memory, files and disk stay within [`Limits`] and constants; what a header claims
//!   is never believed before it has arrived.
//! - **LOWER-ONLY**: a whiteout hides what earlier layers have made and nothing of its own layer,
//!   in whatever order the two come.

mod archive;
mod compression;
mod content;
mod layer;
mod pax;
mod sparse;
mod tree;

use std::{
    io::{self, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use self::{layer::Layer, tree::Tree};
use crate::{
    digest::Digest,
    error::{Error, Result},
};

/// How much an image may be, unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all layers together, decompressed.
    pub bytes: u64,
    /// Files, directories, links and whiteouts of all layers together.
    pub entries: u64,
}

impl Default for Limits {
    /// 128 GiB in 8 million entries: several times the largest images in use.
    fn default() -> Limits {
        Limits {
            bytes: 128 << 30,
            entries: 8_000_000,
        }
    }
}

/// A way to end long work on another thread.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ends the work soon, with an error.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a layer has turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// Of the decompressed archive, to the last byte.
    pub digest: Digest,
    /// Entries of this layer, whiteouts included.
    pub entries: u64,
    /// Length of the decompressed archive, in bytes.
    pub bytes: u64,
}

/// Puts layers over one another in a directory.
pub struct Unpacker {
    tree: Tree,
    limits: Limits,
    stop: Stop,
    entries: u64,
    bytes: u64,
}

impl Unpacker {
    /// An unpacker into `directory`, which is empty and of which nobody else but its owner, root,
    /// knows: files in it get the owners and the set-id bits that the layers name.
    ///
    /// # Errors
    /// [`Error::Layer`] if the directory cannot be opened.
    pub fn new(directory: &Path, limits: Limits, stop: Stop) -> Result<Unpacker> {
        let tree = Tree::open(directory).map_err(|fault| fault.at(None))?;
        Ok(Unpacker {
            tree,
            limits,
            stop,
            entries: 0,
            bytes: 0,
        })
    }

    /// Unpacks the next layer: a tar archive, as it is or compressed with gzip or zstd.
    ///
    /// After an error the tree is to be thrown away.
    ///
    /// # Errors
    /// [`Error::Layer`] names the entry and says what is wrong with it; [`Error::TooLarge`],
    /// [`Error::DiskFull`], [`Error::Stopped`].
    pub fn layer(&mut self, input: impl Read) -> Result<Unpacked> {
        let decompressed = compression::open(input).map_err(|fault| fault.at(None))?;
        let mut input = Metered {
            input: decompressed,
            hasher: Sha256::new(),
            bytes: 0,
            most: self.limits.bytes.saturating_sub(self.bytes),
            stop: self.stop.clone(),
        };
        let most = self.limits.entries.saturating_sub(self.entries);
        let layer = Layer::new(&mut self.tree, &mut input, most);
        let unpacked = layer.unpack();
        // Why reading has failed is known better here.
        if self.stop.is_stopped() {
            return Err(Error::Stopped);
        }
        if input.bytes > input.most {
            return Err(Error::TooLarge {
                what: "bytes, unpacked",
                limit: self.limits.bytes,
            });
        }
        let entries = unpacked.map_err(|error| match error {
            Error::TooLarge { what, .. } => Error::TooLarge {
                what,
                limit: self.limits.entries,
            },
            other => other,
        })?;
        self.entries += entries;
        self.bytes += input.bytes;
        Ok(Unpacked {
            digest: Digest::of_hash(input.hasher.finalize().into()),
            entries,
            bytes: input.bytes,
        })
    }

    /// Entries of all layers so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }
}

/// Counts, hashes, and ends what is read, where that is too much or nobody wants it any more.
struct Metered<R> {
    input: R,
    hasher: Sha256,
    bytes: u64,
    most: u64,
    stop: Stop,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_stopped() || self.bytes > self.most {
            return Err(io::ErrorKind::Other.into());
        }
        let n = self.input.read(buffer)?;
        self.bytes += n as u64;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// What is wrong with an entry, before it is known which one it is.
#[derive(Debug)]
enum Fault {
    Truncated,
    Malformed(&'static str),
    Field(&'static str),
    Type(u8),
    Name(&'static str),
    Parent(&'static str),
    Link(&'static str),
    Compression(&'static str),
    Input(io::Error),
    TooManyEntries,
    Io {
        action: &'static str,
        source: io::Error,
    },
}

impl Fault {
    fn field(name: &'static str) -> Fault {
        Fault::Field(name)
    }

    fn system(action: &'static str, error: Errno) -> Fault {
        Fault::Io {
            action,
            source: error.into(),
        }
    }

    fn at(self, entry: Option<&[u8]>) -> Error {
        let entry = entry.map(|name| String::from_utf8_lossy(name).into_owned());
        let mut cause = None;
        let reason = match self {
            Fault::TooManyEntries => {
                return Error::TooLarge {
                    what: "entries",
                    limit: 0,
                };
            }
            Fault::Truncated => "the archive ends in the middle of it".to_owned(),
            Fault::Malformed(what) => format!("the archive has {what}"),
            Fault::Field(name) => format!("its {name} is out of range or no {name} at all"),
            Fault::Type(byte) => format!("its type `{}` is not known", byte.escape_ascii()),
            Fault::Name(why) => format!("its name {why}"),
            Fault::Parent(why) => format!("its parent directory {why}"),
            Fault::Link(why) => format!("what it links to {why}"),
            Fault::Compression(what) => format!("it is compressed with {what}, not gzip or zstd"),
            Fault::Input(source) => {
                cause = Some(source);
                "the archive cannot be read".to_owned()
            }
            Fault::Io { action, source } => {
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) {
                    return Error::DiskFull { action, source };
                }
                cause = Some(source);
                format!("cannot {action}")
            }
        };
        Error::Layer {
            entry,
            reason,
            source: cause,
        }
    }
}
