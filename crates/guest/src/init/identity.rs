//! Files that say which machine this is, kept in memory instead of on the disk.
//!
//! A restored sandbox is told who it is before anybody may use it, and nothing is as slow then as
//! the first write to a disk: 40 ms of code that has never run before, under software emulation.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use rustix::mount::mount_bind;

use super::{Error, console::say};

/// What is written whenever a sandbox becomes another one.
const FILES: [&str; 4] = ["machine-id", "hostname", "hosts", "resolv.conf"];

/// Covers each of the files in `/etc` with a copy of it in `/run`. One that cannot be covered stays
/// what it is.
pub(super) fn cover() {
    for name in FILES {
        if let Err(error) = cover_file(Path::new("/etc"), Path::new("/run/cubicle/etc"), name) {
            say(&error.to_string());
        }
    }
}

fn cover_file(etc: &Path, place: &Path, name: &str) -> Result<(), Error> {
    let (target, copy) = (etc.join(name), place.join(name));
    prepare(&target, &copy).map_err(|source| Error::File {
        what: "copy to memory",
        path: target.clone(),
        source,
    })?;
    mount_bind(&copy, &target).map_err(|error| Error::Mount {
        what: copy.display().to_string(),
        target,
        source: error.into(),
    })
}

/// Makes a file to mount and a file to mount it on.
fn prepare(target: &Path, copy: &Path) -> io::Result<()> {
    let content = match fs::read(target) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::File::create_new(target)?;
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    if let Some(place) = copy.parent() {
        fs::create_dir_all(place)?;
    }
    fs::write(copy, content)?;
    fs::set_permissions(copy, Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_says_what_the_file_says_and_everybody_may_read_it() {
        let root = tempfile::tempdir().unwrap();
        let (target, copy) = (root.path().join("hosts"), root.path().join("run/etc/hosts"));
        prepare(&target, &copy).unwrap();
        assert!(target.exists(), "there must be something to mount on");
        assert_eq!(fs::read(&copy).unwrap(), b"");
        fs::write(&target, "127.0.0.1 localhost\n").unwrap();
        fs::set_permissions(&target, Permissions::from_mode(0o600)).unwrap();
        prepare(&target, &copy).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), b"127.0.0.1 localhost\n");
        assert_eq!(copy.metadata().unwrap().permissions().mode() & 0o777, 0o644);
    }
}
