//! The benchmarks run, tell what they measured and what they left out, and leave nothing behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::Server;
use cubicle_control::fleet::{FleetError, memory::Step};

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_is_measured_in_every_combination() {
    let server = Server::start().await;
    for operation in ["snapshot", "clone", "rollback", "pause"] {
        let words =
            format!("bench {operation} -n 4 --warm-up 1 --dirty 0,10,400 -c 1,3 --no-peers");
        let report = server.json(&words).await;
        assert_eq!(report["bench"], operation);
        assert!(report["server"]["kernel"].is_string() && report["server"]["version"].is_string());
        let cells = report["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 6);
        for cell in cells {
            if cell["dirtyMb"] == 400 {
                let why = cell["skipped"].as_str().unwrap();
                assert!(why.contains("room for 316 MB"), "{why}");
                continue;
            }
            let (n, at_once) = (
                cell["n"].as_u64().unwrap(),
                cell["concurrency"].as_u64().unwrap(),
            );
            // As many as were asked for, and the rest of the last round.
            let all_at_once = if operation == "clone" {
                4
            } else {
                4_u64.next_multiple_of(at_once)
            };
            assert_eq!(n, all_at_once, "{operation}: {cell}");
            let call = &cell["values"]["callMs"];
            assert!(
                call["p50"].as_f64().unwrap() > 0.0 && call["max"].as_f64() >= call["p95"].as_f64()
            );
            assert!(cell["values"]["wallMs"]["n"].as_u64().unwrap() >= 2);
            if operation == "rollback" {
                assert!(cell["values"]["firstCommandMs"]["p50"].is_f64());
            } else {
                assert_eq!(cell["values"]["frozenMs"]["p50"], 5.0);
                assert_eq!(cell["tiers"]["anonymous_pages"], n);
            }
            assert!(!cell["phasesMs"].as_object().unwrap().is_empty(), "{cell}");
        }
        assert!(
            server.fleet.alive().is_empty(),
            "{operation} leaves sandboxes behind"
        );
        let commands = std::mem::take(&mut *server.commands.lock().unwrap());
        assert!(commands.iter().any(|command| command.contains("count=10 ")));
        assert!(
            !commands
                .iter()
                .any(|command| command.contains("count=400 "))
        );
        let left = server.json("snapshot ls --all").await;
        assert_eq!(
            left.as_array().map(Vec::len),
            Some(0),
            "{operation} leaves {left}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn people_get_tables_and_peers_that_are_missing_are_said_to_be() {
    let server = Server::start().await;
    let output = server
        .run("bench snapshot -n 2 --warm-up 0 --dirty 0,900 -c 1")
        .await;
    let text = Server::ok(output);
    for words in [
        "CALL",
        "FREEZE",
        "WRITTEN",
        "TIER",
        "anonymous_pages",
        "kernel none",
        "p50 / p95 / max",
    ] {
        assert!(text.contains(words), "{words} in\n{text}");
    }
    assert!(
        text.contains("900 MB with 1 at once was left out"),
        "{text}"
    );
    for peer in ["gVisor", "CRIU"] {
        let line = text.lines().find(|line| line.contains(peer)).unwrap();
        assert!(
            line.contains("not installed") || line.contains("ms") || line.contains("failed"),
            "{line}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_report_becomes_a_page() {
    let server = Server::start().await;
    let output = server
        .run("--json bench pause -n 1 --warm-up 0 --dirty 0 -c 1")
        .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pause.json");
    std::fs::write(&file, Server::ok(output)).unwrap();
    let page = Server::ok(server.run(&format!("bench page {}", file.display())).await);
    assert!(page.starts_with("# How fast"), "{page}");
    assert!(
        page.contains("## pause\n") && page.contains("| 0 MB | 1 | 1 |"),
        "{page}"
    );
    std::fs::write(&file, "{}").unwrap();
    let broken = server.run(&format!("bench page {}", file.display())).await;
    let said = String::from_utf8_lossy(&broken.stderr).into_owned();
    assert!(
        said.contains("pause.json") && said.contains("missing field"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_benchmark_that_fails_kills_what_it_made() {
    let server = Server::start().await;
    for (operation, step) in [
        ("snapshot", Step::Freeze),
        ("rollback", Step::Rollback),
        ("pause", Step::Resume),
    ] {
        let broken = FleetError::Failed {
            doing: "do that".into(),
            why: "the disk is full".into(),
        };
        server.fleet.fail_at(step, broken);
        let output = server
            .run(&format!("bench {operation} -n 2 --dirty 0 -c 2 --no-peers"))
            .await;
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("the disk is full"), "{said}");
        assert!(server.fleet.alive().is_empty(), "{operation}");
        let left = server.json("snapshot ls --all").await;
        assert_eq!(
            left.as_array().map(Vec::len),
            Some(0),
            "{operation} leaves {left}"
        );
    }
}
