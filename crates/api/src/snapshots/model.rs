//! Snapshots as clients of others see them.

use std::time::Duration;

use cubicle_control::snapshot::{CreateSnapshot, Snapshot, SnapshotCreation, SnapshotState};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{
    error::{ApiError, ApiResult},
    sandboxes::reference,
    timing::millis,
};

/// Longest life of a snapshot that can be asked for, in seconds: a year, as for a sandbox.
const MAX_TTL: u64 = cubicle_control::sandbox::MAX_LIFETIME.as_secs();

/// A snapshot to take.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
#[schema(as = NewSnapshot)]
pub(crate) struct SnapshotBody {
    /// `name` or `name:tag`. A name that exists stands for the new snapshot from then on.
    name: Option<String>,
    /// Whether to keep the memory. `false`: the disk only, and sandboxes made from it boot.
    memory: Option<bool>,
    /// Whether to refuse if the guest daemon does not answer.
    require_healthy_guest: Option<bool>,
    /// Seconds until it deletes itself; what the server is set to if left out.
    ttl: Option<i64>,
}

impl SnapshotBody {
    pub(crate) fn request(self) -> ApiResult<CreateSnapshot> {
        let ttl = self.ttl.map(|seconds| match u64::try_from(seconds) {
            Ok(seconds @ 1..=MAX_TTL) => Ok(Duration::from_secs(seconds)),
            _ => {
                let why = format!("{seconds} is no number of seconds between 1 and {MAX_TTL}");
                Err(ApiError::field("ttl", why))
            }
        });
        let memory = self.memory.unwrap_or(true);
        Ok(CreateSnapshot {
            name: self.name.map(|name| reference("name", name)).transpose()?,
            memory,
            require_healthy: self.require_healthy_guest.unwrap_or(false) || !memory,
            ttl: ttl.transpose()?,
        })
    }
}

/// A name to look for.
pub(crate) fn name_of(text: Option<&str>) -> ApiResult<Option<String>> {
    text.map(|name| reference("name", name.to_owned()))
        .transpose()
}

/// A snapshot that was taken.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotInfo {
    /// What to call it: accepted wherever a template's id is.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// Its names for people.
    names: Vec<String>,
    /// How its memory was found: `full`, `anonymous_pages`, `soft_dirty`, or `none` if it has none.
    tier: &'static str,
    /// Memory that was looked at, in bytes.
    bytes_scanned: u64,
    /// Memory that had changed, in bytes.
    bytes_dirty: u64,
    /// What was written to the store, in bytes.
    bytes_written: u64,
    /// How long the sandbox stood still, in milliseconds.
    frozen_ms: f64,
}

impl From<&SnapshotCreation> for SnapshotInfo {
    fn from(creation: &SnapshotCreation) -> Self {
        let taken = &creation.taken;
        Self {
            snapshot_id: creation.snapshot.reference(),
            names: creation.snapshot.names(),
            tier: taken.tier,
            bytes_scanned: taken.bytes_scanned,
            bytes_dirty: taken.bytes_dirty,
            bytes_written: taken.bytes_written,
            frozen_ms: millis(taken.frozen),
        }
    }
}

/// A snapshot in a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListedSnapshot {
    /// What to call it: accepted wherever a template's id is.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// Its names for people.
    names: Vec<String>,
    /// In Cube's words: `CREATING`, `READY`, `FAILED` or `DELETING`.
    status: &'static str,
    /// The sandbox it was taken of.
    #[serde(rename = "originSandboxID")]
    origin_sandbox_id: String,
    /// When it was asked for.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When its status last changed.
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
}

impl From<&Snapshot> for ListedSnapshot {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            snapshot_id: snapshot.reference(),
            names: snapshot.names(),
            status: in_cubes_words(snapshot.state),
            origin_sandbox_id: snapshot.sandbox.to_string(),
            created_at: snapshot.created_at,
            updated_at: snapshot.updated_at,
        }
    }
}

const fn in_cubes_words(state: SnapshotState) -> &'static str {
    match state {
        SnapshotState::Publishing => "CREATING",
        SnapshotState::Ready => "READY",
        SnapshotState::Failed => "FAILED",
        SnapshotState::Deleting | SnapshotState::Deleted => "DELETING",
    }
}
