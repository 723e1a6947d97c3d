//! Mount points, and what is mounted on them.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
};

use cubicle_protocol::guest_api::Mount;
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use super::Error;
use crate::access::User;

const DEVICE: &str = "/dev/fuse";

/// How the kernel shows our file systems in `/proc/self/mountinfo`.
const KIND: &str = "fuse.cubicle";

/// Where nothing may be mounted, nor below: the machine would not work any more.
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Checks that a share may be mounted there.
pub(super) fn check(mount: &Mount) -> Result<PathBuf, Error> {
    let path = Path::new(&mount.path);
    let refused = |reason| Error::Path {
        path: mount.path.clone(),
        reason,
    };
    if !path.is_absolute() {
        return Err(refused("it is not absolute"));
    }
    let plain = |component| matches!(component, Component::RootDir | Component::Normal(_));
    if !path.components().all(plain) || path.as_os_str().as_bytes().contains(&0) {
        return Err(refused("it has a `..` in it"));
    }
    // Without slashes that mean nothing.
    let path: PathBuf = path.components().collect();
    check_place(&path, &mount.path)?;
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if mount.tag.is_empty() || mount.tag.len() > 64 || !mount.tag.bytes().all(good) {
        return Err(Error::Tag(mount.tag.clone()));
    }
    Ok(path)
}

/// Checks that the machine can spare a place, which is called `path`.
fn check_place(place: &Path, path: &str) -> Result<(), Error> {
    let reason = if place == Path::new("/") {
        "it is the root"
    } else if SYSTEM.iter().any(|system| place.starts_with(system)) {
        "the system needs it"
    } else {
        return Ok(());
    };
    Err(Error::Path {
        path: path.to_owned(),
        reason,
    })
}

/// Something to be mounted.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) tag: String,
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
}

/// Something that has been mounted.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) wanted: Wanted,
    /// Where, without symbolic links.
    pub(super) at: PathBuf,
    /// Through which its file system speaks to the kernel.
    pub(super) device: OwnedFd,
}

/// Makes the mount points and mounts all, or nothing. `others` are mounted already. Looks at no path
/// any more once it has begun to mount: that might lead into what nobody answers for yet.
pub(super) fn attach_all(
    others: &[PathBuf],
    wanted: Vec<Wanted>,
    user: &User,
) -> Result<Vec<Attached>, Error> {
    let mut places: Vec<PathBuf> = Vec::with_capacity(wanted.len());
    for one in &wanted {
        let failed = |source| Error::MountPoint {
            path: one.path.clone(),
            source,
        };
        make_directory(&one.path, user).map_err(failed)?;
        let at = fs::canonicalize(&one.path).map_err(failed)?;
        check_place(&at, &one.path.to_string_lossy())?;
        let mut taken = others.iter().chain(&places);
        if let Some(other) = taken.find(|other| other.starts_with(&at) || at.starts_with(other)) {
            return Err(Error::Nested(other.clone(), at));
        }
        places.push(at);
    }
    let mut attached: Vec<Attached> = Vec::with_capacity(wanted.len());
    for (wanted, at) in wanted.into_iter().zip(places) {
        match attach(&wanted, &at) {
            Ok(device) => attached.push(Attached { wanted, at, device }),
            Err(error) => {
                for undone in attached {
                    detach(&undone.at)?;
                }
                return Err(error);
            }
        }
    }
    Ok(attached)
}

fn attach(wanted: &Wanted, at: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = openat(CWD, DEVICE, flags, Mode::empty());
    let device = device.map_err(|errno| Error::Device(errno.into()))?;
    let failed = |source| Error::Mount {
        path: at.to_owned(),
        source,
    };
    // The kernel checks permissions, by the modes that it is told, for all users.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let options = CString::new(options).map_err(|error| failed(error.into()))?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, wanted.read_only);
    mount(source(&wanted.tag), at, KIND, flags, &*options).map_err(|e| failed(e.into()))?;
    Ok(device)
}

/// Unmounts a share. Programs that use it keep what they have open, and get errors from it.
pub(super) fn detach(path: &Path) -> Result<(), Error> {
    unmount(path, UnmountFlags::DETACH).map_err(|errno| Error::Unmount {
        path: path.to_owned(),
        source: errno.into(),
    })
}

/// Unmounts what a daemon before this one has left, which nobody answers for any more.
pub(super) fn detach_strays() -> Result<(), Error> {
    let list = fs::read("/proc/thread-self/mountinfo").map_err(Error::MountList)?;
    for path in ours(&list) {
        tracing::info!(path = %path.display(), "unmounting what nobody serves");
        detach(&path)?;
    }
    Ok(())
}

/// Where our file systems are mounted by a mountinfo, see proc_pid_mountinfo(5); the last first.
fn ours(list: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in list.split(|&byte| byte == b'\n') {
        let fields: Vec<_> = line.split(|&byte| byte == b' ').collect();
        let Some(dash) = fields.iter().position(|field| field == b"-") else {
            continue;
        };
        if fields.get(dash + 1) == Some(&KIND.as_bytes())
            && let Some(path) = fields.get(4)
        {
            found.push(PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(path))));
        }
    }
    found.reverse();
    found
}

/// Undoes `\040` and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| after.first_chunk::<3>())
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    bytes
}

fn source(tag: &str) -> String {
    format!("cubicle:{tag}")
}

/// Makes a directory with all those above it. What is new belongs to `user`.
fn make_directory(path: &Path, user: &User) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut at = path;
    loop {
        match fs::metadata(at) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(at),
            Err(error) => return Err(error),
        }
        let Some(parent) = at.parent() else { break };
        at = parent;
    }
    for directory in missing.into_iter().rev() {
        fs::create_dir(directory)?;
        std::os::unix::fs::lchown(directory, Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(tag: &str, path: &str) -> Mount {
        Mount {
            tag: tag.to_owned(),
            path: path.to_owned(),
            read_only: false,
            root: None,
        }
    }

    #[test]
    fn only_places_that_the_machine_can_spare_are_mount_points() {
        for good in ["/data", "/home/user/x", "/devices", "/a//b/", "/process"] {
            assert!(check(&mount("t", good)).is_ok(), "{good}");
        }
        let clean = check(&mount("t", "/a//b/./c/")).unwrap();
        assert_eq!(clean.as_os_str(), "/a/b/c");
        for bad in [
            "", "data", "./data", "/", "//", "/proc", "/sys/x", "/dev/shm", "/a/../b", "/a\0b",
        ] {
            let error = check(&mount("t", bad)).unwrap_err();
            assert!(matches!(error, Error::Path { .. }), "{bad}: {error}");
        }
        for bad in ["", "a/b", "ü", &"x".repeat(65)] {
            let error = check(&mount(bad, "/data")).unwrap_err();
            assert!(matches!(error, Error::Tag(_)), "{bad}: {error}");
        }
    }

    #[test]
    fn our_mounts_are_found_whatever_they_are_called() {
        let list = b"22 1 0:5 / /dev rw shared:2 - devtmpfs devtmpfs rw\n\
            40 22 0:33 / /data rw,nosuid - fuse.cubicle cubicle:a rw\n\
            41 22 0:34 / /with\\040space\\134 rw shared:7 master:1 - fuse.cubicle cubicle:b rw\n\
            42 22 0:35 / /other rw - fuse.sshfs x rw\n";
        let found = ours(list);
        assert_eq!(found, [Path::new("/with space\\"), Path::new("/data")]);
    }

    #[test]
    fn directories_above_a_mount_point_are_made() {
        let root = tempfile::tempdir().unwrap();
        let user = User {
            name: "me".to_owned(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            home: PathBuf::new(),
            shell: PathBuf::new(),
        };
        let deep = root.path().join("a/b/c");
        make_directory(&deep, &user).unwrap();
        make_directory(&deep, &user).unwrap();
        assert!(deep.is_dir());
        fs::write(root.path().join("file"), "").unwrap();
        let error = make_directory(&root.path().join("file/x"), &user).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
        let error = make_directory(&root.path().join("file"), &user).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }
}
