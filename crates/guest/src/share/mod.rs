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
use mount::{Attached, Wanted};
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
    /// Where it was wanted.
    path: PathBuf,
    /// Where that really is.
    at: PathBuf,
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
            // Nothing of ours is mounted yet, so nothing of this can wait for us.
            mount::detach_strays()?;
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
            blocking(move || mount::detach(&old.at)).await?;
            self.mounted().remove(&tag);
        }
        for mounted in self.mounted().values() {
            mounted.session.refresh();
        }
        let (others, missing) = self.missing(wanted);
        if missing.is_empty() {
            return Ok(());
        }
        let owner = (user.uid, user.gid);
        let user = user.clone();
        let attached = if others.is_empty() {
            // On this thread, which is much quicker: no path can lead into a share.
            mount::attach_all(&others, missing, &user)?
        } else {
            blocking(move || mount::attach_all(&others, missing, &user)).await?
        };
        for attached in attached {
            self.serve(attached, owner).await?;
        }
        Ok(())
    }

    /// Where shares are mounted, and what is wanted besides.
    fn missing(&self, wanted: BTreeMap<String, (PathBuf, bool)>) -> (Vec<PathBuf>, Vec<Wanted>) {
        let mounted = self.mounted();
        let others = mounted.values().map(|mounted| mounted.at.clone());
        let missing = wanted
            .into_iter()
            .filter(|(tag, _)| !mounted.contains_key(tag))
            .map(|(tag, (path, read_only))| Wanted {
                tag,
                path,
                read_only,
            });
        (others.collect(), missing.collect())
    }

    /// Begins to answer for what has just been mounted. Not before: until then nobody can wait for
    /// the device. The kernel's first question is there by now, and mounting does not wait for its
    /// answer.
    async fn serve(&self, attached: Attached, owner: (u32, u32)) -> Result<(), Error> {
        let Attached { wanted, at, device } = attached;
        let session = match Session::start(device, owner) {
            Ok(session) => session,
            Err(error) => {
                blocking(move || mount::detach(&at)).await?;
                return Err(Error::Device(error));
            }
        };
        let Wanted {
            tag,
            path,
            read_only,
        } = wanted;
        let mounted = Mounted {
            path,
            at,
            read_only,
            session,
        };
        self.mounted().insert(tag, mounted);
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
