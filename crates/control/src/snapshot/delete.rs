//! How a snapshot ends: deleted by a client, or because its time is up.

use std::{sync::Arc, time::Duration};

use super::{Filter, Shared, Snapshot, SnapshotState, Snapshots};
use crate::{
    db::now,
    error::{Error, Result},
    template::{DEFAULT_TAG, Reference, shorten},
};

/// Pause before another attempt to delete a snapshot whose time is up.
const RETRY_AFTER: Duration = Duration::from_secs(10);

impl Snapshots {
    /// Deletes a snapshot by its id, or all that have a name (and, if it is given, a tag). What was
    /// made from them runs on, what descends from them stays, and the order does not matter.
    ///
    /// # Errors
    /// [`Error::SnapshotNotFound`]; [`Error::SnapshotInUse`] if a paused sandbox consists of it;
    /// [`Error::SnapshotUnusable`] while it is being taken.
    pub async fn delete(&self, reference: &str) -> Result<()> {
        let not_found = || Error::SnapshotNotFound {
            reference: shorten(reference),
        };
        let shared = &self.shared;
        let parsed: Reference = reference.parse().map_err(|_| not_found())?;
        let doomed = shared.doomed(&parsed).await?;
        if doomed.is_empty() {
            if let Some(sandbox) = shared.store.paused_as(&parsed.name).await?
                && let Ok(id) = parsed.name.parse()
            {
                return Err(Error::SnapshotInUse { id, sandbox });
            }
            return Err(not_found());
        }
        let mut deleted = false;
        let mut being_taken = false;
        for snapshot in doomed {
            being_taken |= snapshot.state == SnapshotState::Publishing;
            deleted |= shared.delete(&snapshot).await?;
        }
        if deleted {
            return Ok(());
        }
        if being_taken {
            return Err(Error::SnapshotUnusable {
                reference: shorten(reference),
                why: "it is still being taken".to_owned(),
            });
        }
        Err(not_found())
    }
}

impl Shared {
    /// The snapshots that a request to delete means.
    async fn doomed(&self, reference: &Reference) -> Result<Vec<Snapshot>> {
        let by_id = self.store.get(&reference.name).await?;
        let by_id = by_id.filter(|snapshot| {
            let tag = reference.tag();
            super::visible(snapshot.state) && (tag == DEFAULT_TAG || tag == snapshot.tag)
        });
        if let Some(snapshot) = by_id {
            return Ok(vec![snapshot]);
        }
        self.store
            .list(&Filter {
                name: Some(reference),
                states: &[
                    SnapshotState::Publishing,
                    SnapshotState::Ready,
                    SnapshotState::Failed,
                ],
                ..Filter::default()
            })
            .await
    }

    /// Deletes a snapshot: from then on nobody sees it, and its files go as soon as that is
    /// possible. False: it is being taken, or somebody else deletes it.
    async fn delete(&self, snapshot: &Snapshot) -> Result<bool> {
        let id = &snapshot.id;
        let from = [SnapshotState::Ready, SnapshotState::Failed];
        let to = SnapshotState::Deleting;
        if !self.store.change(id, &from, to, None).await? {
            return Ok(false);
        }
        self.deadlines.set(id, || None);
        match self.sandboxes.fleet.delete_snapshot(id).await {
            Ok(_) => self.store.bury(id).await?,
            Err(error) => {
                tracing::warn!(snapshot = %id, %error, "it is deleted in the background");
                let (trash, store, id) = (self.trash.clone(), self.store.clone(), id.clone());
                self.sandboxes.tasks.spawn(async move {
                    // If the server stops first, the next start goes on from the row.
                    if trash.delete(&id).await
                        && let Err(error) = store.bury(&id).await
                    {
                        tracing::error!(snapshot = %id, %error, "its end is not on record");
                    }
                });
            }
        }
        tracing::info!(snapshot = %id, "deleted");
        Ok(true)
    }
}

/// Deletes snapshots when their time is up, for ever.
pub(super) async fn delete_expired(shared: Arc<Shared>) {
    loop {
        for id in shared.deadlines.due().await {
            let deleted = match shared.store.get(id.as_str()).await {
                Ok(Some(snapshot)) => shared.delete(&snapshot).await.map(drop),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = deleted {
                tracing::error!(snapshot = %id, %error, "its time is up, but it cannot be deleted");
                shared.deadlines.set(&id, || Some(now() + RETRY_AFTER));
            }
        }
    }
}
