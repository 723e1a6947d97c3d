//! The byte protocol under HTTP/2 on the virtio-serial port.
//!
//! The port is one byte stream that outlives every connection on it: servers restart, VMs are
//! frozen in the middle of a frame and thawed somewhere else. So a connection, called a *life*,
//! begins with a handshake that finds its way through whatever was in flight before:
//!
//! ```text
//! host  -> guest   Hello = MAGIC 0x01 version nonce crc     new life, the old one is void
//! guest -> host    Reply = MAGIC 0x02 version nonce crc     same nonce: this life is up
//! ```
//!
//! Towards the guest the payload is *stuffed*: [`Stuffer`] puts one `0x00` behind every [`MAGIC`]
//! that occurs in it, so `MAGIC 0x01` is a Hello wherever it appears, and [`Detector`] takes the
//! zeros out again. Towards the host the payload is raw: the host knows its nonce, drops everything
//! before the Reply that carries it, and from there on reads what the guest wrote.
//!
//! First in a life come two messages, one each way ([`introduction`]): who the guest is to be, and
//! that it is. All that follows is HTTP/2.
//!
//! `version` is big-endian, `crc` is the CRC-32 (IEEE) of version and nonce, big-endian.

use std::fmt;

mod detector;
pub mod host;
pub mod introduction;
mod stuffer;

pub use detector::{Detector, Event};
pub use stuffer::{Run, Stuffer};

/// Version of everything below HTTP/2. A guest speaks one; a host also the one before.
pub const VERSION: u16 = 3;

/// The version before: its introduction is JSON. Snapshots hold guests that speak it, and a host goes on
/// to understand them.
const VERSION_WITH_JSON: u16 = 2;

/// Marks a Hello, a Reply, or, followed by `0x00`, itself.
///
/// Its first byte occurs nowhere else in it, so two occurrences never overlap and a match that
/// fails can only begin again at the byte that broke it. It begins with neither `0x00` nor `0x01`,
/// and as the head of an HTTP/2 frame it would announce one of 13 MB.
pub const MAGIC: [u8; 8] = [0xcb, b'c', b'u', b'b', b'i', b'c', b'l', 0xe5];

/// Flow-control window of one HTTP/2 stream on the channel, in bytes, on both sides.
pub const STREAM_WINDOW: u32 = 1 << 20;

/// Flow-control window of the HTTP/2 connection, in bytes: the largest that the protocol has, so
/// that a reader who stopped reading uses up the window of its own stream and nobody else's.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Largest HTTP/2 frame that either side accepts, in bytes.
pub const MAX_FRAME_SIZE: u32 = 64 << 10;

/// Most HTTP/2 streams that may be open on the channel at once.
pub const MAX_STREAMS: u32 = 10_000;

/// Behind [`MAGIC`] in payload: drop this byte, the magic was payload.
pub(crate) const ESCAPE: u8 = 0x00;
const HELLO: u8 = 0x01;
const REPLY: u8 = 0x02;
const NONCE_LEN: usize = 16;
/// Version, nonce, crc.
const BODY_LEN: usize = 2 + NONCE_LEN + 4;
/// Length of a [`Hello`] and of its Reply on the wire, in bytes.
pub const HELLO_LEN: usize = MAGIC.len() + 1 + BODY_LEN;

/// Tells one life of the channel from every other: 128 random bits, chosen by the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce([u8; NONCE_LEN]);

impl Nonce {
    /// A fresh random nonce.
    #[must_use]
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// The nonce with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; NONCE_LEN]) -> Self {
        Self(bytes)
    }

    /// The nonce's bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; NONCE_LEN] {
        &self.0
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({self})")
    }
}

/// How a life begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version of the side that speaks.
    pub version: u16,
    /// The life's nonce.
    pub nonce: Nonce,
}

impl Hello {
    /// A Hello, or the Reply to one, of this side's [`VERSION`].
    #[must_use]
    pub const fn new(nonce: Nonce) -> Self {
        Self {
            version: VERSION,
            nonce,
        }
    }

    /// What the host writes to begin a life.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HELLO_LEN] {
        self.encode(HELLO)
    }

    /// What the guest writes to confirm one.
    #[must_use]
    pub fn to_reply_bytes(&self) -> [u8; HELLO_LEN] {
        self.encode(REPLY)
    }

    fn encode(&self, kind: u8) -> [u8; HELLO_LEN] {
        let mut out = [0; HELLO_LEN];
        let (magic, rest) = out.split_at_mut(MAGIC.len());
        magic.copy_from_slice(&MAGIC);
        rest[0] = kind;
        let (checked, crc) = rest[1..].split_at_mut(BODY_LEN - 4);
        checked[..2].copy_from_slice(&self.version.to_be_bytes());
        checked[2..].copy_from_slice(&self.nonce.0);
        crc.copy_from_slice(&crc32fast::hash(checked).to_be_bytes());
        out
    }

    /// `None`: the checksum does not fit.
    fn decode(body: &[u8; BODY_LEN]) -> Option<Self> {
        let (checked, crc) = body.split_at(BODY_LEN - 4);
        if crc != crc32fast::hash(checked).to_be_bytes() {
            return None;
        }
        let mut nonce = [0; NONCE_LEN];
        nonce.copy_from_slice(&checked[2..]);
        Some(Self {
            version: u16::from_be_bytes([checked[0], checked[1]]),
            nonce: Nonce(nonce),
        })
    }
}

/// Why a life did not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port could not be read or written.
    #[error("the channel broke while {doing}")]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The other end went away before the guest answered: the VM is gone, or was stopped.
    #[error("the channel closed before the guest answered the hello")]
    Closed,
    /// The guest answered in another version of the protocol.
    #[error("the guest speaks version {guest} of the channel protocol, this host speaks {host}")]
    Version {
        /// The guest's version.
        guest: u16,
        /// This side's [`VERSION`].
        host: u16,
    },
}

/// How many bytes of [`MAGIC`] the last bytes of `bytes` are the beginning of: 0 to 7. A complete
/// magic at the end counts as 0.
fn partial_match(bytes: &[u8]) -> usize {
    let longest = bytes.len().min(MAGIC.len() - 1);
    // The first byte occurs once in MAGIC, so at most one suffix can match.
    (1..=longest)
        .find(|&len| bytes.ends_with(&MAGIC[..len]))
        .unwrap_or(0)
}
