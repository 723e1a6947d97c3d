//! Volumes over HTTP, as E2B's clients and Cube's ask for them.

mod common;

use common::Server;
use serde_json::{Value, json};

#[tokio::test]
async fn made_listed_mounted_and_deleted_in_both_dialects() {
    for prefix in ["", "/cubeapi/v1"] {
        let server = Server::new().await;
        let path = format!("{prefix}/volumes");
        let made = server.post(&path, json!({"name": "data"})).await;
        let made = made.expect(201).json();
        let (id, token) = (&made["volumeID"], &made["token"]);
        assert_eq!(made["name"], "data");
        assert!(token.as_str().is_some_and(|token| token.len() >= 32));
        let unnamed = server.post(&path, json!({"driver": "local"})).await;
        unnamed.expect(201);
        let listed = server.get(&path).await.expect(200).json();
        assert_eq!(listed[0], json!({"volumeID": id, "name": "data"}));
        assert_eq!(listed.as_array().map(Vec::len), Some(2));
        let id = id.as_str().unwrap_or_default().to_owned();
        for reference in ["data", &id] {
            let one = server.get(&format!("{path}/{reference}")).await;
            assert_eq!(one.expect(200).json(), made);
        }
        let taken = server.post(&path, json!({"name": "data"})).await;
        taken.expect(409);
        for bad in [
            json!({"name": "a/b"}),
            json!({"name": ""}),
            json!({"name": 1}),
        ] {
            server.post(&path, bad).await.expect(400);
        }
        let driver = server.post(&path, json!({"driver": "juicefs"})).await;
        driver.expect(501);

        let sandbox = server
            .sandbox(json!({
                "templateID": "base",
                "metadata": {"a": "b"},
                "volumeMounts": [
                    {"name": "data", "path": "/data"},
                    {"name": id, "path": "/same", "readOnly": true},
                ],
            }))
            .await;
        let shown = json!([
            {"name": "data", "path": "/data"},
            {"name": "data", "path": "/same", "readOnly": true},
        ]);
        let detail = server.get(&format!("{prefix}/sandboxes/{sandbox}")).await;
        assert_eq!(detail.expect(200).json()["volumeMounts"], shown);

        let in_use = server.delete(&format!("{path}/data")).await.expect(409);
        assert!(in_use.text.contains(&sandbox), "{}", in_use.text);
        server
            .delete(&format!("/sandboxes/{sandbox}"))
            .await
            .expect(204);
        server.delete(&format!("{path}/data")).await.expect(204);
        for gone in ["data", &id, "never-was"] {
            server.delete(&format!("{path}/{gone}")).await.expect(404);
            server.get(&format!("{path}/{gone}")).await.expect(404);
        }
    }
}

#[tokio::test]
async fn directories_of_the_host_are_refused_unless_they_are_allowed() {
    let server = Server::new().await;
    let create = |mounts: Value| {
        let body = json!({"templateID": "base", "metadata": {"host-mount": mounts}});
        server.post("/v2/sandboxes", body)
    };
    let mount = json!([{"hostPath": "/etc", "mountPath": "/m"}]).to_string();
    let refused = create(mount.into()).await.expect(403);
    assert!(
        refused.text.contains("--host-mount-allow"),
        "{}",
        refused.text
    );
    let nonsense = create("/etc".into()).await.expect(400);
    assert!(nonsense.text.contains("hostPath"), "{}", nonsense.text);
    // Asking for none is asking for nothing; the key is not for the user's eyes.
    let created = create("[]".into()).await.expect(201).json();
    let id = created["sandboxID"].as_str().unwrap_or_default();
    let detail = server.get(&format!("/sandboxes/{id}")).await.expect(200);
    assert_eq!(detail.json()["metadata"], json!({}));
}

#[tokio::test]
async fn what_cannot_be_mounted_is_a_bad_request() {
    let server = Server::new().await;
    let made = server.post("/volumes", json!({"name": "data"})).await;
    made.expect(201);
    for mounts in [
        json!([{"name": "missing", "path": "/data"}]),
        json!([{"name": "data", "path": "data"}]),
        json!([{"name": "data", "path": "/"}]),
        json!([{"name": "data", "path": "/proc/x"}]),
        json!([{"name": "data", "path": "/a"}, {"name": "data", "path": "/a/b"}]),
        json!([{"name": "data"}]),
        json!({"name": "data", "path": "/data"}),
    ] {
        let body = json!({"templateID": "base", "volumeMounts": mounts});
        server.post("/v2/sandboxes", body).await.expect(400);
    }
}
