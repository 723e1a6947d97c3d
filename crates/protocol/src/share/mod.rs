//! The protocol of a *share*: a directory of the host that a sandbox has mounted.
//!
//! The guest asks, the host answers. All state (what is open, which names are known, what has been
//! asked and not answered) is the guest's, in its memory, and so part of every snapshot. The host
//! keeps nothing but a cache: any request can be answered by a host that has never seen the guest
//! before. So a share survives pause, resume, clone, rollback and a restart of the server by
//! itself.
//!
//! The host opens `POST /shares/{tag}` on the channel, under its own authority, once in every life.
//! The body of the answer carries [`Request`]s, the body of the request carries [`Reply`]s, each in
//! a [frame](encode). Requests are answered in any order. When a life ends, the guest asks again, in
//! the next one, what was not answered, and says so ([`Request::again`]): an operation is done at
//! least once.
//!
//! Invariants:
//! - A [`RelativePath`] that was decoded names something beneath the share's root, if nothing on
//!   the way is a symbolic link: it has no empty, `.` or `..` component and no NUL.
//! - No frame is longer than [`MAX_FRAME`], so neither side needs more memory than
//!   [`MAX_IN_FLIGHT`] of them.

mod frame;
mod message;
mod path;

#[cfg(test)]
mod tests;

pub use frame::{Error, Frame, Frames, encode, encode_head, entries, push_entry};
pub use message::{
    Answer, Change, Entry, Errno, FileRef, Kind, Moment, Operation, RenameHow, Reply, Request,
    Status, Time, Usage,
};
pub use path::{InvalidPath, RelativePath};

/// Path of the call that opens a share, without the `/` and the tag that follow it.
pub const SHARES_PATH: &str = "/shares";

/// Most bytes of file content in one [`Operation::Read`] or [`Operation::Write`], and most bytes of
/// entries, link target or attribute in one answer.
pub const MAX_DATA: usize = 256 << 10;

/// Most bytes of a message without its data. The longest has two paths of [`MAX_PATH`].
pub const MAX_HEAD: usize = 10 << 10;

/// Most bytes of a frame, its length field included.
pub const MAX_FRAME: usize = frame::PREFIX + MAX_HEAD + MAX_DATA;

/// Most requests of one share that wait for their answer.
pub const MAX_IN_FLIGHT: usize = 64;

/// Longest path below a share's root, in bytes; `PATH_MAX` of Linux.
pub const MAX_PATH: usize = 4096;

/// Longest name of a file, in bytes; `NAME_MAX` of Linux.
pub const MAX_NAME: usize = 255;

/// What the names of files begin with that were removed while a program in the guest had them open.
/// They lie in the share's root until the last program has closed them.
pub const UNLINKED_PREFIX: &str = ".cubicle-unlinked-";
