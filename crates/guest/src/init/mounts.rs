use std::{
    ffi::CStr,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Access, access},
    io::Errno,
    mount::{MountFlags, mount},
};

use super::{Error, console::say};

struct FileSystem {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static CStr,
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// What is needed to find the root file system; it moves there with us.
const KERNEL: [FileSystem; 3] = [
    FileSystem {
        kind: "proc",
        target: "/proc",
        flags: SAFE.union(MountFlags::NOEXEC),
        options: c"",
    },
    FileSystem {
        kind: "sysfs",
        target: "/sys",
        flags: SAFE.union(MountFlags::NOEXEC),
        options: c"",
    },
    FileSystem {
        kind: "devtmpfs",
        target: "/dev",
        flags: MountFlags::NOSUID,
        options: c"mode=0755",
    },
];

/// What programs expect, in the real root.
const PROGRAMS: [FileSystem; 4] = [
    FileSystem {
        kind: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"mode=0620,gid=5,ptmxmode=0666",
    },
    FileSystem {
        kind: "tmpfs",
        target: "/dev/shm",
        flags: SAFE,
        options: c"mode=1777",
    },
    FileSystem {
        kind: "tmpfs",
        target: "/run",
        flags: SAFE,
        options: c"mode=0755",
    },
    FileSystem {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: SAFE.union(MountFlags::NOEXEC),
        options: c"nsdelegate",
    },
];

/// What udev would make, and shells and programs use.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// The mount points that move from the initramfs into the real root.
pub(super) fn moving() -> impl Iterator<Item = &'static str> {
    KERNEL.iter().map(|file_system| file_system.target)
}

/// Mounts `/proc`, `/sys` and `/dev` in the initramfs.
pub(super) fn kernel_file_systems() -> Result<(), Error> {
    KERNEL.iter().try_for_each(FileSystem::mount)
}

/// Mounts the rest in the real root; says what could not be.
pub(super) fn programs_file_systems() {
    for file_system in &PROGRAMS {
        if let Err(error) = file_system.mount() {
            say(&error.to_string());
        }
    }
    for (target, link) in LINKS {
        if let Err(source) = symlink(target, link)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            say(&Error::File {
                what: "make",
                path: PathBuf::from(link),
                source,
            }
            .to_string());
        }
    }
    // Every program may count on a place for its temporary files.
    let tmp = FileSystem {
        kind: "tmpfs",
        target: "/tmp",
        flags: SAFE,
        options: c"mode=1777",
    };
    if access("/tmp", Access::WRITE_OK).is_err()
        && let Err(error) = tmp.mount()
    {
        say(&error.to_string());
    }
}

impl FileSystem {
    fn mount(&self) -> Result<(), Error> {
        let target = Path::new(self.target);
        // On a file system that cannot be written to, the mount says what is missing.
        let _ = fs::create_dir_all(target);
        match mount(self.kind, target, self.kind, self.flags, self.options) {
            // The kernel does some of this by itself.
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(error) => Err(Error::Mount {
                what: self.kind.to_owned(),
                target: target.to_owned(),
                source: error.into(),
            }),
        }
    }
}
