//! Removal of whole trees.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, unlinkat},
    io::{self, Errno},
};

/// Removes what is at `path`, with everything below it; a link itself and not what it leads to.
/// What is gone already, or goes meanwhile, is no error.
///
/// Directories are entered by descriptor and never by path, so that one that is exchanged for a
/// link leads nowhere else. However deep the tree is, the stack stays small; each level takes a
/// descriptor.
///
/// # Errors
/// Whatever the kernel says; `ENOTEMPTY` if somebody keeps filling a directory.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        // POSIX would have EPERM here.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    let Some(top) = open(CWD, path)? else {
        return Ok(());
    };
    let mut levels = vec![Level::new(top, CString::default())?];
    while let Some(level) = levels.last_mut() {
        match level.next()? {
            Some((name, FileType::Directory)) => {
                if let Some(directory) = open(level.fd()?, &name)? {
                    levels.push(Level::new(directory, name)?);
                }
            }
            // It was no directory when it was listed.
            Some((name, _)) => gone(unlinkat(level.fd()?, &name, AtFlags::empty()))?,
            None => {
                let name = levels.pop().map(|level| level.name).unwrap_or_default();
                match levels.last() {
                    Some(parent) => gone(unlinkat(parent.fd()?, &name, AtFlags::REMOVEDIR))?,
                    None => gone(unlinkat(CWD, path, AtFlags::REMOVEDIR))?,
                }
            }
        }
    }
    Ok(())
}

/// A directory that is being emptied, and its name in the one above.
struct Level {
    entries: Dir,
    name: CString,
}

impl Level {
    fn new(directory: OwnedFd, name: CString) -> io::Result<Self> {
        Ok(Self {
            entries: Dir::new(directory)?,
            name,
        })
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.entries.fd()
    }

    /// The next entry and its type.
    fn next(&mut self) -> io::Result<Option<(CString, FileType)>> {
        while let Some(entry) = self.entries.read().transpose()? {
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let kind = match entry.file_type() {
                // Not every file system says it in its listings.
                FileType::Unknown => kind_of(self.fd()?, name)?,
                kind => kind,
            };
            return Ok(Some((name.to_owned(), kind)));
        }
        Ok(None)
    }
}

fn kind_of(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<FileType> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode)),
        Err(Errno::NOENT) => Ok(FileType::Unknown),
        Err(errno) => Err(errno),
    }
}

/// Opens a directory; none if it is gone.
fn open(at: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(at, name, flags, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn trees_go_and_what_links_lead_to_stays() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("tree/a/b")).unwrap();
        fs::create_dir(at("kept")).unwrap();
        fs::write(at("kept/file"), "").unwrap();
        for number in 0..1000 {
            fs::write(at(&format!("tree/a/{number}")), "").unwrap();
        }
        symlink(at("kept"), at("tree/a/link")).unwrap();
        symlink(at("tree"), at("link")).unwrap();
        remove_tree(&at("link")).unwrap();
        assert!(at("tree/a/b").exists());
        remove_tree(&at("tree")).unwrap();
        assert!(!at("tree").exists());
        remove_tree(&at("tree")).unwrap();
        remove_tree(&at("kept/file/below")).unwrap();
        assert!(at("kept/file").exists());
    }

    #[test]
    fn deep_trees_need_no_deep_stack() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("top");
        // Deeper than a path can say, made from below by moving.
        fs::create_dir(&top).unwrap();
        for _ in 0..600 {
            let outer = root.path().join("outer");
            fs::create_dir(&outer).unwrap();
            fs::rename(&top, outer.join("a-directory")).unwrap();
            fs::rename(&outer, &top).unwrap();
        }
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        let removal = {
            let top = top.clone();
            thread.spawn(move || remove_tree(&top)).unwrap()
        };
        removal.join().unwrap().unwrap();
        assert!(!top.exists());
    }
}
