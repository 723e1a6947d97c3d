//! The server itself, templates, and what all answers have in common.

mod common;

use axum::body::Body;
use common::Server;
use cubicle_api::ApiConfig;
use http::{Method, Request};
use serde_json::{Value, json};

#[tokio::test]
async fn health_counts_sandboxes() {
    let server = Server::new().await;
    assert_eq!(
        server.get("/health").await.expect(200).json(),
        json!({"status": "ok", "sandboxes": 0})
    );
    server.sandbox(json!({"templateID": "base"})).await;
    assert_eq!(
        server.get("/cubeapi/v1/health").await.expect(200).json()["sandboxes"],
        1
    );
}

#[tokio::test]
async fn templates_are_listed_found_changed_and_deleted() {
    let server = Server::new().await;
    let list = server.get("/templates").await.expect(200).json();
    let base = &list[0];
    assert_eq!(list.as_array().expect("list").len(), 1);
    assert_eq!(
        (&base["aliases"], &base["names"]),
        (&json!(["base"]), &json!(["base"]))
    );
    assert_eq!(
        (&base["buildStatus"], &base["status"]),
        (&json!("ready"), &json!("READY"))
    );
    assert_eq!(
        (&base["createdBy"], &base["lastSpawnedAt"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(
        (&base["memoryMB"], &base["buildCount"]),
        (&json!(512), &json!(1))
    );
    let id = base["templateID"].as_str().expect("id");
    assert_eq!(
        server.get("/default-templates").await.expect(200).json(),
        list
    );

    let alias = server
        .get("/templates/aliases/base")
        .await
        .expect(200)
        .json();
    assert_eq!(alias, json!({"templateID": id, "public": false}));
    let patch = server.request(Method::PATCH, "/v2/templates/base", r#"{"public":true}"#);
    assert_eq!(
        server.send(patch).await.expect(200).json(),
        json!({"names": ["base"]})
    );
    let one = server
        .get(&format!("/templates/{id}"))
        .await
        .expect(200)
        .json();
    assert_eq!(one["public"], true);
    let build = &one["builds"][0];
    assert_eq!(build["buildID"], base["buildID"]);
    assert!(build["finishedAt"].is_string());

    let build = build["buildID"].as_str().expect("id");
    let status = format!("/templates/{id}/builds/{build}/status");
    let first = server
        .get(&format!("{status}?logsOffset=0&limit=2"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&first["status"], &first["logs"]),
        (&json!("ready"), &json!([]))
    );
    assert_eq!(first["logEntries"].as_array().expect("list").len(), 2);
    let rest = server
        .get(&format!("{status}?logsOffset=2"))
        .await
        .expect(200)
        .json();
    let rest = rest["logEntries"].as_array().expect("list");
    let last = rest.last().expect("a line")["message"].as_str();
    assert!(last.is_some_and(|said| said.starts_with("the template is ready")));
    let end = server
        .get(&format!("{status}?logsOffset={}", 2 + rest.len()))
        .await
        .expect(200)
        .json();
    assert_eq!(
        end["logEntries"],
        json!([]),
        "the tail must become empty, or clients never stop"
    );
    let logs = format!("/templates/{id}/builds/{build}/logs?direction=backward&limit=1");
    let last = server.get(&logs).await.expect(200).json();
    assert_eq!(last["logs"][0]["step"], "finalize");

    // A snapshot's id as clients spell it: one segment, percent-encoded.
    let kept = server.sandbox(json!({"templateID": "base"})).await;
    server
        .delete(&format!("/templates/{id}%3Adefault"))
        .await
        .expect(409);
    server
        .delete(&format!("/templates/{id}%3Adefault?force=maybe"))
        .await
        .expect(400);
    server
        .delete(&format!("/templates/{id}%3Adefault?force=true"))
        .await
        .expect(204);
    server.delete("/templates/base").await.expect(404);
    server.get(&format!("/sandboxes/{kept}")).await.expect(200);
}

#[tokio::test]
async fn templates_are_paged() {
    let server = Server::new().await;
    for name in ["one", "two"] {
        server
            .post(&format!("/cubicle/v1/templates/{name}/build"), json!({}))
            .await
            .expect(200);
    }
    let first = server.get("/v2/templates?limit=2").await.expect(200);
    assert_eq!(first.json().as_array().expect("list").len(), 2);
    let next = format!(
        "/v2/templates?limit=2&nextToken={}",
        first.header("x-next-token")
    );
    let second = server.get(&next).await.expect(200);
    assert_eq!(second.json()[0]["aliases"], json!(["base"]));
    assert_eq!(second.header("x-next-token"), "");
}

#[tokio::test]
async fn a_build_is_followed_line_by_line() {
    let server = Server::new().await;
    let build = async |name: &str, body: Value| -> Vec<Value> {
        let answer = server
            .post(&format!("/cubicle/v1/templates/{name}/build"), body)
            .await;
        let answer = answer.expect(200);
        assert_eq!(answer.header("content-type"), "application/x-ndjson");
        answer
            .text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    };
    let events = build("web:v1", json!({"memoryMB": 256})).await;
    let kinds = events.iter().map(|e| e["type"].as_str().expect("type"));
    let kinds: Vec<_> = kinds.collect();
    let [first, between @ .., last] = kinds.as_slice() else {
        panic!("{kinds:?}");
    };
    assert_eq!((*first, *last), ("started", "done"));
    assert!(!between.is_empty() && between.iter().all(|kind| *kind == "progress"));
    assert_eq!(events[1]["step"], "base");
    let done = events.last().expect("an end");
    assert_eq!(done["cached"], false);
    let id = done["templateId"].as_str().expect("id");
    let created = server
        .post("/v2/sandboxes", json!({"templateID": "web:v1"}))
        .await
        .expect(201);
    assert_eq!(created.json()["templateID"], id);

    let again = build("web:v1", json!({"memoryMB": 256})).await;
    assert_eq!(
        (again.len(), &again[1]["type"], &again[1]["cached"]),
        (2, &json!("done"), &json!(true))
    );
    server.fleet.fail_next_build("no space left");
    let failed = build("web:v1", json!({"force": true})).await;
    let last = failed.last().expect("an end");
    assert_eq!(last["type"], "failed");
    assert!(
        last["message"]
            .as_str()
            .expect("message")
            .contains("no space left")
    );
}

#[tokio::test]
async fn the_cluster_says_how_full_it_is() {
    let config = ApiConfig {
        domain: Some("d".into()),
        ..ApiConfig::default()
    };
    let server = Server::with(config).await;
    server.sandbox(json!({"templateID": "base"})).await;
    let overview = server
        .get("/cubeapi/v1/cluster/overview")
        .await
        .expect(200)
        .json();
    assert_eq!(
        overview,
        json!({"nodeCount": 1, "healthyNodes": 1, "totalCpuMilli": 4000,
               "allocatableCpuMilli": 2000, "totalMemoryMB": 8192, "allocatableMemoryMB": 7680,
               "maxMvmSlots": 100})
    );
    let nodes = server.get("/cubeapi/v1/nodes").await.expect(200).json();
    assert_eq!(
        (&nodes[0]["cpuSaturation"], &nodes[0]["usedMvmSlots"]),
        (&json!(50), &json!(1))
    );
    let node = server
        .get("/cubeapi/v1/nodes/memory")
        .await
        .expect(200)
        .json();
    assert_eq!(node["nodeID"], "memory");
    assert_eq!(node["localTemplates"].as_array().expect("list").len(), 1);
    let config = server.get("/cubeapi/v1/config").await.expect(200).json();
    assert_eq!(
        (&config["authEnabled"], &config["sandboxDomain"]),
        (&json!(true), &json!("d"))
    );
    assert_eq!(config["defaultTemplateId"], node["localTemplates"][0]);
    let version = server.get("/cubicle/v1/version").await.expect(200).json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        server.get("/cubicle/v1/nodes").await.expect(200).json()[0]["nodeID"],
        "memory"
    );
}

#[tokio::test]
async fn prometheus_is_told_by_route_and_state() {
    let server = Server::with(ApiConfig {
        open_metrics: true,
        ..ApiConfig::default()
    })
    .await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    server.get(&format!("/sandboxes/{id}")).await.expect(200);
    server.get("/nothing").await.expect(404);
    let request = Request::get("/metrics")
        .body(Body::empty())
        .expect("request");
    let answer = server.send(request).await.expect(200);
    assert!(
        answer
            .header("content-type")
            .starts_with("application/openmetrics-text")
    );
    for line in [
        r#"cubicle_sandboxes{state="running"} 1"#,
        r#"cubicle_sandboxes{state="killing"} 0"#,
        r#"cubicle_sandbox_creates_total{outcome="created"} 1"#,
        r#"cubicle_sandbox_create_duration_seconds_count 1"#,
        r#"cubicle_sandbox_create_phase_duration_seconds_count{phase="restore"} 1"#,
        r#"cubicle_http_requests_total{method="GET",route="/sandboxes/{sandboxID}",status="200"} 1"#,
        r#"cubicle_http_requests_total{method="GET",route="unknown",status="404"} 1"#,
        r#"cubicle_node_slots_ready{node="memory"} 4"#,
        r#"cubicle_node_spares{node="memory",kind="restored"} 2"#,
        r#"cubicle_node_spares{node="memory",kind="paused"} 1"#,
        r#"cubicle_node_spares_memory_bytes{node="memory"} 62914560"#,
        "# EOF",
    ] {
        assert!(answer.text.contains(line), "{line} in\n{}", answer.text);
    }
    assert!(!answer.text.contains(&id), "an id must not become a label");
}

#[tokio::test]
async fn requests_have_ids_and_browsers_may_call() {
    let server = Server::new().await;
    let ask = async |id: &str| {
        let request = Request::get("/health")
            .header("x-request-id", id)
            .body(Body::empty());
        server
            .send(request.expect("request"))
            .await
            .header("x-request-id")
            .to_owned()
    };
    assert_eq!(ask("mine-1").await, "mine-1");
    for odd in ["a b", &"x".repeat(129)] {
        assert_eq!(ask(odd).await.len(), 36, "a fresh id instead of {odd:?}");
    }
    let preflight = Request::options("/v2/sandboxes")
        .header("origin", "https://app.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "x-api-key,browser")
        .body(Body::empty())
        .expect("request");
    let answer = server.send(preflight).await.expect(200);
    assert_eq!(answer.header("access-control-allow-origin"), "*");
    assert_eq!(answer.header("access-control-allow-headers"), "*");
}

#[tokio::test]
async fn pages_of_strangers_cannot_use_a_server_that_asks_for_no_key() {
    let server = Server::open().await;
    let preflight = Request::options("/v2/sandboxes")
        .header("origin", "https://app.example")
        .header("access-control-request-method", "POST")
        .body(Body::empty())
        .expect("request");
    let answer = server.send(preflight).await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
    let simple = Request::get("/v2/sandboxes")
        .header("origin", "https://app.example")
        .body(Body::empty())
        .expect("request");
    server.send(simple).await.expect(403);
}
