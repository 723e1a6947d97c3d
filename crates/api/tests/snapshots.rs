//! Snapshots over HTTP, in both dialects and in ours.

mod common;

use std::time::Duration;

use common::{Server, numbers_of_a_freeze};
use cubicle_control::fleet::memory::Step;
use cubicle_ids::SnapshotId;
use http::Method;
use serde_json::{Value, json};

#[allow(clippy::expect_used, reason = "a helper of tests may panic")]
fn text(value: &Value, field: &str) -> String {
    value[field].as_str().expect(field).to_owned()
}

async fn take(server: &Server, id: &str, body: Value) -> String {
    let path = format!("/sandboxes/{id}/snapshots");
    text(
        &server.post(&path, body).await.expect(201).json(),
        "snapshotID",
    )
}

/// As clients encode an id that is one segment of a path.
fn encoded(id: &str) -> String {
    id.replace('/', "%2F").replace(':', "%3A")
}

#[tokio::test]
async fn taken_listed_used_and_deleted_as_the_clients_do() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    for prefix in ["", "/cubeapi/v1"] {
        let path = format!("{prefix}/sandboxes/{id}/snapshots");
        for body in ["", "{}", r#"{"memory":true}"#] {
            let request = server.request(Method::POST, &path, body);
            let taken = server.send(request).await.expect(201);
            numbers_of_a_freeze(&taken);
            let taken = taken.json();
            let snapshot = text(&taken, "snapshotID");
            assert!(
                snapshot.starts_with("snap-") && snapshot.ends_with(":default"),
                "{snapshot}"
            );
            assert_eq!(taken["names"], json!([]));
            assert_eq!(
                (&taken["tier"], &taken["frozenMs"]),
                (&json!("anonymous_pages"), &json!(5.0))
            );
            assert_eq!(taken["bytesWritten"], 7 << 20);

            let listed = server
                .get(&format!("{prefix}/snapshots?sandboxID={id}"))
                .await
                .expect(200)
                .json();
            let listed = &listed[0];
            assert_eq!(text(listed, "snapshotID"), snapshot);
            assert_eq!(
                (&listed["status"], &listed["originSandboxID"]),
                (&json!("READY"), &json!(id))
            );
            assert!(listed["createdAt"].is_string() && listed["updatedAt"].is_string());
            // What lists give is accepted where a template is, and so is the bare id.
            let bare = snapshot.trim_end_matches(":default").to_owned();
            for template in [&snapshot, &bare] {
                let made = server.sandbox(json!({"templateID": template})).await;
                server
                    .delete(&format!("/sandboxes/{made}"))
                    .await
                    .expect(204);
            }
            let gone = format!("{prefix}/templates/{}", encoded(&snapshot));
            server.delete(&gone).await.expect(204);
            let again = server.delete(&gone).await.expect(404);
            assert!(
                again.text.contains("emplate"),
                "Cube's client asks for the word: {}",
                again.text
            );
        }
    }
    let detail = server
        .get(&format!("/sandboxes/{id}"))
        .await
        .expect(200)
        .json();
    assert_eq!(detail["state"], "running", "it runs on");
    assert_eq!(server.get("/snapshots").await.expect(200).json(), json!([]));
}

#[tokio::test]
async fn names_are_one_segment_however_they_are_spelled() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    // Clients name snapshots as they like, also like this.
    for name in ["before", "snap-filter-1a2b", "team/name", "team/name:v2"] {
        let path = format!("/sandboxes/{id}/snapshots");
        let taken = server
            .post(&path, json!({"name": name}))
            .await
            .expect(201)
            .json();
        let full = if name.contains(':') {
            name.to_owned()
        } else {
            format!("{name}:default")
        };
        assert!(
            taken["names"][0].as_str().is_some_and(|n| n == full),
            "{taken}"
        );
        let list = server
            .get(&format!("/snapshots?name={}", encoded(name)))
            .await
            .expect(200)
            .json();
        assert_eq!(list[0]["snapshotID"], taken["snapshotID"]);
        let none = server
            .get(&format!("/snapshots?name={name}-does-not-exist"))
            .await
            .expect(200);
        assert_eq!(none.json(), json!([]));
        let made = server.sandbox(json!({"templateID": full})).await;
        server
            .delete(&format!("/sandboxes/{made}"))
            .await
            .expect(204);
        server
            .delete(&format!("/templates/{}", encoded(&full)))
            .await
            .expect(204);
        server
            .delete(&format!("/templates/{}", encoded(&full)))
            .await
            .expect(404);
    }
    // A name that means a template already, and one that is none.
    let path = format!("/sandboxes/{id}/snapshots");
    server
        .post(&path, json!({"name": "base"}))
        .await
        .expect(409);
    for bad in ["A", "a b", "../etc", "a/b/c", "a:b:c", "é"] {
        server.post(&path, json!({"name": bad})).await.expect(400);
    }
    let freezes = server.fleet.reached(Step::Freeze);
    assert_eq!(freezes, 4, "what is refused freezes nothing");
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let other = server.sandbox(json!({"templateID": "base"})).await;
    let mut newest_first = Vec::new();
    for _ in 0..5 {
        newest_first.insert(0, take(&server, &id, json!({})).await);
        take(&server, &other, json!({})).await;
    }
    for list in [
        "/snapshots",
        "/cubeapi/v1/snapshots",
        "/cubicle/v1/snapshots",
    ] {
        let mut paged = Vec::new();
        let mut token = String::new();
        loop {
            let page = server
                .get(&format!("{list}?sandboxID={id}&limit=2&nextToken={token}"))
                .await
                .expect(200);
            let items = page.json();
            let items = items.as_array().expect("a list");
            assert!(items.len() <= 2);
            paged.extend(items.iter().map(|item| text(item, "snapshotID")));
            assert_ne!(
                page.headers.get("x-next-token").map(|t| t.is_empty()),
                Some(true)
            );
            token = page.header("x-next-token").to_owned();
            if token.is_empty() {
                break;
            }
        }
        let bare = |id: &String| id.trim_end_matches(":default").to_owned();
        let wanted: Vec<_> = newest_first.iter().map(bare).collect();
        assert_eq!(paged.iter().map(bare).collect::<Vec<_>>(), wanted, "{list}");
        let all = server.get(list).await.expect(200).json();
        assert_eq!(all.as_array().map(Vec::len), Some(10));
        let none = server
            .get(&format!("{list}?sandboxID=inothing"))
            .await
            .expect(200);
        assert_eq!(none.json(), json!([]));
    }
}

#[tokio::test]
async fn a_clone_made_by_the_client_outlives_its_snapshot() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let snapshot = take(&server, &id, json!({})).await;
    server.fleet.create_takes(Duration::from_millis(30));
    let create = || {
        server.post(
            "/sandboxes",
            json!({"templateID": snapshot, "timeout": 300}),
        )
    };
    let (a, b, c) = tokio::join!(create(), create(), create());
    for made in [a, b, c] {
        made.expect(201);
    }
    server
        .delete(&format!("/templates/{snapshot}"))
        .await
        .expect(204);
    assert_eq!(server.fleet.alive().len(), 4, "the copies and their source");
    server
        .post("/sandboxes", json!({"templateID": snapshot}))
        .await
        .expect(404);
}

#[tokio::test]
async fn our_own_calls_tell_everything() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let create = format!("/cubicle/v1/sandboxes/{id}/snapshots");
    let body = json!({"name": "first", "ttl": 3600});
    let taken = server.post(&create, body).await.expect(201).json();
    let first = text(&taken, "snapshotID");
    first.parse::<SnapshotId>().expect("a bare id");
    assert_eq!(taken["names"], json!(["first:default"]));
    assert!(
        taken["phases"]
            .as_array()
            .is_some_and(|phases| !phases.is_empty())
    );
    let disk = server
        .post(&create, json!({"memory": false}))
        .await
        .expect(201)
        .json();
    assert_eq!(disk["tier"], "none");
    let disk = text(&disk, "snapshotID");

    for name in [
        first.clone(),
        "first".into(),
        "first%3Adefault".into(),
        format!("{first}%3Adefault"),
    ] {
        let info = server
            .get(&format!("/cubicle/v1/snapshots/{name}"))
            .await
            .expect(200)
            .json();
        assert_eq!(text(&info, "snapshotID"), first);
        assert_eq!(
            (&info["state"], &info["memory"]),
            (&json!("ready"), &json!(true))
        );
        assert_eq!(text(&info, "sandboxID"), id);
        for number in [
            "bytesScanned",
            "bytesDirty",
            "bytesWritten",
            "logicalBytes",
            "ownBytes",
            "cpuCount",
            "memoryMB",
        ] {
            assert!(info[number].is_u64(), "{number}: {info}");
        }
        assert!(info["durable"].is_boolean() && info["expiresAt"].is_string());
    }
    let disk_info = server
        .get(&format!("/cubicle/v1/snapshots/{disk}"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&disk_info["memory"], &disk_info["expiresAt"]),
        (&json!(false), &Value::Null)
    );

    // A sandbox from the first, and a snapshot of that: a branch.
    let child = server.sandbox(json!({"templateID": first})).await;
    let branch = text(
        &server
            .post(
                &format!("/cubicle/v1/sandboxes/{child}/snapshots"),
                json!({}),
            )
            .await
            .expect(201)
            .json(),
        "snapshotID",
    );
    let info = server
        .get(&format!("/cubicle/v1/snapshots/{first}"))
        .await
        .expect(200)
        .json();
    let children = info["children"].as_array().expect("a list");
    assert!(children.contains(&json!(branch)), "{info}");
    let tree = server
        .get("/cubicle/v1/snapshot-tree")
        .await
        .expect(200)
        .json();
    let places = tree.as_array().expect("a list");
    let place = |id: &str| {
        places
            .iter()
            .position(|p| p["snapshotID"] == id)
            .expect("a place")
    };
    assert_eq!(
        (&places[0]["kind"], &places[0]["alias"]),
        (&json!("template"), &json!("base"))
    );
    assert_eq!(places[0]["depth"], 0);
    assert!(place(&first) < place(&branch));
    let depth = |id: &str| places[place(id)]["depth"].as_u64().expect("a depth");
    assert_eq!(depth(&branch), depth(&first) + 1);
    assert_eq!(
        places[place(&branch)]["snapshot"]["sandboxID"],
        child.as_str()
    );
    let of_child = server
        .get(&format!("/cubicle/v1/snapshot-tree?sandboxID={child}"))
        .await
        .expect(200)
        .json();
    assert!(
        of_child
            .as_array()
            .is_some_and(|all| all.iter().any(|p| p["snapshotID"] == branch))
    );

    // A place outlives what was there, as long as something descends from it.
    server
        .delete(&format!("/cubicle/v1/snapshots/{first}"))
        .await
        .expect(204);
    server
        .delete(&format!("/cubicle/v1/snapshots/{first}"))
        .await
        .expect(404);
    server
        .get(&format!("/cubicle/v1/snapshots/{first}"))
        .await
        .expect(404);
    let tree = server
        .get("/cubicle/v1/snapshot-tree")
        .await
        .expect(200)
        .json();
    let gone = tree
        .as_array()
        .expect("a list")
        .iter()
        .find(|p| p["snapshotID"] == first);
    assert_eq!(gone.expect("its place")["kind"], "deleted");

    let usage = server
        .get("/cubicle/v1/snapshot-usage")
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&usage["count"], &usage["maxCount"]),
        (&json!(2), &json!(10_000))
    );
    assert!(usage["ownBytes"].is_u64() && usage["logicalBytes"].is_u64());
}

#[tokio::test]
async fn a_damaged_snapshot_is_found_and_never_used() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    let snapshot = take(&server, &id, json!({"name": "point"})).await;
    let bare = snapshot.trim_end_matches(":default").to_owned();
    let verify = format!("/cubicle/v1/snapshots/{}/verify", encoded(&snapshot));
    let whole = server.post(&verify, json!({})).await.expect(200).json();
    assert_eq!(
        (&whole["ok"], &whole["reason"]),
        (&json!(true), &Value::Null)
    );
    assert_eq!(whole["snapshotID"], bare.as_str());

    server.fleet.damage(&bare.parse().expect("id"));
    let torn = server.post(&verify, json!({})).await.expect(200).json();
    assert_eq!(
        (&torn["ok"], &torn["snapshotID"]),
        (&json!(false), &json!(bare))
    );
    assert!(
        torn["reason"]
            .as_str()
            .is_some_and(|why| why.contains("checksum")),
        "{torn}"
    );
    let used = server
        .post("/sandboxes", json!({"templateID": snapshot}))
        .await;
    assert!(used.status.is_client_error(), "{}", used.text);
    let back = server
        .post(
            &format!("/sandboxes/{id}/rollback"),
            json!({"snapshotID": snapshot}),
        )
        .await;
    back.expect(409);
    let info = server
        .get(&format!("/cubicle/v1/snapshots/{bare}"))
        .await
        .expect(200)
        .json();
    assert_eq!(info["state"], "failed");
    let listed = server
        .get("/cubicle/v1/snapshots?state=failed")
        .await
        .expect(200)
        .json();
    assert_eq!(listed[0]["snapshotID"], bare.as_str());
    assert_eq!(server.get("/snapshots").await.expect(200).json(), json!([]));
    server
        .post("/cubicle/v1/snapshots/snap-nothing/verify", json!({}))
        .await
        .expect(404);
    server
        .delete(&format!("/templates/{}", encoded(&snapshot)))
        .await
        .expect(204);
}

#[tokio::test]
async fn one_operation_at_a_time() {
    let server = Server::new().await;
    let id = server.sandbox(json!({"templateID": "base"})).await;
    server.fleet.takes(Step::Freeze, Duration::from_millis(200));
    let path = format!("/sandboxes/{id}/snapshots");
    let (slow, refused) = tokio::join!(server.post(&path, json!({})), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.post(&path, json!({})).await
    });
    slow.expect(201);
    let refused = refused.expect(409);
    assert!(
        refused.text.contains("operation in progress"),
        "{}",
        refused.text
    );
    assert_eq!(
        (
            refused.header("should-retry"),
            refused.header("retry-after")
        ),
        ("true", "1")
    );
    server.post(&path, json!({})).await.expect(201);
}
