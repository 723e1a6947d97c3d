//! A program that has started once and continues as many processes.
//!
//! QEMU spends most of its start before it looks at its arguments: 50 libraries are mapped and
//! linked, 12 MiB of pointers relocated, all types of devices registered. A *zygote* is a QEMU
//! that has done all that and waits at the door of `main`. Asked to, it forks; the child confines
//! itself, gets arguments and descriptors, and goes on into `main` as one VM. Its start takes less
//! than half the time, and what was written up to there, 7 MB, is shared by all VMs of a node.
//!
//! This crate is both ends of that. The server uses it as an ordinary library: [`Request`] is what a
//! zygote is asked for, [`Reply`] and [`Ending`] are its answers. The same crate, built as a shared
//! library with the feature `preload`, is what the dynamic linker loads into the program
//! (`LD_PRELOAD`): `preload` takes the place of the C library's entry, `confine` is what a child does
//! to itself, `thrift` keeps QEMU from what each child would pay for. `cubicle-vmm` builds that library and
//! puts it into the root that VMs see.
//!
//! Protocol: the zygote's standard input is a `SOCK_SEQPACKET` socket. It says [`READY`] when it is
//! ready, then each message it gets is a [`Request`] with its descriptors, of which the first is a
//! stream: on it come a [`Reply`], with a pidfd if the child runs, and when the child has ended
//! and was reaped, an [`Ending`]. A zygote whose socket is closed ends; its children live on.
//!
//! Invariants:
//! - A request holds no secret: what is left of it in the zygote's memory is in every later child's.
//! - A child runs none of the program's code before it is confined, and has one thread until then: the
//!   program's own fork handlers, which start threads, come last.
//! - The zygote reads nothing that a VM can write. It is root, in the jail, with the capabilities
//!   that confining its children takes.

// Without the feature, nobody calls what the preloaded library does.
#![cfg_attr(not(feature = "preload"), allow(dead_code))]

mod confine;
mod preload;
mod request;
mod thrift;

pub use confine::{STEPS, drop_capabilities};
pub use request::{Ending, Reply, Request};

/// What a zygote says when it waits for requests.
pub const READY: &[u8] = b"ready";

/// Environment variable that asks the zygote to have the program register what it can be made of
/// before it forks, which only a QEMU that exports certain functions can do.
pub const WARM: &str = "CUBICLE_ZYGOTE_WARM";

/// Longest request, in bytes, that a zygote takes.
pub const MAX_REQUEST: usize = 64 << 10;

/// Most descriptors that one message can carry (`SCM_MAX_FD` of the kernel).
pub const MAX_DESCRIPTORS: usize = 253;

/// A zygote's name in the process list; its children have the program's.
pub const NAME: &std::ffi::CStr = c"cubicle-zygote";

/// Length of the zygote's second argument, which does nothing but make room: children write their
/// names over it.
pub const TITLE_LEN: usize = 240;
