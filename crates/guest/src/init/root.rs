use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, mount_move, unmount},
};

use super::{DEVICE_TIMEOUT, Error, cmdline::Options, console::say, mounts, uevents::Uevents};

const TARGET: &str = "/sysroot";
/// Holds what is written over a root file system that cannot be written to.
const OVERLAY: &str = "/overlay";

/// Mounts the root file system and makes it this process's root; the initramfs is emptied.
pub(super) fn switch(options: &Options, events: &mut Uevents) -> Result<(), Error> {
    wait_for(&options.root, events)?;
    let target = Path::new(TARGET);
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| Error::File { what, path, source }
    };
    fs::create_dir_all(target).map_err(failed("make", target))?;
    if mount_root(options, target)? == Writable::No
        && let Err(error) = overlay(target)
    {
        say(&format!("the root file system stays read-only: {error}"));
    }

    for source in mounts::moving() {
        let inside = target.join(source.trim_start_matches('/'));
        let _ = fs::create_dir(&inside);
        if let Err(error) = mount_move(source, &inside) {
            let source = error.into();
            return Err(Error::Mount {
                what: source_name(&inside),
                target: inside,
                source,
            });
        }
    }
    std::env::set_current_dir(target).map_err(failed("enter", target))?;
    empty_initramfs();
    mount_move(".", "/").map_err(|error| Error::Mount {
        what: TARGET.to_owned(),
        target: PathBuf::from("/"),
        source: error.into(),
    })?;
    rustix::process::chroot(".").map_err(|error| failed("enter", target)(error.into()))?;
    std::env::set_current_dir("/").map_err(failed("enter", Path::new("/")))
}

fn source_name(inside: &Path) -> String {
    inside
        .strip_prefix(TARGET)
        .unwrap_or(inside)
        .display()
        .to_string()
}

fn wait_for(device: &Path, events: &mut Uevents) -> Result<(), Error> {
    let until = Instant::now() + DEVICE_TIMEOUT;
    while !device.exists() {
        if !events.wait(until)? && !device.exists() {
            return Err(Error::NoDevice {
                what: device.display().to_string(),
            });
        }
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Writable {
    Yes,
    No,
}

fn mount_root(options: &Options, target: &Path) -> Result<Writable, Error> {
    // Times of access would make every read a write, and every write a page of the snapshot.
    let flags = MountFlags::NOATIME;
    let kind = options.root_type.as_str();
    let (data, read_only_data) = match kind {
        // Else the kernel writes to the unused parts of a new file system, in every sandbox; and
        // doesn't mount one that needs a recovery from a disk that cannot be written to.
        "ext4" => (c"noinit_itable", c"noload"),
        _ => (c"", c""),
    };
    match mount(&options.root, target, kind, flags, data) {
        Ok(()) => return Ok(Writable::Yes),
        // A read-only disk, or a file system that only has that.
        Err(Errno::ROFS | Errno::ACCESS) => {}
        Err(error) => return Err(failed(options, target)(error)),
    }
    let flags = flags | MountFlags::RDONLY;
    mount(&options.root, target, kind, flags, read_only_data).map_err(failed(options, target))?;
    Ok(Writable::No)
}

fn failed(options: &Options, target: &Path) -> impl FnOnce(Errno) -> Error {
    let what = format!("{} ({})", options.root.display(), options.root_type);
    let target = target.to_owned();
    move |error| Error::Mount {
        what,
        target,
        source: error.into(),
    }
}

/// Puts a writable layer in memory over `target`.
fn overlay(target: &Path) -> Result<(), Error> {
    let make = |path: &str| {
        fs::create_dir_all(path).map_err(|source| Error::File {
            what: "make",
            path: PathBuf::from(path),
            source,
        })
    };
    let mounted = |what: &str, target: &Path| {
        let (what, target) = (what.to_owned(), target.to_owned());
        move |error: Errno| Error::Mount {
            what,
            target,
            source: error.into(),
        }
    };
    let below = Path::new(OVERLAY);
    make(OVERLAY)?;
    mount("tmpfs", below, "tmpfs", MountFlags::empty(), c"mode=0755")
        .map_err(mounted("tmpfs", below))?;
    for directory in ["/overlay/upper", "/overlay/work", "/overlay/merged"] {
        make(directory)?;
    }
    let layers = c"lowerdir=/sysroot,upperdir=/overlay/upper,workdir=/overlay/work";
    let merged = Path::new("/overlay/merged");
    let result = mount("overlay", merged, "overlay", MountFlags::NOATIME, layers)
        .map_err(mounted("overlay", merged))
        .and_then(|()| mount_move(merged, target).map_err(mounted("overlay", target)));
    if result.is_err() {
        let _ = unmount(below, UnmountFlags::DETACH);
    }
    result
}

/// Frees the memory of the drivers' files. This program goes on to run from its own file, which is
/// kept by that.
fn empty_initramfs() {
    let Ok(root) = fs::metadata("/") else { return };
    remove_below(Path::new("/"), root.dev());
}

/// Removes what is on the device `dev`, and on no other.
fn remove_below(directory: &Path, dev: u64) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(found) = fs::symlink_metadata(&path) else {
            continue;
        };
        if found.dev() != dev {
            continue;
        }
        if found.is_dir() {
            remove_below(&path, dev);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_on_the_same_device_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", root.path().join("link")).unwrap();
        let dev = fs::metadata(root.path()).unwrap().dev();
        remove_below(root.path(), dev + 1);
        assert!(deep.join("file").exists());
        remove_below(root.path(), dev);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists());
    }
}
