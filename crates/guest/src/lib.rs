//! What runs inside a sandbox: the first process of its machine, and the daemon through which
//! everything else reaches it.
//!
//! - [`init`] brings the machine up and keeps the daemon running.
//! - [`channel`] serves the host on the virtio-serial port, [`daemon`] puts everything together.
//! - [`process`], [`filesystem`], [`files`] and [`system`] are the envd protocol of E2B's clients;
//!   [`access`] says who may use it, [`http`] what is served where.
//! - [`interpreter`] serves code interpreters' clients where the image has kernels, [`units`] those
//!   who know it as services.
//! - [`journal`] remembers what happened.
//!
//! Invariants:
//! - Nothing that only the host may ask for can be reached by TCP, from inside or through a tunnel.
//! - Losing the host ends no program.
//! - The daemon is small: each of its pages that is written to is carried by every snapshot.

pub mod access;
mod blocking;
pub mod channel;
mod copy;
pub mod daemon;
mod fds;
pub mod files;
pub mod filesystem;
pub mod http;
pub mod init;
pub mod interpreter;
pub mod journal;
pub mod process;
pub mod proto;
pub mod share;
pub mod system;
pub mod units;
