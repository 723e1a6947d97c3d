//! From a spec to a VM that is loaded.

use std::{
    ffi::CString,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::Path,
    sync::Arc,
};

use cubicle_ids::SandboxId;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::net::UnixStream;

use super::{
    CHANNEL_SOCKET, CONSOLE_SOCKET, Host, KvmAccess, MONITOR_SOCKET, NAME, args, blocking,
    qmp::Qmp, vm::QemuVm,
};
use crate::{
    error::{Error, Result},
    output::Output,
    process::Process,
    remains::Launching,
    spec::{Boot, Disk, DiskIo, MemoryFile, VmRecord, VmSpec},
    zygote::Plan,
};
use args::{Descriptors, MemorySource, OpenBoot, OpenDisk};

/// Descriptors that QEMU may have open: about 30, two per disk, some per connection.
const MAX_FILES: u64 = 512;

/// Longest file that a VM process may write, unless its disks are longer: device state is 10 KiB.
const MIN_FILE_LEN: u64 = 64 << 20;

/// Starts the VM's process and waits until it is loaded. The stream is the guest's console, if
/// the spec asks for a kernel log.
pub(super) async fn launch(host: &Arc<Host>, spec: VmSpec) -> Result<(QemuVm, Option<UnixStream>)> {
    validate(&spec)?;
    let spec = Arc::new(spec);
    let started = {
        let (host, spec) = (Arc::clone(host), Arc::clone(&spec));
        blocking(move || {
            let mut launching = Launching::new(spec.id.clone());
            let started = start(&host, &spec, &mut launching);
            (launching, started)
        })
        .await
    };
    let (launching, started) = started.map_err(|reason| {
        let id = spec.id.clone();
        Error::Spawn {
            id,
            step: "prepare it",
            source: io::Error::other(reason),
        }
    })?;
    let mut started = match started {
        Ok(started) => started,
        Err(error) => {
            launching.abandon().await?;
            return Err(error);
        }
    };
    match load(&mut started, &spec).await {
        Ok((qmp, console)) => {
            let Started {
                record,
                process,
                output,
                ..
            } = started;
            // From here on the VM is wanted.
            launching.arrived();
            Ok((QemuVm::new(record, process, qmp, Some(output)), console))
        }
        Err(error) => {
            let error = explain(error, &started, &spec.id).await;
            launching.abandon().await?;
            Err(error)
        }
    }
}

/// A process that was started and what has to be known of it.
struct Started {
    record: VmRecord,
    process: Process,
    output: Output,
    /// Connections made before the process ran; QEMU will find them waiting.
    monitor: Option<std::os::unix::net::UnixStream>,
    console: Option<std::os::unix::net::UnixStream>,
}

/// Everything up to the execution of QEMU. Blocks for a few milliseconds.
fn start(host: &Host, spec: &VmSpec, launching: &mut Launching) -> Result<Started> {
    make_run_dir(spec)?;
    launching.add_run_dir(spec.run_dir.clone());
    let (memory, memory_file) = open_memory(host, spec)?;
    let boot = open_boot(spec)?;
    let disks = spec.disks.iter().map(|disk| open_disk(disk, spec.disk_io));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let listen = |name: &str| {
        let path = spec.run_dir.join(name);
        UnixListener::bind(&path)
            .map(OwnedFd::from)
            .map_err(Error::io("listen on", path))
    };
    let connect = |name: &str| {
        let path = spec.run_dir.join(name);
        std::os::unix::net::UnixStream::connect(&path)
            .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
            .map_err(Error::io("connect to", path))
    };
    let kvm = match &host.kvm {
        KvmAccess::Descriptor(kvm) => Some(kvm.try_clone()),
        KvmAccess::Open | KvmAccess::Group(_) => None,
    };
    let kvm = kvm
        .transpose()
        .map_err(Error::host("duplicate /dev/kvm", &spec.id))?;
    let tap = spec.tap.as_ref().map(OwnedFd::try_clone).transpose();
    let fds = Descriptors {
        memory,
        boot,
        disks,
        tap: tap.map_err(Error::host("duplicate its tap device", &spec.id))?,
        monitor: listen(MONITOR_SOCKET)?,
        channel: listen(CHANNEL_SOCKET)?,
        console: spec
            .kernel_log
            .then(|| listen(CONSOLE_SOCKET))
            .transpose()?,
        kvm,
    };
    let monitor = connect(MONITOR_SOCKET)?;
    let console = spec
        .kernel_log
        .then(|| connect(CONSOLE_SOCKET))
        .transpose()?;
    // A sandbox may have two VMs for a moment; each has a run directory of its own.
    let group = spec.run_dir.file_name().and_then(std::ffi::OsStr::to_str);
    let group = group.unwrap_or(spec.id.as_str());
    let cgroup = host.cgroups.create(group, &spec.limits)?;
    let output = Output::new().map_err(Error::host("allocate room for its output", &spec.id))?;

    let process = spawn(host, spec, &fds, output.as_fd())?;
    launching.add_process(process.clone());
    let cgroups = cgroup.keep();
    launching.add_cgroups(cgroups.clone());
    let record = VmRecord {
        id: spec.id.clone(),
        driver: NAME.to_owned(),
        pid: process.pid(),
        start_time: process.start_time(),
        boot_id: host.boot_id.clone(),
        run_dir: spec.run_dir.clone(),
        cgroups,
        uid: spec.uid,
        memory: memory_file,
    };
    Ok(Started {
        record,
        process,
        output,
        monitor: Some(monitor),
        console,
    })
}

fn spawn(host: &Host, spec: &VmSpec, fds: &Descriptors, output: BorrowedFd<'_>) -> Result<Process> {
    let failed = |step, source| Error::Spawn {
        id: spec.id.clone(),
        step,
        source,
    };
    let no_nul = |text: String| {
        CString::new(text).map_err(|error| failed("prepare its arguments", error.into()))
    };
    let arguments = args::arguments(spec, host.accelerator, &host.features, fds, host.tsc_khz);
    let file_len = fds
        .disks
        .iter()
        .map(|disk| disk.len)
        .max()
        .unwrap_or(0)
        .max(MIN_FILE_LEN);
    let mut limits = vec![
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_NOFILE, MAX_FILES),
        (libc::RLIMIT_FSIZE, file_len),
    ];
    // Counted per user, and the user is the VM's own: holds where there are no cgroups, too.
    limits.extend(
        spec.limits
            .pids
            .map(|pids| (libc::RLIMIT_NPROC, u64::from(pids))),
    );
    let plan = Plan {
        arguments: arguments.into_iter().map(no_nul).collect::<Result<_>>()?,
        input: host.nothing.as_fd(),
        output,
        inherit: fds.inherited(),
        network_namespace: spec.netns.as_ref().map(|netns| netns.as_fd()),
        uid: spec.uid,
        groups: match host.kvm {
            KvmAccess::Group(group) => vec![group],
            KvmAccess::Open | KvmAccess::Descriptor(_) => Vec::new(),
        },
        limits,
    };
    let forked = host.zygotes.fork(&plan);
    forked.map_err(|failure| failed(failure.step, failure.source))
}

/// Waits until QEMU has come up and the guest is loaded, moving it into its cgroup meanwhile.
async fn load(started: &mut Started, spec: &VmSpec) -> Result<(Qmp, Option<UnixStream>)> {
    let id = &spec.id;
    let adopt_stream = |stream: Option<std::os::unix::net::UnixStream>| {
        let stream = stream.map(UnixStream::from_std).transpose();
        stream.map_err(Error::host("watch a connection", id))
    };
    let console = adopt_stream(started.console.take())?;
    let monitor =
        adopt_stream(started.monitor.take())?.ok_or_else(|| Error::Gone { id: id.clone() })?;
    let (qmp, greeted) = Qmp::over(monitor);
    // On the older layout of cgroups, moving a process waits for every processor of the host to
    // pass through a quiet moment, up to 15 ms: QEMU comes up at the same time.
    let (pid, cgroups) = (started.process.pid(), started.record.cgroups.clone());
    let attached = blocking(move || crate::cgroup::attach(&cgroups, pid));
    let loaded = super::vm::until_loaded(id, &started.process, &qmp, greeted, spec);
    let (attached, loaded) = tokio::join!(attached, loaded);
    loaded?;
    attached.unwrap_or_else(|reason| {
        Err(Error::InvalidSpec {
            id: id.clone(),
            reason,
        })
    })?;
    Ok((qmp, console))
}

/// When the process has ended, its last words say more than the broken connection.
async fn explain(error: Error, started: &Started, id: &SandboxId) -> Error {
    let Error::Exited { attempt, .. } = error else {
        return error;
    };
    let exit = started.process.exited().await;
    let log = format!("{} ({exit})", started.output.tail());
    Error::Exited {
        id: id.clone(),
        attempt,
        log,
    }
}

fn validate(spec: &VmSpec) -> Result<()> {
    let invalid = |reason: String| {
        Err(Error::InvalidSpec {
            id: spec.id.clone(),
            reason,
        })
    };
    let run_dir_len = spec.run_dir.as_os_str().len();
    if spec.cpus == 0 || spec.cpus > 255 {
        return invalid(format!(
            "it has {} CPUs, and 1 to 255 are possible",
            spec.cpus
        ));
    }
    if spec.memory_mib < VmSpec::MIN_MEMORY_MIB {
        let least = VmSpec::MIN_MEMORY_MIB;
        return invalid(format!(
            "{} MiB of memory is less than {least}",
            spec.memory_mib
        ));
    }
    if spec.disks.len() > VmSpec::MAX_DISKS {
        return invalid(format!(
            "it has {} disks, and {} fit",
            spec.disks.len(),
            VmSpec::MAX_DISKS
        ));
    }
    if run_dir_len > VmSpec::MAX_RUN_DIR || !spec.run_dir.is_absolute() {
        let run_dir = spec.run_dir.display();
        return invalid(format!(
            "{run_dir} is relative or too long for the address of a socket"
        ));
    }
    if spec.uid == 0 {
        return invalid("its process may not be root's".to_owned());
    }
    Ok(())
}

fn make_run_dir(spec: &VmSpec) -> Result<()> {
    let dir = &spec.run_dir;
    let monitor = dir.join(MONITOR_SOCKET);
    if std::os::unix::net::UnixStream::connect(monitor).is_ok() {
        let reason = format!("another VM runs in {}", dir.display());
        return Err(Error::InvalidSpec {
            id: spec.id.clone(),
            reason,
        });
    }
    let make = || DirBuilder::new().mode(0o700).create(dir);
    match make() {
        // A leftover of a VM by that name that is long gone.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_dir_all(dir).map_err(Error::io("empty", dir))?;
            make().map_err(Error::io("create", dir))
        }
        result => result.map_err(Error::io("create", dir)),
    }
}

fn open_memory(host: &Host, spec: &VmSpec) -> Result<(MemorySource, MemoryFile)> {
    let len = u64::from(spec.memory_mib) << 20;
    let Boot::Restore { memory, .. } = &spec.boot else {
        let zero = Path::new("/dev/zero");
        let inode = fs::metadata(zero)
            .map_err(Error::io("look at", zero))?
            .ino();
        return Ok((MemorySource::Zero, MemoryFile { inode, len }));
    };
    let writable = !host.features.read_only_images();
    let image = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(memory)
        .map_err(Error::io("open", memory))?;
    let metadata = image.metadata().map_err(Error::io("look at", memory))?;
    if metadata.len() != len {
        let (path, image_len) = (memory.display(), metadata.len());
        return Err(Error::InvalidSpec {
            id: spec.id.clone(),
            reason: format!("{path} holds {image_len} bytes, and its memory is {len}"),
        });
    }
    if writable {
        // QEMU before 8.2 maps it private all the same, but wants to open it for writing.
        image
            .set_permissions(fs::Permissions::from_mode(0o666))
            .map_err(Error::io("make writable", memory))?;
    } else {
        check_readable(&spec.id, memory, metadata.mode())?;
    }
    Ok((
        MemorySource::Image(image.into()),
        MemoryFile {
            inode: metadata.ino(),
            len,
        },
    ))
}

/// QEMU opens the file anew from its descriptor, as a user that owns nothing.
fn check_readable(id: &SandboxId, path: &Path, mode: u32) -> Result<()> {
    if mode & 0o004 != 0 {
        return Ok(());
    }
    let (path, mode) = (path.display(), mode & 0o7777);
    let reason = format!("{path} has mode {mode:04o}, and every user must be able to read it");
    Err(Error::InvalidSpec {
        id: id.clone(),
        reason,
    })
}

fn open_boot(spec: &VmSpec) -> Result<OpenBoot> {
    let open = |path: &Path| File::open(path).map_err(Error::io("open", path));
    let readable = |path: &Path| {
        let file = open(path)?;
        let mode = file.metadata().map_err(Error::io("look at", path))?.mode();
        check_readable(&spec.id, path, mode)?;
        Ok(OwnedFd::from(file))
    };
    match &spec.boot {
        Boot::Cold {
            kernel,
            initramfs,
            cmdline,
        } => Ok(OpenBoot::Cold {
            kernel: readable(kernel)?,
            initramfs: page_aligned(initramfs)?,
            cmdline: cmdline.clone(),
        }),
        Boot::Restore { device_state, .. } => Ok(OpenBoot::Restore {
            device_state: open(device_state)?.into(),
        }),
    }
}

/// The file, or a copy of it in memory that is padded with zeroes to whole pages.
///
/// QEMU puts the initial file system at the very top of a `microvm`'s memory, aligned downwards to
/// a page, without regard to the page there that the firmware has built its ACPI tables in. Only
/// if the length is a multiple of the page size is that last page left alone; else the kernel
/// finds archive where it looks for tables, and hangs or has no devices, depending on the length.
fn page_aligned(path: &Path) -> Result<OwnedFd> {
    const PAGE: u64 = 4096;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("look at", path))?;
    if metadata.len() % PAGE == 0 && metadata.mode() & 0o004 != 0 {
        return Ok(file.into());
    }
    let copy = || {
        let memory = memfd_create("initramfs", MemfdFlags::CLOEXEC)?;
        let mut padded = File::from(memory);
        io::copy(&mut &file, &mut padded)?;
        padded.set_len(metadata.len().next_multiple_of(PAGE))?;
        Ok(padded.into())
    };
    copy().map_err(Error::io("make a padded copy of", path))
}

fn open_disk(disk: &Disk, io: DiskIo) -> Result<OpenDisk> {
    let open = |flags: i32| {
        OpenOptions::new()
            .read(true)
            .write(!disk.read_only)
            .custom_flags(flags)
            .open(&disk.path)
    };
    let direct = match io {
        DiskIo::Direct => match open(libc::O_DIRECT) {
            // The file system cannot.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            result => Some(result),
        },
        DiskIo::Buffered => None,
    };
    let (file, direct) = match direct {
        Some(result) => (result, true),
        None => (open(0), false),
    };
    let file = file.map_err(Error::io("open", &disk.path))?;
    let len = file
        .metadata()
        .map_err(Error::io("look at", &disk.path))?
        .len();
    Ok(OpenDisk {
        fd: file.into(),
        read_only: disk.read_only,
        direct,
        len,
    })
}
