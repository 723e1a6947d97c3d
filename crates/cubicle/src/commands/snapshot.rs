//! `cubicle snapshot`: take, look at, verify and delete snapshots.

mod tree;

use std::{process::ExitCode, time::Duration};

use serde_json::Value;
use time::OffsetDateTime;

use super::{code, several};
use crate::{
    cli::{Global, Snapshot},
    client::{
        Client,
        snapshots::{NewSnapshot, SnapshotInfo, SnapshotUsage, Taken, Verified},
    },
    error::Error,
    output,
};

pub(crate) async fn run(global: &Global, command: Snapshot) -> Result<ExitCode, Error> {
    let client = super::client(global)?;
    match command {
        Snapshot::Create {
            sandbox,
            name,
            no_memory,
            require_healthy,
            ttl,
        } => {
            let new = NewSnapshot {
                name,
                memory: !no_memory,
                require_healthy_guest: require_healthy,
                ttl,
            };
            let taken = client.snapshot(&sandbox, &new).await?;
            if global.json {
                output::print_json(&taken);
            } else {
                println!("{}", taken.snapshot_id);
                eprintln!("{}", cost(&taken));
            }
        }
        Snapshot::Ls { sandbox, all } => {
            let snapshots = client.snapshots(sandbox.as_deref(), all).await?;
            if global.json {
                output::print_json(&snapshots);
            } else {
                output::print_table(&table(&snapshots, OffsetDateTime::now_utc()));
                eprintln!("{}", summary(&client.snapshot_usage().await?));
            }
        }
        Snapshot::Tree { sandbox } => {
            let snapshots = client.snapshot_tree(sandbox.as_deref()).await?;
            if global.json {
                output::print_json(&snapshots);
            } else {
                for line in tree::draw(&snapshots, OffsetDateTime::now_utc()) {
                    println!("{line}");
                }
            }
        }
        Snapshot::Info { id } => {
            let info = client.snapshot_info(&id).await?;
            if global.json {
                output::print_json(&info);
            } else {
                for line in describe(&info) {
                    println!("{line}");
                }
            }
        }
        Snapshot::Rm { ids } => {
            let delete = async |id: &str| client.delete_snapshot(id).await;
            return several::remove(&ids, "snapshot", "removed", global.json, delete).await;
        }
        Snapshot::Verify { ids, all } => return verify(&client, ids, all, global.json).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// What a freeze cost and how long the whole call took, on one line.
pub(super) fn cost(taken: &Taken) -> String {
    format!("{}, {} in all", freeze(taken), ms(taken.total_ms))
}

/// What a freeze cost, on one line.
pub(super) fn freeze(taken: &Taken) -> String {
    let frozen = ms(taken.frozen_ms);
    if taken.tier == "none" {
        return format!("disk only, frozen for {frozen}");
    }
    format!(
        "tier {}, {} written ({} dirty of {} scanned), frozen for {frozen}",
        taken.tier,
        output::bytes(taken.bytes_written),
        output::bytes(taken.bytes_dirty),
        output::bytes(taken.bytes_scanned),
    )
}

/// Milliseconds as the server tells them.
pub(super) fn ms(ms: f64) -> String {
    output::millis(Duration::from_secs_f64(ms.max(0.0) / 1e3))
}

fn table(snapshots: &[SnapshotInfo], now: OffsetDateTime) -> comfy_table::Table {
    let mut table = output::table(&[
        "SNAPSHOT", "NAMES", "SANDBOX", "AGE", "LOGICAL", "OWN", "TIER", "STATE",
    ]);
    let size = |size: Option<u64>| size.map_or_else(|| "?".to_owned(), output::bytes);
    for snapshot in snapshots {
        table.add_row([
            snapshot.snapshot_id.clone(),
            snapshot.names.join(","),
            snapshot.sandbox_id.clone(),
            output::span((now - snapshot.created_at).whole_seconds()),
            size(snapshot.logical_bytes),
            size(snapshot.own_bytes),
            tier(snapshot).to_owned(),
            state(snapshot).to_owned(),
        ]);
    }
    table
}

/// What all snapshots take, on one line.
fn summary(usage: &SnapshotUsage) -> String {
    let of = |bound: Option<String>| bound.map_or_else(String::new, |most| format!(" of {most}"));
    format!(
        "{}{} snapshots take {}{} for {} of memory and disk",
        usage.count,
        of(usage.max_count.map(|most| most.to_string())),
        output::bytes(usage.own_bytes),
        of(usage.max_own_bytes.map(output::bytes)),
        output::bytes(usage.logical_bytes),
    )
}

/// How its memory was taken.
fn tier(snapshot: &SnapshotInfo) -> &str {
    match &snapshot.tier {
        _ if !snapshot.memory => "disk only",
        Some(tier) => tier,
        None => "",
    }
}

/// Whether it can be relied upon.
fn state(snapshot: &SnapshotInfo) -> &str {
    match (snapshot.state.as_str(), snapshot.durable) {
        ("ready", Some(true)) => "durable",
        // It can be used, but a power failure would lose it.
        ("ready", _) => "ready",
        ("failed", _) => "damaged",
        (other, _) => other,
    }
}

/// Everything about one snapshot, a line each, by name.
fn describe(info: &Value) -> Vec<String> {
    let Some(fields) = info.as_object() else {
        return vec![info.to_string()];
    };
    let width = fields.keys().map(String::len).max().unwrap_or(0);
    let mut lines = Vec::new();
    for (name, value) in fields {
        let text = match value {
            Value::Null => continue,
            Value::Array(all) if all.is_empty() => continue,
            Value::String(text) => text.clone(),
            Value::Array(all) => {
                let words: Vec<String> = all.iter().map(word).collect();
                words.join(", ")
            }
            Value::Number(number) if name.ends_with("Bytes") || name.starts_with("bytes") => number
                .as_u64()
                .map_or_else(|| number.to_string(), output::bytes),
            Value::Number(number) if name.ends_with("Ms") => format!("{number} ms"),
            other => other.to_string(),
        };
        lines.push(format!("{name:width$}  {text}"));
    }
    lines
}

/// An item of a list: a word, or a phase.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(phase) if phase.contains_key("ms") => {
            let name = phase.get("name").and_then(Value::as_str).unwrap_or("?");
            let ms = phase.get("ms").and_then(Value::as_f64).unwrap_or(0.0);
            format!("{name} {ms:.1} ms")
        }
        other => other.to_string(),
    }
}

async fn verify(
    client: &Client,
    mut ids: Vec<String>,
    all: bool,
    json: bool,
) -> Result<ExitCode, Error> {
    if all {
        let snapshots = client.snapshots(None, true).await?;
        ids = snapshots.into_iter().map(|s| s.snapshot_id).collect();
    }
    let mut outcomes: Vec<Verified> = Vec::new();
    for id in ids {
        let outcome = client.verify_snapshot(&id).await?;
        if !json {
            match &outcome.reason {
                None if outcome.ok => println!("{}  whole", outcome.snapshot_id),
                reason => println!(
                    "{}  damaged: {}",
                    outcome.snapshot_id,
                    reason.as_deref().unwrap_or("the server does not say how")
                ),
            }
        }
        outcomes.push(outcome);
    }
    if json {
        output::print_json(&outcomes);
    }
    Ok(code(outcomes.iter().all(|outcome| outcome.ok)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;
    use crate::client::snapshots::Phase;

    const NOW: OffsetDateTime = datetime!(2030-01-01 12:00 UTC);

    #[test]
    fn a_list_of_every_kind() {
        let base = SnapshotInfo {
            snapshot_id: "snap-1".into(),
            names: vec!["before-tests:default".into()],
            sandbox_id: "iabc".into(),
            state: "ready".into(),
            memory: true,
            created_at: NOW - time::Duration::minutes(2),
            tier: Some("soft_dirty".into()),
            logical_bytes: Some(4608 << 20),
            own_bytes: Some(12 << 20),
            durable: Some(true),
        };
        let disk = SnapshotInfo {
            snapshot_id: "snap-2".into(),
            names: vec![],
            memory: false,
            durable: Some(false),
            tier: Some("none".into()),
            ..base.clone()
        };
        let broken = SnapshotInfo {
            snapshot_id: "snap-3".into(),
            state: "failed".into(),
            logical_bytes: None,
            own_bytes: None,
            tier: None,
            ..base.clone()
        };
        let table = table(&[base, disk, broken], NOW);
        let lines: Vec<_> = table
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect();
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[test]
    fn what_all_of_them_take() {
        let usage = SnapshotUsage {
            count: 3,
            own_bytes: 36 << 20,
            logical_bytes: 13 << 30,
            max_count: Some(10_000),
            max_own_bytes: None,
        };
        let bounded = SnapshotUsage {
            max_count: None,
            max_own_bytes: Some(1 << 30),
            ..usage.clone()
        };
        insta::assert_snapshot!(format!("{}\n{}", summary(&usage), summary(&bounded)));
    }

    #[test]
    fn what_a_freeze_cost() {
        let taken = Taken {
            snapshot_id: "snap-1".into(),
            names: vec![],
            parent: None,
            tier: "anonymous_pages".into(),
            bytes_scanned: 512 << 20,
            bytes_dirty: 7 << 20,
            bytes_written: 8 << 20,
            frozen_ms: 6.25,
            total_ms: 31.0,
            phases: vec![Phase {
                name: "stop".into(),
                ms: 0.4,
            }],
        };
        insta::assert_snapshot!(cost(&taken));
        let disk = Taken {
            tier: "none".into(),
            ..taken
        };
        insta::assert_snapshot!(cost(&disk));
    }

    #[test]
    fn everything_about_one() {
        let info = json!({
            "snapshotID": "snap-1", "names": ["a", "b"], "parent": null, "children": [],
            "ownBytes": 12 << 20, "bytesScanned": 512 << 20, "frozenMs": 8.4, "durable": true,
            "phases": [{"name": "stop", "ms": 0.42}, {"name": "memory", "ms": 5.0}],
        });
        insta::assert_snapshot!(describe(&info).join("\n"));
    }
}
