//! Requests through the proxy to real servers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod access;
mod lives;
mod messages;
mod servers;
mod streams;
mod world;
