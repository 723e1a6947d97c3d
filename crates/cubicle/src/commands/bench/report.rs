//! What a run found out, for programs and for people.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    machine::machine_line,
    operations::{Operation, shown},
    peers::Peers,
    summary::Summary,
};
use crate::{cli::BenchMatrix, output};

/// A whole run.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub(super) bench: String,
    pub(super) template: String,
    /// The machine and the server, in the server's own words.
    pub(super) server: Value,
    pub(super) cells: Vec<Cell>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) peers: Option<Peers>,
}

/// One combination of dirty memory and concurrency.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Cell {
    /// MB (10^6 bytes) of memory that were written before each operation.
    pub(super) dirty_mb: u32,
    /// Sandboxes that were operated on, or copies that were made, at the same time.
    pub(super) concurrency: u32,
    /// Operations that were measured.
    pub(super) n: usize,
    /// By names that end in their unit; `wallMs` is of all operations of a round together.
    pub(super) values: BTreeMap<String, Summary>,
    pub(super) phases_ms: BTreeMap<String, Summary>,
    /// How often the memory was taken in which way.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) tiers: BTreeMap<String, usize>,
    /// Why it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) skipped: Option<String>,
}

impl Cell {
    pub(super) fn skipped(dirty_mb: u32, concurrency: u32, why: String) -> Self {
        Self {
            dirty_mb,
            concurrency,
            n: 0,
            values: BTreeMap::new(),
            phases_ms: BTreeMap::new(),
            tiers: BTreeMap::new(),
            skipped: Some(why),
        }
    }
}

impl Report {
    pub(super) fn new<O: Operation>(options: &BenchMatrix, server: Value) -> Self {
        Self {
            bench: O::NAME.to_owned(),
            template: options.template.clone(),
            server,
            cells: Vec::new(),
            peers: None,
        }
    }

    pub(super) fn print(&self) {
        println!("{}", machine_line(&self.server));
        println!(
            "{} of sandboxes from `{}`; p50 / p95 / max\n",
            self.bench, self.template
        );
        output::print_table(&self.values());
        if let Some(phases) = self.phases() {
            println!("\nphases, p50 in ms, one at a time");
            output::print_table(&phases);
        }
        for line in self.left_out() {
            println!("\n{line}");
        }
        if let Some(peers) = &self.peers {
            println!();
            peers.print();
        }
    }

    /// What was measured, a row for each combination.
    pub(super) fn values(&self) -> comfy_table::Table {
        let shown = shown(&self.bench);
        let mut header = vec!["DIRTY", "AT ONCE", "N"];
        header.extend(shown.iter().map(|(_, title)| *title));
        header.extend(["ALL TOGETHER", "TIER"]);
        let mut table = output::table(&header);
        for cell in self.cells.iter().filter(|cell| cell.skipped.is_none()) {
            let mut row = vec![
                format!("{} MB", cell.dirty_mb),
                cell.concurrency.to_string(),
                cell.n.to_string(),
            ];
            let names = shown.iter().map(|(name, _)| *name).chain(["wallMs"]);
            row.extend(names.map(|name| show(name, cell.values.get(name))));
            let tiers: Vec<&str> = cell.tiers.keys().map(String::as_str).collect();
            row.push(tiers.join(", "));
            table.add_row(row);
        }
        table
    }

    /// What was left out, and why.
    pub(super) fn left_out(&self) -> Vec<String> {
        let why = |cell: &Cell| {
            let (dirty, concurrency) = (cell.dirty_mb, cell.concurrency);
            let why = cell.skipped.as_ref()?;
            Some(format!(
                "{dirty} MB with {concurrency} at once was left out: {why}"
            ))
        };
        self.cells.iter().filter_map(why).collect()
    }

    /// The medians of the phases for each size, where one operation runs at a time.
    pub(super) fn phases(&self) -> Option<comfy_table::Table> {
        let alone: Vec<&Cell> = self
            .cells
            .iter()
            .filter(|cell| cell.concurrency == 1 && !cell.phases_ms.is_empty())
            .collect();
        let mut names: Vec<&str> = Vec::new();
        for name in alone.iter().flat_map(|cell| cell.phases_ms.keys()) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        if names.is_empty() {
            return None;
        }
        let mut header = vec!["DIRTY"];
        header.extend(&names);
        let mut table = output::table(&header);
        for cell in alone {
            let mut row = vec![format!("{} MB", cell.dirty_mb)];
            row.extend(names.iter().map(|name| match cell.phases_ms.get(*name) {
                Some(summary) => format!("{:.1}", summary.p50),
                None => String::new(),
            }));
            table.add_row(row);
        }
        Some(table)
    }
}

/// A summary in the unit that its name ends in.
fn show(name: &str, summary: Option<&Summary>) -> String {
    let Some(summary) = summary else {
        return "-".to_owned();
    };
    let unit = if name.ends_with("Mb") { "MB" } else { "ms" };
    format!(
        "{:.1} / {:.1} / {:.1} {unit}",
        summary.p50, summary.p95, summary.max
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_for_people() {
        let one = |value: f64| Summary {
            n: 10,
            p50: value,
            p95: value * 1.5,
            max: value * 2.0,
        };
        let cell = Cell {
            dirty_mb: 10,
            concurrency: 1,
            n: 10,
            values: [
                ("callMs".to_owned(), one(31.2)),
                ("frozenMs".to_owned(), one(8.25)),
                ("writtenMb".to_owned(), one(10.9)),
                ("wallMs".to_owned(), one(31.3)),
            ]
            .into(),
            phases_ms: [
                ("stop".to_owned(), one(0.8)),
                ("memory".to_owned(), one(5.0)),
            ]
            .into(),
            tiers: [("soft_dirty".to_owned(), 10)].into(),
            skipped: None,
        };
        let report = Report {
            bench: "snapshot".into(),
            template: "base".into(),
            server: json!({"version": "0.1.0"}),
            cells: vec![cell, Cell::skipped(500, 1, "no room".into())],
            peers: None,
        };
        let text = |table: &comfy_table::Table| -> String {
            table
                .lines()
                .map(|line| format!("{}\n", line.trim_end()))
                .collect()
        };
        let tables = format!(
            "{}\n{}",
            text(&report.values()),
            text(&report.phases().expect("phases"))
        );
        insta::assert_snapshot!(tables);
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["cells"][1]["skipped"], "no room");
        assert_eq!(json["cells"][0]["values"]["callMs"]["p50"], 31.2);
    }
}
