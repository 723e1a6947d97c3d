//! A sandbox made of a temporary directory.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, StatusCode, header::CONTENT_TYPE},
};
use bytes::Bytes;
use cubicle_guest::{
    access::{AccessToken, State},
    channel::Introduce,
    http::Api,
};
use cubicle_protocol::guest_api::Introduced;
use http_body_util::BodyExt as _;
use serde_json::Value;
use tempfile::TempDir;
use tower::ServiceExt as _;

/// What an answer was.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

pub(crate) struct Sandbox {
    root: TempDir,
    pub(crate) state: Arc<State>,
    pub(crate) router: Router,
    introduce: Introduce,
    pub(crate) uid: u32,
}

impl Sandbox {
    /// A sandbox with the users `root` and `user`, whose homes are below its root. Without
    /// privileges both are whoever runs the tests.
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let me = fs::metadata(root.path()).unwrap();
        let (uid, gid) = if me.uid() == 0 {
            (1000, 1000)
        } else {
            (me.uid(), me.gid())
        };
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("etc")).unwrap();
        fs::create_dir_all(at("root")).unwrap();
        fs::create_dir_all(at("home/user")).unwrap();
        chown(at("home/user"), Some(uid), Some(gid)).unwrap();
        let passwd = format!(
            "root:x:{}:{}:root:{}:/bin/bash\nuser:x:{uid}:{gid}::{}:/bin/bash\n",
            me.uid(),
            me.gid(),
            at("root").display(),
            at("home/user").display(),
        );
        fs::write(at("etc/passwd"), passwd).unwrap();
        fs::write(
            at("etc/group"),
            format!("root:x:{}:\nuser:x:{gid}:\n", me.gid()),
        )
        .unwrap();
        let state = Arc::new(State::with_root(root.path().to_owned()));
        let api = Api::new(Arc::clone(&state), connectrpc::Router::new());
        Self {
            root,
            state,
            router: api.public_router(),
            introduce: api.introduce(),
            uid,
        }
    }

    pub(crate) fn with_token(token: &str) -> Self {
        let sandbox = Self::new();
        sandbox.state.update(|settings| {
            settings.access_token = AccessToken::new(token.to_owned());
        });
        sandbox
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// A path below the home of `user`.
    pub(crate) fn home(&self, path: &str) -> PathBuf {
        self.root().join("home/user").join(path)
    }

    /// Tells the sandbox who it is, as the host does on the channel.
    pub(crate) async fn introduce(&self, request: serde_json::Value) -> Introduced {
        let request = serde_json::from_value(request).unwrap();
        (self.introduce)(request).await
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    pub(crate) async fn get(&self, uri: &str) -> Answer {
        self.send(Request::get(uri).body(Body::empty()).unwrap())
            .await
    }

    pub(crate) async fn post(
        &self,
        uri: &str,
        content_type: &str,
        body: impl Into<Body>,
    ) -> Answer {
        let request = Request::post(uri).header(CONTENT_TYPE, content_type);
        self.send(request.body(body.into()).unwrap()).await
    }

    /// Uploads one file as a plain body.
    pub(crate) async fn upload(&self, path: &str, content: impl Into<Body>) -> Answer {
        self.post(
            &format!("/files?path={path}"),
            "application/octet-stream",
            content,
        )
        .await
    }

    /// Calls a method of the file system service as `user`.
    pub(crate) async fn call(&self, method: &str, request: Value) -> Answer {
        let uri = format!("/filesystem.Filesystem/{method}");
        self.post(&uri, "application/json", request.to_string())
            .await
    }

    /// The same, and its answer, which must be a success.
    pub(crate) async fn ask(&self, method: &str, request: Value) -> Value {
        let answer = self.call(method, request).await;
        assert_eq!(answer.status, StatusCode::OK, "{method}: {}", answer.text());
        answer.json()
    }

    /// The same, and the code and message of the error that it must be.
    pub(crate) async fn fail(&self, method: &str, request: Value) -> (StatusCode, String, String) {
        let answer = self.call(method, request).await;
        let error = answer.json();
        let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        (answer.status, text("code"), text("message"))
    }
}

/// One message of a stream.
pub(crate) fn frame(flags: u8, message: &[u8]) -> Vec<u8> {
    let mut frame = vec![flags];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    frame
}

/// The messages of a stream, as far as they are complete.
pub(crate) fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<5>() {
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let Some((message, rest)) = rest.split_at_checked(len) else {
            break;
        };
        frames.push((head[0], message.to_vec()));
        bytes = rest;
    }
    frames
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut decoder = flate2::write::MultiGzDecoder::new(Vec::new());
    decoder.write_all(bytes).unwrap();
    decoder.finish().unwrap()
}
