//! What the sandbox says of itself, and what it is told.

use std::fs;

use axum::{
    body::Body,
    http::{Request, StatusCode},
};
use cubicle_protocol::guest_api::Introduced;
use serde_json::json;

use crate::support::Sandbox;

#[tokio::test]
async fn only_health_is_open_without_the_token() {
    let sandbox = Sandbox::with_token("secret");
    let health = sandbox.get("/health").await;
    assert_eq!((health.status, health.text()), (StatusCode::NO_CONTENT, ""));
    for uri in ["/metrics", "/envs", "/nope", "/filesystem.Filesystem/Stat"] {
        let answer = sandbox.get(uri).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{uri}");
        assert_eq!(answer.json()["code"], 401);
        let request = Request::get(uri).header("x-access-token", "secre");
        let answer = sandbox.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{uri}");
        let request = Request::get(uri).header("x-access-token", "secret");
        let answer = sandbox.send(request.body(Body::empty()).unwrap()).await;
        assert_ne!(answer.status, StatusCode::UNAUTHORIZED, "{uri}");
    }
    let answer = sandbox
        .post("/files/compose", "application/json", "{}")
        .await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn wrong_routes_and_methods_are_json() {
    let sandbox = Sandbox::new();
    let answer = sandbox.get("/nope").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(
        answer.json(),
        json!({"code": 404, "message": "no such route"})
    );
    for (method, uri) in [("DELETE", "/files"), ("POST", "/metrics"), ("PUT", "/envs")] {
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .body(Body::empty())
            .unwrap();
        let answer = sandbox.send(request).await;
        assert_eq!(
            answer.status,
            StatusCode::METHOD_NOT_ALLOWED,
            "{method} {uri}"
        );
        assert_eq!(answer.json()["code"], 405);
    }
}

#[tokio::test]
async fn browsers_of_every_origin_may_ask() {
    let sandbox = Sandbox::with_token("secret");
    let request = Request::builder()
        .method("OPTIONS")
        .uri("/filesystem.Filesystem/Stat")
        .header("origin", "https://example.com")
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "x-access-token,connect-protocol-version",
        );
    let answer = sandbox.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("access-control-allow-headers"), Some("*"));
}

#[tokio::test]
async fn metrics_have_the_names_that_clients_read() {
    let metrics = Sandbox::new().get("/metrics").await.json();
    let mut names: Vec<_> = metrics
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    names.sort_unstable();
    assert_eq!(
        names.join(" "),
        "cpu_count cpu_used_pct disk_total disk_used mem_cache mem_total mem_total_mib mem_used \
         mem_used_mib ts"
    );
}

#[tokio::test]
async fn the_host_says_who_the_sandbox_is() {
    let sandbox = Sandbox::new();
    let init = async |request: serde_json::Value| match sandbox.introduce(request).await {
        Introduced::Became(response) => response,
        Introduced::Refused(why) => panic!("{why}"),
    };
    let first = json!({
        "envVars": {"GREETING": "hello", "E2B_SANDBOX_ID": "forged"},
        "accessToken": "secret",
        "defaultUser": "root",
        "defaultWorkdir": "/srv",
        "sandboxID": "iabcdefghij0123456789"[..20],
        "machineID": "0123456789abcdef0123456789abcdef",
        "dnsServers": ["9.9.9.9"],
        "generation": 1,
        "nonce": "first",
    });
    let answer = init(first).await;
    assert_eq!(answer.envd_version, cubicle_protocol::ENVD_VERSION);
    assert_eq!(answer.previous_nonce, None);
    let read = |path: &str| fs::read_to_string(sandbox.root().join(path)).unwrap();
    assert_eq!(read("etc/machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert_eq!(read("etc/resolv.conf"), "nameserver 9.9.9.9\n");
    assert_eq!(read("run/e2b/.E2B_SANDBOX"), "true");
    assert_eq!(read("run/e2b/.E2B_SANDBOX_ID"), "iabcdefghij012345678");

    let request = Request::get("/envs").header("x-access-token", "secret");
    let envs = sandbox.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(
        envs.json(),
        json!({
            "E2B_SANDBOX": "true",
            "E2B_SANDBOX_ID": "iabcdefghij012345678",
            "GREETING": "hello",
        })
    );
    let settings = sandbox.state.settings();
    assert_eq!(settings.default_user.as_deref(), Some("root"));
    assert_eq!(settings.default_workdir.as_deref(), Some("/srv".as_ref()));

    // What isn't said stays; the environment is replaced; the nonce shows where this VM is from.
    let answer = init(json!({"envVars": {"B": "2"}, "nonce": "second"})).await;
    assert_eq!(answer.previous_nonce.as_deref(), Some("first"));
    let settings = sandbox.state.settings();
    assert_eq!(settings.env_vars.keys().collect::<Vec<_>>(), ["B"]);
    assert!(settings.access_token.as_ref().unwrap().matches(b"secret"));
    assert_eq!(settings.sandbox_id.as_deref(), Some("iabcdefghij012345678"));
    assert_eq!(settings.generation, Some(1));
}

#[tokio::test]
async fn a_request_that_cannot_be_met_fails() {
    let sandbox = Sandbox::new();
    let refused = async |request: serde_json::Value| match sandbox.introduce(request).await {
        Introduced::Refused(why) => why,
        Introduced::Became(response) => panic!("became {response:?}"),
    };
    let why = refused(json!({"machineID": "x"})).await;
    assert!(why.starts_with("invalid machine id 'x'"), "{why}");
    // A directory where the file should be.
    fs::create_dir_all(sandbox.root().join("etc/resolv.conf")).unwrap();
    let why = refused(json!({"dnsServers": ["1.1.1.1"]})).await;
    assert!(why.contains("etc/resolv.conf"), "{why}");
}

/// In a UTS namespace of the thread's own, so that this machine keeps its name.
#[test]
fn the_host_name_can_be_resolved() {
    let test = || {
        // SAFETY: only the UTS namespace of this thread is changed; nothing else is shared with it.
        let own = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUTS) };
        if own.is_err() {
            return; // It takes privileges.
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let sandbox = Sandbox::new();
            let answer = sandbox.introduce(json!({"hostname": "cell-7"})).await;
            assert!(matches!(answer, Introduced::Became(_)), "{answer:?}");
            let name = rustix::system::uname();
            assert_eq!(name.nodename().to_str(), Ok("cell-7"));
            let read = |path: &str| fs::read_to_string(sandbox.root().join(path)).unwrap();
            assert_eq!(read("etc/hostname"), "cell-7\n");
            assert!(read("etc/hosts").ends_with("\n127.0.1.1 cell-7\n"));
        });
    };
    std::thread::spawn(test).join().unwrap();
}
