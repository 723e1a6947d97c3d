//! What makes no sense about pauses, resumes, forks, rollbacks and snapshots is refused before any
//! machine is bothered, and changes nothing.

mod common;

use std::fmt::Write as _;

use common::Server;
use cubicle_control::fleet::memory::Step;
use http::Method;
use serde_json::json;

const UNKNOWN: &str = "i0000000000000000000";

#[tokio::test]
async fn nonsense_changes_nothing() {
    let server = Server::new().await;
    let id = server
        .sandbox(json!({"templateID": "base", "timeout": 3600}))
        .await;
    let before = server.get(&format!("/sandboxes/{id}")).await.expect(200);
    let long = "x".repeat(10_000);
    let bodies: Vec<(&str, String)> = vec![
        // A list, a word, a wrong type, a number that is none.
        ("pause", "[]".into()),
        ("pause", "x".into()),
        ("pause", r#"{"memory":"no"}"#.into()),
        ("pause", r#"{"memory":0}"#.into()),
        ("pause", r#"{"requireHealthyGuest":1}"#.into()),
        ("resume", r#"{"timeout":"1"}"#.into()),
        ("resume", r#"{"timeout":-2}"#.into()),
        ("resume", r#"{"timeout":1e30}"#.into()),
        ("resume", r#"{"autoPause":"yes"}"#.into()),
        ("connect", r#"{"timeout":1.5}"#.into()),
        ("fork", r#"{"count":0}"#.into()),
        ("fork", r#"{"count":-1}"#.into()),
        ("fork", r#"{"count":101}"#.into()),
        ("fork", r#"{"count":1.5}"#.into()),
        ("fork", r#"{"count":"2"}"#.into()),
        ("fork", format!(r#"{{"count":{}}}"#, i64::MAX)),
        ("fork", r#"{"timeout":-2}"#.into()),
        ("fork", "[2]".into()),
        ("rollback", String::new()),
        ("rollback", "{}".into()),
        ("rollback", r#"{"snapshotID":7}"#.into()),
        ("rollback", r#"{"snapshotID":null}"#.into()),
        ("rollback", r#"{"snapshotID":""}"#.into()),
        ("rollback", format!(r#"{{"snapshotID":"{long}"}}"#)),
        ("snapshots", r#"{"name":5}"#.into()),
        ("snapshots", r#"{"name":""}"#.into()),
        ("snapshots", format!(r#"{{"name":"{long}"}}"#)),
        ("snapshots", r#"{"memory":"no"}"#.into()),
        ("snapshots", r#"{"ttl":0}"#.into()),
        ("snapshots", r#"{"ttl":-1}"#.into()),
        ("snapshots", format!(r#"{{"ttl":{}}}"#, i64::MAX)),
    ];
    let mut table = String::new();
    for (operation, body) in &bodies {
        let mut said = None;
        for prefix in ["", "/cubeapi/v1", "/cubicle/v1"] {
            let ours = prefix == "/cubicle/v1";
            if ours && matches!(*operation, "resume" | "connect") {
                continue;
            }
            let path = format!("{prefix}/sandboxes/{id}/{operation}");
            let request = server.request(Method::POST, &path, body.clone());
            let answer = server.send(request).await.expect(400);
            assert_eq!(answer.header("should-retry"), "false");
            let message = answer.json()["message"].as_str().expect("words").to_owned();
            assert!(message.len() < 300, "{message}");
            if said.is_none() {
                let shown: String = body.chars().take(60).collect();
                let _ = writeln!(table, "{operation} {shown}\n    {message}");
            }
            assert_eq!(*said.get_or_insert(message.clone()), message, "{path}");
        }
    }
    for step in [Step::Freeze, Step::Resume, Step::Rollback] {
        assert_eq!(server.fleet.reached(step), 0, "{step:?}");
    }
    assert_eq!(server.fleet.calls(), (1, 0), "no machine was bothered");
    let after = server.get(&format!("/sandboxes/{id}")).await.expect(200);
    assert_eq!(before.text, after.text);
    insta::assert_snapshot!(table);
}

#[tokio::test]
async fn unknown_sandboxes_are_not_found_in_words_that_cubes_clients_understand() {
    let server = Server::new().await;
    for operation in [
        "pause",
        "resume",
        "connect",
        "fork",
        "rollback",
        "snapshots",
    ] {
        for prefix in ["", "/cubeapi/v1", "/cubicle/v1"] {
            if prefix == "/cubicle/v1" && matches!(operation, "resume" | "connect") {
                continue;
            }
            let path = format!("{prefix}/sandboxes/{UNKNOWN}/{operation}");
            let body = json!({"snapshotID": "snap-0", "timeout": 60});
            let answer = server.post(&path, body).await.expect(404);
            assert_eq!(answer.json()["code"], 404);
            let text = answer.text.to_lowercase();
            assert!(!text.contains("template"), "{path}: {text}");
            assert!(text.contains("was not found"), "{path}: {text}");
        }
    }
    for id in ["ABC", "..%2Fetc", &"i".repeat(10_000), "%ff", "i%00"] {
        for operation in ["pause", "fork", "snapshots"] {
            let path = format!("/sandboxes/{id}/{operation}");
            server.post(&path, json!({})).await.expect(400);
        }
    }
}

#[tokio::test]
async fn lists_refuse_what_they_cannot_mean() {
    let server = Server::new().await;
    let long = "x".repeat(10_000);
    let mut table = String::new();
    for query in [
        "limit=0",
        "limit=101",
        "limit=-1",
        "limit=x",
        "limit=1&limit=2",
        "nextToken=x",
        "sandboxID=ABC",
        &format!("name={long}"),
    ] {
        let mut said = None;
        for path in [
            "/snapshots",
            "/cubeapi/v1/snapshots",
            "/cubicle/v1/snapshots",
        ] {
            let answer = server.get(&format!("{path}?{query}")).await.expect(400);
            let message = answer.json()["message"].as_str().expect("words").to_owned();
            assert_eq!(*said.get_or_insert(message.clone()), message, "{path}");
        }
        let shown: String = query.chars().take(40).collect();
        let _ = writeln!(table, "{shown}: {}", said.unwrap_or_default());
    }
    for (path, query) in [
        ("/cubicle/v1/snapshots", "state=deleted"),
        ("/cubicle/v1/snapshots", "state=ready,x"),
        ("/cubicle/v1/snapshot-tree", "sandboxID=ABC"),
        ("/sandboxes", "state=pausing"),
    ] {
        let answer = server.get(&format!("{path}?{query}")).await.expect(400);
        let _ = writeln!(table, "{path}?{query}: {}", answer.json()["message"]);
    }
    insta::assert_snapshot!(table);
}

#[tokio::test]
async fn snapshots_need_a_key() {
    let server = Server::new().await;
    for (method, path) in [
        (Method::POST, "/sandboxes/i0/pause"),
        (Method::POST, "/sandboxes/i0/resume"),
        (Method::POST, "/sandboxes/i0/fork"),
        (Method::POST, "/sandboxes/i0/rollback"),
        (Method::POST, "/sandboxes/i0/snapshots"),
        (Method::GET, "/snapshots"),
        (Method::DELETE, "/templates/snap-0"),
        (Method::GET, "/cubicle/v1/snapshots"),
        (Method::GET, "/cubicle/v1/snapshots/snap-0"),
        (Method::DELETE, "/cubicle/v1/snapshots/snap-0"),
        (Method::POST, "/cubicle/v1/snapshots/snap-0/verify"),
        (Method::GET, "/cubicle/v1/snapshot-tree"),
        (Method::GET, "/cubicle/v1/snapshot-usage"),
        (Method::POST, "/cubicle/v1/sandboxes/i0/pause"),
        (Method::POST, "/cubicle/v1/sandboxes/i0/fork"),
        (Method::POST, "/cubicle/v1/sandboxes/i0/rollback"),
        (Method::POST, "/cubicle/v1/sandboxes/i0/snapshots"),
    ] {
        let mut request = server.request(method, path, "{}");
        request.headers_mut().remove("x-api-key");
        server.send(request).await.expect(401);
    }
}
