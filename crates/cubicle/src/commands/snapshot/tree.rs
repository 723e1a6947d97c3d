//! Snapshots drawn as the tree that they are.

use time::OffsetDateTime;

use super::state;
use crate::{client::snapshots::TreePlace, output};

/// A line for each place. They come in the order of the tree, each with its depth.
pub(super) fn draw(places: &[TreePlace], now: OffsetDateTime) -> Vec<String> {
    let names: Vec<String> = (0..places.len())
        .map(|at| format!("{}{}", branch(places, at), title(&places[at])))
        .collect();
    let width = names.iter().map(|text| text.chars().count()).max();
    places
        .iter()
        .zip(names)
        .map(|(place, text)| {
            let gap = width.unwrap_or(0) - text.chars().count();
            format!("{text}{:gap$}  {}", "", facts(place, now))
        })
        .collect()
}

/// The lines that lead to a snapshot: one column for each ancestor below the root.
fn branch(places: &[TreePlace], at: usize) -> String {
    let depth = places[at].depth;
    let mut columns = String::new();
    for level in 1..=depth {
        // Whether the ancestor on this level has another sibling below.
        let goes_on = places[at + 1..]
            .iter()
            .take_while(|later| later.depth >= level)
            .any(|later| later.depth == level);
        columns.push_str(match (level == depth, goes_on) {
            (true, true) => "├── ",
            (true, false) => "└── ",
            (false, true) => "│   ",
            (false, false) => "    ",
        });
    }
    columns
}

fn title(place: &TreePlace) -> String {
    let names = match &place.snapshot {
        Some(snapshot) => snapshot.names.join(", "),
        None => place.alias.clone().unwrap_or_default(),
    };
    if names.is_empty() {
        place.snapshot_id.clone()
    } else {
        format!("{} ({names})", place.snapshot_id)
    }
}

fn facts(place: &TreePlace, now: OffsetDateTime) -> String {
    let Some(snapshot) = &place.snapshot else {
        return place.kind.clone();
    };
    let mut facts = vec![format!("of {}", snapshot.sandbox_id)];
    if let Some(own) = snapshot.own_bytes {
        facts.push(format!("{} own", output::bytes(own)));
    }
    if !snapshot.memory {
        facts.push("disk only".to_owned());
    }
    if state(snapshot) != "durable" {
        facts.push(state(snapshot).to_owned());
    }
    let age = (now - snapshot.created_at).whole_seconds();
    facts.push(format!("{} ago", output::span(age)));
    facts.join(", ")
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::client::snapshots::SnapshotInfo;

    const NOW: OffsetDateTime = datetime!(2030-01-01 12:00 UTC);

    fn snapshot(id: &str, depth: usize) -> TreePlace {
        let id = format!("snap-{id}");
        TreePlace {
            depth,
            snapshot_id: id.clone(),
            kind: "snapshot".into(),
            alias: None,
            snapshot: Some(SnapshotInfo {
                snapshot_id: id,
                names: Vec::new(),
                sandbox_id: "iabc".into(),
                state: "ready".into(),
                memory: true,
                created_at: NOW - time::Duration::minutes(2),
                tier: None,
                logical_bytes: Some(4608 << 20),
                own_bytes: Some(12 << 20),
                durable: Some(true),
            }),
        }
    }

    fn place(id: &str, depth: usize, kind: &str, alias: Option<&str>) -> TreePlace {
        TreePlace {
            kind: kind.into(),
            alias: alias.map(str::to_owned),
            snapshot: None,
            ..snapshot(id, depth)
        }
    }

    fn with(mut place: TreePlace, change: impl FnOnce(&mut SnapshotInfo)) -> TreePlace {
        change(place.snapshot.as_mut().expect("a snapshot"));
        place
    }

    #[test]
    fn a_tree_of_every_shape() {
        let all = [
            place("root", 0, "template", Some("base")),
            snapshot("a", 1),
            place("b", 2, "deleted", None),
            with(snapshot("c", 3), |s| s.names = vec!["best:default".into()]),
            with(snapshot("d", 2), |s| s.state = "failed".into()),
            with(snapshot("e", 1), |s| {
                s.memory = false;
                s.durable = Some(false);
                s.own_bytes = None;
            }),
            place("other", 0, "template", None),
            snapshot("f", 1),
            snapshot("g", 2),
        ];
        insta::assert_snapshot!(draw(&all, NOW).join("\n"));
        assert!(draw(&[], NOW).is_empty());
    }

    #[test]
    fn a_chain_of_any_length_is_drawn() {
        let all: Vec<_> = (0..300).map(|n| snapshot(&n.to_string(), n)).collect();
        let lines = draw(&all, NOW);
        assert_eq!(lines.len(), 300);
        assert!(lines[299].contains("└── snap-299"), "{}", lines[299]);
        assert!(!lines.join("").contains('│'));
    }
}
