//! Pause, resume and connect over HTTP, in both dialects and in ours.

mod common;

use std::time::Duration;

use common::{Server, numbers_of_a_freeze};
use cubicle_api::ApiConfig;
use cubicle_control::fleet::FreezeKind;
use cubicle_control::fleet::{FleetError, SnapshotKind, memory::Step};
use cubicle_ids::SandboxId;
use http::Method;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

async fn detail(server: &Server, id: &str) -> Value {
    server
        .get(&format!("/sandboxes/{id}"))
        .await
        .expect(200)
        .json()
}

#[allow(clippy::expect_used, reason = "a helper of tests may panic")]
fn seconds_left(detail: &Value) -> i64 {
    let end = detail["endAt"].as_str().expect("a time");
    let end = OffsetDateTime::parse(end, &Rfc3339).expect("RFC 3339");
    (end - OffsetDateTime::now_utc()).whole_seconds()
}

#[tokio::test]
async fn pause_and_connect_as_the_clients_do() {
    let server = Server::new().await;
    let created = server
        .post(
            "/v2/sandboxes",
            json!({"templateID": "base", "timeout": 100}),
        )
        .await
        .expect(201)
        .json();
    let id = created["sandboxID"].as_str().expect("id");
    let path = |rest: &str| format!("/sandboxes/{id}{rest}");

    // E2B's client sends a body, Cube's sends none.
    let paused = server
        .post(&path("/pause"), json!({"memory": true}))
        .await
        .expect(204);
    assert_eq!(paused.text, "");
    numbers_of_a_freeze(&paused);
    assert!(paused.header("server-timing").contains("total;dur="));
    assert!(
        server.fleet.alive().is_empty(),
        "it takes nothing of the machine"
    );

    let seen = detail(&server, id).await;
    assert_eq!(
        (&seen["state"], &seen["pauseMode"]),
        (&json!("paused"), &json!("full"))
    );
    assert!(seen.get("envdUnresponsiveAtPause").is_none());
    assert_eq!(
        seen["endAt"], "9999-12-31T23:59:59Z",
        "it sleeps as long as it likes"
    );
    let again = server.post(&path("/pause"), json!({})).await.expect(409);
    assert_eq!(again.header("should-retry"), "false");
    assert!(
        !again.text.to_lowercase().contains("template"),
        "{}",
        again.text
    );

    for version in ["/v2", ""] {
        let connect = format!("{version}{}", path("/connect"));
        let woken = server
            .post(&connect, json!({"timeout": 200, "memory": true}))
            .await
            .expect(201);
        assert!(woken.header("server-timing").contains("total;dur="));
        let woken = woken.json();
        for field in ["sandboxID", "templateID", "envdAccessToken", "envdVersion"] {
            assert_eq!(woken[field], created[field], "{field} stays");
        }
        let seen = detail(&server, id).await;
        assert_eq!(seen["state"], "running");
        assert!(seen.get("pauseMode").is_none());
        assert!((198..=200).contains(&seconds_left(&seen)), "{seen}");
        server
            .post(&connect, json!({"timeout": 10}))
            .await
            .expect(200);
        let seen = detail(&server, id).await;
        assert!(
            (198..=200).contains(&seconds_left(&seen)),
            "a connect never shortens"
        );
        let request = server.request(Method::POST, &path("/pause"), "");
        server.send(request).await.expect(204);
    }
    // A paused one can be killed.
    server.delete(&path("")).await.expect(204);
    server.get(&path("")).await.expect(404);
    assert!(
        server
            .fleet
            .snapshots_of(SnapshotKind::Frozen(FreezeKind::Pause))
            .is_empty()
    );
}

#[tokio::test]
async fn resume_as_older_clients_do() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    for prefix in ["", "/cubeapi/v1"] {
        let path = |rest: &str| format!("{prefix}/sandboxes/{id}/{rest}");
        let running = server.post(&path("resume"), json!({})).await.expect(409);
        assert!(running.text.contains("already running"), "{}", running.text);
        server.post(&path("pause"), json!({})).await.expect(204);
        let body = json!({"timeout": 60, "autoPause": true, "memory": true});
        let woken = server.post(&path("resume"), body).await.expect(201).json();
        assert_eq!(woken["sandboxID"], id.as_str());
        let seen = detail(&server, &id).await;
        assert_eq!(seen["lifecycle"]["onTimeout"], "pause");
        assert!((58..=60).contains(&seconds_left(&seen)));
        server.post(&path("pause"), json!({})).await.expect(204);
        let request = server.request(Method::POST, &path("resume"), "");
        server.send(request).await.expect(201);
        assert!((13..=15).contains(&seconds_left(&detail(&server, &id).await)));
    }
}

#[tokio::test]
async fn a_pause_without_memory_says_so_and_boots() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let path = |rest: &str| format!("/sandboxes/{id}/{rest}");
    let paused = server
        .post(&path("pause"), json!({"memory": false}))
        .await
        .expect(204);
    assert_eq!(paused.header("cubicle-tier"), "none");
    assert_eq!(detail(&server, &id).await["pauseMode"], "filesystem");
    // There is no memory to forget.
    server
        .post(&path("connect"), json!({"timeout": 60, "memory": false}))
        .await
        .expect(201);
    server.post(&path("pause"), json!({})).await.expect(204);
    assert_eq!(detail(&server, &id).await["pauseMode"], "full");
    for call in ["connect", "resume"] {
        let refused = server
            .post(&path(call), json!({"timeout": 60, "memory": false}))
            .await
            .expect(501);
        assert!(refused.text.contains("memory"), "{}", refused.text);
        assert_eq!(
            detail(&server, &id).await["state"],
            "paused",
            "its memory is still there"
        );
    }
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_not_paused_unless_told_so() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    server.fleet.deafen(&id.parse::<SandboxId>().expect("id"));
    let path = format!("/sandboxes/{id}/pause");
    for body in [
        json!({"requireHealthyGuest": true}),
        json!({"memory": false}),
    ] {
        let refused = server.post(&path, body).await.expect(503);
        assert_eq!(
            refused.json()["error_code"],
            "sandbox_snapshot_guest_agent_unresponsive"
        );
        assert_eq!(detail(&server, &id).await["state"], "running");
    }
    server.post(&path, json!({})).await.expect(204);
}

#[tokio::test]
async fn lists_show_who_sleeps() {
    let server = Server::new().await;
    let awake = server.sandbox(json!({"templateID": "base"})).await;
    let asleep = server
        .sandbox(json!({"templateID": "base", "metadata": {"a": "b"}}))
        .await;
    server
        .post(&format!("/sandboxes/{asleep}/pause"), json!({}))
        .await
        .expect(204);
    let ids = async |path: &str, agent: &str| {
        let mut request = server.request(Method::GET, path, "");
        let agent = agent.parse().expect("header");
        request.headers_mut().insert("user-agent", agent);
        let list = server.send(request).await.expect(200).json();
        let list = list.as_array().expect("a list");
        let id = |item: &Value| item["sandboxID"].as_str().expect("id").to_owned();
        let mut ids: Vec<_> = list.iter().map(id).collect();
        ids.sort();
        ids
    };
    let only = |id: &String| vec![id.clone()];
    let mut both = vec![awake.clone(), asleep.clone()];
    both.sort();
    for prefix in ["", "/cubeapi/v1"] {
        let path = |rest: &str| format!("{prefix}{rest}");
        assert_eq!(ids(&path("/v2/sandboxes"), "x").await, both);
        assert_eq!(
            ids(&path("/v2/sandboxes?state=paused"), "x").await,
            only(&asleep)
        );
        assert_eq!(
            ids(&path("/v2/sandboxes?state=running"), "x").await,
            only(&awake)
        );
        assert_eq!(
            ids(&path("/v2/sandboxes?state=running,paused"), "x").await,
            both
        );
        assert_eq!(
            ids(&path("/v2/sandboxes?state=paused&metadata=a%3Db"), "x").await,
            only(&asleep)
        );
        // Cube's clients see all of them here, E2B's those that run.
        assert_eq!(ids(&path("/sandboxes"), "python-requests/2").await, both);
        assert_eq!(
            ids(&path("/sandboxes"), "e2b-python-sdk/2.45.1").await,
            only(&awake)
        );
        assert_eq!(
            ids(&path("/sandboxes?state=paused"), "e2b-python-sdk/2.45.1").await,
            only(&asleep)
        );
    }
    let page = server.get("/v2/sandboxes?limit=1").await.expect(200);
    assert!(!page.header("x-next-token").is_empty());
    assert_eq!(page.header("x-total-running"), "1");
    let sleeping = server.get("/v2/sandboxes?state=paused").await.json();
    assert_eq!(sleeping[0]["state"], "paused");
}

#[tokio::test]
async fn what_happens_at_the_end_is_said_in_either_dialect() {
    let server = Server::new().await;
    let cases = [
        (json!({}), json!({"onTimeout": "kill", "autoResume": false})),
        (
            json!({"autoPause": true}),
            json!({"onTimeout": "pause", "autoResume": false}),
        ),
        (
            json!({"autoPause": true, "autoPauseMemory": false}),
            json!({"onTimeout": "pause", "autoResume": false}),
        ),
        (
            json!({"autoPause": true, "autoResume": {"enabled": true}}),
            json!({"onTimeout": "pause", "autoResume": true}),
        ),
        (
            json!({"lifecycle": {"onTimeout": "pause", "autoResume": true}}),
            json!({"onTimeout": "pause", "autoResume": true}),
        ),
        (
            json!({"lifecycle": {"onTimeout": "kill"}}),
            json!({"onTimeout": "kill", "autoResume": false}),
        ),
        (
            json!({"lifecycle": null}),
            json!({"onTimeout": "kill", "autoResume": false}),
        ),
        (
            json!({"autoPause": true, "lifecycle": {"onTimeout": "pause"}}),
            json!({"onTimeout": "pause", "autoResume": false}),
        ),
    ];
    for (mut body, expected) in cases {
        body["templateID"] = "base".into();
        let id = server.sandbox(body.clone()).await;
        assert_eq!(detail(&server, &id).await["lifecycle"], expected, "{body}");
    }
    // And it does happen.
    let id = server
        .sandbox(json!({"templateID": "base", "timeout": 1, "autoPause": true}))
        .await;
    for _ in 0..600 {
        let seen = detail(&server, &id).await;
        if seen["state"] == "paused" && seen["pauseMode"] == "full" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it was not paused when its time was up");
}

#[tokio::test]
async fn our_own_pause_tells_everything() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let path = format!("/cubicle/v1/sandboxes/{id}/pause");
    let taken = server.post(&path, json!({})).await.expect(200).json();
    assert_eq!(taken["tier"], "anonymous_pages");
    assert_eq!(taken["bytesScanned"], 512 << 20);
    assert_eq!(
        (&taken["bytesDirty"], &taken["bytesWritten"]),
        (&json!(7 << 20), &json!(7 << 20))
    );
    assert_eq!(taken["frozenMs"], 5.0);
    assert!(taken["totalMs"].is_f64());
    assert!(taken["phases"][0]["name"].is_string() && taken["phases"][0]["ms"].is_number());
    assert!(
        taken["parent"]
            .as_str()
            .is_some_and(|id| id.starts_with("snap-"))
    );
    server.post(&path, json!({})).await.expect(409);
}

#[tokio::test]
async fn failures_leave_a_sandbox_as_it_was() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let path = |rest: &str| format!("/sandboxes/{id}/{rest}");
    let broken = |doing: &str| FleetError::Failed {
        doing: doing.into(),
        why: "the disk is full".into(),
    };
    server.fleet.fail_at(Step::Freeze, broken("freeze it"));
    let failed = server.post(&path("pause"), json!({})).await.expect(500);
    assert!(failed.text.contains("the disk is full"), "{}", failed.text);
    assert_eq!(detail(&server, &id).await["state"], "running");

    server.post(&path("pause"), json!({})).await.expect(204);
    server.fleet.fail_at(Step::Resume, broken("restore it"));
    let failed = server
        .post(&path("connect"), json!({"timeout": 9}))
        .await
        .expect(500);
    assert!(failed.text.contains("the disk is full"), "{}", failed.text);
    assert_eq!(detail(&server, &id).await["state"], "paused");
    let why = "every slot is taken".to_owned();
    server
        .fleet
        .fail_at(Step::Resume, FleetError::Capacity { why });
    let full = server.post(&path("resume"), json!({})).await.expect(503);
    assert_eq!(full.json()["error_code"], "sandbox_capacity_unavailable");
    assert_eq!(
        (full.header("should-retry"), full.header("retry-after")),
        ("true", "2")
    );
    server.post(&path("resume"), json!({})).await.expect(201);
}

#[tokio::test]
async fn prometheus_is_told_what_freezing_costs() {
    let server = Server::with(ApiConfig {
        open_metrics: true,
        ..ApiConfig::default()
    })
    .await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let path = |rest: &str| format!("/sandboxes/{id}/{rest}");
    server.post(&path("snapshots"), json!({})).await.expect(201);
    server.post(&path("pause"), json!({})).await.expect(204);
    server.post(&path("connect"), json!({})).await.expect(201);
    server.post(&path("fork"), json!({})).await.expect(201);
    let text = server.get("/metrics").await.expect(200).text;
    for line in [
        r#"cubicle_sandbox_operations_total{operation="snapshot",outcome="done"} 1"#,
        r#"cubicle_sandbox_operations_total{operation="pause",outcome="done"} 1"#,
        r#"cubicle_sandbox_operations_total{operation="resume",outcome="done"} 1"#,
        r#"cubicle_freezes_total{operation="snapshot",tier="anonymous_pages"} 1"#,
        r#"cubicle_freeze_written_bytes_total{operation="pause",tier="anonymous_pages"} 7340032"#,
        r#"cubicle_freeze_duration_seconds_count{operation="snapshot",tier="anonymous_pages"} 1"#,
        r#"cubicle_fork_children_total{outcome="done"} 1"#,
        "cubicle_snapshots 1",
        "cubicle_snapshots_logical_bytes ",
        r#"cubicle_sandbox_operation_phase_duration_seconds_count{operation="snapshot""#,
        r#"cubicle_sandboxes{state="running"} 2"#,
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}
