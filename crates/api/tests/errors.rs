//! Every refusal: its status, its words, its headers.

mod common;

use std::fmt::Write as _;

use axum::body::Body;
use common::{Answer, Server};
use cubicle_control::fleet::FleetError;
use http::{Method, Request};
use serde_json::{Value, json};

/// What a snapshot shows of an answer. Also checks what all errors have in common.
fn shown(answer: &Answer) -> String {
    let body = answer.json();
    assert_eq!(body["code"], answer.status.as_u16(), "{body}");
    assert!(
        body["message"]
            .as_str()
            .is_some_and(|message| !message.is_empty()),
        "{body}"
    );
    assert_eq!(answer.header("content-type"), "application/json");
    assert!(!answer.header("x-request-id").is_empty());
    assert!(["true", "false"].contains(&answer.header("should-retry")));
    let mut line = format!(
        "{} {}",
        answer.status.as_u16(),
        body["message"].as_str().unwrap_or("")
    );
    if let Some(code) = body["error_code"].as_str() {
        let _ = write!(line, " [{code}]");
    }
    if answer.header("should-retry") == "true" {
        let _ = write!(line, " (retry after {} s)", answer.header("retry-after"));
    }
    line
}

#[tokio::test]
async fn refused_creates() {
    let server = Server::new().await;
    let long = "x".repeat(10_000);
    let with = |field: &str, value: Value| json!({"templateID": "base", field: value});
    let network = |field: &str, value: Value| with("network", json!({field: value}));
    let cases = [
        ("no template", json!({})),
        ("template of a wrong type", json!({"templateID": 5})),
        ("empty template", json!({"templateID": ""})),
        ("unknown template", json!({"templateID": "nothing"})),
        ("unknown tag", json!({"templateID": "base:nothing"})),
        ("unknown snapshot", json!({"templateID": "snap-nothing"})),
        ("no name at all", json!({"templateID": "../../etc"})),
        ("long template", json!({"templateID": long})),
        ("timeout of a wrong type", with("timeout", json!("soon"))),
        ("fraction of a timeout", with("timeout", json!(1.5))),
        ("negative timeout", with("timeout", json!(-2))),
        ("endless timeout", with("timeout", json!(i64::MAX))),
        ("timeout beyond numbers", with("timeout", json!(1e30))),
        (
            "metadata of a wrong type",
            with("metadata", json!({"a": 1})),
        ),
        (
            "long metadata key",
            with("metadata", json!({long.as_str(): "v"})),
        ),
        ("long metadata value", with("metadata", json!({"k": long}))),
        (
            "host mount of what is not allowed",
            with(
                "metadata",
                json!({"host-mount": r#"[{"hostPath": "/etc", "mountPath": "/m"}]"#}),
            ),
        ),
        (
            "host mount that is no list",
            with("metadata", json!({"host-mount": "/etc"})),
        ),
        ("env of a wrong type", with("envVars", json!(["A=b"]))),
        ("env without a name", with("envVars", json!({"": "b"}))),
        (
            "env name with an equals sign",
            with("envVars", json!({"A=": "b"})),
        ),
        ("env with a zero byte", with("envVars", json!({"A": "b\0"}))),
        (
            "both spellings",
            json!({"templateID": "base", "envs": {}, "envVars": {}}),
        ),
        (
            "auto pause of a wrong type",
            with("autoPause", json!("yes")),
        ),
        (
            "file-system pause without pause",
            with("autoPauseMemory", json!(false)),
        ),
        (
            "file-system pause that traffic ends",
            json!({"templateID": "base", "autoPause": true, "autoPauseMemory": false,
                   "autoResume": {"enabled": true}}),
        ),
        (
            "file-system pause in Cube's words that traffic ends",
            json!({"templateID": "base", "autoPauseMemory": false,
                   "lifecycle": {"onTimeout": "pause", "autoResume": true}}),
        ),
        ("auto resume without a word", with("autoResume", json!({}))),
        (
            "auto resume of a wrong type",
            with("autoResume", json!(true)),
        ),
        (
            "two opinions on the end",
            json!({"templateID": "base", "autoPause": false, "lifecycle": {"onTimeout": "pause"}}),
        ),
        (
            "two opinions on traffic",
            json!({"templateID": "base", "autoPause": true, "autoResume": {"enabled": false},
                   "lifecycle": {"autoResume": true}}),
        ),
        (
            "a word for traffic",
            with("lifecycle", json!({"autoResume": "yes"})),
        ),
        (
            "something else at the end",
            with("lifecycle", json!({"onTimeout": "dance"})),
        ),
        ("identity", with("iam", json!({"tokens": {"aws": {}}}))),
        (
            "volumes",
            with("volumeMounts", json!([{"name": "v", "path": "/v"}])),
        ),
        ("placement", with("distributionScope", json!(["other"]))),
        ("mcp of a wrong type", with("mcp", json!(1))),
        ("domain rule", network("allowOut", json!(["example.com"]))),
        ("nonsense rule", network("denyOut", json!(["everything"]))),
        (
            "egress proxy",
            network("egressProxy", json!({"address": "a:1"})),
        ),
        ("header rules", network("rules", json!({"a.com": []}))),
    ];
    let mut table = String::new();
    for (name, body) in cases {
        for path in ["/sandboxes", "/v2/sandboxes"] {
            let answer = server.post(path, body.clone()).await;
            assert!(
                answer.status.is_client_error() || answer.status == 501,
                "{name}"
            );
            if path == "/v2/sandboxes" {
                let _ = writeln!(table, "{name}: {}", shown(&answer));
            }
        }
    }
    assert_eq!(server.fleet.calls().0, 0, "no machine was bothered");
    insta::assert_snapshot!(table);
}

#[tokio::test]
async fn refused_bodies_paths_and_queries() {
    let server = Server::new().await;
    let id = server
        .sandbox(json!({"templateID": "base", "timeout": 3600}))
        .await;
    let unknown = "i0000000000000000000";
    let long = "x".repeat(10_000);
    let huge = format!(r#"{{"templateID":"{}"}}"#, "x".repeat(2 << 20));
    let build = "00000000-0000-0000-0000-000000000000";
    let cases: Vec<(Method, String, String)> = vec![
        (Method::POST, "/sandboxes".into(), String::new()),
        (Method::POST, "/sandboxes".into(), "{".into()),
        (Method::POST, "/sandboxes".into(), "[]".into()),
        (
            Method::POST,
            "/sandboxes".into(),
            r#"{"templateID":"base"} x"#.into(),
        ),
        (Method::POST, "/sandboxes".into(), huge),
        (Method::GET, format!("/sandboxes/{unknown}"), String::new()),
        (Method::GET, format!("/sandboxes/{long}"), String::new()),
        (
            Method::GET,
            "/sandboxes/..%2F..%2Fetc".into(),
            String::new(),
        ),
        (Method::GET, "/sandboxes/%ff".into(), String::new()),
        (Method::GET, "/sandboxes/ABC".into(), String::new()),
        (
            Method::DELETE,
            format!("/sandboxes/{unknown}"),
            String::new(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{unknown}/timeout"),
            r#"{"timeout":1}"#.into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{id}/timeout"),
            "{}".into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{id}/timeout"),
            r#"{"timeout":-5}"#.into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{id}/timeout"),
            r#"{"timeout":"1"}"#.into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{unknown}/refreshes"),
            "{}".into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{id}/refreshes"),
            r#"{"duration":3601}"#.into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{id}/refreshes"),
            r#"{"duration":-1}"#.into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{unknown}/connect"),
            r#"{"timeout":1}"#.into(),
        ),
        (
            Method::POST,
            format!("/sandboxes/{id}/connect"),
            r#"{"memory":1}"#.into(),
        ),
        (
            Method::POST,
            format!("/v2/sandboxes/{unknown}/connect"),
            "{}".into(),
        ),
        (
            Method::POST,
            format!("/v2/sandboxes/{id}/connect"),
            r#"{"timeout":-3}"#.into(),
        ),
        (
            Method::GET,
            format!("/sandboxes/{unknown}/metrics"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/sandboxes/{id}/metrics?start=x"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/sandboxes/{id}/metrics?start=2&end=1"),
            String::new(),
        ),
        (
            Method::GET,
            "/sandboxes/metrics?sandbox_ids=A".into(),
            String::new(),
        ),
        (
            Method::GET,
            format!("/sandboxes/{unknown}/logs"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/v2/sandboxes/{unknown}/logs"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/v2/sandboxes/{id}/logs?direction=up"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/v2/sandboxes/{id}/logs?level=loud"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/v2/sandboxes/{id}/logs?limit=1001"),
            String::new(),
        ),
        (
            Method::GET,
            format!("/v2/sandboxes/{id}/logs?search={long}"),
            String::new(),
        ),
        (Method::GET, "/v2/sandboxes?limit=0".into(), String::new()),
        (Method::GET, "/v2/sandboxes?limit=101".into(), String::new()),
        (
            Method::GET,
            "/v2/sandboxes?state=dead".into(),
            String::new(),
        ),
        (Method::GET, "/v2/sandboxes?order=up".into(), String::new()),
        (
            Method::GET,
            "/v2/sandboxes?startedAfter=today".into(),
            String::new(),
        ),
        (
            Method::GET,
            "/v2/sandboxes?nextToken=x".into(),
            String::new(),
        ),
        (
            Method::GET,
            "/v2/sandboxes?metadata=a%3D1%26a%3D2".into(),
            String::new(),
        ),
        (
            Method::GET,
            "/v2/sandboxes?limit=1&limit=2".into(),
            String::new(),
        ),
        (Method::GET, "/templates/nothing".into(), String::new()),
        (Method::DELETE, "/templates/nothing".into(), String::new()),
        (
            Method::DELETE,
            "/templates/team%2Fname%3Adefault".into(),
            String::new(),
        ),
        (
            Method::PATCH,
            "/templates/nothing".into(),
            r#"{"public":true}"#.into(),
        ),
        (
            Method::PATCH,
            "/v2/templates/base".into(),
            r#"{"public":1}"#.into(),
        ),
        (
            Method::GET,
            "/templates/aliases/nothing".into(),
            String::new(),
        ),
        (
            Method::GET,
            format!("/templates/base/builds/{build}/status"),
            String::new(),
        ),
        (
            Method::GET,
            "/templates/base/builds/x/logs".into(),
            String::new(),
        ),
        (Method::GET, "/v2/templates?limit=0".into(), String::new()),
        (
            Method::GET,
            "/v2/templates?nextToken=x".into(),
            String::new(),
        ),
        (
            Method::POST,
            "/cubicle/v1/templates/Bad!/build".into(),
            String::new(),
        ),
        (
            Method::POST,
            "/cubicle/v1/templates/x/build".into(),
            r#"{"cpuCount":0}"#.into(),
        ),
        (
            Method::POST,
            "/cubicle/v1/templates/x/build".into(),
            r#"{"memoryMB":1}"#.into(),
        ),
        (
            Method::POST,
            "/cubicle/v1/templates/snap-x/build".into(),
            String::new(),
        ),
        (
            Method::GET,
            "/cubeapi/v1/nodes/nothing".into(),
            String::new(),
        ),
        (Method::GET, "/nothing".into(), String::new()),
        (Method::GET, "/cubeapi/v1/nothing".into(), String::new()),
        (Method::GET, "/nodes".into(), String::new()),
        (Method::PUT, "/sandboxes".into(), String::new()),
        (Method::POST, "/health".into(), String::new()),
    ];
    let mut table = String::new();
    for (method, path, body) in cases {
        let request = server.request(method.clone(), &path, body.clone());
        let answer = server.send(request).await;
        let about = |text: &str| text.chars().take(70).collect::<String>();
        let _ = writeln!(table, "{method} {} {}", about(&path), about(&body));
        let line = shown(&answer);
        assert!(
            line.len() < 400,
            "no error may carry all of what was sent: {line}"
        );
        let _ = writeln!(table, "    {line}");
    }
    let table = table.replace(&id, "<id>").replace(unknown, "<unknown>");
    insta::assert_snapshot!(table);
}

#[tokio::test]
async fn without_a_key_nothing_but_health_and_the_description() {
    let server = Server::new().await;
    let mut table = String::new();
    let open = ["/health", "/cubeapi/v1/health", "/openapi.json"];
    let closed = [
        "/sandboxes",
        "/v2/sandboxes",
        "/sandboxes/i0",
        "/templates",
        "/metrics",
        "/cubeapi/v1/sandboxes",
        "/cubeapi/v1/nodes",
        "/cubeapi/v1/config",
        "/cubicle/v1/version",
    ];
    let ask = async |path: &str, header: Option<(&str, String)>| {
        let mut request = Request::get(path);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        server
            .send(request.body(Body::empty()).expect("request"))
            .await
    };
    for path in open {
        ask(path, None).await.expect(200);
    }
    for path in closed {
        let answer = ask(path, None).await.expect(401);
        let _ = writeln!(table, "{path}: {}", shown(&answer));
        ask(path, Some(("x-api-key", "e2b_00".into())))
            .await
            .expect(401);
        ask(
            path,
            Some(("authorization", format!("Basic {}", server.key))),
        )
        .await
        .expect(401);
        let bearer = ask(
            path,
            Some(("authorization", format!("Bearer {}", server.key))),
        )
        .await;
        assert_ne!(bearer.status, 401, "{path}");
    }
    let wrong = ask("/sandboxes", Some(("x-api-key", "e2b_00".into()))).await;
    let _ = writeln!(table, "a wrong key: {}", shown(&wrong));
    insta::assert_snapshot!(table);
    let open = Server::open().await;
    let answer = open
        .send(
            Request::get("/sandboxes")
                .body(Body::empty())
                .expect("request"),
        )
        .await;
    answer.expect(200);
}

#[tokio::test]
async fn failures_of_machines_say_whether_to_try_again() {
    let server = Server::new().await;
    let create = async || {
        server
            .post("/v2/sandboxes", json!({"templateID": "base"}))
            .await
    };
    let mut table = String::new();
    let failed = FleetError::Failed {
        doing: "start a VM".into(),
        why: "no such file".into(),
    };
    server.fleet.fail_next_create(failed);
    let _ = writeln!(table, "failed: {}", shown(&create().await));
    server.fleet.room_for(0);
    let _ = writeln!(table, "full: {}", shown(&create().await));
    server.fleet.room_for(10);
    server.fleet.fail_next_create(FleetError::Unsupported {
        what: "this".into(),
    });
    let _ = writeln!(table, "unsupported: {}", shown(&create().await));
    let snapshot = cubicle_ids::SnapshotId::generate();
    server.fleet.fail_next_create(FleetError::NoSnapshot {
        id: snapshot.clone(),
    });
    let lost = shown(&create().await).replace(snapshot.as_str(), "<snapshot>");
    let _ = writeln!(table, "snapshot lost: {lost}");
    server.control.close().await;
    let _ = writeln!(table, "closed: {}", shown(&create().await));
    insta::assert_snapshot!(table);
}
