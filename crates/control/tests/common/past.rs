//! What tests of snapshots share.

use cubicle_control::{
    Error,
    fleet::FreezeKind,
    snapshot::{SnapshotQuery, Snapshots},
};
use cubicle_ids::SnapshotId;

use super::Plane;

pub async fn ids(snapshots: &Snapshots, query: SnapshotQuery) -> Vec<SnapshotId> {
    let page = snapshots.list(&query).await.expect("list");
    page.items.into_iter().map(|snapshot| snapshot.id).collect()
}

pub fn named(name: &str) -> SnapshotQuery {
    SnapshotQuery {
        name: Some(name.to_owned()),
        ..SnapshotQuery::default()
    }
}

pub fn is_missing<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(
        matches!(result, Err(Error::SnapshotNotFound { .. })),
        "{result:?}"
    );
}

pub fn is_unusable<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(
        matches!(result, Err(Error::SnapshotUnusable { .. })),
        "{result:?}"
    );
}

pub fn of_users(plane: &Plane) -> Vec<SnapshotId> {
    plane.of_kind(FreezeKind::User)
}
