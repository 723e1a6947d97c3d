//! What is in volumes over HTTP, as E2B's clients read and write it.

#![allow(clippy::expect_used, reason = "tests may panic")]

mod common;

use axum::body::{Body, Bytes};
use common::{Answer, Server};
use http::{Method, Request};
use serde_json::{Value, json};

/// A server with one volume.
struct Volume {
    server: Server,
    id: String,
    token: String,
}

impl Volume {
    async fn new() -> Self {
        let server = Server::new().await;
        let made = server.post("/volumes", json!({"name": "data"})).await;
        let made = made.expect(201).json();
        let text = |key: &str| made[key].as_str().unwrap_or_default().to_owned();
        Self {
            id: text("volumeID"),
            token: text("token"),
            server,
        }
    }

    async fn ask(&self, method: Method, what: &str, body: impl Into<Body>) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(format!("/volumecontent/{}/{what}", self.id))
            .header("authorization", format!("Bearer {}", self.token))
            .body(body.into())
            .expect("request");
        self.server.send(request).await
    }

    async fn get(&self, what: &str) -> Answer {
        self.ask(Method::GET, what, "").await
    }

    async fn put(&self, what: &str, text: &'static str) -> Answer {
        self.ask(Method::PUT, what, text).await
    }

    async fn make(&self, what: &str) -> Answer {
        self.ask(Method::POST, what, "").await
    }

    /// The paths of everything in it.
    async fn all(&self) -> Vec<Value> {
        let listed = self.get("dir?path=/&depth=9").await.expect(200).json();
        let entries = listed.as_array().cloned().unwrap_or_default();
        entries.into_iter().map(|mut e| e["path"].take()).collect()
    }
}

#[tokio::test]
async fn files_come_and_go() {
    let volume = Volume::new().await;
    let made = volume.make("dir?path=/a/b&force=true&mode=448").await;
    let made = made.expect(201).json();
    assert_eq!(
        (&made["name"], &made["type"], &made["path"], &made["mode"]),
        (
            &json!("b"),
            &json!("directory"),
            &json!("/a/b"),
            &json!(0o700)
        )
    );
    let put = volume.put("file?path=a/b/file.txt", "Hello").await;
    let put = put.expect(201).json();
    assert_eq!(
        (&put["type"], &put["path"], &put["size"], &put["mode"]),
        (
            &json!("file"),
            &json!("/a/b/file.txt"),
            &json!(5),
            &json!(0o644)
        )
    );
    let seen = volume.get("path?path=/a/b/file.txt").await.expect(200);
    assert_eq!(seen.json(), put);
    let read = volume.get("file?path=/a/b/file.txt").await.expect(200);
    assert_eq!(read.text, "Hello");
    assert_eq!(read.header("content-length"), "5");
    assert_eq!(read.header("content-type"), "application/octet-stream");

    let again = volume.put("file?path=/a/b/file.txt&force=false", "x").await;
    let refused = again.expect(409).text;
    assert!(refused.contains("/a/b/file.txt"), "{refused}");
    let put = volume.put("file?path=/a/b/file.txt&force=true", "").await;
    assert_eq!(put.expect(201).json()["size"], 0);
    let read = volume.get("file?path=/a/b/file.txt").await.expect(200);
    assert_eq!(read.text, "");

    let change = json!({"mode": 0o600}).to_string();
    let changed = volume.ask(Method::PATCH, "path?path=/a/b/file.txt", change);
    assert_eq!(changed.await.expect(200).json()["mode"], 0o600);

    let listed = volume.get("dir?path=/").await.expect(200).json();
    assert_eq!(listed[0]["path"], "/a");
    assert_eq!(volume.all().await, ["/a", "/a/b", "/a/b/file.txt"]);
    let root = volume.get("path?path=/").await.expect(200).json();
    assert_eq!((&root["name"], &root["path"]), (&json!("/"), &json!("/")));

    let removed = volume.ask(Method::DELETE, "path?path=/a", "").await;
    removed.expect(204);
    assert!(volume.all().await.is_empty());
}

#[tokio::test]
async fn what_makes_no_sense_changes_nothing() {
    let volume = Volume::new().await;
    volume.put("file?path=/file", "kept").await.expect(201);
    volume.make("dir?path=/dir").await.expect(201);
    for missing in ["path?path=/no", "dir?path=/no", "file?path=/no/x"] {
        volume.get(missing).await.expect(404);
    }
    for bad in [
        "path",
        "path?path=",
        "path?path=/a/../b",
        "path?path=/a&path=/b",
        "path?path=%00",
        "dir?path=/&depth=0",
        "dir?path=/&depth=-1",
        "dir?path=/file",
        "file?path=/dir",
    ] {
        let refused = volume.get(bad).await.expect(400);
        assert_eq!(refused.json()["code"], 400, "{bad}");
    }
    for (bad, status) in [
        ("file?path=/dir&force=true", 400),
        ("file?path=/&force=true", 400),
        ("file?path=/file", 409),
        ("file?path=/no/x", 404),
        ("file?path=/file/x", 400),
        ("file?path=/new&mode=512", 400),
        ("file?path=/new&mode=rw", 400),
        ("file?path=/new&uid=4294967295", 400),
        ("file?path=/new&force=maybe", 400),
    ] {
        volume.put(bad, "changed").await.expect(status);
    }
    for (bad, status) in [
        ("dir?path=/dir", 409),
        ("dir?path=/file&force=true", 409),
        ("dir?path=/x/y", 404),
        ("dir?path=/", 409),
    ] {
        volume.make(bad).await.expect(status);
    }
    for (what, body, status) in [
        ("path?path=/no", r#"{"mode": 1}"#, 404),
        ("path?path=/file", r#"{"mode": 512}"#, 400),
        ("path?path=/file", r#"{"uid": -1}"#, 400),
        ("path?path=/file", "[]", 400),
    ] {
        let answer = volume.ask(Method::PATCH, what, body).await;
        answer.expect(status);
    }
    for (what, status) in [("path?path=/no", 404), ("path?path=/", 400)] {
        let answer = volume.ask(Method::DELETE, what, "").await;
        answer.expect(status);
    }
    let broken = futures::stream::iter([
        Ok(Bytes::from_static(b"half")),
        Err(std::io::Error::other("gone")),
    ]);
    let broken = Body::from_stream(broken);
    let answer = volume.ask(Method::PUT, "file?path=/new", broken).await;
    answer.expect(400);
    assert_eq!(volume.all().await, ["/dir", "/file"]);
    let read = volume.get("file?path=/file").await.expect(200);
    assert_eq!(read.text, "kept");
}

#[tokio::test]
async fn nobody_gets_in_without_the_token_of_that_volume() {
    let mut volume = Volume::new().await;
    volume.put("file?path=/file", "secret").await.expect(201);
    let (id, token) = (volume.id.clone(), volume.token.clone());
    let other = volume.server.post("/volumes", json!({})).await;
    let other = other.expect(201).json();
    let other = |key: &str| other[key].as_str().unwrap_or_default().to_owned();
    let key = volume.server.key.clone();
    for wrong in ["", "x", &other("token"), &key] {
        wrong.clone_into(&mut volume.token);
        let refused = volume.get("file?path=/file").await.expect(401);
        assert!(!refused.text.contains(&token));
        volume.put("file?path=/new", "x").await.expect(401);
    }
    let path = format!("/volumecontent/{id}/path?path=/file");
    volume.server.get(&path).await.expect(401);

    // Names are guessed more easily than ids, so they are none here.
    volume.token.clone_from(&token);
    for unknown in ["data", "vol-0", "..%2F..%2Fetc"] {
        unknown.clone_into(&mut volume.id);
        volume.get("path?path=/file").await.expect(404);
    }
    volume.id.clone_from(&id);
    assert_eq!(volume.all().await, ["/file"]);
    let deleted = volume.server.delete(&format!("/volumes/{id}")).await;
    deleted.expect(204);
    volume.get("path?path=/file").await.expect(404);
}
