//! Virtual machines: how one is started, stopped, frozen, looked into and killed.
//!
//! [`Hypervisor`] starts a VM from a [`VmSpec`], cold or from a snapshot; [`Vm`] is one that runs.
//! Two drivers: [`qemu`], real VMs under KVM or software emulation, and [`fake`], VMs in memory
//! whose in-process guest answers the real channel protocol, for tests of everything above.
//!
//! This crate owns the VM's process, the zygote that it is forked from, and whatever exists on the host
//! for that process alone: its run directory, sockets, logs and cgroup. It owns neither disks nor memory
//! images nor network namespaces; it is handed those.
//!
//! Invariants:
//! - A VM outlives the process that started it. Dropping a [`Vm`] handle changes nothing; only
//!   [`Vm::kill`] (or the guest itself) ends a VM. A [`VmRecord`] is all that another process
//!   needs to adopt it.
//! - A process is signalled through a pidfd that was proven to be the recorded process, so never
//!   a stranger that got its pid.
//! - The VM's process runs under a uid of its own with no capability, cannot gain one, sees a
//!   read-only root with no data in it and reaches files only through descriptors it was given.
//! - After [`Vm::kill`] returned, nothing of the VM is left: no process, no zombie, no run
//!   directory, no cgroup. The same holds when [`Hypervisor::launch`] fails.
//! - A file mapped as guest memory is never written through that mapping.

use std::{path::Path, pin::Pin, sync::Arc};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

pub mod cgroup;
pub mod error;
pub mod fake;
mod jail;
mod maps;
mod output;
pub mod probe;
mod process;
pub mod qemu;
mod remains;
pub mod spec;
pub mod tsc;
mod zygote;

pub use error::{Error, Result};
pub use spec::{
    Boot, Disk, DiskIo, GuestMemory, Limits, MemoryFile, MemoryRange, VmRecord, VmSpec, VmUsage,
};

/// First of the user ids that VM processes run under; a VM in network slot `n` has
/// `VM_UID_BASE + n`. Above what distributions hand out to people and services.
pub const VM_UID_BASE: u32 = 200_000;

/// A byte stream in both directions.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A connection to the VM's channel port, before any handshake.
pub type ChannelStream = Pin<Box<dyn ByteStream>>;

/// A driver: starts VMs and takes over VMs that an earlier process of ours started.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// Short name, as recorded in [`VmRecord::driver`]: `qemu`, `fake`.
    fn name(&self) -> &'static str;

    /// Names the machine that this driver makes here: program, its release, accelerator, processor
    /// model. A snapshot can be restored only where this is what it was when it was taken.
    fn machine(&self) -> String;

    /// Starts a VM and returns when it is loaded: a cold one runs, a restored one is stopped
    /// unless [`VmSpec::start`] is set.
    ///
    /// # Errors
    /// Whatever keeps the VM from being loaded; nothing is left of it then.
    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn Vm>>;

    /// Takes over a running VM. `None`: that process is gone, and what it left behind (run
    /// directory, cgroup) has been removed.
    ///
    /// # Errors
    /// When the host does not tell whether the process still runs, or what it left cannot be
    /// removed.
    async fn adopt(&self, record: &VmRecord) -> Result<Option<Arc<dyn Vm>>>;
}

/// A VM that was started. All methods may be called from any task; commands are serialised.
#[async_trait]
pub trait Vm: Send + Sync {
    /// All that is needed to adopt or kill this VM from another process.
    fn record(&self) -> VmRecord;

    /// Opens a fresh connection to the guest's channel port. One connection is served at a time:
    /// drop the previous one first. Connecting works from the moment of launch, whether or not
    /// anything in the guest listens yet.
    ///
    /// # Errors
    /// [`Error::Gone`] once the VM has ended.
    async fn connect_channel(&self) -> Result<ChannelStream>;

    /// Stops the guest's CPUs and drains its disks. Stopping a stopped VM does nothing.
    ///
    /// # Errors
    /// When the VM has ended or does not obey.
    async fn pause(&self) -> Result<()>;

    /// Lets a stopped guest run on. Resuming a running VM does nothing.
    ///
    /// # Errors
    /// When the VM has ended or does not obey.
    async fn resume(&self) -> Result<()>;

    /// Writes the state of CPUs and devices, without guest memory, of a paused VM to a new file;
    /// returns its length in bytes. The file is complete but not flushed to disk.
    ///
    /// # Errors
    /// When the VM has ended, does not obey, or the file cannot be created.
    async fn save_device_state(&self, to: &Path) -> Result<u64>;

    /// Where guest memory is in the VM's process. Found once, then remembered.
    ///
    /// # Errors
    /// When the VM has ended.
    fn memory(&self) -> Result<GuestMemory>;

    /// CPU time that the VM's process has used since its start, in microseconds. Costs a system call.
    ///
    /// # Errors
    /// When the VM has ended.
    fn cpu_time_us(&self) -> Result<u64>;

    /// What the VM's process uses of the host now. Takes the kernel some milliseconds to count.
    ///
    /// # Errors
    /// When the VM has ended.
    async fn usage(&self) -> Result<VmUsage>;

    /// Ends the VM at once and waits until nothing is left of it. Killing a VM that has ended
    /// removes what it left.
    ///
    /// # Errors
    /// When the process does not die or what it left cannot be removed.
    async fn kill(&self) -> Result<()>;

    /// Resolves when the VM's process is gone, whoever started it and for whatever reason.
    async fn exited(&self);
}
