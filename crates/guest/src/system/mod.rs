//! What the sandbox says of itself, and what the host tells it about itself.

mod entropy;
mod init;
mod metrics;
mod names;

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    extract::State as Shared,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

pub use init::Error;
pub(crate) use init::introduce;
pub(crate) use metrics::{Meter, metrics};

use crate::access::State;

/// `GET /health`: 204 as long as the daemon answers.
pub(crate) async fn health() -> Response {
    uncached(StatusCode::NO_CONTENT)
}

/// `GET /envs`: the environment that programs get.
pub(crate) async fn envs(Shared(state): Shared<Arc<State>>) -> Response {
    let environment: BTreeMap<String, String> = state.settings().environment();
    uncached(Json(environment))
}

/// `POST /sync`: 204 once everything that was written is on the disks.
pub(crate) async fn sync() -> Response {
    match tokio::task::spawn_blocking(rustix::fs::sync).await {
        Ok(()) => uncached(StatusCode::NO_CONTENT),
        Err(_) => uncached(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

/// A response that holds for this moment only.
fn uncached(response: impl IntoResponse) -> Response {
    let mut response = response.into_response();
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
