//! Images that others have made: found by name, fetched, unpacked and made into disks.

mod digest;
mod error;
pub mod unpack;

pub use digest::Digest;
pub use error::{Error, Result};
