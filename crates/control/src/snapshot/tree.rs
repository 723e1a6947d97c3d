//! How snapshots descend from each other.
//!
//! A line of descent may be thousands of snapshots long (an agent that takes one at each step), so
//! nothing here recurses.

use std::collections::{HashMap, HashSet};

use cubicle_ids::{SandboxId, SnapshotId, TemplateId};
use time::OffsetDateTime;

use super::{Snapshot, SnapshotState};

/// A snapshot and what descends from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeNode {
    /// The snapshot.
    pub id: SnapshotId,
    /// What it is now.
    pub what: TreeWhat,
    /// What descends from it directly, oldest first.
    pub children: Vec<TreeNode>,
}

impl Drop for TreeNode {
    /// One after the other: the drop of a long line of descent must not need a deep stack.
    fn drop(&mut self) {
        let mut waiting = std::mem::take(&mut self.children);
        while let Some(mut node) = waiting.pop() {
            waiting.append(&mut node.children);
        }
    }
}

/// What a place in the tree of snapshots is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreeWhat {
    /// The snapshot of a template.
    Template {
        /// The template.
        id: TemplateId,
        /// Its name.
        alias: Option<String>,
    },
    /// A snapshot.
    Snapshot(Box<Snapshot>),
    /// A snapshot that was deleted.
    Deleted {
        /// When it had been asked for, if that is still known.
        created_at: Option<OffsetDateTime>,
    },
}

/// Snapshots, and those that they descend from.
pub(super) struct Family {
    rows: HashMap<SnapshotId, Snapshot>,
    /// Everyone, in no order.
    members: Vec<SnapshotId>,
}

impl Family {
    /// Of these rows, those of one sandbox with what they descend from, or all.
    pub(super) fn new(rows: Vec<Snapshot>, sandbox: Option<&SandboxId>) -> Self {
        let mut waiting: Vec<SnapshotId> = rows
            .iter()
            .filter(|row| sandbox.is_none_or(|sandbox| row.sandbox == *sandbox))
            .filter(|row| super::visible(row.state))
            .map(|row| row.id.clone())
            .collect();
        let rows: HashMap<_, _> = rows.into_iter().map(|row| (row.id.clone(), row)).collect();
        let mut known = HashSet::new();
        let mut members = Vec::new();
        while let Some(id) = waiting.pop() {
            if !known.insert(id.clone()) {
                continue;
            }
            waiting.extend(rows.get(&id).and_then(|row| row.parent.clone()));
            members.push(id);
        }
        Self { rows, members }
    }

    /// Those of which there is no row.
    pub(super) fn unknown(&self) -> Vec<SnapshotId> {
        let unknown = self.members.iter();
        unknown
            .filter(|id| !self.rows.contains_key(*id))
            .cloned()
            .collect()
    }

    /// The trees, the oldest of siblings first. `templates` says which of the unknown ones belong
    /// to templates.
    pub(super) fn trees(
        mut self,
        templates: Vec<(SnapshotId, TemplateId, Option<String>)>,
    ) -> Vec<TreeNode> {
        let mut templates: HashMap<_, _> = templates
            .into_iter()
            .map(|(snapshot, id, alias)| (snapshot, (id, alias)))
            .collect();
        let age = |id: &SnapshotId| self.rows.get(id).map(|row| (row.created_at, id.clone()));
        // Newest first, because the last one is taken first.
        self.members.sort_by_cached_key(age);
        self.members.reverse();
        let mut children: HashMap<SnapshotId, Vec<SnapshotId>> = HashMap::new();
        let mut waiting = Vec::new();
        for id in self.members {
            match self.rows.get(&id).and_then(|row| row.parent.clone()) {
                Some(parent) => children.entry(parent).or_default().push(id),
                None => waiting.push((id, 0)),
            }
        }
        let mut in_order = Vec::new();
        while let Some((id, depth)) = waiting.pop() {
            let below = children.remove(&id).unwrap_or_default();
            let what = match (self.rows.remove(&id), templates.remove(&id)) {
                (Some(row), _) if super::visible(row.state) => TreeWhat::Snapshot(Box::new(row)),
                (Some(row), _) => TreeWhat::Deleted {
                    created_at: Some(row.created_at),
                },
                (None, Some((id, alias))) => TreeWhat::Template { id, alias },
                (None, None) => TreeWhat::Deleted { created_at: None },
            };
            in_order.push((depth, id, what));
            waiting.extend(below.into_iter().map(|child| (child, depth + 1)));
        }
        // Backwards, all that descends from a snapshot is complete when its turn comes.
        let mut trees: Vec<(usize, TreeNode)> = Vec::new();
        while let Some((depth, id, what)) = in_order.pop() {
            let mut children = Vec::new();
            while let Some((_, child)) = trees.pop_if(|(below, _)| *below == depth + 1) {
                children.push(child);
            }
            trees.push((depth, TreeNode { id, what, children }));
        }
        trees.into_iter().rev().map(|(_, tree)| tree).collect()
    }
}

impl Snapshot {
    /// Whether sandboxes can be made from it.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.state == SnapshotState::Ready
    }
}
