//! A working directory for a build: in memory where there is room, else on disk.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    cache::remove,
    error::{During as _, Result},
};

/// An empty directory that only this build uses. Dropping it undoes the mount and removes it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    in_memory: bool,
}

impl Scratch {
    /// Makes the directory `path`, with room for `bytes`. In memory if three times as much is
    /// available there, so that a build never competes with running sandboxes for the last of it.
    /// What is at `path` already was left by a crash and is removed.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if that fails, or if something of somebody else is mounted there.
    pub fn new(path: PathBuf, bytes: u64) -> Result<Scratch> {
        discard(&path).during("remove what an interrupted build left")?;
        fs_err::create_dir_all(&path).during("make a working directory")?;
        // From here on, dropping it cleans up.
        let mut scratch = Scratch {
            path,
            in_memory: false,
        };
        if available_memory().is_some_and(|available| available / 3 > bytes) {
            let options = format!("mode=0755,size={bytes}");
            let Ok(options) = std::ffi::CString::new(options) else {
                return Ok(scratch);
            };
            // Without the right to mount, the disk does as well.
            let mounted = mount(
                "cubicle-build",
                &scratch.path,
                "tmpfs",
                MountFlags::empty(),
                Some(&*options),
            );
            scratch.in_memory = mounted.is_ok();
        }
        Ok(scratch)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is in memory.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = discard(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a working directory is left behind");
        }
    }
}

fn discard(path: &Path) -> io::Result<()> {
    while path.exists() && unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
    // Removing goes through mounts, into what may be somebody else's directory.
    if has_mounts(path)? {
        let message = format!("something is mounted in `{}`", path.display());
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
    }
    remove(path)
}

/// Whether something is mounted at `path` or below it.
fn has_mounts(path: &Path) -> io::Result<bool> {
    let path = match path.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let mounts = fs_err::read("/proc/self/mountinfo")?;
    let mut points = mounts.split(|&byte| byte == b'\n').filter_map(|line| {
        // The fifth field; white space and backslashes in it are written in octal.
        line.split(|&byte| byte == b' ').nth(4).map(unescape)
    });
    Ok(points.any(|point| Path::new(OsStr::from_bytes(&point)).starts_with(&path)))
}

/// Puts `\ooo` back into the byte that it stands for.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if byte == b'\\' => {
                plain.push(value);
                rest = &tail[3..];
            }
            _ => {
                plain.push(byte);
                rest = tail;
            }
        }
    }
    plain
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let meminfo = fs_err::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted(path: &Path) -> bool {
        let mounts = fs_err::read_to_string("/proc/self/mounts").unwrap();
        mounts.contains(path.to_str().unwrap())
    }

    #[test]
    fn nothing_is_left_of_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("work");
        let scratch = Scratch::new(path.clone(), 1 << 20).unwrap();
        fs_err::write(scratch.path().join("file"), "x").unwrap();
        assert_eq!(mounted(&path), scratch.in_memory());
        drop(scratch);
        assert!(!path.exists() && !mounted(&path));
    }

    #[test]
    fn what_a_crash_left_is_removed_first() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("work");
        let crashed = Scratch::new(path.clone(), 1 << 20).unwrap();
        fs_err::write(path.join("stale"), "x").unwrap();
        std::mem::forget(crashed);
        let scratch = Scratch::new(path.clone(), 1 << 20).unwrap();
        assert!(!path.join("stale").exists());
        drop(scratch);
        assert!(!path.exists() && !mounted(&path));
    }

    #[test]
    fn what_is_mounted_inside_is_never_removed() {
        let root = tempfile::tempdir().unwrap();
        let precious = root.path().join("precious");
        fs_err::create_dir(&precious).unwrap();
        fs_err::write(precious.join("file"), "x").unwrap();
        let path = root.path().join("wo rk");
        let inside = path.join("bind");
        fs_err::create_dir_all(&inside).unwrap();
        rustix::mount::mount_bind(&precious, &inside).unwrap();
        let error = Scratch::new(path.clone(), u64::MAX / 4).unwrap_err();
        unmount(&inside, UnmountFlags::DETACH).unwrap();
        assert!(precious.join("file").exists(), "{error}");
        drop(Scratch::new(path.clone(), u64::MAX / 4).unwrap());
        assert!(!path.exists() && precious.join("file").exists());
    }

    #[test]
    fn too_much_for_the_memory_goes_to_disk() {
        let root = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(root.path().join("work"), u64::MAX / 4).unwrap();
        assert!(!scratch.in_memory());
    }
}
