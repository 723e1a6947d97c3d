//! Templates, built in E2B's words, in Cube's and in our own, without machines.
#![allow(clippy::expect_used, reason = "helpers of tests may panic")]

mod common;

use axum::body::Body;
use common::{Answer, Server};
use http::{Method, Request};
use serde_json::{Value, json};

/// Asks for a build's status as E2B's clients do, until it has ended and has no more to say.
async fn until_it_ends(server: &Server, template: &str, build: &str) -> (Value, Vec<Value>) {
    let mut lines: Vec<Value> = Vec::new();
    for _ in 0..1000 {
        let offset = lines.len();
        let path = format!("/templates/{template}/builds/{build}/status?logsOffset={offset}");
        let status = server.get(&path).await.expect(200).json();
        let entries = status["logEntries"].as_array().expect("entries").clone();
        let ended = !["waiting", "building"].contains(&text(&status["status"]).as_str());
        if ended && entries.is_empty() {
            return (status, lines);
        }
        lines.extend(entries);
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    panic!("build {build} does not end");
}

async fn prepare(server: &Server, body: Value) -> (String, String) {
    let prepared = server.post("/v3/templates", body).await.expect(202).json();
    (text(&prepared["templateID"]), text(&prepared["buildID"]))
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
        .to_owned()
}

/// Sends a request without a key.
async fn stranger(server: &Server, method: Method, uri: &str, body: &'static [u8]) -> Answer {
    let request = Request::builder().method(method).uri(uri);
    server
        .send(request.body(Body::from(body)).expect("a request"))
        .await
}

#[tokio::test]
async fn a_build_as_e2b_clients_make_it() {
    let server = Server::new().await;
    let body = json!({"name": "web:v1", "tags": ["new"], "cpuCount": 2, "memoryMB": 1024});
    let prepared = server.post("/v3/templates", body).await.expect(202).json();
    assert_eq!(prepared["names"], json!(["web"]));
    assert_eq!(prepared["tags"], json!(["new", "v1"]));
    let (template, build) = (text(&prepared["templateID"]), text(&prepared["buildID"]));
    let waiting = server
        .get(&format!(
            "/templates/{template}/builds/{build}/status?logsOffset=0"
        ))
        .await
        .expect(200)
        .json();
    assert_eq!(waiting["status"], "waiting");

    // The files go to the URL that the server says, and need no key there.
    let hash = "0123456789abcdef".repeat(4);
    let request = Request::builder()
        .uri(format!("/templates/{template}/files/{hash}"))
        .header("x-api-key", &server.key)
        .header("host", "localhost:3000")
        .body(Body::empty())
        .expect("a request");
    let link = server.send(request).await.expect(201).json();
    assert_eq!(link["present"], false);
    let url = text(&link["url"]);
    let path = url
        .strip_prefix("http://localhost:3000")
        .expect("its own address");
    let early = json!({"steps": [{"type": "COPY", "args": ["a", "/a"], "filesHash": hash}]});
    let start = format!("/v2/templates/{template}/builds/{build}");
    let missing = server.post(&start, early).await.expect(400).json();
    assert!(
        text(&missing["message"]).contains("were not uploaded"),
        "{missing}"
    );
    stranger(&server, Method::PUT, path, b"an archive")
        .await
        .expect(200);
    for forged in [
        format!("/templates/{template}/files/{hash}"),
        format!("/templates/{template}/files/{hash}?token=1.2"),
        path.replace("token=", "token=9"),
        path.replace(&hash, &"f".repeat(64)),
        path.replace(&template, "tpl-other"),
    ] {
        stranger(&server, Method::PUT, &forged, b"x")
            .await
            .expect(403);
    }

    let body = json!({
        "fromImage": "python:3",
        "steps": [
            {"type": "COPY", "args": ["a", "/a", "", ""], "filesHash": hash, "force": false},
            {"type": "ENV", "args": ["A", "1"]},
            {"type": "RUN", "args": ["echo hello"]},
            {"type": "USER", "args": ["root"]},
            {"type": "WORKDIR", "args": ["/srv"]},
        ],
        "startCmd": "serve", "readyCmd": "true", "force": false,
    });
    server.post(&start, body.clone()).await.expect(202);
    server.post(&start, body).await.expect(202);
    let (status, lines) = until_it_ends(&server, &template, &build).await;
    assert_eq!(status["status"], "ready", "{status}");
    assert_eq!(status["logs"], json!([]));
    let said: Vec<String> = lines.iter().map(|line| text(&line["message"])).collect();
    assert!(said.iter().any(|line| line == "hello"), "{said:?}");

    // Every tag stands for it, and a sandbox is made of it.
    for name in ["web:v1", "web:new", &template] {
        let created = server.post("/sandboxes", json!({"templateID": name})).await;
        if name == template {
            continue;
        }
        let id = text(&created.expect(201).json()["sandboxID"]);
        server.delete(&format!("/sandboxes/{id}")).await.expect(204);
    }
}

#[tokio::test]
async fn a_step_that_fails_is_named() {
    let server = Server::new().await;
    let (template, build) = prepare(&server, json!({"name": "broken"})).await;
    let steps = json!({"steps": [
        {"type": "RUN", "args": ["true"]},
        {"type": "ENV", "args": ["A", "1"]},
        {"type": "RUN", "args": ["exit 3"]},
        {"type": "RUN", "args": ["echo never"]},
    ]});
    let start = format!("/v2/templates/{template}/builds/{build}");
    server.post(&start, steps).await.expect(202);
    let (status, lines) = until_it_ends(&server, &template, &build).await;
    assert_eq!(status["status"], "error");
    assert_eq!(status["reason"]["step"], "3", "{status}");
    assert!(text(&status["reason"]["message"]).contains('3'), "{status}");
    let of_step = status["reason"]["logEntries"].as_array().expect("entries");
    assert!(!of_step.is_empty() && of_step.iter().all(|line| line["step"] == "3"));
    assert!(!lines.iter().any(|line| line["message"] == "never"));

    // Lines that are not grave enough do not count.
    let grave = format!("/templates/{template}/builds/{build}/status?level=error");
    let first = server.get(&grave).await.expect(200).json();
    let count = first["logEntries"].as_array().expect("entries").len();
    assert!((1..lines.len()).contains(&count), "{first}");
    let rest = server
        .get(&format!("{grave}&logsOffset={count}"))
        .await
        .expect(200)
        .json();
    assert_eq!(rest["logEntries"], json!([]));

    let page = |query: &str| format!("/templates/{template}/builds/{build}/logs?{query}");
    let last = server
        .get(&page("direction=backward&limit=1"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        last["logs"][0]["message"],
        lines.last().expect("a line")["message"]
    );
    let all = server
        .get(&page("limit=100&source=persistent"))
        .await
        .expect(200)
        .json();
    assert_eq!(all["logs"].as_array().expect("lines").len(), lines.len());
    let none = server
        .get(&page("cursor=99999999999999"))
        .await
        .expect(200)
        .json();
    assert_eq!(none["logs"], json!([]));
    server.get(&page("source=elsewhere")).await.expect(400);
}

#[tokio::test]
async fn tags_come_and_go() {
    let server = Server::new().await;
    let assign = json!({"target": "base:default", "tags": ["stable", "v1", "v1"]});
    let assigned = server
        .post("/templates/tags", assign)
        .await
        .expect(201)
        .json();
    assert_eq!(assigned["tags"], json!(["stable", "v1"]));
    let tags = server.get("/templates/base/tags").await.expect(200).json();
    let mut names: Vec<String> = tags
        .as_array()
        .expect("tags")
        .iter()
        .map(|tag| {
            assert_eq!(tag["buildID"], assigned["buildID"]);
            text(&tag["tag"])
        })
        .collect();
    names.sort();
    assert_eq!(names, ["default", "stable", "v1"]);
    let count = server
        .get("/templates/base/tags/count")
        .await
        .expect(200)
        .json();
    assert_eq!(count, json!({"total": 3}));
    let exists = server
        .get("/templates/base/tags/exists?tag=v1")
        .await
        .expect(200)
        .json();
    assert_eq!(exists, json!({"exists": true, "normalizedTag": "v1"}));

    let delete = |body: Value| {
        let request = server.request(Method::DELETE, "/templates/tags", body.to_string());
        server.send(request)
    };
    delete(json!({"name": "base", "tags": ["v1", "never-there"]}))
        .await
        .expect(204);
    delete(json!({"name": "base", "tags": ["v1"]}))
        .await
        .expect(404);
    delete(json!({"name": "base:stable", "tags": ["stable"]}))
        .await
        .expect(400);
    delete(json!({"name": "base", "tags": []}))
        .await
        .expect(400);
    let exists = server
        .get("/templates/base/tags/exists?tag=v1")
        .await
        .expect(200)
        .json();
    assert_eq!(exists["exists"], false);
    for bad in ["base:", ":v1", "", "base:A B"] {
        let body = json!({"target": bad, "tags": ["x"]});
        server.post("/templates/tags", body).await.expect(400);
    }
    let none = json!({"target": "base:none", "tags": ["x"]});
    server.post("/templates/tags", none).await.expect(404);
}

/// Asks for a job as Cube's clients do, until it has ended.
async fn until_job_ends(server: &Server, prefix: &str, job: &Value) -> Value {
    let (template, id) = (text(&job["templateID"]), text(&job["jobID"]));
    for _ in 0..1000 {
        let path = format!("{prefix}/templates/{template}/builds/{id}/status");
        let status = server.get(&path).await.expect(200).json();
        if ["READY", "FAILED"].contains(&text(&status["status"]).as_str()) {
            return status;
        }
        assert!(["PENDING", "BUILDING"].contains(&text(&status["status"]).as_str()));
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    panic!("job {id} does not end");
}

#[tokio::test]
async fn a_template_as_cube_clients_build_it() {
    let server = Server::new().await;
    for prefix in ["", "/cubeapi/v1"] {
        let body = json!({
            "image": "python:3.12", "name": format!("cube{}", prefix.len()), "cpu": 1000,
            "memory": 512, "env": ["A=1"], "exposedPorts": [8000], "dns": ["1.1.1.1"],
        });
        let job = server
            .post(&format!("{prefix}/templates"), body)
            .await
            .expect(202)
            .json();
        assert_eq!(job["jobID"], job["buildID"]);
        let status = until_job_ends(&server, prefix, &job).await;
        assert_eq!(
            (&status["status"], &status["progress"]),
            (&json!("READY"), &json!(100))
        );
        let (template, id) = (text(&job["templateID"]), text(&job["jobID"]));
        let logs = format!("{prefix}/templates/{template}/builds/{id}/logs");
        let logs = server.get(&logs).await.expect(200).json();
        assert!(!logs["lines"].as_array().expect("lines").is_empty());

        let got = server
            .get(&format!("{prefix}/templates/{template}"))
            .await
            .expect(200)
            .json();
        assert_eq!(got["status"], "READY");
        assert_eq!(got["imageInfo"], "python:3.12");
        assert_eq!(got["jobID"], json!(id));
        assert_eq!(got["replicas"][0]["status"], "READY");
        assert_eq!(
            got["createRequest"]["env"],
            json!(["A"]),
            "values may be secrets"
        );
        assert_eq!(got["exposedPorts"], json!([8000]));

        let again = format!("{prefix}/templates/{template}");
        let job = server.post(&again, json!({})).await.expect(202).json();
        assert_ne!(text(&job["jobID"]), id);
        assert_eq!(
            until_job_ends(&server, prefix, &job).await["status"],
            "READY"
        );
        server
            .post(&again, json!({"image": "other"}))
            .await
            .expect(400);
        let builds = server.get(&format!("{again}?limit=1")).await.expect(200);
        let next = builds.header("x-next-token").to_owned();
        assert_eq!(builds.json()["builds"].as_array().expect("builds").len(), 1);
        let rest = server
            .get(&format!("{again}?limit=1&nextToken={next}"))
            .await
            .expect(200);
        assert_eq!(rest.header("x-next-token"), "");
        server
            .get(&format!("{again}?nextToken=x"))
            .await
            .expect(400);
    }
}

#[tokio::test]
async fn one_request_id_is_one_template() {
    let server = Server::new().await;
    let before = server.get("/templates").await.expect(200).json();
    let body = json!({"image": "python:3.12", "requestID": "r-1"});
    let asked = (0..10).map(|_| server.post("/templates", body.clone()));
    let jobs = futures::future::join_all(asked).await;
    let ids: std::collections::BTreeSet<(String, String)> = jobs
        .into_iter()
        .map(|job| {
            let job = job.expect(202).json();
            (text(&job["templateID"]), text(&job["jobID"]))
        })
        .collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let after = server.get("/templates").await.expect(200).json();
    let count = |list: &Value| list.as_array().expect("a list").len();
    assert_eq!(count(&after), count(&before) + 1);

    let other = json!({"image": "python:3.13", "requestID": "r-1"});
    let refused = server.post("/templates", other).await.expect(409).json();
    assert_eq!(refused["error_code"], "idempotency_request_mismatch");

    // The same by a header.
    let send = |image: &str| {
        let body = json!({"image": image}).to_string();
        let mut request = server.request(Method::POST, "/templates", body);
        let headers = request.headers_mut();
        headers.insert("idempotency-key", "r-2".parse().expect("a value"));
        server.send(request)
    };
    let first = send("node:20").await.expect(202).json();
    let second = send("node:20").await.expect(202).json();
    assert_eq!(first["jobID"], second["jobID"]);
    send("node:22").await.expect(409);
}

#[tokio::test]
async fn a_template_has_another_name() {
    let server = Server::new().await;
    let base = server
        .get("/templates/aliases/base")
        .await
        .expect(200)
        .json();
    let put = |reference: &str, alias: Value| {
        let path = format!("/templates/{reference}/alias");
        let body = json!({"alias": alias}).to_string();
        server.send(server.request(Method::PUT, &path, body))
    };
    let renamed = put("base", json!("ground")).await.expect(200).json();
    assert_eq!(renamed["aliases"], json!(["ground"]));
    assert_eq!(renamed["templateID"], base["templateID"]);
    server.get("/templates/aliases/base").await.expect(404);
    server.get("/templates/aliases/ground").await.expect(200);

    let job = server
        .post("/templates", json!({"image": "x", "name": "other"}))
        .await;
    let job = job.expect(202).json();
    until_job_ends(&server, "", &job).await;
    put("other", json!("ground")).await.expect(409);
    server.get("/templates/aliases/other").await.expect(200);
    for bad in [
        json!("tpl-x"),
        json!("snap-x"),
        json!("A"),
        json!("a:b"),
        json!(7),
    ] {
        put("other", bad).await.expect(400);
    }
    put("nothing", json!("x")).await.expect(404);

    let id = text(&job["templateID"]);
    let nameless = put("other", json!("")).await.expect(200).json();
    assert_eq!(nameless["aliases"], json!([]));
    let created = server
        .post("/sandboxes", json!({"templateID": id}))
        .await
        .expect(201);
    let sandbox = text(&created.json()["sandboxID"]);
    server
        .delete(&format!("/sandboxes/{sandbox}"))
        .await
        .expect(204);
    server
        .post(&format!("/templates/{id}"), json!({}))
        .await
        .expect(409);
}

/// The events of a build that is followed.
fn events(answer: &Answer) -> Vec<Value> {
    let lines = answer.text.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[tokio::test]
async fn our_own_builds_follow_what_happens() {
    let server = Server::new().await;
    let hash = "ab".repeat(32);
    let present = format!("/cubicle/v1/files/{hash}");
    assert_eq!(
        server.get(&present).await.expect(200).json(),
        json!({"present": false})
    );
    let put = server.request(Method::PUT, &present, "an archive");
    server.send(put).await.expect(200);
    assert_eq!(
        server.get(&present).await.expect(200).json(),
        json!({"present": true})
    );
    stranger(&server, Method::PUT, &present, b"x")
        .await
        .expect(401);

    let body = json!({
        "image": "python:3.12", "tags": ["v1"],
        "steps": [
            {"type": "copy", "src": "files", "dest": "/a/", "files": hash, "user": "a:b", "mode": "0755"},
            {"type": "env", "env": {"A": "1"}},
            {"type": "workdir", "path": "/a"},
            {"type": "user", "user": "root"},
            {"type": "run", "command": "echo hello"},
        ],
        "ready": {"type": "exec", "command": "true"}, "readyWithinSeconds": 60, "env": {"B": "2"},
        "ports": [80], "dns": ["1.1.1.1"], "memoryMB": 1024,
    });
    let build = "/cubicle/v1/templates/own/build";
    let seen = events(&server.post(build, body.clone()).await.expect(200));
    assert_eq!(seen[0]["type"], "started");
    assert!(
        seen.iter().any(|event| event["message"] == "hello"),
        "{seen:?}"
    );
    let done = seen.last().expect("an end");
    assert_eq!(done["type"], "done", "{done}");
    let again = events(&server.post(build, body).await.expect(200));
    let echoed = again
        .iter()
        .filter(|event| event["message"] == "hello")
        .count();
    assert_eq!(
        echoed, 0,
        "what was done before is not done again: {again:?}"
    );

    for origin in [
        json!({"recipe": "base"}),
        json!({"template": "own:v1"}),
        json!({}),
    ] {
        let seen = events(
            &server
                .post("/cubicle/v1/templates/more/build", origin)
                .await
                .expect(200),
        );
        assert_eq!(seen.last().expect("an end")["type"], "done", "{seen:?}");
    }

    let body = json!({"steps": [{"type": "run", "command": "exit 3"}]});
    let seen = events(
        &server
            .post("/cubicle/v1/templates/bad/build", body)
            .await
            .expect(200),
    );
    let failed = seen.last().expect("an end");
    assert_eq!(
        (&failed["type"], &failed["step"]),
        (&json!("failed"), &json!("1")),
        "{failed}"
    );
}
