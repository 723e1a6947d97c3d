//! Snapshots: the past of sandboxes, named, listed, checked and deleted.
//!
//! A snapshot is to its users what a template is: its id or name is accepted wherever a template's
//! is. Its place among the others (which one descends from which) outlives it; its files do not.
//!
//! A name may be given to several snapshots, as a template may be built several times. It stands
//! for the newest of them; the others keep it for lists, and their ids.

mod create;
mod delete;
mod model;
mod query;
mod reconcile;
mod store;
mod trash;
mod tree;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use cubicle_ids::{SandboxId, SnapshotId};

pub use self::{
    create::{CreateSnapshot, SnapshotCreation},
    model::{Report, Snapshot, SnapshotState, Stored},
    query::{SnapshotCursor, SnapshotPage, SnapshotQuery},
    tree::{TreeNode, TreeWhat},
};
pub(crate) use self::{
    reconcile::{MISSING, reconcile},
    store::{Filter, Store},
    trash::Trash,
};
use crate::{
    error::{Error, Result},
    fleet::FleetError,
    sandbox::{self, Deadlines, MAX_PAGE, Sandboxes},
    template::{Reference, Templates, shorten},
};

/// How many snapshots there may be, and for how long.
#[derive(Debug, Clone)]
pub struct SnapshotConfig {
    /// Most snapshots of users; `None`: any number.
    pub max_count: Option<u64>,
    /// Most bytes that all of them together may take of the store; `None`: what fits.
    pub max_own_bytes: Option<u64>,
    /// How long those live that are not given a lifetime; `None`: until they are deleted.
    pub default_ttl: Option<Duration>,
}

impl SnapshotConfig {
    /// Most snapshots, unless something else is said.
    pub const MAX_COUNT: u64 = 10_000;
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            max_count: Some(Self::MAX_COUNT),
            max_own_bytes: None,
            default_ttl: None,
        }
    }
}

/// What snapshots take, all of them together. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotUsage {
    /// Snapshots of users.
    pub count: u64,
    /// What deleting each of them would free, added up.
    pub own_bytes: u64,
    /// What they hold, holes included.
    pub logical_bytes: u64,
    /// Most snapshots, if there is a bound.
    pub max_count: Option<u64>,
    /// Most of [`Self::own_bytes`], if there is a bound.
    pub max_own_bytes: Option<u64>,
}

/// The snapshots of this server. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    shared: Arc<Shared>,
}

struct Shared {
    config: SnapshotConfig,
    store: Store,
    sandboxes: Arc<sandbox::Inner>,
    templates: Templates,
    trash: Trash,
    deadlines: Deadlines<SnapshotId>,
    /// What all snapshots took of the store, and when that was.
    own_bytes: Mutex<Option<(Instant, u64)>>,
}

impl Snapshots {
    /// Follows the snapshots that have an end, from what the reconciliation of sandboxes has left.
    pub(crate) async fn open(
        config: SnapshotConfig,
        store: Store,
        sandboxes: &Sandboxes,
        templates: Templates,
    ) -> Result<Self> {
        let inner = Arc::clone(&sandboxes.inner);
        let this = Self {
            shared: Arc::new(Shared {
                config,
                store,
                trash: inner.trash.clone(),
                sandboxes: inner,
                templates,
                deadlines: Deadlines::default(),
                own_bytes: Mutex::default(),
            }),
        };
        for snapshot in this.shared.store.list(&Filter::default()).await? {
            if visible(snapshot.state) {
                this.shared
                    .deadlines
                    .set(&snapshot.id, || snapshot.expires_at);
            }
        }
        let (shared, inner) = (Arc::clone(&this.shared), &this.shared.sandboxes);
        let stopping = inner.stopping.clone();
        inner.tasks.spawn(async move {
            stopping
                .run_until_cancelled(delete::delete_expired(shared))
                .await;
        });
        Ok(this)
    }

    /// A page of snapshots, newest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a limit outside 1 to [`MAX_PAGE`], or a name that cannot be one.
    pub async fn list(&self, query: &SnapshotQuery) -> Result<SnapshotPage> {
        let limit = query.limit.unwrap_or(MAX_PAGE);
        if !(1..=MAX_PAGE).contains(&limit) {
            let why = format!("{limit} is not between 1 and {MAX_PAGE}");
            return Err(Error::invalid("limit", why));
        }
        let name = match query.name.as_deref().map(str::parse::<Reference>) {
            Some(Err(_)) => {
                // What cannot be a name is nobody's name.
                return Ok(SnapshotPage {
                    items: Vec::new(),
                    next: None,
                });
            }
            Some(Ok(name)) => Some(name),
            None => None,
        };
        let states: &[SnapshotState] = if query.states.is_empty() {
            &[SnapshotState::Ready]
        } else {
            &query.states
        };
        let filter = Filter {
            sandbox: query.sandbox.as_ref(),
            name: name.as_ref(),
            states,
            after: query.cursor.as_ref(),
            limit: Some(limit + 1),
        };
        let mut items = self.shared.store.list(&filter).await?;
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().filter(|_| more).map(SnapshotCursor::of);
        self.shared.measure(&mut items).await;
        Ok(SnapshotPage { items, next })
    }

    /// The snapshot that an id, a name or `name:tag` stands for.
    pub async fn get(&self, reference: &str) -> Result<Snapshot> {
        let mut found = [self.shared.find(reference).await?];
        self.shared.measure(&mut found).await;
        let [snapshot] = found;
        Ok(snapshot)
    }

    /// How snapshots descend from each other, all of them or those of one sandbox with what they
    /// descend from. One tree for each that descends from nothing, the oldest first.
    pub async fn tree(&self, sandbox: Option<&SandboxId>) -> Result<Vec<TreeNode>> {
        let mut rows = self.shared.store.list(&Filter::default()).await?;
        self.shared.measure(&mut rows).await;
        let family = tree::Family::new(rows, sandbox);
        let roots = self.shared.store.templates_of(&family.unknown()).await?;
        Ok(family.trees(roots))
    }

    /// Reads a snapshot's files and compares them with their checksums. One that is damaged is
    /// marked as failed.
    ///
    /// # Errors
    /// [`Error::SnapshotUnusable`] if it is damaged.
    pub async fn verify(&self, reference: &str) -> Result<Snapshot> {
        let shared = &self.shared;
        let snapshot = shared.find(reference).await?;
        let id = &snapshot.id;
        if snapshot.state == SnapshotState::Publishing {
            return Err(Error::SnapshotUnusable {
                reference: id.to_string(),
                why: "it is still being taken".to_owned(),
            });
        }
        let why = match shared.sandboxes.fleet.verify_snapshot(id).await {
            Ok(()) => {
                let (from, to) = ([SnapshotState::Failed], SnapshotState::Ready);
                shared.store.change(id, &from, to, None).await?;
                return self.get(id.as_str()).await;
            }
            Err(FleetError::Damaged { reason, .. }) => reason,
            Err(FleetError::NoSnapshot { .. }) => MISSING.to_owned(),
            Err(error) => return Err(error.into()),
        };
        tracing::error!(snapshot = %id, why, "a snapshot is damaged");
        let (from, to) = ([SnapshotState::Ready], SnapshotState::Failed);
        shared.store.change(id, &from, to, Some(&why)).await?;
        Err(Error::SnapshotUnusable {
            reference: id.to_string(),
            why,
        })
    }

    /// What all snapshots take.
    pub async fn usage(&self) -> Result<SnapshotUsage> {
        let filter = Filter {
            states: &[
                SnapshotState::Publishing,
                SnapshotState::Ready,
                SnapshotState::Failed,
            ],
            ..Filter::default()
        };
        let mut rows = self.shared.store.list(&filter).await?;
        self.shared.measure(&mut rows).await;
        let stored = rows.iter().filter_map(|row| row.stored);
        let (own_bytes, logical_bytes) = stored.fold((0, 0), |(own, logical), stored| {
            (own + stored.own_bytes, logical + stored.logical_bytes)
        });
        Ok(SnapshotUsage {
            count: rows.len() as u64,
            own_bytes,
            logical_bytes,
            max_count: self.shared.config.max_count,
            max_own_bytes: self.shared.config.max_own_bytes,
        })
    }
}

impl Shared {
    /// The snapshot that a reference stands for.
    async fn find(&self, reference: &str) -> Result<Snapshot> {
        let not_found = || Error::SnapshotNotFound {
            reference: shorten(reference),
        };
        let parsed: Reference = reference.parse().map_err(|_| not_found())?;
        self.store.find(&parsed).await?.ok_or_else(not_found)
    }

    /// Adds what the store says of snapshots.
    async fn measure(&self, snapshots: &mut [Snapshot]) {
        if snapshots.is_empty() {
            return;
        }
        let facts = match self.sandboxes.fleet.snapshots().await {
            Ok(facts) => facts,
            Err(error) => {
                tracing::warn!(%error, "the store does not say how large snapshots are");
                return;
            }
        };
        let facts: HashMap<_, _> = facts.iter().map(|fact| (&fact.id, fact)).collect();
        for snapshot in snapshots {
            snapshot.stored = facts.get(&snapshot.id).map(|fact| Stored::from(*fact));
        }
    }
}

/// Whether clients can see a snapshot in this state.
const fn visible(state: SnapshotState) -> bool {
    matches!(
        state,
        SnapshotState::Publishing | SnapshotState::Ready | SnapshotState::Failed
    )
}
