//! What can go wrong with a slot, and for whom.

use std::{io, path::PathBuf};

use ipnet::Ipv4Net;

use crate::SlotIndex;

/// Why an operation on the pool or on a slot failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot work.
    #[error("the network configuration is not usable: {0}")]
    Config(String),
    /// Another process has a pool in this run directory.
    #[error("{} is in use by another process: stop it, or give this one a run directory of its own", lock.display())]
    InUse {
        /// The lock file that the other process holds.
        lock: PathBuf,
    },
    /// An interface that belongs to another pool has a name of ours.
    #[error(
        "the interface {interface} belongs to a pool in {owner}: give one of the two pools another \
         name, or delete what is left of it with `ip link delete {interface}`"
    )]
    NameTaken {
        /// Name of the interface in the host's namespace.
        interface: String,
        /// Run directory of the other pool.
        owner: String,
    },
    /// Another interface of the host has a route into the slots' subnet.
    #[error(
        "the subnet {subnet} of the network slots is in use: {taken} is reached through {interface}; \
         choose a private subnet that nothing else on this host uses"
    )]
    SubnetTaken {
        /// The configured subnet.
        subnet: Ipv4Net,
        /// The part of it that is taken.
        taken: Ipv4Net,
        /// Name of the interface.
        interface: String,
    },
    /// The kernel refused a request to change or to read links, addresses, routes, rules or
    /// connections.
    #[error("the kernel refused to {action}: {source}")]
    Kernel {
        /// What was asked for, as an infinitive.
        action: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was attempted, as an infinitive.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A system call about a namespace or a device failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was attempted, as an infinitive.
        action: String,
        /// What the system answered.
        source: io::Error,
    },
    /// As many slots as are allowed are in use.
    #[error("all {max} network slots are in use: release one, or raise the pool's maximum")]
    Exhausted {
        /// The configured maximum.
        max: usize,
    },
    /// The pool was closed.
    #[error("the pool of network slots is closed")]
    Closed,
    /// There is no such slot waiting to be adopted.
    #[error("network slot {index} cannot be adopted: {why}")]
    NotAdoptable {
        /// The slot asked for.
        index: SlotIndex,
        /// What is the matter with it.
        why: &'static str,
    },
    /// A slot came back while a process still holds its tap.
    #[error(
        "network slot {index} was released while a process still holds its tap: end the VM first"
    )]
    TapAttached {
        /// The slot.
        index: SlotIndex,
    },
    /// The slot belongs to another pool.
    #[error("network slot {index} belongs to another pool")]
    Foreign {
        /// The slot.
        index: SlotIndex,
    },
    /// A part of a slot has disappeared.
    #[error("network slot {index} has lost its interface {interface}")]
    Damaged {
        /// The slot.
        index: SlotIndex,
        /// The interface that is gone.
        interface: String,
    },
    /// A thread that worked inside a namespace ended without an answer.
    #[error("the thread that was to {action} died")]
    WorkerDied {
        /// What it was doing, as an infinitive.
        action: String,
    },
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn kernel(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Kernel { action, source }
    }

    pub(crate) fn system<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }

    pub(crate) fn file<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source: source.into(),
        }
    }
}
