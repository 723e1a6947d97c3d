//! A tree beside the one that is unpacked into, in which nothing may ever change.

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

/// A place with a target to unpack into, and things that names in archives may be aimed at.
pub(crate) struct Ground {
    place: TempDir,
    before: BTreeMap<PathBuf, String>,
}

impl Ground {
    /// In memory where that is possible.
    pub(crate) fn new() -> Ground {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() {
            tempfile::tempdir_in(memory).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        let canary = place.path().join("canary");
        fs_err::create_dir_all(canary.join("dir/sub")).unwrap();
        fs_err::write(canary.join("secret"), "secret").unwrap();
        fs_err::write(canary.join("dir/file"), "file").unwrap();
        fs_err::write(canary.join("dir/sub/x"), "x").unwrap();
        symlink("secret", canary.join("link")).unwrap();
        let restricted = std::fs::Permissions::from_mode(0o400);
        fs_err::set_permissions(canary.join("secret"), restricted).unwrap();
        let mut ground = Ground {
            place,
            before: BTreeMap::new(),
        };
        fs_err::create_dir(ground.target()).unwrap();
        ground.before = ground.snapshot();
        ground
    }

    pub(crate) fn target(&self) -> PathBuf {
        self.place.path().join("target")
    }

    pub(crate) fn canary(&self) -> PathBuf {
        self.place.path().join("canary")
    }

    /// Panics if anything but the target has changed.
    pub(crate) fn check(&self) {
        let now = self.snapshot();
        assert_eq!(now, self.before, "something outside has changed");
    }

    /// An empty target again.
    pub(crate) fn clear(&self) {
        // The target's own mode and owner may have been changed by an entry for the root.
        fs_err::remove_dir_all(self.target()).unwrap();
        fs_err::create_dir(self.target()).unwrap();
    }

    fn snapshot(&self) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        for entry in fs_err::read_dir(self.place.path()).unwrap() {
            let path = entry.unwrap().path();
            if path == self.target() {
                found.insert(path, "target".to_owned());
            } else {
                walk(&path, &mut found);
            }
        }
        found
    }
}

fn walk(path: &Path, found: &mut BTreeMap<PathBuf, String>) {
    let meta = fs_err::symlink_metadata(path).unwrap();
    let content = if meta.is_file() {
        String::from_utf8_lossy(&fs_err::read(path).unwrap()).into_owned()
    } else {
        String::new()
    };
    // The time of the last change of the inode tells of everything else: of links and attributes.
    let facts = format!(
        "{:o} {}:{} {} links {} bytes changed {}.{:09} {content}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.nlink(),
        meta.size(),
        meta.ctime(),
        meta.ctime_nsec(),
    );
    found.insert(path.to_owned(), facts);
    if meta.is_dir() {
        for entry in fs_err::read_dir(path).unwrap() {
            walk(&entry.unwrap().path(), found);
        }
    }
}
