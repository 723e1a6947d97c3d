//! Templates that are asked for in ways that make no sense: each gets its 4xx, and nothing begins.
#![allow(clippy::expect_used, reason = "helpers of tests may panic")]

mod common;

use std::fmt::Write as _;

use common::Server;
use http::Method;
use serde_json::{Value, json};

/// What is said to each of these bodies; before and after there are the same templates.
async fn refusals(server: &Server, path: &str, bodies: Vec<(&str, Value)>) -> String {
    let before = server.get("/templates").await.expect(200).json();
    let mut said = String::new();
    for (name, body) in bodies {
        let answer = server.post(path, body).await;
        let status = answer.status.as_u16();
        assert!(
            (400..502).contains(&status) && status != 500,
            "{name}: {}",
            answer.text
        );
        let error = answer.json();
        assert_eq!(error["code"], status, "{name}");
        assert_eq!(answer.header("should-retry"), "false", "{name}");
        let message = error["message"].as_str().expect("a message");
        assert!(
            message.len() < 500,
            "{name}: what was sent comes back whole"
        );
        let _ = writeln!(said, "{name}: {status} {message}");
    }
    let after = server.get("/templates").await.expect(200).json();
    assert_eq!(before, after, "bad input changed something");
    said
}

#[tokio::test]
async fn rooms_for_builds() {
    let server = Server::new().await;
    let long = "x".repeat(10_000);
    let with = |field: &str, value: Value| json!({"name": "x", field: value});
    let bodies = vec![
        ("no name", json!({})),
        ("empty name", json!({"name": ""})),
        ("name of a wrong type", json!({"name": 7})),
        ("long name", json!({"name": long})),
        ("name that is a path", json!({"name": "../x"})),
        ("name with a shell", json!({"name": "x;reboot"})),
        ("name with a line", json!({"name": "x\n"})),
        ("name of an id", json!({"name": "tpl-x"})),
        ("bad tag in the name", json!({"name": "x:"})),
        ("bad tag", with("tags", json!(["A B"]))),
        ("tags of a wrong type", with("tags", json!("v1"))),
        ("no CPU", with("cpuCount", json!(0))),
        ("negative CPUs", with("cpuCount", json!(-1))),
        ("half a CPU", with("cpuCount", json!(0.5))),
        ("too little memory", with("memoryMB", json!(1))),
        ("memory beyond numbers", with("memoryMB", json!(1e30))),
        ("negative disk", with("minFreeDiskMb", json!(-1))),
        ("endless disk", with("minFreeDiskMb", json!(i64::MAX))),
    ];
    insta::assert_snapshot!(refusals(&server, "/v3/templates", bodies).await);
}

#[tokio::test]
async fn starts_of_builds() {
    let server = Server::new().await;
    let prepared = server
        .post("/v3/templates", json!({"name": "x"}))
        .await
        .expect(202)
        .json();
    let text = |field: &str| prepared[field].as_str().expect("an id").to_owned();
    let (template, build) = (text("templateID"), text("buildID"));
    let step = |step: Value| json!({"steps": [step]});
    let of = |kind: &str, args: Value| step(json!({"type": kind, "args": args}));
    let hash = "a".repeat(64);
    let copy =
        |args: Value, hash: &str| step(json!({"type": "COPY", "args": args, "filesHash": hash}));
    let long = "x".repeat(200_000);
    let bodies = vec![
        (
            "image and template",
            json!({"fromImage": "a", "fromTemplate": "b"}),
        ),
        ("image with a shell", json!({"fromImage": "a;b"})),
        ("image that is a path", json!({"fromImage": "../a"})),
        ("image with a line", json!({"fromImage": "a\nb"})),
        ("long image", json!({"fromImage": "x".repeat(10_000)})),
        ("image of a wrong type", json!({"fromImage": 7})),
        (
            "registry of a template",
            json!({"fromTemplate": "base", "fromImageRegistry":
            {"type": "registry", "username": "a", "password": "secret"}}),
        ),
        (
            "registry without a type",
            json!({"fromImageRegistry": {"username": "a", "password": "secret"}}),
        ),
        (
            "registry of Amazon",
            json!({"fromImageRegistry": {"type": "aws", "awsRegion": "x"}}),
        ),
        ("steps of a wrong type", json!({"steps": "RUN"})),
        (
            "too many steps",
            json!({"steps": vec![json!({"type": "USER", "args": ["a"]}); 1001]}),
        ),
        ("unknown step", of("ADD", json!(["a", "b"]))),
        ("step without a type", step(json!({"args": []}))),
        ("RUN of nothing", of("RUN", json!([]))),
        ("RUN of blanks", of("RUN", json!([" "]))),
        ("RUN with a NUL", of("RUN", json!(["a\0b"]))),
        ("RUN that is too long", of("RUN", json!([long]))),
        ("RUN with too much", of("RUN", json!(["a", "b", "c"]))),
        ("RUN of a number", of("RUN", json!([1]))),
        ("ENV without a value", of("ENV", json!(["A"]))),
        ("ENV without a name", of("ENV", json!(["", "1"]))),
        ("ENV with a bad name", of("ENV", json!(["A=B", "1"]))),
        ("WORKDIR of nothing", of("WORKDIR", json!([]))),
        ("USER of nothing", of("USER", json!([""]))),
        ("COPY without a hash", of("COPY", json!(["a", "b"]))),
        (
            "COPY with a bad hash",
            copy(json!(["a", "b"]), "../../etc/passwd"),
        ),
        ("COPY without a destination", copy(json!(["a"]), &hash)),
        (
            "COPY with a bad mode",
            copy(json!(["a", "b", "", "u+x"]), &hash),
        ),
        ("COPY of what is not there", copy(json!(["a", "b"]), &hash)),
        ("start command with a NUL", json!({"startCmd": "a\0"})),
        ("unknown template", json!({"fromTemplate": 7})),
    ];
    let path = format!("/v2/templates/{template}/builds/{build}");
    insta::assert_snapshot!(refusals(&server, &path, bodies).await);
    let status = format!("/templates/{template}/builds/{build}/status");
    assert_eq!(
        server.get(&status).await.expect(200).json()["status"],
        "waiting"
    );

    for path in [
        format!("/v2/templates/{template}/builds/x"),
        format!("/v2/templates/base/builds/{build}"),
        "/v2/templates/nothing/builds/x".to_owned(),
    ] {
        server.post(&path, json!({})).await.expect(404);
    }
    for hash in ["x", "..%2F..", &"A".repeat(64), &"a".repeat(10_000)] {
        let path = format!("/templates/{template}/files/{hash}");
        server.get(&path).await.expect(400);
        server
            .send(server.request(Method::PUT, &path, "x"))
            .await
            .expect(400);
        let path = format!("/cubicle/v1/files/{hash}");
        server
            .send(server.request(Method::PUT, &path, "x"))
            .await
            .expect(400);
    }
    let path = format!("/templates/nothing/files/{hash}");
    server.get(&path).await.expect(404);
}

#[tokio::test]
async fn templates_of_cube() {
    let server = Server::new().await;
    let with = |field: &str, value: Value| json!({"image": "x", field: value});
    let bodies = vec![
        ("no image", json!({})),
        ("empty image", json!({"image": " "})),
        ("image with a shell", json!({"image": "x$(reboot)"})),
        ("bad name", with("name", json!("A B"))),
        ("name of an id", with("name", json!("snap-x"))),
        ("no CPU", with("cpu", json!(0))),
        ("CPUs beyond numbers", with("cpu", json!(i64::MAX))),
        ("too little memory", with("memory", json!(1))),
        ("bad size", with("writableLayerSize", json!("lots"))),
        ("endless size", with("writableLayerSize", json!("999999T"))),
        ("port 0", with("exposedPorts", json!([0]))),
        ("port beyond numbers", with("exposedPorts", json!([70000]))),
        ("bad probe", with("probePort", json!(-1))),
        ("path without a port", with("probePath", json!("/x"))),
        (
            "path that is none",
            json!({"image": "x", "probePort": 80, "probePath": "x"}),
        ),
        (
            "two probes",
            json!({"image": "x", "probePort": 80, "probe": {"type": "none"}}),
        ),
        ("unknown probe", with("probe", json!({"type": "magic"}))),
        ("bad variable", with("env", json!(["A"]))),
        ("variable without a name", with("env", json!(["=1"]))),
        ("bad name server", with("dns", json!(["example.com"]))),
        ("name server of IPv6", with("dns", json!(["::1"]))),
        (
            "user without a password",
            with("registryUsername", json!("a")),
        ),
        (
            "password without a user",
            with("registryPassword", json!("secret")),
        ),
        ("args alone", with("args", json!(["a"]))),
        ("another type", with("instanceType", json!("metal"))),
        ("another network", with("networkType", json!("host"))),
        ("unknown node", with("nodes", json!(["elsewhere"]))),
        ("no internet", with("allowInternetAccess", json!(false))),
        ("egress rules", with("denyOut", json!(["0.0.0.0/0"]))),
        ("shared memory", with("enableIvshmem", json!(true))),
        ("empty request id", with("requestID", json!(""))),
        ("long request id", with("requestID", json!("x".repeat(300)))),
    ];
    insta::assert_snapshot!(refusals(&server, "/templates", bodies).await);
    server
        .post("/templates/nothing", json!({}))
        .await
        .expect(404);
    for (job, status) in [
        ("job-x", 404),
        ("x", 404),
        ("job-00000000000000000000000000000000", 404),
    ] {
        let path = format!("/templates/base/builds/{job}/status");
        server.get(&path).await.expect(status);
    }
}

#[tokio::test]
async fn our_own_builds() {
    let server = Server::new().await;
    let step = |step: Value| json!({"steps": [step]});
    let bodies = vec![
        ("two origins", json!({"image": "a", "recipe": "b"})),
        ("empty image", json!({"image": ""})),
        ("bad image", json!({"image": "a b"})),
        ("empty recipe", json!({"recipe": ""})),
        (
            "registry without an image",
            json!({"registryAuth": {"username": "a", "password": "b"}}),
        ),
        ("unknown step", step(json!({"type": "add"}))),
        ("step without a type", step(json!({}))),
        ("empty command", step(json!({"type": "run", "command": ""}))),
        (
            "bad variable",
            step(json!({"type": "env", "env": {"A=B": "1"}})),
        ),
        ("empty path", step(json!({"type": "workdir", "path": ""}))),
        ("empty user", step(json!({"type": "user", "user": ""}))),
        (
            "bad hash",
            step(json!({"type": "copy", "src": "a", "dest": "b", "files": "x"})),
        ),
        (
            "files that are not there",
            step(json!({"type": "copy", "src": "a", "dest": "b",
            "files": "a".repeat(64)})),
        ),
        (
            "bad mode",
            step(
                json!({"type": "copy", "src": "a", "dest": "b", "mode": "rwx",
            "files": "a".repeat(64)}),
            ),
        ),
        ("empty start", json!({"start": " "})),
        ("no program", json!({"command": []})),
        ("bad probe", json!({"ready": {"type": "http", "port": 0}})),
        (
            "bad path of a probe",
            json!({"ready": {"type": "http", "port": 80, "path": "x y"}}),
        ),
        ("no time", json!({"readyWithinSeconds": 0})),
        ("bad name server", json!({"dns": ["x"]})),
        ("port 0", json!({"ports": [0]})),
        ("bad variable of all", json!({"env": {"": "1"}})),
        ("too many CPUs", json!({"cpuCount": 1000})),
        ("too small a disk", json!({"diskSizeMB": 1})),
    ];
    let path = "/cubicle/v1/templates/x/build";
    insta::assert_snapshot!(refusals(&server, path, bodies).await);
}
