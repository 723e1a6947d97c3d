//! The router over a control plane without machines, called in-process.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of it"
)]
#![allow(clippy::expect_used, reason = "a helper of tests may panic")]

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body};
use cubicle_api::{ApiConfig, AppState, AuthMode};
use cubicle_control::{
    Control, ControlConfig,
    fleet::memory::MemoryFleet,
    sandbox::SandboxConfig,
    template::{BuildSpec, BuildTemplate, Size},
};
use futures::TryStreamExt as _;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tower::ServiceExt as _;

pub struct Server {
    pub router: Router,
    pub control: Control,
    pub fleet: Arc<MemoryFleet>,
    pub key: String,
    _dir: tempfile::TempDir,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self
    }
}

impl Server {
    /// A server with a template `base`.
    pub async fn new() -> Self {
        Self::with(ApiConfig::default()).await
    }

    pub async fn with(config: ApiConfig) -> Self {
        Self::make(config, |_| ()).await
    }

    /// The same with another control plane.
    pub async fn configured(change: impl FnOnce(&mut ControlConfig)) -> Self {
        Self::make(ApiConfig::default(), change).await
    }

    async fn make(config: ApiConfig, change: impl FnOnce(&mut ControlConfig)) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let fleet: Arc<MemoryFleet> = Arc::default();
        let mut control_config = ControlConfig {
            sandboxes: SandboxConfig {
                sample_every: Duration::from_millis(50),
                ..SandboxConfig::default()
            },
            ..ControlConfig::new(dir.path().join("cubicle.db"))
        };
        control_config.templates.settle = Duration::from_millis(1);
        control_config.templates.probe_every = Duration::from_millis(1);
        change(&mut control_config);
        let (control, _) = Control::open(control_config, fleet.clone())
            .await
            .expect("control");
        let key = control
            .keys
            .ensure_default()
            .await
            .expect("keys")
            .expect("a first key")
            .key;
        let order = BuildTemplate {
            name: "base".into(),
            tags: Vec::new(),
            size: Size {
                cpu_count: 2,
                memory_mib: 512,
                disk_mib: 1024,
            },
            spec: BuildSpec {
                force: true,
                ..BuildSpec::recipe("base")
            },
            request_id: None,
        };
        let build = control.templates.build(order).await.expect("build").build;
        let _: Vec<_> = control
            .templates
            .follow(build.id)
            .try_collect()
            .await
            .expect("built");
        let router = cubicle_api::router(AppState::new(control.clone(), config, |_| ()));
        Self {
            router,
            control,
            fleet,
            key,
            _dir: dir,
        }
    }

    pub async fn open() -> Self {
        Self::with(ApiConfig {
            auth: AuthMode::Open,
            ..ApiConfig::default()
        })
        .await
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self
            .router
            .clone()
            .oneshot(request)
            .await
            .expect("infallible");
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.expect("body").to_bytes();
        let text = String::from_utf8(bytes.to_vec()).expect("text");
        Answer {
            status: parts.status,
            headers: parts.headers,
            text,
        }
    }

    pub fn request(&self, method: Method, path: &str, body: impl Into<Body>) -> Request<Body> {
        Request::builder()
            .method(method)
            .uri(path)
            .header("x-api-key", &self.key)
            .body(body.into())
            .expect("request")
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path, Body::empty()))
            .await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path, Body::empty()))
            .await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::POST, path, body.to_string()))
            .await
    }

    /// Creates a sandbox and returns its id.
    pub async fn sandbox(&self, body: Value) -> String {
        let created = self.post("/v2/sandboxes", body).await.expect(201).json();
        created["sandboxID"].as_str().expect("an id").to_owned()
    }
}

/// What the headers of every answer to a freeze say.
#[track_caller]
pub fn numbers_of_a_freeze(answer: &Answer) {
    assert_eq!(answer.header("cubicle-tier"), "anonymous_pages");
    let scanned = (512_u64 << 20).to_string();
    let dirty = (7_u64 << 20).to_string();
    assert_eq!(answer.header("cubicle-bytes-scanned"), scanned);
    assert_eq!(answer.header("cubicle-bytes-dirty"), dirty);
    assert_eq!(answer.header("cubicle-bytes-written"), dirty);
    assert_eq!(answer.header("cubicle-frozen-ms"), "5.000");
}
