//! A page in Markdown from reports that were saved as JSON.

use std::path::{Path, PathBuf};

use super::{machine::machine_line, report::Report};
use crate::error::Error;

/// Prints the page.
pub(super) fn print(files: &[PathBuf]) -> Result<(), Error> {
    let reports = files.iter().map(|file| read(file));
    let reports = reports.collect::<Result<Vec<_>, _>>()?;
    print!("{}", page(&reports));
    Ok(())
}

fn read(file: &Path) -> Result<Report, Error> {
    let at = |action: &'static str| {
        move |source: std::io::Error| Error::File {
            action,
            path: file.to_owned(),
            source,
        }
    };
    let text = std::fs::read_to_string(file).map_err(at("read"))?;
    serde_json::from_str(&text)
        .map_err(std::io::Error::from)
        .map_err(at("understand"))
}

fn page(reports: &[Report]) -> String {
    let mut page = String::from(
        "# How fast snapshots, clones, rollbacks and pauses are\n\n\
         Made by `cubicle bench page` from what `cubicle bench snapshot|clone|rollback|pause --json` \
         measured. Numbers from other machines say little about yours; run it.\n",
    );
    let mut machine = None;
    for report in reports {
        let line = machine_line(&report.server);
        if machine.as_ref() != Some(&line) {
            page += &format!("\nMeasured on: {line}.\n");
            machine = Some(line);
        }
        let of = &report.template;
        page += &format!(
            "\n## {}\n\nOf sandboxes from `{of}`; each cell is p50 / p95 / max.\n\n",
            report.bench
        );
        page += &markdown(&report.values());
        for line in report.left_out() {
            page += &format!("\n{line}.\n");
        }
        if let Some(phases) = report.phases() {
            page += "\nPhases, p50 in ms, one at a time:\n\n";
            page += &markdown(&phases);
        }
        if let Some(peers) = &report.peers {
            page += &format!(
                "\nBeside others in the same run, on {}; p50:\n\n",
                peers.workload
            );
            page += &markdown(&peers.table());
            for line in peers.missing() {
                page += &format!("\n{line}.\n");
            }
        }
    }
    page
}

/// The same table in Markdown.
fn markdown(table: &comfy_table::Table) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let header = table
        .header()
        .map(|row| row.cell_iter().map(comfy_table::Cell::content).collect());
    let header: Vec<String> = header.unwrap_or_default();
    let width = header.len();
    let mut text = line(header.iter().map(|title| title.to_lowercase()).collect());
    text += &line(vec!["---".to_owned(); width]);
    for row in table.row_iter() {
        let mut cells: Vec<String> = row.cell_iter().map(comfy_table::Cell::content).collect();
        cells.resize(width, String::new());
        // A bar would end the cell.
        text += &line(cells.iter().map(|cell| cell.replace('|', "/")).collect());
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_page_of_two_reports() {
        let summary = |p50: f64| json!({"n": 10, "p50": p50, "p95": p50 * 1.5, "max": p50 * 2.0});
        let report = |bench: &str, peers: Value| -> Report {
            let report = json!({
                "bench": bench, "template": "base",
                "server": {"version": "0.1.0", "commit": "0123456789ab", "cpuModel": "a CPU",
                           "cpuCount": 2, "kernel": "6.1", "hypervisor": "QEMU 10 (tcg)"},
                "cells": [
                    {"dirtyMb": 0, "concurrency": 1, "n": 10, "tiers": {"soft_dirty": 10},
                     "values": {"callMs": summary(20.0), "frozenMs": summary(4.0), "wallMs": summary(20.5)},
                     "phasesMs": {"memory": summary(2.0), "pause": summary(0.5)}},
                    {"dirtyMb": 500, "concurrency": 1, "n": 0, "values": {}, "phasesMs": {},
                     "skipped": "a sandbox of `base` has room for 316 MB"},
                ],
                "peers": peers,
            });
            serde_json::from_value(report).expect("a report")
        };
        let peers = json!({"workload": "a program", "measured": [
            {"name": "cubicle", "checkpointMs": summary(10.0), "restoreMs": summary(20.0)},
            {"name": "CRIU", "missing": "not installed"},
        ]});
        let page = page(&[report("snapshot", peers), report("rollback", Value::Null)]);
        insta::assert_snapshot!(page);
    }

    #[test]
    fn what_is_no_report_is_said_so() {
        let missing = Path::new("/nonexistent/report.json");
        let error = read(missing).expect_err("there is none").to_string();
        assert_eq!(error, "cannot read /nonexistent/report.json");
    }
}
