//! The daemon's HTTP surface, as a client meets it: the real router over a directory of its own.

mod files;
mod filesystem;
mod support;
mod system;
mod watch;
mod wire;
