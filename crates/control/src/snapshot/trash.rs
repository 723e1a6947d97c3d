//! Snapshots that nobody needs any more, until the store has deleted them.

use std::time::Duration;

use cubicle_ids::SnapshotId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::fleet::{FleetError, SharedFleet};

/// First and longest pause between two attempts to delete a snapshot.
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

/// Deletes snapshots in the background, however often it takes to ask. What is left when the
/// server stops is deleted by the next start, because nothing owns it.
#[derive(Clone)]
pub(crate) struct Trash {
    fleet: SharedFleet,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

impl Trash {
    pub(crate) fn new(fleet: SharedFleet, tasks: TaskTracker, stopping: CancellationToken) -> Self {
        Self {
            fleet,
            tasks,
            stopping,
        }
    }

    /// Deletes a snapshot, whenever that is possible. One that does not exist is fine.
    pub(crate) fn discard(&self, snapshot: SnapshotId) {
        let this = self.clone();
        self.tasks.spawn(async move {
            this.delete(&snapshot).await;
        });
    }

    /// Returns when the snapshot is gone. False: the server stops first.
    pub(crate) async fn delete(&self, snapshot: &SnapshotId) -> bool {
        let mut pause = RETRY_AFTER;
        loop {
            match self.fleet.delete_snapshot(snapshot).await {
                Ok(_) => return true,
                Err(FleetError::Unsupported { .. }) => return false,
                Err(error) => {
                    tracing::error!(%snapshot, %error, "cannot delete it, trying again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stopping.cancelled() => return false,
            }
            pause = (pause * 2).min(RETRY_AFTER_MAX);
        }
    }
}
