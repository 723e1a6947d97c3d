//! Images that others have made: found by name, fetched, unpacked and made into disks.
//!
//! [`Images::resolve`] says what a name means: an image in a registry, in a file on this machine, or
//! a recipe ([`ImageMap`]). [`Images::pull`] brings its blobs here, and [`Images::disk`] makes a disk
//! of its layers. This crate owns one directory: `blobs`, which are kept by their digests, and
//! `disks`, which are kept by their [`cubicle_image::Fingerprint`]s.
//!
//! Invariants:
//! - **VERIFIED**: a blob has its final name only if its bytes have its digest. What it holds,
//!   decompressed, is compared with the image's configuration again when it is unpacked.
//! - **ONCE**: a blob is here once, is fetched by one task at a time, and a disk is made by one. What
//!   a crash or a broken connection interrupted goes on where it was.
//! - **BY-CONTENT**: a disk's fingerprint is that of the layers' decompressed content: the same image
//!   by tag, by digest, from a registry, a layout or a tarball is the same disk.
//! - **INSIDE**: no layer reaches anything outside of its tree ([`unpack`]).
//! - **NOTHING-LEFT**: what fails leaves nothing behind, except the first part of a blob whose
//!   connection broke.
//! - Credentials go to the registry that the user named and to no other, and into no message.

mod blobs;
mod config;
mod digest;
mod disk;
mod document;
mod error;
mod images;
mod local;
mod map;
mod registry;
pub mod unpack;

pub use config::{Auth, Config, ImageConfig, Mirror};
pub use digest::Digest;
pub use disk::Disk;
pub use error::{Error, Result};
pub use images::{Found, Image, Images, Layer, PULL, Removed, Resolved, UNPACK};
pub use map::{ImageMap, Target};
pub use unpack::Limits;
