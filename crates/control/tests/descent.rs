//! Which snapshot descends from which.

#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

mod common;

use common::{Plane, past::of_users, request};
use cubicle_control::snapshot::{SnapshotQuery, TreeNode, TreeWhat};
use cubicle_ids::SandboxId;

fn outline(trees: &[TreeNode], depth: usize, lines: &mut Vec<String>) {
    for node in trees {
        let what = match &node.what {
            TreeWhat::Template { alias, .. } => alias.clone().unwrap_or_default(),
            TreeWhat::Snapshot(snapshot) => snapshot.name.clone().unwrap_or_default(),
            TreeWhat::Deleted { .. } => "deleted".to_owned(),
        };
        lines.push(format!("{}{what}", " ".repeat(depth)));
        outline(&node.children, depth + 1, lines);
    }
}

#[tokio::test]
async fn the_tree_says_what_descends_from_what_also_when_that_is_gone() {
    let plane = Plane::new().await;
    let (sandboxes, snapshots) = (&plane.control.sandboxes, &plane.control.snapshots);
    let sandbox = plane.sandbox().await;
    let id = &sandbox.id;
    let other = plane.sandbox().await;
    let trunk = plane.snapshot(id, Some("trunk")).await;
    let left = plane.snapshot(id, Some("left")).await;
    plane.snapshot(id, Some("leaf")).await;
    sandboxes.rollback(id, "trunk").await.expect("back");
    plane.snapshot(id, Some("right")).await;
    let child = plane.create(request("left")).await;
    plane.snapshot(&child.id, Some("childs")).await;
    plane.snapshot(&other.id, Some("apart")).await;
    let tree = async |of: Option<&SandboxId>| {
        let mut lines = Vec::new();
        outline(&snapshots.tree(of).await.expect("tree"), 0, &mut lines);
        lines
    };
    let whole = [
        "base",
        " trunk",
        "  left",
        "   leaf",
        "   childs",
        "  right",
        " apart",
    ];
    assert_eq!(tree(None).await, whole);
    assert_eq!(
        tree(Some(id)).await,
        whole[..4]
            .iter()
            .chain(&whole[5..6])
            .copied()
            .collect::<Vec<_>>()
    );
    assert_eq!(
        tree(Some(&child.id)).await,
        ["base", " trunk", "  left", "   childs"]
    );
    assert!(tree(Some(&SandboxId::generate())).await.is_empty());

    snapshots.delete(left.id.as_str()).await.expect("delete");
    snapshots.delete(trunk.id.as_str()).await.expect("delete");
    assert_eq!(
        tree(None).await,
        [
            "base",
            " deleted",
            "  deleted",
            "   leaf",
            "   childs",
            "  right",
            " apart"
        ],
        "they part where they parted"
    );
    snapshots.delete("leaf").await.expect("delete");
    assert_eq!(
        tree(None).await,
        ["base", " deleted", "  right", "  childs", " apart"],
        "what only one descends from is of no interest any more"
    );
    for name in ["right", "childs", "apart"] {
        snapshots.delete(name).await.expect("delete");
    }
    assert!(tree(None).await.is_empty());
    let plane = plane.restart(|_| ()).await;
    let back = plane.control.sandboxes.rollback(&child.id, "base").await;
    back.expect("its past is not forgotten with what was in between");
    assert_eq!(plane.fleet.snapshot_ids().len(), 1, "only the template's");
}

#[tokio::test]
async fn a_line_of_descent_may_be_long() {
    let plane = Plane::new().await;
    let snapshots = &plane.control.snapshots;
    let sandbox = plane.sandbox().await;
    for _ in 0..300 {
        plane.snapshot(&sandbox.id, None).await;
    }
    let trees = snapshots.tree(None).await.expect("tree");
    let mut depth = 0;
    let mut node = &trees[0];
    while let Some(child) = node.children.first() {
        (node, depth) = (child, depth + 1);
    }
    assert_eq!((trees.len(), depth), (1, 300));
    let mut all = Vec::new();
    let mut query = SnapshotQuery::default();
    loop {
        let page = snapshots.list(&query).await.expect("list");
        all.extend(page.items.into_iter().map(|snapshot| snapshot.id));
        let Some(next) = page.next else { break };
        query.cursor = Some(next);
    }
    assert_eq!(all.len(), 300);
    // In an order that is neither's.
    all.sort_unstable();
    for id in all {
        snapshots.delete(id.as_str()).await.expect("delete");
    }
    assert!(of_users(&plane).is_empty());
    assert!(snapshots.tree(None).await.expect("tree").is_empty());
}
