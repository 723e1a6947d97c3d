//! Fork and rollback over HTTP, in both dialects and in ours.

mod common;

use std::collections::HashSet;

use common::{Server, numbers_of_a_freeze};
use cubicle_control::fleet::{FleetError, FreezeKind, SnapshotKind, memory::Step};
use http::Method;
use serde_json::{Value, json};

#[allow(clippy::expect_used, reason = "a helper of tests may panic")]
async fn snapshot(server: &Server, id: &str, body: Value) -> String {
    let path = format!("/sandboxes/{id}/snapshots");
    let taken = server.post(&path, body).await.expect(201).json();
    taken["snapshotID"].as_str().expect("id").to_owned()
}

#[tokio::test]
async fn forks_are_sandboxes_of_their_own() {
    let server = Server::new().await;
    let body = json!({"templateID": "base", "timeout": 600, "metadata": {"a": "b"}});
    let source = server.post("/v2/sandboxes", body).await.expect(201).json();
    let id = source["sandboxID"].as_str().expect("id");
    let mut seen = HashSet::from([id.to_owned()]);
    for (prefix, body, count) in [
        ("", String::new(), 1),
        ("", r#"{"count":2,"timeout":60}"#.to_owned(), 2),
        ("/cubeapi/v1", r#"{"count":3}"#.to_owned(), 3),
    ] {
        let path = format!("{prefix}/sandboxes/{id}/fork");
        let request = server.request(Method::POST, &path, body);
        let forked = server.send(request).await.expect(201);
        numbers_of_a_freeze(&forked);
        let forked = forked.json();
        let list = forked.as_array().expect("a list");
        assert_eq!(list.len(), count);
        for entry in list {
            assert!(entry.get("error").is_none(), "{entry}");
            let sandbox = &entry["sandbox"];
            assert!(seen.insert(sandbox["sandboxID"].as_str().expect("id").to_owned()));
            assert_ne!(sandbox["envdAccessToken"], source["envdAccessToken"]);
            for field in ["templateID", "clientID", "envdVersion", "envdAccessToken"] {
                assert!(sandbox[field].is_string(), "{field}");
            }
        }
    }
    assert_eq!(server.fleet.alive().len(), 7, "the source runs on");
    let left = server
        .fleet
        .snapshots_of(SnapshotKind::Frozen(FreezeKind::Temporary));
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(server.get("/snapshots").await.expect(200).json(), json!([]));

    let hundred = format!("/sandboxes/{id}/fork");
    server.fleet.room_for(1000);
    let forked = server
        .post(&hundred, json!({"count": 100}))
        .await
        .expect(201);
    assert_eq!(forked.json().as_array().map(Vec::len), Some(100));
}

#[tokio::test]
async fn one_fork_may_fail_where_others_do_not() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    server.fleet.fail_at(
        Step::Create,
        FleetError::Failed {
            doing: "start a VM".into(),
            why: "no such file".into(),
        },
    );
    let path = format!("/sandboxes/{id}/fork");
    let forked = server
        .post(&path, json!({"count": 3}))
        .await
        .expect(201)
        .json();
    let list = forked.as_array().expect("a list");
    let failed: Vec<_> = list.iter().filter_map(|entry| entry.get("error")).collect();
    assert_eq!((list.len(), failed.len()), (3, 1), "{forked}");
    assert_eq!(failed[0]["code"], 500);
    assert!(
        failed[0]["message"]
            .as_str()
            .is_some_and(|text| text.contains("no such file"))
    );
    assert_eq!(server.fleet.alive().len(), 3);

    server.fleet.room_for(4);
    let forked = server
        .post(&path, json!({"count": 2}))
        .await
        .expect(201)
        .json();
    let codes: Vec<_> = forked
        .as_array()
        .expect("a list")
        .iter()
        .map(|e| &e["error"]["code"])
        .collect();
    assert!(
        codes.contains(&&json!(503)) && codes.contains(&&Value::Null),
        "{forked}"
    );

    server
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await
        .expect(204);
    server.post(&path, json!({})).await.expect(409);
}

#[tokio::test]
async fn our_own_fork_tells_everything() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let path = format!("/cubicle/v1/sandboxes/{id}/fork");
    let forked = server
        .post(&path, json!({"count": 2}))
        .await
        .expect(201)
        .json();
    assert_eq!(forked["snapshot"]["bytesWritten"], 7 << 20);
    assert_eq!(forked["snapshot"]["tier"], "anonymous_pages");
    assert!(forked["totalMs"].is_f64());
    assert_eq!(forked["sandboxes"].as_array().map(Vec::len), Some(2));
    assert!(forked["sandboxes"][1]["sandbox"]["sandboxID"].is_string());
}

#[tokio::test]
async fn rollback_as_the_clients_do() {
    let server = Server::new().await;
    let body = json!({"templateID": "base", "timeout": 600});
    let created = server.post("/sandboxes", body).await.expect(201).json();
    let id = created["sandboxID"].as_str().expect("id");
    let first = snapshot(&server, id, json!({})).await;
    let named = snapshot(&server, id, json!({"name": "team/point:v2"})).await;
    for (prefix, to) in [("", &first), ("/cubeapi/v1", &named), ("", &first)] {
        let path = format!("{prefix}/sandboxes/{id}/rollback");
        let done = server
            .post(&path, json!({"snapshotID": to}))
            .await
            .expect(200);
        assert!(done.header("server-timing").contains("total;dur="));
        let done = done.json();
        assert_eq!(
            (&done["sandboxID"], &done["snapshotID"]),
            (&json!(id), &json!(to))
        );
        assert_eq!(done["status"], "READY");
        assert!(
            done["operationID"]
                .as_str()
                .is_some_and(|id| id.len() == 36)
        );
    }
    let path = format!("/sandboxes/{id}/rollback");
    let body = json!({"snapshotID": "team/point:v2"});
    server.post(&path, body).await.expect(200);
    let detail = server
        .get(&format!("/sandboxes/{id}"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        detail["envdAccessToken"], created["envdAccessToken"],
        "clients go on as before"
    );
    assert_eq!(server.fleet.alive().len(), 1);

    let own = format!("/cubicle/v1{path}");
    let done = server
        .post(&own, json!({"snapshotID": first}))
        .await
        .expect(200)
        .json();
    assert_eq!(done["generation"], 6, "{done}");
    assert!(done["phases"][0]["ms"].is_number() && done["totalMs"].is_f64());
    assert!(first.starts_with(done["snapshotID"].as_str().expect("id")));
}

#[tokio::test]
async fn what_a_sandbox_cannot_go_back_to() {
    let server = Server::new().await;
    let id = server
        .sandbox(json!({"templateID": "base", "timeout": 600}))
        .await;
    let other = server
        .sandbox(json!({"templateID": "base", "timeout": 600}))
        .await;
    let foreign = snapshot(&server, &other, json!({})).await;
    let own = snapshot(&server, &id, json!({})).await;
    let path = format!("/sandboxes/{id}/rollback");
    let roll = async |to: &str| server.post(&path, json!({"snapshotID": to})).await;
    for unknown in [
        "snap-0123456789abcdef",
        "nothing",
        "nothing:at-all",
        "../../etc",
    ] {
        let answer = roll(unknown).await.expect(404);
        assert!(
            !answer.text.to_lowercase().contains("template"),
            "{}",
            answer.text
        );
    }
    roll(&foreign).await.expect(409);
    assert_eq!(server.fleet.reached(Step::Rollback), 0);

    // To what it was made from, and on to a copy of one's own past.
    let child = server
        .sandbox(json!({"templateID": own, "timeout": 600}))
        .await;
    let body = json!({"snapshotID": own});
    let of_child = format!("/sandboxes/{child}/rollback");
    server.post(&of_child, body).await.expect(200);

    // A failure changes nothing.
    let broken = FleetError::Failed {
        doing: "restore".into(),
        why: "the guest does not answer".into(),
    };
    server.fleet.fail_at(Step::Rollback, broken);
    let failed = roll(&own).await.expect(500);
    assert!(
        failed.text.contains("the guest does not answer"),
        "{}",
        failed.text
    );
    let detail = server
        .get(&format!("/sandboxes/{id}"))
        .await
        .expect(200)
        .json();
    assert_eq!(detail["state"], "running");
    roll(&own).await.expect(200);

    server
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await
        .expect(204);
    roll(&own).await.expect(409);
}
