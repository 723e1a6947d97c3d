//! Sandboxes over HTTP: every endpoint's success, in both dialects.

mod common;

use std::time::Duration;

use axum::body::Body;
use common::Server;
use cubicle_api::ApiConfig;
use http::{Method, Request};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

#[allow(clippy::expect_used, reason = "a helper of tests may panic")]
fn at(value: &Value) -> OffsetDateTime {
    OffsetDateTime::parse(value.as_str().expect("a time"), &Rfc3339).expect("RFC 3339")
}

fn seconds_left(detail: &Value) -> i64 {
    (at(&detail["endAt"]) - OffsetDateTime::now_utc()).whole_seconds()
}

#[tokio::test]
async fn create_get_and_kill_as_the_clients_do() {
    let config = ApiConfig {
        domain: Some("cubicle.test:3000".into()),
        ..ApiConfig::default()
    };
    let server = Server::with(config).await;
    let body = json!({"templateID": "base", "metadata": {"a": "b"}, "envVars": {"X": "1"}});
    let created = server.post("/v2/sandboxes", body).await.expect(201);
    let timing = created.header("server-timing");
    assert!(timing.contains("resolve;dur="), "{timing}");
    assert_eq!(timing.matches("total;dur=").count(), 1, "{timing}");
    let created = created.json();
    let id = created["sandboxID"].as_str().expect("id").to_owned();
    assert!(id.starts_with('i') && id.len() == 20, "{id}");
    assert_eq!(created["alias"], "base");
    assert_eq!(created["clientID"], "local");
    assert_eq!(created["envdVersion"], "0.6.13");
    assert_eq!(created["domain"], "cubicle.test:3000");
    assert!(
        created["envdAccessToken"]
            .as_str()
            .is_some_and(|token| token.len() >= 32)
    );
    assert!(created.get("trafficAccessToken").is_none());

    // The id alone, and with the client's behind it.
    for path in [format!("/sandboxes/{id}"), format!("/sandboxes/{id}-local")] {
        let detail = server.get(&path).await.expect(200).json();
        assert_eq!(detail["sandboxID"], id.as_str());
        assert_eq!(detail["templateID"], created["templateID"]);
        assert_eq!(detail["state"], "running");
        assert_eq!(detail["metadata"], json!({"a": "b"}));
        assert_eq!(detail["envdAccessToken"], created["envdAccessToken"]);
        assert_eq!(
            detail["lifecycle"],
            json!({"autoResume": false, "onTimeout": "kill"})
        );
        assert_eq!(detail["allowInternetAccess"], Value::Null);
        assert_eq!(detail["network"]["allowPublicTraffic"], true);
        assert_eq!(
            (&detail["cpuCount"], &detail["memoryMB"]),
            (&json!(2), &json!(512))
        );
        assert_eq!(detail["diskSizeMB"], 1024);
        assert!(
            (298..=300).contains(&seconds_left(&detail)),
            "{}",
            detail["endAt"]
        );
    }
    let killed = server.delete(&format!("/sandboxes/{id}")).await.expect(204);
    assert_eq!(killed.text, "");
    let gone = server.delete(&format!("/sandboxes/{id}")).await.expect(404);
    assert!(
        !gone.text.to_lowercase().contains("template"),
        "{}",
        gone.text
    );
}

#[tokio::test]
async fn what_older_and_other_clients_send_is_understood() {
    let server = Server::new().await;
    // E2B 2.45, then Cube's, then every harmless default there is.
    let bodies = [
        json!({"templateID": "base", "timeout": 300, "secure": true,
               "allow_internet_access": true, "metadata": {}, "envVars": {}}),
        json!({"templateID": "base", "timeout": 300, "envs": {"A": "b"},
               "allowInternetAccess": true, "network": {"allowOut": [], "denyOut": []}}),
        json!({"templateID": "base", "timeout": null, "autoPause": false, "autoPauseMemory": true,
               "autoResume": {"enabled": false}, "secure": false, "network": null, "mcp": null,
               "iam": {"tokens": {}}, "volumeMounts": [], "distributionScope": [],
               "lifecycle": {"onTimeout": "kill", "autoResume": false}, "metadata": null,
               "envVars": null, "allow_internet_access": null, "somethingNew": {"a": 1}}),
        json!({"templateID": "base", "mcp": {"browser": {}}}),
    ];
    for (body, expected) in bodies.into_iter().zip([300, 300, 15, 15]) {
        let created = server
            .post("/sandboxes", body.clone())
            .await
            .expect(201)
            .json();
        let path = format!("/sandboxes/{}", created["sandboxID"].as_str().expect("id"));
        let left = seconds_left(&server.get(&path).await.expect(200).json());
        assert!((expected - 2..=expected).contains(&left), "{body}: {left}");
    }
    // JavaScript clients send chunks without a length.
    let chunks = [r#"{"templateID":"#, r#""base"}"#].map(|c| Ok::<_, std::io::Error>(c.to_owned()));
    let body = Body::from_stream(futures::stream::iter(chunks));
    server
        .send(server.request(Method::POST, "/v2/sandboxes", body))
        .await
        .expect(201);
    // The same again at Cube's prefix, with a bearer.
    let bearer = Request::post("/cubeapi/v1/sandboxes")
        .header("authorization", format!("Bearer {}", server.key))
        .body(Body::from(r#"{"templateID":"base"}"#))
        .expect("request");
    server.send(bearer).await.expect(201);
}

#[tokio::test]
async fn options_reach_the_machine() {
    let server = Server::new().await;
    let body = json!({
        "templateID": "base", "envVars": {"FOO": "bar"}, "allow_internet_access": false,
        "network": {"allowPublicTraffic": false, "allowOut": ["8.8.8.8"], "denyOut": ["10.0.0.0/8"],
                    "maskRequestHost": "localhost:${PORT}"},
    });
    let created = server.post("/v2/sandboxes", body).await.expect(201).json();
    let id = created["sandboxID"]
        .as_str()
        .expect("id")
        .parse()
        .expect("id");
    let order = server.fleet.order(&id).expect("an order");
    assert_eq!(order.env_vars, [("FOO".to_owned(), "bar".to_owned())]);
    assert_eq!(order.network.allow_internet, Some(false));
    assert_eq!(
        order.network.allow_out,
        ["8.8.8.8/32".parse().expect("net")]
    );
    assert_eq!(created["envdAccessToken"], order.envd_token.as_str());
    assert!(
        created["trafficAccessToken"]
            .as_str()
            .is_some_and(|token| token.len() >= 32)
    );
    let detail = server
        .get(&format!("/sandboxes/{id}"))
        .await
        .expect(200)
        .json();
    assert_eq!(detail["allowInternetAccess"], false);
    assert_eq!(
        detail["network"],
        json!({"allowPublicTraffic": false, "allowOut": ["8.8.8.8/32"],
               "denyOut": ["10.0.0.0/8"], "maskRequestHost": "localhost:${PORT}"})
    );
}

#[tokio::test]
async fn what_a_sandbox_may_reach_changes_while_it_runs() {
    let server = Server::new().await;
    let body = json!({
        "templateID": "base",
        "network": {"allowOut": ["8.8.8.8"], "denyOut": ["0.0.0.0/0"], "maskRequestHost": "a.b"},
    });
    let id = server.sandbox(body).await;
    let path = format!("/sandboxes/{id}/network");
    let put = async |body: Value| {
        let request = server.request(Method::PUT, &path, body.to_string());
        server.send(request).await
    };
    let order = || {
        server
            .fleet
            .order(&id.parse().expect("id"))
            .expect("an order")
    };

    // Whatever is not said is not allowed or refused any more; who may come in stays as it was.
    put(json!({"denyOut": ["9.9.9.9"], "allow_internet_access": true}))
        .await
        .expect(204);
    assert!(order().network.allow_out.is_empty());
    let detail = async || {
        server
            .get(&format!("/sandboxes/{id}"))
            .await
            .expect(200)
            .json()
    };
    assert_eq!(
        detail().await["network"],
        json!({"allowPublicTraffic": true, "allowOut": [], "denyOut": ["9.9.9.9/32"],
               "maskRequestHost": "a.b"})
    );
    put(json!({"allowPublicTraffic": false, "allowInternetAccess": false}))
        .await
        .expect(204);
    let closed = detail().await;
    assert_eq!(closed["network"]["allowPublicTraffic"], false);
    assert_eq!(order().network.allow_internet, Some(false));
    put(json!({})).await.expect(204);
    assert_eq!(order().network.allow_internet, None);
    assert_eq!(
        detail().await["network"]["allowPublicTraffic"],
        false,
        "as it was"
    );

    for (body, status) in [
        (json!({"denyOut": ["example.com"]}), 400),
        (json!({"allowOut": "8.8.8.8"}), 400),
        (json!({"allowOut": ["example.com"]}), 501),
        (json!([]), 400),
    ] {
        put(body).await.expect(status);
        assert!(order().network.deny_out.is_empty(), "nothing has changed");
    }
    let nobody = server.request(Method::PUT, "/sandboxes/nobody/network", "{}");
    server.send(nobody).await.expect(404);
    server
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await
        .expect(204);
    put(json!({})).await.expect(409);
}

#[tokio::test]
async fn time_is_set_given_and_never_taken_by_connect() {
    let server = Server::new().await;
    let id = server
        .sandbox(json!({"templateID": "base", "timeout": 100}))
        .await;
    let path = |rest: &str| format!("/sandboxes/{id}{rest}");
    let left = async || seconds_left(&server.get(&path("")).await.expect(200).json());
    let near = |left: i64, wanted: i64| (wanted - 2..=wanted).contains(&left);

    server
        .post(&path("/timeout"), json!({"timeout": 50}))
        .await
        .expect(204);
    assert!(near(left().await, 50));
    server
        .post(&path("/refreshes"), json!({"duration": 10}))
        .await
        .expect(204);
    assert!(near(left().await, 50), "a refresh never shortens");
    server
        .post(&path("/refreshes"), json!({"duration": 200}))
        .await
        .expect(204);
    assert!(near(left().await, 200));
    server
        .send(server.request(Method::POST, &path("/refreshes"), ""))
        .await
        .expect(204);
    assert!(near(left().await, 200));

    let connected = server
        .post(&path("/connect"), json!({"timeout": 10}))
        .await
        .expect(200)
        .json();
    assert_eq!(connected["sandboxID"], id.as_str());
    assert!(connected["envdAccessToken"].is_string());
    assert!(near(left().await, 200), "a connect never shortens");
    // E2B's newer clients (v2) and Cube's (v1) send an empty object: 300 seconds.
    for version in ["", "/v2"] {
        for body in ["{}", ""] {
            server
                .post(&path("/timeout"), json!({"timeout": 50}))
                .await
                .expect(204);
            let connect = format!("{version}{}", path("/connect"));
            server
                .send(server.request(Method::POST, &connect, body))
                .await
                .expect(200);
            assert!(near(left().await, 300), "{version} {body:?}");
        }
    }
    server
        .post(&path("/timeout"), json!({"timeout": -1}))
        .await
        .expect(204);
    let detail = server.get(&path("")).await.expect(200).json();
    assert_eq!(detail["endAt"], "9999-12-31T23:59:59Z");
    server
        .post(&path("/connect"), json!({"timeout": 600}))
        .await
        .expect(200);
    let detail = server.get(&path("")).await.expect(200).json();
    assert_eq!(
        detail["endAt"], "9999-12-31T23:59:59Z",
        "never is longer than ten minutes"
    );
    server
        .post(&path("/timeout"), json!({"timeout": 0}))
        .await
        .expect(204);
    for _ in 0..500 {
        if server.get(&path("")).await.status == 404 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("a timeout of 0 did not end it");
}

#[tokio::test]
async fn lists_are_filtered_ordered_and_paged() {
    let server = Server::new().await;
    let mut ids = Vec::new();
    for n in 0..5 {
        let metadata = json!({"group": "a b&c", "n": n.to_string()});
        ids.push(
            server
                .sandbox(json!({"templateID": "base", "metadata": metadata}))
                .await,
        );
    }
    server
        .sandbox(json!({"templateID": "base", "metadata": {"group": "other"}}))
        .await;
    // As recorded from a client: encoded three times.
    let filter = "metadata=group%3Da%252520b%252526c";
    let listed = async |query: &str| {
        let page = server
            .get(&format!("/v2/sandboxes?{query}"))
            .await
            .expect(200);
        assert_ne!(
            page.headers.get("x-next-token").map(|t| t.is_empty()),
            Some(true)
        );
        let ids: Vec<String> = page
            .json()
            .as_array()
            .expect("a list")
            .iter()
            .map(|sandbox| sandbox["sandboxID"].as_str().expect("id").to_owned())
            .collect();
        (ids, page.header("x-next-token").to_owned())
    };
    let newest_first: Vec<_> = ids.iter().rev().cloned().collect();
    assert_eq!(listed(filter).await, (newest_first.clone(), String::new()));
    assert_eq!(listed(&format!("{filter}&order=asc")).await.0, ids);
    assert_eq!(listed("").await.0.len(), 6);
    assert_eq!(listed("state=running").await.0.len(), 6);
    assert_eq!(listed("state=running,paused").await.0.len(), 6);
    assert_eq!(listed("state=paused").await.0.len(), 0);
    assert_eq!(listed("template=base").await.0.len(), 6);
    assert_eq!(listed("template=other").await.0.len(), 0);
    assert_eq!(listed("metadata=n%3D3").await.0, [ids[3].clone()]);

    let mut paged = Vec::new();
    let mut token = String::new();
    loop {
        let (page, next) = listed(&format!("{filter}&limit=2&nextToken={token}")).await;
        paged.extend(page);
        if next.is_empty() {
            break;
        }
        token = next;
    }
    assert_eq!(paged, newest_first);

    let third = server.get(&format!("/sandboxes/{}", ids[2])).await.json();
    let since = third["startedAt"].as_str().expect("time").to_owned();
    let after = listed(&format!("{filter}&startedAfter={since}")).await.0;
    assert_eq!(after, newest_first[..3], "that instant is included");

    let v1 = server.get("/sandboxes").await.expect(200).json();
    assert_eq!(v1.as_array().expect("list").len(), 6);
    let v1 = server
        .get("/sandboxes?metadata=n%3D3")
        .await
        .expect(200)
        .json();
    assert_eq!(v1[0]["sandboxID"], ids[3].as_str());
}

#[tokio::test]
async fn metrics_and_logs_tell_what_happened() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let metrics = format!("/sandboxes/{id}/metrics");
    let mut samples = Value::Null;
    for _ in 0..500 {
        samples = server.get(&metrics).await.expect(200).json();
        if samples != json!([]) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let sample = &samples[0];
    for field in [
        "cpuCount",
        "cpuUsedPct",
        "memUsed",
        "memTotal",
        "memCache",
        "diskUsed",
        "diskTotal",
    ] {
        assert!(sample[field].is_number(), "{field} in {sample}");
    }
    assert_eq!(
        sample["timestampUnix"],
        at(&sample["timestamp"]).unix_timestamp()
    );
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let range = |start: i64, end: i64| format!("{metrics}?start={start}&end={end}");
    assert_ne!(
        server.get(&range(now - 60, now)).await.expect(200).json(),
        json!([])
    );
    assert_eq!(
        server
            .get(&range(now - 7200, now - 3600))
            .await
            .expect(200)
            .json(),
        json!([])
    );
    let all = server
        .get(&format!("/sandboxes/metrics?sandbox_ids={id},inone"))
        .await
        .expect(200);
    assert_eq!(
        all.json()["sandboxes"]
            .as_object()
            .expect("map")
            .keys()
            .collect::<Vec<_>>(),
        [&id]
    );

    server.delete(&format!("/sandboxes/{id}")).await.expect(204);
    let v1 = server
        .get(&format!("/sandboxes/{id}/logs"))
        .await
        .expect(200)
        .json();
    assert_eq!(v1["logs"][0]["line"], "sandbox created");
    assert_eq!(v1["logEntries"][1]["message"], "sandbox ended");
    let v2 = format!("/v2/sandboxes/{id}/logs");
    let latest = server
        .get(&format!("{v2}?direction=backward&limit=1"))
        .await
        .expect(200)
        .json();
    assert_eq!(latest["logs"][0]["fields"], json!({"reason": "killed"}));
    let none = server
        .get(&format!("{v2}?level=error"))
        .await
        .expect(200)
        .json();
    assert_eq!(none, json!({"logs": []}));
    let found = server
        .get(&format!("{v2}?search=created"))
        .await
        .expect(200)
        .json();
    assert_eq!(found["logs"].as_array().expect("list").len(), 1);
}

#[tokio::test]
async fn a_repeated_create_with_a_key_is_one_create() {
    let server = Server::new().await;
    let send = async |key: &str, body: &str| {
        let mut request = server.request(Method::POST, "/v2/sandboxes", body.to_owned());
        request
            .headers_mut()
            .insert("idempotency-key", key.parse().expect("header"));
        server.send(request).await
    };
    let body = r#"{"templateID":"base","timeout":60}"#;
    let first = send("k-1", body).await.expect(201).json();
    let spelled = r#" { "timeout": 60, "templateID": "base" } "#;
    assert_eq!(send("k-1", spelled).await.expect(201).json(), first);
    let other = send("k-1", r#"{"templateID":"base"}"#).await.expect(409);
    assert_eq!(other.json()["error_code"], "idempotency_request_mismatch");
    assert_eq!(other.header("should-retry"), "false");

    server.fleet.create_takes(Duration::from_millis(200));
    let (one, two) = tokio::join!(send("k-2", body), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        send("k-2", body).await
    });
    one.expect(201);
    let two = two.expect(409);
    assert_eq!(two.json()["error_code"], "idempotency_in_progress");
    assert_eq!(
        (two.header("should-retry"), two.header("retry-after")),
        ("true", "1")
    );
    assert_eq!(server.fleet.alive().len(), 2);
}

#[tokio::test]
async fn a_client_that_hangs_up_during_create_leaks_nothing() {
    let server = Server::new().await;
    server.fleet.create_takes(Duration::from_millis(30));
    let request = server.post("/v2/sandboxes", json!({"templateID": "base"}));
    assert!(
        tokio::time::timeout(Duration::from_millis(10), request)
            .await
            .is_err()
    );
    for _ in 0..500 {
        if server.fleet.calls().1 > 0 && server.control.sandboxes.in_memory() == (0, 0) {
            assert!(server.fleet.alive().is_empty());
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the abandoned sandbox lives on");
}
