//! The daemon inside the virtual machine.

pub mod access;
mod blocking;
pub mod channel;
pub mod daemon;
mod fds;
pub mod files;
pub mod filesystem;
pub mod http;
pub mod journal;
pub mod process;
pub mod proto;
pub mod system;
