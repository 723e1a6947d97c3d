//! Which snapshots to list, and where the last page ended.

use std::str::FromStr;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use cubicle_ids::{SandboxId, SnapshotId};

use super::{Snapshot, SnapshotState};
use crate::{db::to_micros, sandbox::BadCursor};

/// A page of snapshots to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct SnapshotQuery {
    /// Taken of this sandbox, which need not exist any more.
    pub sandbox: Option<SandboxId>,
    /// Of this name, or `name:tag`.
    pub name: Option<String>,
    /// In one of these states; empty: those that can be used.
    pub states: Vec<SnapshotState>,
    /// Where the last page ended.
    pub cursor: Option<SnapshotCursor>,
    /// Most snapshots on the page, 1 to [`MAX_PAGE`](crate::sandbox::MAX_PAGE), which is also meant by `None`.
    pub limit: Option<usize>,
}

/// A page of snapshots.
#[derive(Debug, Clone)]
pub struct SnapshotPage {
    /// Those on it.
    pub items: Vec<Snapshot>,
    /// Where the next one begins, if there is one.
    pub next: Option<SnapshotCursor>,
}

/// The last snapshot of a page. Opaque to clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotCursor {
    pub(super) created_at: i64,
    pub(super) id: SnapshotId,
}

impl SnapshotCursor {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        Self {
            created_at: to_micros(snapshot.created_at),
            id: snapshot.id.clone(),
        }
    }
}

impl std::fmt::Display for SnapshotCursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(format!("{}.{}", self.created_at, self.id)))
    }
}

impl FromStr for SnapshotCursor {
    type Err = BadCursor;

    fn from_str(token: &str) -> Result<Self, Self::Err> {
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| BadCursor)?;
        let text = String::from_utf8(bytes).map_err(|_| BadCursor)?;
        let (created_at, id) = text.split_once('.').ok_or(BadCursor)?;
        let cursor = Self {
            created_at: created_at.parse().map_err(|_| BadCursor)?,
            id: id.parse().map_err(|_| BadCursor)?,
        };
        // `+5` and `5` are one number; a token has one spelling.
        if cursor.to_string() == token {
            Ok(cursor)
        } else {
            Err(BadCursor)
        }
    }
}
