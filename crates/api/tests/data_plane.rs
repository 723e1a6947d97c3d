//! The proxy's counters in `/metrics`, counted by real requests through a real proxy.

mod common;

use std::sync::Arc;

use axum::{Router, body::Body, middleware};
use common::Server;
use cubicle_api::{ApiConfig, AppState};
use cubicle_ids::SandboxId;
use cubicle_proxy::{GuestIo, Proxy, Routes, SandboxRoute, SignedFile, Upstream, UpstreamError};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use tower::ServiceExt as _;

/// No sandbox anywhere.
struct Nowhere;

impl Routes for Nowhere {
    fn lookup(&self, _: &SandboxId) -> Option<SandboxRoute> {
        None
    }
    fn find_by_signature(&self, _: &SignedFile) -> Option<SandboxId> {
        None
    }
}

#[async_trait::async_trait]
impl Upstream for Nowhere {
    async fn request(
        &self,
        id: &SandboxId,
        _: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        Err(UpstreamError::NotFound(id.clone()))
    }
    async fn connect(&self, id: &SandboxId, _: u16) -> Result<Box<dyn GuestIo>, UpstreamError> {
        Err(UpstreamError::NotFound(id.clone()))
    }
}

#[tokio::test]
async fn requests_into_sandboxes_are_counted_beside_the_apis_own() {
    let server = Server::new().await;
    let proxy = Proxy::new(Arc::new(Nowhere), Arc::new(Nowhere));
    let config = ApiConfig {
        open_metrics: true,
        ..ApiConfig::default()
    };
    let counters = Box::new(proxy.metrics().clone());
    let state = AppState::new(server.control.clone(), config, |registry| {
        registry.register_collector(counters);
    });
    let router: Router = cubicle_api::router(state).layer(middleware::from_fn_with_state(
        proxy,
        cubicle_proxy::intercept,
    ));
    let send = async |path: &str, sandbox: Option<&str>| {
        let mut request = Request::get(path);
        if let Some(id) = sandbox {
            request = request.header("e2b-sandbox-id", id);
        }
        let request = request.body(Body::empty()).expect("request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        let status = response.status();
        let bytes = response
            .into_body()
            .collect()
            .await
            .expect("body")
            .to_bytes();
        (
            status.as_u16(),
            String::from_utf8_lossy(&bytes).into_owned(),
        )
    };
    // The same path is the API's without a sandbox and the guest's with one.
    assert_eq!(send("/health", None).await.0, 200);
    let (status, text) = send("/health", Some("i0")).await;
    assert_eq!(status, 502, "{text}");
    assert!(
        text.contains("was not found"),
        "clients look for these words: {text}"
    );

    let (status, text) = send("/metrics", None).await;
    assert_eq!(status, 200, "{text}");
    for line in [
        r#"cubicle_proxy_requests_total{via="headers"} 1"#,
        r#"cubicle_proxy_requests_total{via="host"} 0"#,
        r#"cubicle_proxy_failures_total{reason="not_found"} 1"#,
        "cubicle_proxy_active_requests 0",
        r#"cubicle_http_requests_total{method="GET",route="/health",status="200"} 1"#,
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}
