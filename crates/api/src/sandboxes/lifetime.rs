//! How long sandboxes live.

use std::time::Duration;

use axum::extract::State;
use cubicle_control::sandbox::Lifetime;
use http::StatusCode;

use super::model::{RefreshBody, TimeoutBody};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, OptionalJsonBody, SandboxPath},
};

/// Life that a refresh gives at least, in seconds, where the request says nothing.
const REFRESH: i64 = 15;
/// Longest life that a refresh gives.
const MAX_REFRESH: i64 = 3600;

/// Kill a sandbox
///
/// Answers once everything of it is released.
#[utoipa::path(
    delete, path = "/sandboxes/{sandboxID}", tag = "sandboxes",
    params(("sandboxID" = String, Path)),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 500, body = ErrorBody),
    ),
)]
pub(crate) async fn kill(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> ApiResult<StatusCode> {
    state.control.sandboxes.kill(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Set a sandbox's end
///
/// Measured from now; may be sooner than before.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/timeout", tag = "sandboxes", request_body = TimeoutBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 204, description = "Its end is set"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn set_timeout(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    JsonBody(body): JsonBody<TimeoutBody>,
) -> ApiResult<StatusCode> {
    let lifetime = Lifetime::from_seconds("timeout", body.timeout)?;
    state.control.sandboxes.set_lifetime(&id, lifetime).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Give a sandbox more time
///
/// Never shortens its life.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/refreshes", tag = "sandboxes", request_body = RefreshBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 204, description = "It has that much time, or more"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn refresh(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<RefreshBody>,
) -> ApiResult<StatusCode> {
    let seconds = body.duration.unwrap_or(REFRESH);
    if !(0..=MAX_REFRESH).contains(&seconds) {
        let why = format!("is no number of seconds between 0 and {MAX_REFRESH}");
        return Err(ApiError::field("duration", why));
    }
    let lifetime = Lifetime::For(Duration::from_secs(seconds.unsigned_abs()));
    state.control.sandboxes.extend(&id, lifetime).await?;
    Ok(StatusCode::NO_CONTENT)
}
