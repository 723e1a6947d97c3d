//! For crates that make disk images of other things than recipes: the same cache, working
//! directories and packing.

pub use crate::{
    cache::{Cache, Draft, Lock},
    ext4::Packing,
    scratch::Scratch,
};
