//! Snapshots with every number that there is.

use std::time::Duration;

use cubicle_control::{
    fleet::{self, SnapshotTaken},
    sandbox::PauseMode,
    snapshot::{Snapshot, TreeNode, TreeWhat},
};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{sandboxes::ForkResult, timing::millis};

/// One step of an operation.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Phase)]
pub(super) struct PhaseBody {
    /// A word.
    name: &'static str,
    /// How long it took, in milliseconds.
    ms: f64,
}

pub(super) fn phases(phases: &[fleet::Phase]) -> Vec<PhaseBody> {
    let body = |phase: &fleet::Phase| PhaseBody {
        name: phase.name,
        ms: millis(phase.took),
    };
    phases.iter().map(body).collect()
}

/// What freezing a sandbox came to. Sizes in bytes, times in milliseconds.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Taken {
    /// The snapshot.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// Its names for people.
    names: Vec<String>,
    /// The snapshot that its memory was written on top of.
    parent: Option<String>,
    /// How its memory was found: `full`, `anonymous_pages`, `soft_dirty`, or `none` if it has none.
    tier: &'static str,
    /// Memory that was looked at.
    bytes_scanned: u64,
    /// Memory that had changed.
    bytes_dirty: u64,
    /// What was written to the store.
    bytes_written: u64,
    /// How long the sandbox stood still.
    frozen_ms: f64,
    /// How long the call took inside the server.
    total_ms: f64,
    /// Each step, in order.
    phases: Vec<PhaseBody>,
}

impl Taken {
    pub(super) fn new(taken: &SnapshotTaken, names: Vec<String>, total: Duration) -> Self {
        Self {
            snapshot_id: taken.snapshot.to_string(),
            names,
            parent: taken.parent.as_ref().map(ToString::to_string),
            tier: taken.tier,
            bytes_scanned: taken.bytes_scanned,
            bytes_dirty: taken.bytes_dirty,
            bytes_written: taken.bytes_written,
            frozen_ms: millis(taken.frozen),
            total_ms: millis(total),
            phases: phases(&taken.phases),
        }
    }
}

/// The copies of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Forked {
    /// How the sandbox was frozen. The snapshot is gone by now.
    pub(super) snapshot: Taken,
    /// As many as were asked for, each for itself.
    pub(super) sandboxes: Vec<ForkResult>,
    /// How long the call took inside the server, in milliseconds.
    pub(super) total_ms: f64,
}

/// A sandbox in another life.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RolledBack {
    /// The sandbox.
    #[serde(rename = "sandboxID")]
    pub(super) sandbox_id: String,
    /// What it went back to.
    #[serde(rename = "snapshotID")]
    pub(super) snapshot_id: String,
    /// The life it is in: counts restores under its id.
    pub(super) generation: u64,
    /// How long the call took inside the server, in milliseconds.
    pub(super) total_ms: f64,
    /// Each step, in order.
    pub(super) phases: Vec<PhaseBody>,
}

/// A snapshot. Sizes in bytes, times in milliseconds; what is not known is null.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Snapshot)]
pub(super) struct SnapshotBody {
    /// The snapshot.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// Its names for people.
    names: Vec<String>,
    /// `publishing`, `ready`, `failed` or `deleting`.
    state: &'static str,
    /// Why it failed, if it did.
    reason: Option<String>,
    /// The sandbox it was taken of.
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// The template which that sandbox was made from.
    #[serde(rename = "templateID")]
    template_id: String,
    /// What stands for it where a client wants a build.
    #[serde(rename = "buildID")]
    build_id: Uuid,
    /// The snapshot that it descends from directly; it may have been deleted since.
    parent: Option<String>,
    /// Whether it holds memory. If not, sandboxes made from it boot.
    memory: bool,
    /// When it was asked for.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When its state last changed.
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
    /// When it deletes itself.
    #[serde(with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
    /// How its memory was found: `full`, `anonymous_pages`, `soft_dirty`, or `none`.
    tier: Option<String>,
    /// Memory that was looked at.
    bytes_scanned: Option<u64>,
    /// Memory that had changed.
    bytes_dirty: Option<u64>,
    /// What was written to the store.
    bytes_written: Option<u64>,
    /// How long the sandbox stood still.
    frozen_ms: Option<f64>,
    /// What its files say they hold: memory and disk, holes included.
    logical_bytes: Option<u64>,
    /// What deleting it would free.
    own_bytes: Option<u64>,
    /// Whether it survives a power failure.
    durable: Option<bool>,
    /// CPUs of its sandboxes.
    cpu_count: u32,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    /// Version of the guest daemon in it.
    envd_version: String,
}

impl From<&Snapshot> for SnapshotBody {
    fn from(snapshot: &Snapshot) -> Self {
        let report = snapshot.report.as_ref();
        let stored = snapshot.stored.as_ref();
        Self {
            snapshot_id: snapshot.id.to_string(),
            names: snapshot.names(),
            state: snapshot.state.as_str(),
            reason: snapshot.reason.clone(),
            sandbox_id: snapshot.sandbox.to_string(),
            template_id: snapshot.template.to_string(),
            build_id: snapshot.build,
            parent: snapshot.parent.as_ref().map(ToString::to_string),
            memory: snapshot.mode == PauseMode::Full,
            created_at: snapshot.created_at,
            updated_at: snapshot.updated_at,
            expires_at: snapshot.expires_at,
            tier: report.map(|report| report.tier.clone()),
            bytes_scanned: report.map(|report| report.bytes_scanned),
            bytes_dirty: report.map(|report| report.bytes_dirty),
            bytes_written: report.map(|report| report.bytes_written),
            frozen_ms: report.map(|report| millis(report.frozen)),
            logical_bytes: stored.map(|stored| stored.logical_bytes),
            own_bytes: stored.map(|stored| stored.own_bytes),
            durable: stored.map(|stored| stored.durable),
            cpu_count: snapshot.cpu_count,
            memory_mb: snapshot.memory_mib,
            disk_size_mb: snapshot.disk_mib,
            envd_version: snapshot.envd_version.clone(),
        }
    }
}

/// A snapshot and what descends from it directly.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SnapshotDetail {
    #[serde(flatten)]
    pub(super) snapshot: SnapshotBody,
    /// The snapshots that descend from it directly, oldest first.
    pub(super) children: Vec<String>,
}

/// A place in the tree of snapshots. Parents come before their children.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct TreePlace {
    /// How far below its root it is.
    depth: usize,
    /// The snapshot that is there, or was.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// `template`, `snapshot` or `deleted`.
    kind: &'static str,
    /// The template, if that is what it is.
    #[serde(rename = "templateID", skip_serializing_if = "Option::is_none")]
    template_id: Option<String>,
    /// The template's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    /// What is there, if that is a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotBody>,
}

impl TreePlace {
    /// The places of these trees, one after the other. A tree is as deep as somebody takes
    /// snapshots, so this is no recursion.
    pub(super) fn flat(roots: &[TreeNode]) -> Vec<Self> {
        let mut places = Vec::new();
        let mut rest: Vec<(usize, &TreeNode)> = roots.iter().rev().map(|root| (0, root)).collect();
        while let Some((depth, node)) = rest.pop() {
            places.push(Self::new(depth, node));
            rest.extend(node.children.iter().rev().map(|child| (depth + 1, child)));
        }
        places
    }

    fn new(depth: usize, node: &TreeNode) -> Self {
        let mut place = Self {
            depth,
            snapshot_id: node.id.to_string(),
            kind: "deleted",
            template_id: None,
            alias: None,
            snapshot: None,
        };
        match &node.what {
            TreeWhat::Template { id, alias } => {
                place.kind = "template";
                place.template_id = Some(id.to_string());
                place.alias.clone_from(alias);
            }
            TreeWhat::Snapshot(snapshot) => {
                place.kind = "snapshot";
                place.snapshot = Some((&**snapshot).into());
            }
            TreeWhat::Deleted { .. } => {}
        }
        place
    }
}

/// What all snapshots take. Sizes in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SnapshotUsage {
    /// How many there are.
    pub(super) count: u64,
    /// What deleting each of them would free, added up.
    pub(super) own_bytes: u64,
    /// What they hold, holes included.
    pub(super) logical_bytes: u64,
    /// Most snapshots; null: any number.
    pub(super) max_count: Option<u64>,
    /// Most of `ownBytes`; null: what fits.
    pub(super) max_own_bytes: Option<u64>,
}

/// Whether a snapshot is what was written.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Verified {
    /// The snapshot.
    #[serde(rename = "snapshotID")]
    pub(super) snapshot_id: String,
    /// Whether it is.
    pub(super) ok: bool,
    /// What is wrong with it.
    pub(super) reason: Option<String>,
    /// How long that took to find out, in milliseconds.
    pub(super) took_ms: f64,
}

#[cfg(test)]
mod tests {
    use cubicle_ids::SnapshotId;

    use super::*;

    fn node(children: Vec<TreeNode>) -> TreeNode {
        TreeNode {
            id: SnapshotId::generate(),
            what: TreeWhat::Deleted { created_at: None },
            children,
        }
    }

    #[test]
    fn a_tree_is_listed_parents_first() {
        let grandchild = node(vec![]);
        let child = node(vec![grandchild.clone()]);
        let sibling = node(vec![]);
        let root = node(vec![child.clone(), sibling.clone()]);
        let other = node(vec![]);
        let wanted = [
            (0, &root),
            (1, &child),
            (2, &grandchild),
            (1, &sibling),
            (0, &other),
        ];
        let wanted: Vec<_> = wanted
            .map(|(depth, node)| (depth, node.id.to_string()))
            .into();
        let flat = TreePlace::flat(&[root.clone(), other.clone()]);
        let got: Vec<_> = flat.into_iter().map(|p| (p.depth, p.snapshot_id)).collect();
        assert_eq!(got, wanted);
        assert!(TreePlace::flat(&[]).is_empty());
    }
}
