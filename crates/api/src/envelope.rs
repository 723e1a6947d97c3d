//! What every control-plane answer has in common: a request id, a deadline, JSON errors, a count.

use std::{panic::AssertUnwindSafe, time::Duration};

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use http_body_util::BodyExt as _;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::{AppState, error::ApiError};

/// Longest request id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;
const REQUEST_ID: &str = "x-request-id";

/// Gives a request its id, its span and its count, and makes sure that an error is JSON, also one
/// that the web framework made, and one that is a bug.
pub(crate) async fn envelope(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    let began = std::time::Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_else(|| "unknown".to_owned());
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or_default(),
        %method,
        path = request.uri().path(),
    );
    let answer = AssertUnwindSafe(next.run(request))
        .catch_unwind()
        .instrument(span.clone())
        .await;
    let response = answer.unwrap_or_else(|_panic| {
        span.in_scope(|| ApiError::internal(&"a bug ended the request"))
            .into_response()
    });
    let mut response = as_json(response).await;
    response.headers_mut().insert(REQUEST_ID, id);
    let took = began.elapsed();
    let status = response.status().as_u16();
    span.in_scope(|| tracing::debug!(status, ?took, "answered"));
    state.metrics.request(method.as_str(), &route, status, took);
    response
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sane = |value: &&HeaderValue| {
        (1..=MAX_REQUEST_ID).contains(&value.len())
            && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    if let Some(id) = headers.get(REQUEST_ID).filter(sane) {
        return id.clone();
    }
    let fresh = Uuid::new_v4().to_string();
    HeaderValue::try_from(fresh).unwrap_or(HeaderValue::from_static("none"))
}

/// Turns an error that is no JSON into one that is.
async fn as_json(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let json = HeaderValue::from_static("application/json");
    if !is_error || response.headers().get(CONTENT_TYPE) == Some(&json) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let text = body
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let message = match text.trim() {
        "" => status
            .canonical_reason()
            .unwrap_or("the request failed")
            .to_owned(),
        text => text.to_owned(),
    };
    let mut json = ApiError::new(status, message).into_response();
    for (name, value) in &parts.headers {
        if !json.headers().contains_key(name) && name != http::header::CONTENT_LENGTH {
            json.headers_mut().append(name, value.clone());
        }
    }
    json
}

/// 404 for a path that nothing is at.
pub(crate) async fn not_found(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(200).collect();
    ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at {path}"))
}

/// 405 for a path that something else is at.
pub(crate) async fn wrong_method(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(200).collect();
    let message = format!("{} is not possible at {path}", request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// A layer that ends a request that takes too long. What the request had started on a VM goes on or
/// is undone, as its own rules say.
pub(crate) fn deadline(
    limit: Duration,
) -> axum::middleware::FromFnLayer<
    impl Fn(Request, Next) -> BoxFuture<'static, Response> + Clone + Send + Sync + 'static,
    (),
    (Request<Body>,),
> {
    axum::middleware::from_fn(
        move |request: Request, next: Next| -> BoxFuture<'static, Response> {
            Box::pin(async move {
                tokio::time::timeout(limit, next.run(request))
                    .await
                    .unwrap_or_else(|_| {
                        let message =
                            format!("the server has no answer after {} s", limit.as_secs());
                        ApiError::new(StatusCode::GATEWAY_TIMEOUT, message)
                            .retry_after(1)
                            .into_response()
                    })
            })
        },
    )
}
