//! CubeCoW: the volumes, memory images and snapshots of one machine, as flat files that share
//! blocks.
//!
//! This crate owns a directory, the *store*, on a file system with reflinks: the data directory's
//! own if it has them, else a sparse XFS image that is loop-mounted with direct I/O
//! ([`backing`]). In it live
//!
//! - **volumes**: the disks of sandboxes that exist now, `volumes/<sandbox>/<generation>/disk-<n>.img`;
//! - **snapshots**: immutable directories `snapshots/<id>/` with a manifest, one memory image, the
//!   device state and the disks of a VM frozen at one instant, or with its disks alone;
//! - **drafts**: snapshots that are not published yet, and what is being deleted, in `tmp/`;
//! - the **catalog** `catalog.db`, which owns all snapshot files.
//!
//! Invariants:
//! - Every file is whole. Nothing refers to another file, so there are no chains to walk or merge,
//!   and snapshots are deleted in any order.
//! - A snapshot appears by one atomic rename, after its manifest; a crash leaves it whole or absent.
//! - At [`Store::open`], snapshot files without a catalog row are deleted, and so are temporary
//!   snapshots; rows without intact files are marked failed, and so is what was not durable when the
//!   machine stopped. What is failed is never handed out for a restore.
//! - Nothing between [`Store::begin_snapshot`] and the return of [`Draft::publish`] waits for a
//!   disk (no fsync). Background threads read ahead what the next restore needs, make the snapshot
//!   durable, and record its checksums; of what it shares with its ancestors nothing is read again.
//! - Blocks are shared or the caller was told that they are not: there is no silent full copy.

pub mod backing;
mod catalog;
mod digest;
mod draft;
mod error;
mod extents;
mod flush;
pub mod manifest;
pub mod memory;
pub mod reflink;
mod snapshot;
mod store;
mod volume;
mod worker;
mod working_set;

pub use backing::{BackingConfig, StoreInfo, StoreKind, StoreRoot};
pub use draft::Draft;
pub use error::{Error, Result};
pub use manifest::{Contents, DiskShape, Manifest, Part, SnapshotKind, VmShape};
pub use memory::MemoryReport;
pub use snapshot::{Snapshot, SnapshotEntry, SnapshotState};
pub use store::{Sizes, Store, SweepReport};
pub use volume::VolumeName;
