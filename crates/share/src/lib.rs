//! The host's end of a share: one directory tree, for one sandbox that has it mounted. And the same
//! tree for those who reach it from outside of any sandbox: [`Contents`].
//!
//! A [`Share`] does what a guest asks for ([`cubicle_protocol::share`]), with paths, and keeps
//! nothing but a cache of open files, so that it can be dropped and opened again at any time: the
//! guest does not notice. [`serve`] reads requests from a stream and writes the replies to another.
//!
//! Invariants:
//! - Nothing outside the directory is ever looked at or changed, whatever the guest asks and whoever
//!   renames what meanwhile. Paths are resolved by `openat2` beneath the directory, across no mount
//!   and no symbolic link; the last component is used in one system call with the descriptor of its
//!   parent, and never followed.
//! - A guest makes no devices, no sockets and no pipes, and no file that runs as somebody else. It
//!   cannot make the host open a device, socket or pipe that is there.
//! - What a guest makes belongs to the owner of the directory.
//! - A read-only share changes nothing; that is decided here, not in the guest.
//! - One guest occupies at most [`MAX_IN_FLIGHT`](cubicle_protocol::share::MAX_IN_FLIGHT) requests'
//!   memory, [`MAX_OPEN_FILES`] descriptors, and [`MAX_PARALLEL`] threads; all guests together as
//!   many threads as [`Workers`] allows. Threads that run async code never wait for a disk.

mod content;
mod error;
mod files;
mod operations;
mod root;
mod serve;
mod share;
mod space;
mod status;

pub use content::{Attributes, Contents, Item, MAX_LISTED, Problem, Upload};
pub use error::{Error, Result};
pub use files::MAX_OPEN_FILES;
pub use serve::{MAX_PARALLEL, Outgoing, Workers, serve};
pub use share::{Access, Share};
