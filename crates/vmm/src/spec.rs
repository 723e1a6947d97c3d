//! What a VM is asked to be ([`VmSpec`]) and what is written down about one that runs ([`VmRecord`]).

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use cubicle_ids::SandboxId;
use serde::{Deserialize, Serialize};

/// Everything a driver needs to start one VM.
///
/// The shape (`cpus`, `memory_mib`, the number of `disks`) is part of the machine that a snapshot
/// holds: a restore must be given the shape its snapshot was taken with.
#[derive(Debug)]
pub struct VmSpec {
    /// Whose VM this is. Appears in every error.
    pub id: SandboxId,
    /// Directory of this VM alone: sockets and logs. Its name is also that of the VM's cgroup, and
    /// no other VM may have it. The driver creates it (mode 0700) and
    /// removes it with everything in it when the VM is killed. Its parent must exist. At most
    /// [`VmSpec::MAX_RUN_DIR`] bytes long, because a socket address is that short.
    pub run_dir: PathBuf,
    /// Number of virtual CPUs, at least 1.
    pub cpus: u32,
    /// Guest memory in MiB, at least [`VmSpec::MIN_MEMORY_MIB`].
    pub memory_mib: u32,
    /// Cold or from a snapshot.
    pub boot: Boot,
    /// Raw disk images, in the order in which the guest sees them (`/dev/vda`, `/dev/vdb`, ...).
    /// At most [`VmSpec::MAX_DISKS`].
    pub disks: Vec<Disk>,
    /// How the host side reads and writes `disks`.
    pub disk_io: DiskIo,
    /// Tap device opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. Without one, the guest has a
    /// network card whose cable is unplugged.
    pub tap: Option<OwnedFd>,
    /// Network namespace the VM's process lives in. Without one, it lives in an empty namespace.
    pub netns: Option<OwnedFd>,
    /// User and group id of the VM's process; no other process may have it.
    pub uid: u32,
    /// What the VM's process as a whole may use of the host.
    pub limits: Limits,
    /// Keep what the guest kernel prints on its serial console, bounded in size, in
    /// [`VmSpec::kernel_log_path`].
    pub kernel_log: bool,
    /// Restores only: let the guest run as soon as it is loaded, saving one call of
    /// [`Vm::resume`](crate::Vm::resume). A cold boot always starts at once.
    pub start: bool,
}

impl VmSpec {
    /// Smallest guest memory, in MiB, that boots a distribution kernel.
    pub const MIN_MEMORY_MIB: u32 = 64;
    /// Most disks: what a `microvm` has left of its 8 virtio transports besides console, entropy
    /// source and network card.
    pub const MAX_DISKS: usize = 5;
    /// Longest run directory in bytes: `sun_path` holds 108, a separator, a socket name and the
    /// final NUL take the rest.
    pub const MAX_RUN_DIR: usize = 90;

    /// A spec with no disk and no network, the limits its shape calls for, that starts at once.
    #[must_use]
    pub fn new(
        id: SandboxId,
        run_dir: PathBuf,
        uid: u32,
        cpus: u32,
        memory_mib: u32,
        boot: Boot,
    ) -> Self {
        Self {
            id,
            run_dir,
            cpus,
            memory_mib,
            boot,
            disks: Vec::new(),
            disk_io: DiskIo::default(),
            tap: None,
            netns: None,
            uid,
            limits: Limits::for_shape(cpus, memory_mib),
            kernel_log: false,
            start: true,
        }
    }

    /// Where the guest kernel's console output of the VM in `run_dir` is kept.
    #[must_use]
    pub fn kernel_log_path(run_dir: &Path) -> PathBuf {
        run_dir.join("kernel.log")
    }
}

/// Where the guest's first instruction comes from.
#[derive(Debug, Clone)]
pub enum Boot {
    /// Boot a kernel.
    Cold {
        /// Uncompressed ELF kernel (`vmlinux`), readable by every uid.
        kernel: PathBuf,
        /// Initial file system, any mode. One whose length is a multiple of 4096 is used as it
        /// is, another one is copied.
        initramfs: PathBuf,
        /// Kernel command line. The driver appends what its machine needs (console, clock).
        cmdline: String,
    },
    /// Continue a frozen VM.
    Restore {
        /// Guest memory, exactly `memory_mib` long, mapped private: the file is never written.
        /// It must be readable by every uid (0444 is right); its directory need not be, as the
        /// VM gets a descriptor.
        memory: PathBuf,
        /// What [`Vm::save_device_state`](crate::Vm::save_device_state) wrote. Any mode.
        device_state: PathBuf,
    },
}

/// A raw disk image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image. Opened by the driver, so the VM needs no permission on it.
    pub path: PathBuf,
    /// Attach read-only.
    pub read_only: bool,
}

/// How disk images are accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskIo {
    /// `O_DIRECT` where the file system can, else buffered. Nothing is dirty in the host's page
    /// cache when the VM stops, so cloning a disk has nothing to write back.
    #[default]
    Direct,
    /// Through the host's page cache.
    Buffered,
}

/// Bounds on the VM's process, enforced by cgroups where the host has them
/// ([`cgroup::probe`](crate::cgroup::probe) tells which).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// CPU time in thousandths of a core; `None` is no bound.
    pub cpu_millis: Option<u32>,
    /// Memory of guest and VM process together, in MiB; `None` is no bound.
    pub memory_mib: Option<u32>,
    /// Threads; `None` is no bound.
    pub pids: Option<u32>,
}

impl Limits {
    /// Memory that the VM process itself may use on top of the guest's, in MiB: translated code
    /// under software emulation (at most [`JIT_CACHE_MIB`](Self::JIT_CACHE_MIB)), device models,
    /// disk requests in flight and page tables.
    pub const OVERHEAD_MIB: u32 = Self::JIT_CACHE_MIB + 192;
    /// Upper bound of the cache of translated code under software emulation, in MiB.
    pub const JIT_CACHE_MIB: u32 = 256;

    /// CPU time that the VM process may use on top of its CPUs', in thousandths of a core: device
    /// models and disk requests run beside the guest. Without it, a guest that computes on all its
    /// CPUs is stopped for its own disk's sake.
    pub const OVERHEAD_CPU_MILLIS: u32 = 250;

    /// What a VM of this shape needs and no more: its CPUs, its memory, what the process needs
    /// on top of each ([`OVERHEAD_CPU_MILLIS`](Self::OVERHEAD_CPU_MILLIS),
    /// [`OVERHEAD_MIB`](Self::OVERHEAD_MIB)), a thread per CPU and a pool for disk requests.
    #[must_use]
    pub fn for_shape(cpus: u32, memory_mib: u32) -> Self {
        Self {
            cpu_millis: Some(
                cpus.saturating_mul(1000)
                    .saturating_add(Self::OVERHEAD_CPU_MILLIS),
            ),
            memory_mib: Some(memory_mib.saturating_add(Self::OVERHEAD_MIB)),
            pids: Some(cpus.saturating_add(96)),
        }
    }

    /// No bound at all.
    #[must_use]
    pub fn none() -> Self {
        Self {
            cpu_millis: None,
            memory_mib: None,
            pids: None,
        }
    }
}

/// What must be remembered of a running VM so that another process can adopt or kill it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Whose VM it is.
    pub id: SandboxId,
    /// [`Hypervisor::name`](crate::Hypervisor::name) of the driver that started it.
    pub driver: String,
    /// Process id.
    pub pid: i32,
    /// Start time of that process in clock ticks since boot (`/proc/PID/stat`, field 22): with
    /// the boot id, proof that the pid was not reused.
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was started.
    pub boot_id: String,
    /// See [`VmSpec::run_dir`].
    pub run_dir: PathBuf,
    /// cgroup directories that hold the process, all removed with the VM. One on a host with the
    /// unified hierarchy, one per controller otherwise.
    pub cgroups: Vec<PathBuf>,
    /// User id of the process.
    pub uid: u32,
    /// The file behind guest memory.
    pub memory: MemoryFile,
}

/// Identity of the file that is mapped as guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    /// Inode number.
    pub inode: u64,
    /// Bytes of guest memory.
    pub len: u64,
}

/// Where guest memory is in the VM process's address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestMemory {
    /// The VM process.
    pub pid: i32,
    /// Ascending, without overlap; together they cover guest memory from 0 to its length. One
    /// range unless the kernel split the mapping.
    pub ranges: Vec<MemoryRange>,
}

impl GuestMemory {
    /// Bytes of guest memory.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// Whether there is no memory at all, which no running VM reports.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

/// A contiguous piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Address in the VM process, page aligned.
    pub host_address: u64,
    /// Offset in the memory image, page aligned.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub len: u64,
}

/// What a VM's process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmUsage {
    /// CPU time since start, user and system, in microseconds.
    pub cpu_time_us: u64,
    /// Resident memory in bytes, shared pages included.
    pub resident_bytes: u64,
    /// Memory in bytes that only this process has: what killing it frees.
    pub private_bytes: u64,
}
