//! The real file system on the real kernel, with the real host end, in a mount namespace of its
//! own. Needs root and `/dev/fuse`.

mod lives;
mod model;
mod operations;
mod speed;

use std::{
    collections::HashMap,
    convert::Infallible,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use cubicle_protocol::guest_api::Mount;
use cubicle_share::{Access, Outgoing, Share, Workers, serve};
use futures::StreamExt as _;
use rustix::mount::{MountPropagationFlags, mount_change};
use tokio::{runtime::Runtime, sync::mpsc, task::JoinHandle};

use super::Shares;
use crate::access::User;

/// A sandbox with shares, and the host's directories.
pub(super) struct Rig {
    pub(super) shares: Arc<Shares>,
    runtime: Runtime,
    /// `host/<tag>` is shared and mounted on `guest/<tag>`.
    root: tempfile::TempDir,
    lives: Vec<JoinHandle<()>>,
    served: HashMap<(String, bool), Arc<Share>>,
}

impl Rig {
    pub(super) fn new(mounts: &[(&str, Access)]) -> Self {
        own_namespace();
        // Its threads are made by this one, and so are in the same namespace.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let mut rig = Self {
            shares: Arc::default(),
            runtime,
            root: tempfile::tempdir().unwrap(),
            lives: Vec::new(),
            served: HashMap::new(),
        };
        for (tag, _) in mounts {
            fs::create_dir_all(rig.host(tag)).unwrap();
        }
        rig.reconcile(mounts).unwrap();
        rig.connect(mounts);
        rig
    }

    /// One share that can be written to, with the tag `a`.
    pub(super) fn single() -> Self {
        Self::new(&[("a", Access::ReadWrite)])
    }

    pub(super) fn host(&self, tag: &str) -> PathBuf {
        self.root.path().join("host").join(tag)
    }

    pub(super) fn guest(&self, tag: &str) -> PathBuf {
        self.root.path().join("guest").join(tag)
    }

    pub(super) fn reconcile(&self, mounts: &[(&str, Access)]) -> Result<(), super::Error> {
        let mounts = mounts.iter().map(|(tag, access)| Mount {
            tag: (*tag).to_owned(),
            path: self.guest(tag).to_str().unwrap().to_owned(),
            read_only: *access == Access::ReadOnly,
            root: None,
        });
        let user = user();
        self.runtime
            .block_on(self.shares.reconcile(mounts.collect(), &user))
    }

    /// Begins a life in which the host serves these.
    pub(super) fn connect(&mut self, mounts: &[(&str, Access)]) {
        for (tag, access) in mounts {
            let host = self.host(tag);
            let key = ((*tag).to_owned(), *access == Access::ReadOnly);
            let open = || Arc::new(Share::open(&host, *access).unwrap());
            let share = Arc::clone(self.served.entry(key).or_insert_with(open));
            self.serve(tag, share);
        }
    }

    /// Ends the life and the server: the next one knows nothing.
    pub(super) fn crash(&mut self) {
        self.disconnect();
        self.served.clear();
    }

    pub(super) fn serve(&mut self, tag: &str, share: Arc<Share>) {
        let _runtime = self.runtime.enter();
        let session = self.shares.session(tag).unwrap();
        let (sender, receiver) = mpsc::unbounded_channel::<Outgoing>();
        let replies = futures::stream::unfold(receiver, |mut receiver| async {
            let reply = receiver.recv().await?.into_frame();
            Some((Ok::<_, Infallible>(reply), receiver))
        });
        let requests = session.queue.attach(replies).map(Ok::<_, Infallible>);
        let workers = Workers::new(NonZeroUsize::new(8).unwrap());
        self.lives.push(tokio::spawn(async move {
            serve(share, workers, requests, sender).await.unwrap();
        }));
    }

    /// Ends the life.
    pub(super) fn disconnect(&mut self) {
        for life in self.lives.drain(..) {
            life.abort();
            let _ = self.runtime.block_on(life);
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Else files that are open would make the tests wait for a host that is gone.
        self.runtime
            .block_on(self.shares.reconcile(Vec::new(), &user()))
            .unwrap();
    }
}

pub(super) fn user() -> User {
    User {
        name: "user".to_owned(),
        uid: 1000,
        gid: 1001,
        home: PathBuf::from("/home/user"),
        shell: PathBuf::from("/bin/sh"),
    }
}

/// What this thread mounts, no other process sees, and it goes with the thread.
fn own_namespace() {
    // SAFETY: other threads keep the namespace that they have.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(unshared, 0, "needs root");
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
}

pub(super) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
