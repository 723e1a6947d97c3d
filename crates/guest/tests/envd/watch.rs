//! Changes, as they are reported.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use axum::{
    body::Body,
    http::{Request, StatusCode},
};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::support::{Sandbox, frame, frames};

struct Watcher<'a> {
    sandbox: &'a Sandbox,
    id: String,
}

impl<'a> Watcher<'a> {
    async fn create(sandbox: &'a Sandbox, request: Value) -> Self {
        let created = sandbox.ask("CreateWatcher", request).await;
        Self {
            sandbox,
            id: created["watcherId"].as_str().unwrap().to_owned(),
        }
    }

    async fn events(&self) -> Vec<Value> {
        let mut answer = self
            .sandbox
            .ask("GetWatcherEvents", json!({"watcherId": self.id}))
            .await;
        match answer["events"].take() {
            Value::Array(events) => events,
            _ => Vec::new(),
        }
    }

    /// The events as `CREATE name`.
    async fn lines(&self) -> Vec<String> {
        self.events().await.iter().map(line).collect()
    }
}

fn line(event: &Value) -> String {
    let kind = event["type"]
        .as_str()
        .unwrap()
        .trim_start_matches("EVENT_TYPE_");
    format!("{kind} {}", event["name"].as_str().unwrap())
}

fn with_dir(name: &str) -> Sandbox {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.home(name)).unwrap();
    sandbox
}

#[tokio::test]
async fn an_upload_is_three_events_and_no_temporary_file() {
    let sandbox = with_dir("d");
    let watcher = Watcher::create(&sandbox, json!({"path": "d"})).await;
    sandbox.upload("d/f", "content").await;
    assert_eq!(watcher.lines().await, ["CREATE f", "CHMOD f", "WRITE f"]);
    // What is there is emptied first. The kernel makes one event of both, unless the first has been
    // read by then.
    sandbox.upload("d/f", "other").await;
    let mut lines = watcher.lines().await;
    lines.extend(watcher.lines().await);
    assert!((1..=2).contains(&lines.len()), "{lines:?}");
    assert!(lines.iter().all(|line| line == "WRITE f"), "{lines:?}");
    assert_eq!(watcher.lines().await, [""; 0]);
}

#[tokio::test]
async fn every_kind_of_change_is_told() {
    let sandbox = with_dir("d");
    let watcher = Watcher::create(&sandbox, json!({"path": "d"})).await;
    let path = |name: &str| sandbox.home("d").join(name);
    fs::write(path("a"), "x").unwrap();
    fs::set_permissions(path("a"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(path("a"), path("b")).unwrap();
    fs::remove_file(path("b")).unwrap();
    fs::create_dir(path("sub")).unwrap();
    fs::write(path("sub/below"), "x").unwrap();
    fs::remove_dir_all(path("sub")).unwrap();
    let want = "CREATE a, WRITE a, CHMOD a, RENAME a, CREATE b, REMOVE b, CREATE sub, REMOVE sub";
    assert_eq!(watcher.lines().await.join(", "), want);
    fs::remove_dir(sandbox.home("d")).unwrap();
    assert_eq!(watcher.lines().await, ["REMOVE ."]);
}

#[tokio::test]
async fn entries_come_with_what_still_exists() {
    let sandbox = with_dir("d");
    let request = json!({"path": "d", "includeEntry": true});
    let watcher = Watcher::create(&sandbox, request).await;
    sandbox.upload("d/f", "content").await;
    let events = watcher.events().await;
    for event in &events {
        assert_eq!(
            event["entry"]["path"],
            sandbox.home("d/f").to_str().unwrap()
        );
    }
    // It becomes the user's between the first event and the second.
    assert_eq!(events.last().unwrap()["entry"]["owner"], "user");
    fs::remove_file(sandbox.home("d/f")).unwrap();
    fs::write(sandbox.home("d/f"), "").unwrap();
    let events = watcher.events().await;
    assert_eq!(line(&events[0]), "REMOVE f");
    assert_eq!(events[0].get("entry"), None);
    assert_eq!(
        events[1]["entry"]["size"].as_str(),
        None,
        "zero is left out"
    );
    assert_eq!(events[1]["entry"]["name"], "f");
}

#[tokio::test]
async fn recursion_reaches_what_is_made_later() {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.home("d/old/er")).unwrap();
    let watcher = Watcher::create(&sandbox, json!({"path": "d", "recursive": true})).await;
    sandbox.upload("d/old/er/f", "x").await;
    assert_eq!(
        watcher.lines().await,
        ["CREATE old/er/f", "CHMOD old/er/f", "WRITE old/er/f"]
    );

    // All at once, before anybody could have looked.
    fs::create_dir_all(sandbox.home("d/new/est")).unwrap();
    fs::write(sandbox.home("d/new/est/f"), "x").unwrap();
    fs::write(sandbox.home("d/new/empty"), "").unwrap();
    let lines = watcher.lines().await;
    assert_eq!(lines[0], "CREATE new");
    let position = |line: &str| {
        let found = lines.iter().position(|found| found == line);
        found.unwrap_or_else(|| panic!("no {line} in {lines:?}"))
    };
    assert!(position("CREATE new/est") < position("CREATE new/est/f"));
    assert!(position("CREATE new/est/f") < position("WRITE new/est/f"));
    position("CREATE new/empty");
    let created = lines
        .iter()
        .filter(|line| line.starts_with("CREATE"))
        .count();
    assert_eq!(created, 4, "each once: {lines:?}");

    fs::write(sandbox.home("d/new/est/g"), "x").unwrap();
    assert_eq!(
        watcher.lines().await,
        ["CREATE new/est/g", "WRITE new/est/g"]
    );
}

#[tokio::test]
async fn recursion_follows_directories_that_move() {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.home("d/a/b")).unwrap();
    fs::create_dir_all(sandbox.home("out/side")).unwrap();
    fs::write(sandbox.home("out/side/f"), "x").unwrap();
    let watcher = Watcher::create(&sandbox, json!({"path": "d", "recursive": true})).await;
    let path = |name: &str| sandbox.home(name);

    fs::rename(path("d/a"), path("d/z")).unwrap();
    fs::write(path("d/z/b/f"), "").unwrap();
    assert_eq!(
        watcher.lines().await,
        ["RENAME a", "CREATE z", "CREATE z/b/f"]
    );

    fs::rename(path("d/z"), path("out/z")).unwrap();
    assert_eq!(watcher.lines().await, ["RENAME z"]);
    fs::write(path("out/z/b/g"), "").unwrap();
    assert_eq!(watcher.lines().await, [""; 0]);

    fs::rename(path("out/side"), path("d/side")).unwrap();
    assert_eq!(
        watcher.lines().await,
        ["CREATE side", "CREATE side/f", "WRITE side/f"]
    );
    fs::remove_file(path("d/side/f")).unwrap();
    assert_eq!(watcher.lines().await, ["REMOVE side/f"]);
}

/// Whatever the order in which a tree is made and read, everything in it is reported created, and
/// nothing twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_in_a_race() {
    let sandbox = with_dir("d");
    let watcher = Watcher::create(&sandbox, json!({"path": "d", "recursive": true})).await;
    let root = sandbox.home("d");
    let writer = tokio::task::spawn_blocking(move || {
        for number in 0..200 {
            let directory = root.join(format!("{number}/x/y"));
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("f"), "x").unwrap();
        }
    });
    writer.await.unwrap();
    let mut lines = watcher.lines().await;
    lines.retain(|line| line.starts_with("CREATE"));
    lines.sort_unstable();
    let mut want: Vec<String> = (0..200)
        .flat_map(|number| {
            ["", "/x", "/x/y", "/x/y/f"].map(|path| format!("CREATE {number}{path}"))
        })
        .collect();
    want.sort_unstable();
    assert_eq!(lines, want);
}

#[tokio::test]
async fn too_many_events_are_an_error_once() {
    let sandbox = with_dir("d");
    let watcher = Watcher::create(&sandbox, json!({"path": "d"})).await;
    // More than the kernel queues while the watcher cannot run.
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    let paths = ["a", "b"].map(|name| sandbox.home("d").join(name));
    fs::write(&paths[0], "").unwrap();
    for round in 0..limit {
        fs::rename(&paths[round % 2], &paths[(round + 1) % 2]).unwrap();
    }
    let request = json!({"watcherId": watcher.id});
    let (_, code, message) = sandbox.fail("GetWatcherEvents", request).await;
    assert_eq!(code, "data_loss", "{message}");
    fs::write(sandbox.home("d/c"), "").unwrap();
    assert_eq!(watcher.lines().await, ["CREATE c"]);
}

#[tokio::test]
async fn watchers_end_and_are_limited() {
    let sandbox = with_dir("d");
    let watcher = Watcher::create(&sandbox, json!({"path": "d"})).await;
    let request = json!({"watcherId": watcher.id});
    sandbox.ask("RemoveWatcher", request.clone()).await;
    for method in ["GetWatcherEvents", "RemoveWatcher"] {
        let (status, code, _) = sandbox.fail(method, request.clone()).await;
        assert_eq!(
            (status, code.as_str()),
            (StatusCode::NOT_FOUND, "not_found")
        );
    }
    let mut last = String::new();
    for _ in 0..100 {
        last = Watcher::create(&sandbox, json!({"path": "d"})).await.id;
    }
    let (_, code, _) = sandbox.fail("CreateWatcher", json!({"path": "d"})).await;
    assert_eq!(code, "resource_exhausted");
    sandbox
        .ask("RemoveWatcher", json!({"watcherId": last}))
        .await;
    Watcher::create(&sandbox, json!({"path": "d"})).await;
}

#[tokio::test]
async fn streams_begin_report_and_stay_alive() {
    let sandbox = with_dir("d");
    let request = Request::post("/filesystem.Filesystem/WatchDir")
        .header("content-type", "application/connect+json")
        .header("keepalive-ping-interval", "1")
        .body(Body::from(frame(0, br#"{"path":"d"}"#)));
    let response = sandbox
        .router
        .clone()
        .oneshot(request.unwrap())
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let mut body = response.into_body();
    let mut received = Vec::new();
    let mut next = async || {
        loop {
            if let [(0, message), ..] = &frames(&received)[..] {
                let message = message.clone();
                received.drain(..5 + message.len());
                return serde_json::from_slice::<Value>(&message).unwrap();
            }
            let piece = tokio::time::timeout(Duration::from_secs(5), body.frame()).await;
            received.extend(piece.unwrap().unwrap().unwrap().into_data().unwrap());
        }
    };
    assert_eq!(next().await, json!({"start": {}}));
    sandbox.upload("d/f", "x").await;
    for kind in ["CREATE", "CHMOD", "WRITE"] {
        assert_eq!(line(&next().await["filesystem"]), format!("{kind} f"));
    }
    assert_eq!(next().await, json!({"keepalive": {}}));
    fs::remove_file(sandbox.home("d/f")).unwrap();
    assert_eq!(line(&next().await["filesystem"]), "REMOVE f");
}
