//! `filesystem.Filesystem`: look at the files of the sandbox, arrange them, watch them.
//!
//! Every call acts for a user: relative paths start at its home, and what is created belongs to it.
//! The kernel's permission checks are not the user's, though: the daemon is root.
//!
//! System calls on files may block for as long as a disk takes, so that none runs on the thread
//! that serves connections.

mod entry;
mod error;
mod list;
mod metadata;
mod mode;
mod path;
mod remove;
mod watch;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};

pub use error::Error;
pub(crate) use metadata::Metadata;
pub use metadata::MetadataError;
pub use path::{PathError, ensure_directories, resolve};
pub use watch::WatchError;

use crate::{
    access::{Accounts, Settings, State, User, caller},
    blocking::blocking,
    proto::filesystem::{
        CreateWatcherRequest, CreateWatcherResponse, EntryInfo, GetWatcherEventsRequest,
        GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse,
        MoveRequest, MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest,
        RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
    },
};
use remove::remove_tree;
use watch::{Registry, Slot, Tree, WatchOptions};

/// The service.
#[derive(Debug)]
pub struct Filesystem {
    state: Arc<State>,
    watchers: Registry,
}

/// On whose behalf a call acts.
struct Actor {
    user: User,
    accounts: Accounts,
    settings: Arc<Settings>,
}

impl Actor {
    fn resolve(&self, path: &str) -> Result<PathBuf, Error> {
        Ok(resolve(path, &self.user, &self.settings)?)
    }

    fn describe(&self, path: &Path) -> Result<EntryInfo, Error> {
        entry::describe(path, &self.accounts).map_err(Error::io("look at", path))
    }

    fn ensure_directories(&self, path: &Path) -> Result<(), Error> {
        ensure_directories(path, &self.user).map_err(Error::io("create directory", path))
    }
}

impl Filesystem {
    /// The service of the sandbox with that state.
    #[must_use]
    pub fn new(state: Arc<State>) -> Self {
        Self {
            state,
            watchers: Registry::default(),
        }
    }

    /// Runs a call on a thread that may block, as the user that the request names.
    async fn act<T: Send + 'static>(
        &self,
        context: &RequestContext,
        call: impl FnOnce(&Actor) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, ConnectError> {
        let state = Arc::clone(&self.state);
        let name = caller(context.headers());
        let result = blocking(move || {
            let actor = Actor {
                user: state.user(name.as_deref())?,
                accounts: state.accounts()?,
                settings: state.settings(),
            };
            call(&actor)
        });
        Ok(result.await?)
    }

    /// Begins a watch, if there are not too many.
    async fn watch(
        &self,
        context: &RequestContext,
        path: &str,
        options: WatchOptions,
    ) -> Result<(Tree, Slot), ConnectError> {
        let slot = self.watchers.slot().map_err(Error::from)?;
        let (path, state) = (path.to_owned(), Arc::clone(&self.state));
        let tree = self.act(context, move |actor| {
            watch::open(actor.resolve(&path)?, options, state)
        });
        Ok((tree.await?, slot))
    }
}

#[allow(
    refining_impl_trait,
    reason = "nobody calls these methods but the generated router"
)]
impl crate::proto::filesystem::Filesystem for Filesystem {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<StatResponse> {
        let path = request.path.to_owned();
        let entry = self
            .act(&context, move |actor| {
                actor.describe(&actor.resolve(&path)?)
            })
            .await?;
        Response::ok(StatResponse {
            entry: entry.into(),
            ..StatResponse::default()
        })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let path = request.path.to_owned();
        let entry = self
            .act(&context, move |actor| {
                make_dir(actor, &actor.resolve(&path)?)
            })
            .await?;
        Response::ok(MakeDirResponse {
            entry: entry.into(),
            ..MakeDirResponse::default()
        })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<MoveResponse> {
        let (from, to) = (request.source.to_owned(), request.destination.to_owned());
        let rename =
            move |actor: &Actor| rename(actor, &actor.resolve(&from)?, &actor.resolve(&to)?);
        let entry = self.act(&context, rename).await?;
        Response::ok(MoveResponse {
            entry: entry.into(),
            ..MoveResponse::default()
        })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let (path, depth) = (request.path.to_owned(), request.depth.max(1));
        let list = move |actor: &Actor| list::list(&actor.resolve(&path)?, depth, &actor.accounts);
        let entries = self.act(&context, list).await?;
        Response::ok(ListDirResponse {
            entries,
            ..ListDirResponse::default()
        })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<RemoveResponse> {
        let path = request.path.to_owned();
        self.act(&context, move |actor| {
            if path.is_empty() {
                return Err(Error::Precious(actor.resolve("")?));
            }
            remove(&actor.resolve(&path)?)
        })
        .await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let options = WatchOptions {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let (tree, slot) = self.watch(&context, request.path, options).await?;
        let events = watch::stream(tree, slot, context.headers(), context.deadline());
        Ok(Response::stream(events.map_err(Error::from)?))
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        let options = WatchOptions {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let (tree, slot) = self.watch(&context, request.path, options).await?;
        let watcher_id = self.watchers.insert(tree, slot).map_err(Error::from)?;
        Response::ok(CreateWatcherResponse {
            watcher_id,
            ..CreateWatcherResponse::default()
        })
    }

    async fn get_watcher_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        let events = self
            .watchers
            .take(request.watcher_id)
            .await
            .map_err(Error::from)?;
        Response::ok(GetWatcherEventsResponse {
            events,
            ..GetWatcherEventsResponse::default()
        })
    }

    async fn remove_watcher(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        self.watchers
            .remove(request.watcher_id)
            .map_err(Error::from)?;
        Response::ok(RemoveWatcherResponse::default())
    }
}

fn make_dir(actor: &Actor, path: &Path) -> Result<EntryInfo, Error> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(Error::DirectoryExists(path.to_owned())),
        Ok(_) => return Err(Error::NameTaken(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("create directory", path)(error)),
    }
    actor.ensure_directories(path)?;
    actor.describe(path)
}

fn rename(actor: &Actor, from: &Path, to: &Path) -> Result<EntryInfo, Error> {
    // Looked at first, so that a move of nothing leaves no directories behind.
    std::fs::symlink_metadata(from).map_err(Error::io("move", from))?;
    if let Some(parent) = to.parent() {
        actor.ensure_directories(parent)?;
    }
    std::fs::rename(from, to).map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound {
            Error::NotFound(from.to_owned())
        } else {
            Error::Io {
                attempt: "move to",
                path: to.to_owned(),
                source,
            }
        }
    })?;
    actor.describe(to)
}

/// Removes whatever is at `path`, with everything below it; a link itself and not what it leads to.
fn remove(path: &Path) -> Result<(), Error> {
    if !has_name(path) {
        return Err(Error::Precious(path.to_owned()));
    }
    remove_tree(path).map_err(|errno| Error::Io {
        attempt: "remove",
        path: path.to_owned(),
        source: errno.into(),
    })
}

/// Whether a path ends in a name, as that of something that can be removed does: `/` and whatever
/// `..` leads to hold too much.
fn has_name(path: &Path) -> bool {
    path.file_name().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    // The check alone: a removal that gets past it would take this machine with it.
    #[test]
    fn the_root_has_no_name() {
        for path in ["/", "/tmp/..", "/tmp/../..", "/tmp/a/../.."] {
            assert!(!has_name(Path::new(path)), "{path}");
        }
        for path in ["/tmp", "/tmp/../a", "/..a"] {
            assert!(has_name(Path::new(path)), "{path}");
        }
    }
}
