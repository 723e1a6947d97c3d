//! The template store, over HTTP.
#![allow(clippy::expect_used, reason = "these are tests")]

mod common;

use axum::body::Body;
use common::Server;
use cubicle_control::{
    store::{Entry, StoreConfig},
    template::{BuildSpec, Probe, Size},
};
use http::Method;
use serde_json::{Value, json};

/// What the shipped catalogue names, as small as can be.
fn recipes() -> StoreConfig {
    let recipe = |name: &str| Entry {
        name: name.into(),
        description: format!("all of {name}"),
        category: "code".into(),
        size: Size::default(),
        spec: BuildSpec {
            ready: Probe::Http {
                port: 8000,
                path: "/".into(),
            },
            // What machines in memory understand: something that answers a probe.
            start: Some("serve".into()),
            ports: vec![8000],
            env: vec![("HOME".into(), "/x".into())],
            ..BuildSpec::recipe(name)
        },
    };
    StoreConfig {
        recipes: ["base", "code-interpreter-v1", "desktop-browser", "node"]
            .map(recipe)
            .into(),
        source: None,
    }
}

async fn server() -> Server {
    Server::configured(|config| config.store = recipes()).await
}

fn events(text: &str) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).expect("one JSON object a line");
    text.lines().map(parse).collect()
}

#[tokio::test]
async fn the_store_is_the_same_under_every_prefix() {
    let server = server().await;
    let answer = server.get("/cubicle/v1/store").await.expect(200).json();
    assert_eq!(
        (&answer["version"], &answer["source"]),
        (&json!(1), &json!("shipped"))
    );
    let names: Vec<_> = answer["templates"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let names: Vec<_> = names.iter().map(|t| t["name"].as_str()).collect();
    let expected = ["base", "code-interpreter-v1", "node", "desktop-browser"].map(Some);
    assert_eq!(names, expected);
    for path in ["/store", "/cubeapi/v1/store"] {
        assert_eq!(server.get(path).await.expect(200).json(), answer, "{path}");
    }
    let refreshed = server.post("/cubicle/v1/store/refresh", json!({})).await;
    assert_eq!(refreshed.expect(200).json(), answer);
}

#[tokio::test]
async fn a_template_of_the_store_says_what_it_is_and_whether_it_is_here() {
    let server = server().await;
    let node = server
        .get("/cubicle/v1/store/node")
        .await
        .expect(200)
        .json();
    let expected = json!({
        "name": "node", "description": "all of node", "category": "code",
        "cpuCount": 1, "memoryMB": 512, "diskSizeMB": 8192, "ports": [8000],
        "env": {"HOME": "/x"}, "start": "serve",
        "ready": {"http": {"port": 8000, "path": "/"}},
        "from": {"recipe": "node"}, "steps": [],
    });
    assert_eq!(node, expected);
    let base = server
        .get("/cubicle/v1/store/base")
        .await
        .expect(200)
        .json();
    assert_eq!(base["installed"]["buildStatus"], "ready");
    let missing = server.get("/cubicle/v1/store/nope").await.expect(404);
    assert_eq!(
        missing.json()["message"],
        "the template store has no template 'nope'"
    );
}

#[tokio::test]
async fn installing_answers_with_the_build_and_makes_a_template() {
    let server = server().await;
    let path = "/cubicle/v1/store/node/install";
    let answer = server.post(path, json!({})).await.expect(200);
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    let said = events(&answer.text);
    let done = said.last().expect("an end");
    assert_eq!(
        (&done["type"], &done["cached"]),
        (&json!("done"), &json!(false))
    );
    assert!(
        said.iter().any(|event| event["type"] == "progress"),
        "{said:?}"
    );
    let node = server
        .get("/cubicle/v1/store/node")
        .await
        .expect(200)
        .json();
    assert_eq!(node["installed"]["templateID"], done["templateId"]);

    let again = server.post(path, json!({})).await.expect(200);
    assert_eq!(events(&again.text).last().expect("an end")["cached"], true);

    let wanted = json!({"alias": "mine:v1", "memoryMB": 1024});
    server.post(path, wanted).await.expect(200);
    let mine = server.get("/templates/aliases/mine").await;
    mine.expect(200);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let server = server().await;
    let install = |name: &str, body: Value| {
        let path = format!("/cubicle/v1/store/{name}/install");
        let server = &server;
        async move { server.post(&path, body).await }
    };
    install("nope", json!({})).await.expect(404);
    let small = install("node", json!({"memoryMB": 1})).await.expect(400);
    assert!(small.text.contains("memoryMB"), "{}", small.text);
    install("node", json!({"alias": "no such name"}))
        .await
        .expect(400);
    install("node", json!([])).await.expect(400);
    let mut anonymous = server.request(Method::GET, "/cubicle/v1/store", Body::empty());
    anonymous.headers_mut().remove("x-api-key");
    server.send(anonymous).await.expect(401);
}
