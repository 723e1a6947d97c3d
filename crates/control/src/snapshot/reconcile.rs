//! What a restart finds: rows without snapshots, and snapshots without rows.

use std::collections::{HashMap, HashSet};

use cubicle_ids::SnapshotId;

use super::{Filter, Snapshot, SnapshotState, Store, Trash};
use crate::{
    error::Result,
    fleet::{SnapshotFact, SnapshotKind},
};

/// Why a snapshot failed whose files are not there. It is forgiven when they are.
pub(crate) const MISSING: &str = "its files are missing";

/// What was done about snapshots at a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// Snapshots that had been taken, but for the last line on record. Their sandboxes descend from
    /// them.
    pub(crate) finished: Vec<Snapshot>,
    /// Snapshots that nobody owns, deleted.
    pub(crate) dropped: usize,
    /// Snapshots that cannot be used any more.
    pub(crate) failed: usize,
}

/// Makes rows and store agree. `paused` are the snapshots that sandboxes consist of.
pub(crate) async fn reconcile(
    store: &Store,
    trash: &Trash,
    mut facts: HashMap<SnapshotId, SnapshotFact>,
    paused: &HashSet<SnapshotId>,
) -> Result<Swept> {
    use SnapshotState as S;
    let mut swept = Swept::default();
    let mut delete = Vec::new();
    for row in store.list(&Filter::default()).await? {
        let id = &row.id;
        let fact = facts.remove(id);
        let failure = match &fact {
            Some(fact) => fact.failure.as_deref(),
            None => Some(MISSING),
        };
        match (row.state, failure) {
            // Nobody was told of it: it either has happened or it has not.
            (S::Publishing, None) => {
                store.change(id, &[S::Publishing], S::Ready, None).await?;
                swept.finished.push(row);
            }
            (S::Publishing, Some(_)) => {
                store.remove(id).await?;
                delete.extend(fact.map(|fact| fact.id));
            }
            (S::Ready, Some(reason)) => {
                tracing::error!(snapshot = %id, reason, "a snapshot cannot be used any more");
                swept.failed += 1;
                let from = [S::Ready];
                store.change(id, &from, S::Failed, Some(reason)).await?;
            }
            (S::Failed, None) if row.reason.as_deref() == Some(MISSING) => {
                store.change(id, &[S::Failed], S::Ready, None).await?;
            }
            (S::Deleting | S::Deleted, _) => {
                if row.state == S::Deleting {
                    store.bury(id).await?;
                }
                delete.extend(fact.map(|fact| fact.id));
            }
            (S::Ready, None) | (S::Failed, _) => {}
        }
    }
    let strays = facts
        .into_values()
        .filter(|fact| matches!(fact.kind, SnapshotKind::Frozen(_)) && !paused.contains(&fact.id));
    delete.extend(strays.map(|fact| fact.id));
    for snapshot in delete {
        tracing::warn!(%snapshot, "a snapshot that nobody wants is deleted");
        swept.dropped += 1;
        trash.discard(snapshot);
    }
    store.prune().await?;
    Ok(swept)
}
