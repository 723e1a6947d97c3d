//! Directories of the host in the sandbox: file systems that this daemon answers for, and asks the
//! host about.
//!
//! Everything that makes such a file system what it is at one moment is in this process's memory:
//! which files the kernel knows by which number, what is open, what has been asked and not answered.
//! So it is part of every snapshot, and goes on after a restore with another host at the other end,
//! which knows nothing and need not.
//!
//! - `mount` makes mount points and mounts; `abi` and `decode` are the kernel's side of it.
//! - `session` reads the kernel's requests and answers them; `work` says how, `table` where things
//!   are, `directory` what is in them.
//! - `queue` is what the host was asked, over all lives of the channel.
//!
//! Invariants:
//! - The daemon's own thread never touches a path that may be in a share: it would wait for itself.
//! - A request is answered exactly once, whatever becomes of the host.
//! - What was read before a restore is not believed after it.

mod abi;
mod decode;
mod directory;
mod mount;
mod queue;
mod session;
mod table;
mod work;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    body::Body,
    extract::{Path, State as Shared},
    response::{IntoResponse, Response},
};
use cubicle_protocol::guest_api::Mount;
use futures::StreamExt as _;
use http::StatusCode;
use session::Session;

use crate::{
    access::{State, User},
    blocking::blocking,
    http::ApiError,
};

/// Why a share could not be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing may be mounted there.
    #[error("cannot mount anything on '{path}': {reason}")]
    Path {
        /// Where.
        path: String,
        /// Why not.
        reason: &'static str,
    },
    /// The tag is none.
    #[error("invalid tag '{0}' of a mount")]
    Tag(String),
    /// Two mounts would hide each other.
    #[error("cannot mount two directories on {} and {}: one hides the other", .0.display(), .1.display())]
    Nested(PathBuf, PathBuf),
    /// Two mounts have the same tag.
    #[error("two mounts have the tag '{0}'")]
    SameTag(String),
    /// The kernel has no file systems in user space.
    #[error("cannot open /dev/fuse: {0}")]
    Device(#[source] io::Error),
    /// The mount point could not be made.
    #[error("cannot make the mount point {}: {source}", path.display())]
    MountPoint {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel would not mount it.
    #[error("cannot mount a share on {}: {source}", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel would not unmount it.
    #[error("cannot unmount {}: {source}", path.display())]
    Unmount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// What is mounted cannot be found out.
    #[error("cannot read /proc/thread-self/mountinfo: {0}")]
    MountList(#[source] io::Error),
}

/// The shares that are mounted.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    mounted: Mutex<BTreeMap<String, Mounted>>,
    /// Changes are made one at a time. Whether what an earlier daemon left is gone.
    changes: tokio::sync::Mutex<bool>,
}

#[derive(Debug, Clone)]
struct Mounted {
    path: PathBuf,
    read_only: bool,
    session: Arc<Session>,
}

impl Shares {
    /// Whether any share is mounted.
    pub(crate) fn any(&self) -> bool {
        !self.mounted().is_empty()
    }

    /// Makes what is mounted what is `wanted`. What stays is made to look at the host again.
    pub(crate) async fn reconcile(&self, wanted: Vec<Mount>, user: &User) -> Result<(), Error> {
        let mut swept = self.changes.lock().await;
        let wanted = checked(wanted)?;
        if !*swept {
            blocking(mount::detach_strays).await?;
            *swept = true;
        }
        let unwanted: Vec<_> = self
            .mounted()
            .iter()
            .filter(|(tag, mounted)| {
                wanted.get(*tag) != Some(&(mounted.path.clone(), mounted.read_only))
            })
            .map(|(tag, mounted)| (tag.clone(), mounted.clone()))
            .collect();
        for (tag, old) in unwanted {
            // First, so that nothing waits for it any more.
            old.session.queue.close();
            blocking(move || mount::detach(&old.path)).await?;
            self.mounted().remove(&tag);
        }
        for (tag, (path, read_only)) in wanted {
            if let Some(mounted) = self.mounted().get(&tag) {
                mounted.session.refresh();
                continue;
            }
            let mounted = mount_one(&tag, path, read_only, user.clone()).await?;
            self.mounted().insert(tag, mounted);
        }
        Ok(())
    }

    fn session(&self, tag: &str) -> Option<Arc<Session>> {
        let mounted = self.mounted();
        mounted.get(tag).map(|mounted| Arc::clone(&mounted.session))
    }

    fn mounted(&self) -> MutexGuard<'_, BTreeMap<String, Mounted>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Path and access of each share by its tag, if all of them can be mounted together.
fn checked(wanted: Vec<Mount>) -> Result<BTreeMap<String, (PathBuf, bool)>, Error> {
    let mut by_tag: BTreeMap<String, (PathBuf, bool)> = BTreeMap::new();
    for one in wanted {
        let path = mount::check(&one)?;
        let overlap = |other: &&PathBuf| other.starts_with(&path) || path.starts_with(other);
        if let Some(other) = by_tag.values().map(|(path, _)| path).find(overlap) {
            return Err(Error::Nested(other.clone(), path));
        }
        if by_tag.contains_key(&one.tag) {
            return Err(Error::SameTag(one.tag));
        }
        by_tag.insert(one.tag, (path, one.read_only));
    }
    Ok(by_tag)
}

async fn mount_one(
    tag: &str,
    path: PathBuf,
    read_only: bool,
    user: User,
) -> Result<Mounted, Error> {
    let owner = (user.uid, user.gid);
    let (tag, at) = (tag.to_owned(), path.clone());
    let device = blocking(move || {
        let device = mount::open_device()?;
        mount::attach(&tag, &at, read_only, &device, &user)?;
        Ok(device)
    })
    .await?;
    // Not before it is mounted: until then nobody can wait for the device. The kernel's first
    // question is there by now, and mounting does not wait for its answer.
    let session = match Session::start(device, owner) {
        Ok(session) => session,
        Err(error) => {
            let at = path.clone();
            blocking(move || mount::detach(&at)).await?;
            return Err(Error::Device(error));
        }
    };
    Ok(Mounted {
        path,
        read_only,
        session,
    })
}

/// `POST /shares/{tag}`: the host is there and answers for a share, as long as the streams last.
pub(crate) async fn serve(
    Shared(state): Shared<Arc<State>>,
    Path(tag): Path<String>,
    replies: Body,
) -> Result<Response, ApiError> {
    let session = state.shares.session(&tag).ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_FOUND,
            format!("no share '{tag}' is mounted"),
        )
    })?;
    let requests = session.queue.attach(replies.into_data_stream());
    let requests = requests.map(Ok::<_, Infallible>);
    Ok(Body::from_stream(requests).into_response())
}
