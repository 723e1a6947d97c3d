//! The daemon's HTTP surface, as a client meets it: the real router over a directory of its own.

#![allow(
    clippy::unwrap_used,
    reason = "in a test, also in its helpers, that is a failure"
)]

mod files;
mod filesystem;
mod support;
mod system;
mod watch;
mod wire;
