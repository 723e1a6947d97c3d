//! The root that VM processes see: a mount namespace with the hypervisor's program, its
//! libraries and firmware, the library that makes it a zygote, `/proc` limited to a process's own
//! entry, four harmless devices, and nothing else; everything read-only. It also holds an empty
//! network namespace, for VMs that were given none, and an IPC namespace apart from the host's.
//!
//! All VMs share one jail: there is nothing in it to share secrets through, and entering it costs
//! one system call. It lives as long as a descriptor of it is open or a process is in it, so
//! there is nothing to clean up.

use std::{
    ffi::CStr,
    fs,
    fs::File,
    io,
    os::fd::OwnedFd,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Component, Path, PathBuf},
};

use rustix::{
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
        mount_remount, unmount,
    },
    thread::UnshareFlags,
};

use crate::error::{Error, Result};

/// Where the new root is assembled. In the new namespace only; the host's directory is untouched.
const STAGE: &str = "/tmp";
const STAGE_OPTIONS: &CStr = c"mode=755,size=2m";

/// What a dynamically linked program needs besides itself.
const LIBRARIES: [&str; 6] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
];

/// Devices that programs expect; none of them holds state.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];

/// Path in the jail of the library that is preloaded into the program.
pub(crate) const ZYGOTE: &str = "/zygote.so";

/// That library: `cubicle_zygote`, built for this.
static ZYGOTE_LIBRARY: &[u8] = include_bytes!(env!("CUBICLE_ZYGOTE"));

/// Descriptors of the namespaces that make up the jail.
#[derive(Debug)]
pub(crate) struct Jail {
    pub(crate) mount: OwnedFd,
    pub(crate) ipc: OwnedFd,
    /// A network namespace with nothing in it but a loopback device that is down.
    pub(crate) empty_network: OwnedFd,
}

impl Jail {
    /// Builds a jail that holds `program` and the directories `data`, at the paths that they have
    /// outside, and the devices `devices` besides the harmless ones. Blocks for some milliseconds.
    pub(crate) fn build(program: &Path, data: &[PathBuf], devices: &[&str]) -> Result<Self> {
        let mut paths: Vec<PathBuf> = LIBRARIES.iter().map(PathBuf::from).collect();
        // A program that was moved finds its data at `bin/../share`.
        let detour = |path: &&PathBuf| path.components().any(|part| part == Component::ParentDir);
        paths.extend(data.iter().filter(|path| !detour(path)).cloned());
        paths.extend(
            data.iter()
                .filter(detour)
                .filter_map(|path| path.canonicalize().ok()),
        );
        paths.push(program.to_owned());
        if let Some(prefix) = foreign_prefix(program) {
            paths.push(prefix);
        }
        // Directories before what is in them, which is there already then.
        paths.sort_by_key(|path| path.components().count());
        let devices: Vec<PathBuf> = DEVICES
            .iter()
            .chain(devices)
            .map(PathBuf::from)
            .filter(|path| path.exists())
            .collect();
        // Namespaces belong to a thread: this one is made for it and ends with it.
        let builder = std::thread::Builder::new().name("vmm-jail".to_owned());
        let thread = builder
            .spawn(move || assemble(&paths, &devices))
            .map_err(Error::io("start a thread to build", STAGE))?;
        thread.join().unwrap_or_else(|_| {
            let panicked = io::Error::other("the building thread panicked");
            Err(Error::io("build a confined root in", STAGE)(panicked))
        })
    }
}

/// A program outside the distribution's directories brings its libraries in its own prefix:
/// `/opt/qemu/bin/qemu` needs `/opt/qemu`.
fn foreign_prefix(program: &Path) -> Option<PathBuf> {
    let prefix = program.parent()?.parent()?;
    let of_distribution = prefix == Path::new("/usr") || prefix == Path::new("/");
    (!of_distribution).then(|| prefix.to_owned())
}

fn assemble(paths: &[PathBuf], devices: &[PathBuf]) -> Result<Jail> {
    let flags =
        UnshareFlags::FS | UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWNET;
    // SAFETY: what is unsafe about unshare is taking the descriptor table away from code that
    // relies on sharing it; these flags leave it shared.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .map_err(|error| Error::io("leave the namespaces of", "/")(error.into()))?;
    let failed = |attempt: &'static str, path: &Path| {
        let path = path.to_owned();
        move |error: rustix::io::Errno| Error::io(attempt, path)(error.into())
    };
    let stage = Path::new(STAGE);
    // Nothing that happens here may show on the host.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(failed("detach the mounts of", Path::new("/")))?;
    // Opened before the stage is mounted, which hides what is below its path (a program in /tmp).
    let mut opened = Vec::new();
    for path in paths {
        collect(path, &mut opened)?;
    }
    mount(
        "tmpfs",
        stage,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(STAGE_OPTIONS),
    )
    .map_err(failed("mount a new root on", stage))?;
    let library = inside(stage, Path::new(ZYGOTE));
    fs::write(&library, ZYGOTE_LIBRARY).map_err(Error::io("write", library))?;
    for entry in &opened {
        entry.place(stage)?;
    }
    for device in devices {
        let target = inside(stage, device);
        create_file(&target)?;
        mount_bind(device, &target).map_err(failed("bind", device))?;
    }
    let proc = stage.join("proc");
    create_dir(&proc)?;
    let proc_flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // A process sees its own entry only; and none of the rest of /proc.
    mount(
        "proc",
        &proc,
        "proc",
        proc_flags,
        Some(c"hidepid=invisible,subset=pid"),
    )
    .or_else(|_| mount("proc", &proc, "proc", proc_flags, Some(c"hidepid=2")))
    .map_err(failed("mount", &proc))?;
    mount_remount(
        stage,
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
        STAGE_OPTIONS,
    )
    .map_err(failed("make read-only", stage))?;

    std::env::set_current_dir(stage).map_err(Error::io("enter", stage))?;
    // With both arguments the same, the old root ends up mounted on the new one and is dropped.
    rustix::process::pivot_root(".", ".").map_err(failed("make a root of", stage))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("drop the old root from", stage))?;
    let namespace = |kind: &str| {
        let path = format!("/proc/thread-self/ns/{kind}");
        File::open(&path)
            .map(OwnedFd::from)
            .map_err(Error::io("open", path))
    };
    Ok(Jail {
        mount: namespace("mnt")?,
        ipc: namespace("ipc")?,
        empty_network: namespace("net")?,
    })
}

/// Something to put into the jail.
enum Entry {
    /// A file or directory, held open so that it is found whatever is mounted over its path.
    Bind {
        path: PathBuf,
        held: OwnedFd,
        directory: bool,
    },
    /// A symbolic link, `/lib -> usr/lib` on distributions that merged them.
    Link { path: PathBuf, target: PathBuf },
}

/// Opens `path` if it exists; for a symbolic link also what it leads to.
fn collect(path: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    use rustix::fs::{Mode, OFlags};
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if metadata.is_symlink() {
        let target = fs::read_link(path).map_err(Error::io("read the link", path))?;
        let resolved = fs::canonicalize(path).map_err(Error::io("resolve", path))?;
        collect(&resolved, entries)?;
        entries.push(Entry::Link {
            path: path.to_owned(),
            target,
        });
        return Ok(());
    }
    let held = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::io("open", path)(error.into()))?;
    entries.push(Entry::Bind {
        path: path.to_owned(),
        held,
        directory: metadata.is_dir(),
    });
    Ok(())
}

impl Entry {
    fn place(&self, stage: &Path) -> Result<()> {
        match self {
            Self::Link { path, target } => {
                let at = inside(stage, path);
                create_parents(&at)?;
                match symlink(target, &at) {
                    // Below a directory that was bound, it is there already.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
                    result => result.map_err(Error::io("create a link", at)),
                }
            }
            Self::Bind {
                path,
                held,
                directory,
            } => {
                use std::os::fd::AsRawFd as _;
                let at = inside(stage, path);
                if at.exists() {
                    return Ok(());
                }
                if *directory {
                    create_dir(&at)?
                } else {
                    create_file(&at)?
                }
                let failed = |attempt: &'static str| {
                    move |error: rustix::io::Errno| Error::io(attempt, path)(error.into())
                };
                mount_bind(format!("/proc/self/fd/{}", held.as_raw_fd()), &at)
                    .map_err(failed("bind"))?;
                let flags =
                    MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
                mount_remount(&at, flags, c"").map_err(failed("bind read-only"))
            }
        }
    }
}

fn inside(stage: &Path, path: &Path) -> PathBuf {
    let normal = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)));
    stage.join(normal.collect::<PathBuf>())
}

fn create_parents(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), create_dir)
}

/// The umask of the server may be narrow, but an unprivileged process has to pass through.
fn create_dir(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    create_parents(path)?;
    fs::create_dir(path).map_err(Error::io("create", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .map_err(Error::io("set the mode of", path))
}

fn create_file(path: &Path) -> Result<()> {
    create_parents(path)?;
    File::create(path)
        .map(drop)
        .map_err(Error::io("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_outside_the_distribution_bring_a_prefix() {
        assert_eq!(
            foreign_prefix(Path::new("/usr/bin/qemu-system-x86_64")),
            None
        );
        assert_eq!(foreign_prefix(Path::new("/bin/qemu")), None);
        let prefix = foreign_prefix(Path::new("/opt/qemu-11/bin/qemu-system-x86_64"));
        assert_eq!(prefix.as_deref(), Some(Path::new("/opt/qemu-11")));
    }
}
