//! The protocol under the services: what may be left out, and how it is spelled.

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use buffa::Message as _;
use cubicle_guest::proto::{
    filesystem::{ListDirRequest, StatRequest, StatResponse},
    process::{
        ProcessInput, SendSignalRequest, Signal, process_event::EndEvent, process_input::Input,
    },
};
use serde_json::{json, to_value};

use crate::support::{Sandbox, frame, frames, gzip};

#[tokio::test]
async fn json_is_that_of_protobuf() {
    let end = EndEvent {
        exit_code: Some(0),
        exited: true,
        status: "exit status 0".to_owned(),
        ..EndEvent::default()
    };
    assert_eq!(
        to_value(&end).unwrap(),
        json!({"exitCode": 0, "exited": true, "status": "exit status 0"})
    );
    let end = EndEvent {
        exit_code: Some(-1),
        error: Some(String::new()),
        ..EndEvent::default()
    };
    assert_eq!(
        to_value(&end).unwrap(),
        json!({"exitCode": -1, "error": ""})
    );

    let input: ProcessInput = serde_json::from_value(json!({"stdin": "aGkK"})).unwrap();
    assert_eq!(input.input, Some(Input::Stdin(b"hi\n".to_vec())));
    for signal in [json!("SIGNAL_SIGTERM"), json!(15)] {
        let request: SendSignalRequest =
            serde_json::from_value(json!({"process": {"pid": 1}, "signal": signal})).unwrap();
        assert_eq!(request.signal, Signal::SIGNAL_SIGTERM);
    }

    let sandbox = Sandbox::new();
    std::fs::write(sandbox.home("five"), "12345").unwrap();
    let entry = &sandbox.ask("Stat", json!({"path": "five"})).await["entry"];
    assert_eq!(entry["size"], "5");
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert!(entry["modifiedTime"].as_str().unwrap().ends_with('Z'));
    assert_eq!(entry.get("isSymlink"), None);
    // Both spellings of names, numbers as text, and what this version doesn't know.
    for request in [
        json!({"path": ".", "includeEntry": true}),
        json!({"path": ".", "include_entry": true, "future": {"x": [1]}}),
    ] {
        assert!(sandbox.ask("CreateWatcher", request).await["watcherId"].is_string());
    }
    let listed = sandbox
        .ask("ListDir", json!({"path": "", "depth": "1"}))
        .await;
    assert_eq!(listed["entries"][0]["name"], "five");
}

#[tokio::test]
async fn unary_calls_may_be_binary_or_compressed() {
    let sandbox = Sandbox::new();
    let request = StatRequest {
        path: "/".to_owned(),
        ..StatRequest::default()
    };
    let uri = "/filesystem.Filesystem/Stat";
    let answer = sandbox
        .post(uri, "application/proto", request.encode_to_vec())
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), Some("application/proto"));
    let response = StatResponse::decode_from_slice(&answer.body).unwrap();
    assert_eq!(response.entry.name, "/");

    for (encoding, body) in [
        ("identity", br#"{"path":"/"}"#.to_vec()),
        ("gzip", gzip(br#"{"path":"/"}"#)),
    ] {
        let request = Request::post(uri)
            .header(header::CONTENT_TYPE, "application/json; charset=utf-8")
            .header(header::CONTENT_ENCODING, encoding)
            .header("connect-protocol-version", "1")
            .body(Body::from(body));
        let answer = sandbox.send(request.unwrap()).await;
        assert_eq!(answer.json()["entry"]["path"], "/", "{encoding}");
    }
}

#[tokio::test]
async fn errors_carry_their_code_as_status_too() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.home("there")).unwrap();
    let (status, code, message) = sandbox.fail("Stat", json!({"path": "nope"})).await;
    assert_eq!(
        (status, code.as_str()),
        (StatusCode::NOT_FOUND, "not_found")
    );
    assert_eq!(
        message,
        format!("path '{}' does not exist", sandbox.home("nope").display())
    );
    let (status, code, _) = sandbox.fail("MakeDir", json!({"path": "there"})).await;
    assert_eq!(
        (status, code.as_str()),
        (StatusCode::CONFLICT, "already_exists")
    );
    let (status, code, _) = sandbox.fail("Stat", json!({"path": "~x"})).await;
    assert_eq!(
        (status, code.as_str()),
        (StatusCode::BAD_REQUEST, "invalid_argument")
    );

    let broken = sandbox
        .post("/filesystem.Filesystem/Stat", "application/json", "{")
        .await;
    assert_eq!(broken.status, StatusCode::BAD_REQUEST);
    assert_eq!(broken.json()["code"], "invalid_argument");
    let unknown = sandbox
        .post("/filesystem.Filesystem/Nope", "application/json", "{}")
        .await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn users_are_chosen_by_basic_authentication() {
    let sandbox = Sandbox::new();
    let stat = |credentials: &'static str| {
        let request = Request::post("/filesystem.Filesystem/Stat")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, credentials)
            .body(Body::from(r#"{"path":"~"}"#));
        sandbox.send(request.unwrap())
    };
    let root = stat("Basic cm9vdDo=").await.json();
    assert_eq!(
        root["entry"]["path"],
        sandbox.root().join("root").to_str().unwrap()
    );
    let user = stat("Basic dXNlcjo=").await.json();
    assert_eq!(
        user["entry"]["path"],
        sandbox.home("").to_str().unwrap().trim_end_matches('/')
    );
    let nobody = stat("Basic bm9ib2R5Og==").await;
    assert_eq!(nobody.status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        nobody.json(),
        json!({"code": "unauthenticated", "message": "invalid username: 'nobody'"})
    );
    sandbox
        .state
        .update(|settings| settings.default_user = None);
    let (_, code, message) = sandbox.fail("Stat", json!({"path": "~"})).await;
    assert_eq!(
        (code.as_str(), message.as_str()),
        ("unauthenticated", "no user specified")
    );
}

#[tokio::test]
async fn errors_of_streams_come_in_their_last_message() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.home("file"), "").unwrap();
    for (path, code) in [("nope", "not_found"), ("file", "invalid_argument")] {
        let request = frame(0, json!({"path": path}).to_string().as_bytes());
        let uri = "/filesystem.Filesystem/WatchDir";
        let answer = sandbox.post(uri, "application/connect+json", request).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(
            answer.header("content-type"),
            Some("application/connect+json")
        );
        let frames = frames(&answer.body);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].0, 2);
        let end: serde_json::Value = serde_json::from_slice(&frames[0].1).unwrap();
        assert_eq!(end["error"]["code"], code);
    }
}

#[tokio::test]
async fn streams_may_be_binary_and_their_requests_compressed() {
    let sandbox = Sandbox::new();
    // Any message with a path as its first field will do.
    let request = ListDirRequest {
        path: ".".to_owned(),
        ..ListDirRequest::default()
    };
    let plain = request.encode_to_vec();
    for (flags, body) in [(0, plain.clone()), (1, gzip(&plain))] {
        let request = Request::post("/filesystem.Filesystem/WatchDir")
            .header(header::CONTENT_TYPE, "application/connect+proto")
            .header("connect-content-encoding", "gzip")
            .header("connect-timeout-ms", "50")
            .body(Body::from(frame(flags, &body)));
        let answer = sandbox.send(request.unwrap()).await;
        let frames = frames(&answer.body);
        // `{start: {}}`, and the end at the deadline.
        assert_eq!(frames[0], (0, vec![0x0a, 0x00]));
        assert_eq!(frames[1].0, 2);
        let end: serde_json::Value = serde_json::from_slice(&frames[1].1).unwrap();
        assert_eq!(end["error"]["code"], "deadline_exceeded");
    }
}
