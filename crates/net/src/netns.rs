//! Network namespaces: made, kept alive by a bind mount, entered.
//!
//! A thread that enters a namespace never comes back: every piece of work inside a namespace
//! gets a thread of its own, which ends with the work. So no thread of the async runtime is ever
//! found in a namespace where it does not belong.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use rustix::{
    fs::fstatfs,
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use tokio::sync::oneshot;

use crate::{Error, Result};

/// The namespace of the thread that looks.
const OWN: &str = "/proc/thread-self/ns/net";
/// `NSFS_MAGIC` of `linux/magic.h`.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// A network namespace. It lives at least as long as this.
#[derive(Debug, Clone)]
pub(crate) struct Netns(Arc<OwnedFd>);

impl Netns {
    /// The namespace of the calling thread.
    pub(crate) fn current() -> Result<Self> {
        let file = File::open(OWN).map_err(Error::file("open the namespace", OWN))?;
        Ok(Self(Arc::new(file.into())))
    }

    /// The namespace that is kept alive at `path`; `None` if the file is a plain file.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let file = File::open(path).map_err(Error::file("open the namespace", path))?;
        let system = fstatfs(&file).map_err(Error::file("look at the namespace", path))?;
        #[allow(
            clippy::unnecessary_cast,
            reason = "the field's type differs between targets"
        )]
        let is_namespace = system.f_type as i64 == NSFS_MAGIC;
        Ok(is_namespace.then(|| Self(Arc::new(file.into()))))
    }

    /// Makes a new namespace, moves the calling thread into it and keeps it alive at `path`,
    /// where nothing may be yet. Only for a thread that ends with its work.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(Error::file("create", path))?;
        let mut undo = Undo(Some(path.to_owned()));
        // SAFETY: unsharing the network namespace touches neither memory nor the file table, and
        // the calling thread is one that only works on this namespace.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
            .map_err(Error::system("make a network namespace"))?;
        mount_bind(OWN, path).map_err(Error::file("bind-mount the namespace at", path))?;
        let namespace = Self::current()?;
        undo.0 = None;
        Ok(namespace)
    }

    /// Moves the calling thread into this namespace. Only for a thread that ends with its work.
    pub(crate) fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(Error::system("enter a network namespace"))
    }

    /// Runs `work` inside this namespace, in a thread of its own. `action` says in an infinitive
    /// what it does. The work goes on when the caller stops waiting.
    pub(crate) async fn run<T, F>(&self, action: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        let namespace = self.clone();
        in_thread(action, move || {
            namespace.enter()?;
            work()
        })
        .await
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs `work` in a thread of its own, which may enter any namespace.
pub(crate) async fn in_thread<T, F>(action: &str, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let (done, outcome) = oneshot::channel();
    thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            // The caller may have stopped waiting: what the work returns is then dropped here.
            let _ = done.send(work());
        })
        .map_err(Error::system(format!("start a thread to {action}")))?;
    outcome.await.map_err(|_| Error::WorkerDied {
        action: action.to_owned(),
    })?
}

/// Ends the life that a bind mount gives to a namespace and removes the file. What is already
/// gone is no error.
pub(crate) fn forget(path: &Path) -> Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        // Not a mount point (any more), or no such file.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(Error::file("unmount the namespace", path)(error)),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Forgets a half-made namespace unless disarmed.
struct Undo(Option<PathBuf>);

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = forget(path)
        {
            tracing::warn!(%error, "a namespace that could not be finished is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn inode(path: impl AsRef<Path>) -> u64 {
        std::fs::metadata(path).unwrap().ino()
    }

    #[tokio::test]
    async fn a_namespace_outlives_its_thread_and_leaves_the_others_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0");
        let outside = inode(OWN);
        let made = path.clone();
        let namespace = in_thread("test", move || Netns::create(&made))
            .await
            .unwrap();
        assert_eq!(inode(OWN), outside);
        let inside = namespace.run("test", || Ok(inode(OWN))).await.unwrap();
        assert_ne!(inside, outside);
        assert_eq!(inode(&path), inside);

        drop(namespace);
        let again = Netns::open(&path).unwrap().expect("a namespace");
        assert_eq!(again.run("test", || Ok(inode(OWN))).await.unwrap(), inside);

        forget(&path).unwrap();
        forget(&path).unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_is_at_the_path_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0");
        std::fs::write(&path, "mine").unwrap();
        assert!(Netns::open(&path).unwrap().is_none());
        let made = path.clone();
        let error = in_thread("test", move || Netns::create(&made))
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::File {
                    action: "create",
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }
}
