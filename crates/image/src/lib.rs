//! Images: everything that a VM is first booted from, made on this machine from what the host's
//! own package manager trusts.
//!
//! - a [`Kernel`]: the distribution's kernel package (or a file that the user names) unpacked into
//!   `vmlinux`, and an initramfs that holds the guest daemon as `/init` and the few drivers that
//!   the kernel lacks ([`prepare_kernel`]);
//! - a [`RootFs`]: a [`Recipe`] bootstrapped from the host's package mirror and packed into a
//!   sparse, raw ext4 image ([`build_rootfs`]).
//!
//! Invariants:
//! - Nothing is installed on the host, and no code of a downloaded package runs outside a chroot.
//! - A published artefact is complete and never changes: it is written beside its final name and
//!   renamed. Its file name is the [`Fingerprint`] of all that went into it, so the same inputs
//!   are never built twice, not even by two processes at the same time (a lock file decides).
//! - Dropping a returned future stops the work: processes are killed with everything that they
//!   started, mounts are undone, partial files are removed.
//! - Packages are authenticated by apt, with the keys of the host's distribution.

mod apt;
mod bootstrap;
mod bzimage;
mod cache;
mod command;
mod compression;
mod cpio;
mod error;
mod ext4;
mod fingerprint;
mod guest;
mod initramfs;
mod kernel;
mod modules;
mod progress;
mod recipe;
mod registries;
mod rootfs;
mod scratch;
mod setup;
mod version;
pub mod workshop;

pub use apt::{Distribution, Host};
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use guest::GuestBinary;
pub use kernel::{Kernel, KernelSource, prepare_kernel};
pub use progress::{Event, Progress, Step};
pub use recipe::{Ready, Recipe, Suite};
pub use rootfs::{RootFs, build_rootfs};
pub use setup::Setup;
