//! A service of its own for each test, and what a client sees of it.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    access::State, http::Api, journal::Journal, process::Processes, proto::process::ProcessExt as _,
};

pub(super) struct Service {
    address: std::net::SocketAddr,
    pub(super) state: Arc<State>,
    pub(super) journal: Arc<Journal>,
    root: tempfile::TempDir,
}

/// A stream of messages, as it arrives.
pub(super) struct Messages {
    body: Incoming,
    read: BytesMut,
}

impl Messages {
    pub(super) async fn next(&mut self) -> Option<Value> {
        loop {
            if self.read.len() >= 5 {
                let len = u32::from_be_bytes(self.read[1..5].try_into().unwrap()) as usize;
                if self.read.len() >= 5 + len {
                    let frame = self.read.split_to(5 + len);
                    let message: Value = serde_json::from_slice(&frame[5..]).unwrap();
                    return match frame[0] {
                        0 => Some(message["event"].clone()),
                        2 if message.get("error").is_none() => None,
                        2 => Some(message),
                        flags => panic!("flags {flags}"),
                    };
                }
            }
            let frame = self
                .body
                .frame()
                .await
                .expect("the stream ends with a last frame");
            self.read
                .extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
    }

    pub(super) async fn pid(&mut self) -> u32 {
        let start = self.next().await.unwrap();
        start["start"]["pid"]
            .as_u64()
            .unwrap_or_else(|| panic!("{start}")) as u32
    }

    pub(super) async fn all(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some(event) = self.next().await {
            assert!(outcome.end.is_null(), "{event} after the end");
            if let Some(data) = event.get("data") {
                for (name, to) in [
                    ("stdout", &mut outcome.stdout),
                    ("stderr", &mut outcome.stderr),
                    ("pty", &mut outcome.pty),
                ] {
                    if let Some(text) = data.get(name) {
                        let bytes = BASE64_STANDARD.decode(text.as_str().unwrap()).unwrap();
                        assert!(bytes.len() <= 32 << 10);
                        to.extend(bytes);
                    }
                }
            } else if let Some(end) = event.get("end") {
                outcome.end = end.clone();
            } else if let Some(error) = event.get("error") {
                outcome.end = error.clone();
                break;
            } else if event.get("keepalive").is_some() {
                outcome.keepalives += 1;
            }
        }
        outcome
    }
}

#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) pty: Vec<u8>,
    pub(super) keepalives: usize,
    /// The end event or the error.
    pub(super) end: Value,
}

impl Outcome {
    pub(super) fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

impl Service {
    pub(super) async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().join("home");
        std::fs::create_dir_all(home.join("dir")).unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::chown(&home, Some(4321), Some(4322)).unwrap();
        // The directory is reached through one that only root may pass.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(root.path(), open).unwrap();
        let passwd = format!(
            "root:x:0:0::/root:/bin/bash\nuser:x:4321:4322::{}:/bin/sh\nlost:x:4323:4323::/nowhere:\n",
            home.display()
        );
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        std::fs::write(root.path().join("etc/group"), "extra:x:4400:user\n").unwrap();
        let state = Arc::new(State::with_root(root.path().to_owned()));
        let journal = Arc::new(Journal::default());
        let processes = Processes::new(Arc::clone(&state), Arc::clone(&journal));
        let rpc = Arc::new(processes).register(connectrpc::Router::new());
        let router = Api::new(Arc::clone(&state), rpc).public_router();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            address,
            state,
            journal,
            root,
        }
    }

    pub(super) fn home(&self) -> PathBuf {
        self.root.path().join("home")
    }

    pub(super) async fn send(
        &self,
        method: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> http::Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let mut request = Request::post(format!("/process.Process/{method}"))
            .header("host", "envd")
            .header("connect-protocol-version", "1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        sender.send_request(request).await.unwrap()
    }

    pub(super) async fn call(&self, method: &str, request: Value) -> Result<Value, Value> {
        let headers = [("content-type", "application/json")];
        let response = self
            .send(method, &headers, request.to_string().into_bytes())
            .await;
        let ok = response.status() == StatusCode::OK;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&body).unwrap();
        if ok { Ok(body) } else { Err(body) }
    }

    pub(super) async fn stream(
        &self,
        method: &str,
        headers: &[(&str, &str)],
        request: Value,
    ) -> Messages {
        let headers = [&[("content-type", "application/connect+json")], headers].concat();
        let response = self.send(method, &headers, envelope(0, &request)).await;
        assert_eq!(response.status(), StatusCode::OK);
        Messages {
            body: response.into_body(),
            read: BytesMut::new(),
        }
    }

    pub(super) async fn start_with(&self, headers: &[(&str, &str)], request: Value) -> Messages {
        self.stream(
            "Start",
            &[&[("authorization", ROOT)], headers].concat(),
            request,
        )
        .await
    }

    pub(super) async fn start(&self, command: &str) -> Messages {
        self.start_with(&[], sh(command)).await
    }

    pub(super) async fn run(&self, command: &str) -> Outcome {
        self.start(command).await.all().await
    }

    pub(super) async fn follow(&self, selector: Value) -> Messages {
        self.stream("Connect", &[], json!({"process": selector}))
            .await
    }
}

/// `root:` and `user:`.
pub(super) const ROOT: &str = "Basic cm9vdDo=";
pub(super) const USER: &str = "Basic dXNlcjo=";

pub(super) fn envelope(flags: u8, message: &Value) -> Vec<u8> {
    let message = message.to_string();
    let len = u32::try_from(message.len()).unwrap();
    [&[flags][..], &len.to_be_bytes(), message.as_bytes()].concat()
}

pub(super) fn sh(command: &str) -> Value {
    json!({"process": {"cmd": "/bin/bash", "args": ["-c", command]}, "stdin": false})
}

pub(super) fn exited(code: i32) -> Value {
    let status = format!("exit status {code}");
    match code {
        0 => json!({"exitCode": 0, "exited": true, "status": status}),
        _ => json!({"exitCode": code, "exited": true, "status": status, "error": status}),
    }
}

pub(super) fn killed() -> Value {
    let status = "signal: killed";
    json!({"exitCode": -1, "status": status, "error": status})
}

pub(super) fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "not within 5 s: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
