//! Fork and rollback: a sandbox goes several ways, or back.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use cubicle_control::sandbox::{Forked, RolledBack};
use cubicle_ids::SandboxId;
use http::StatusCode;
use uuid::Uuid;

use super::model::{ForkBody, ForkResult, RollbackBody, RollbackResult};
use crate::{
    AppState,
    error::{ApiResult, ErrorBody},
    extract::{JsonBody, OptionalJsonBody, SandboxPath},
    observe::Operation,
    timing,
};

/// Copy a running sandbox
///
/// It is frozen for an instant, and as many sandboxes as are asked for go on from there: with its
/// memory, its processes and its disk, and with ids and tokens of their own. It runs on. One copy may
/// fail where others do not.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/fork", tag = "sandboxes", request_body = ForkBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 201, body = Vec<ForkResult>, description = "As many as were asked for"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn fork(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<ForkBody>,
) -> ApiResult<Response> {
    let (forked, took) = fork_it(&state, &id, &body).await?;
    let taken = forked.taken;
    let results = ForkResult::all(&state, forked.children);
    let mut response = (StatusCode::CREATED, Json(results)).into_response();
    timing::add(&mut response, &taken.phases, took);
    timing::cost(&mut response, &taken);
    Ok(response)
}

/// Forks a sandbox and counts that.
pub(crate) async fn fork_it(
    state: &AppState,
    id: &SandboxId,
    body: &ForkBody,
) -> ApiResult<(Forked, Duration)> {
    let request = body.request()?;
    let began = Instant::now();
    let forked = state.control.sandboxes.fork(id, request).await?;
    let took = began.elapsed();
    state.metrics.phases(Operation::Fork, &forked.taken.phases);
    Ok((forked, took))
}

/// Roll a sandbox back
///
/// Restores a snapshot beside the running sandbox, and puts it in its place once it answers: same id,
/// same address. If anything fails, the sandbox runs on as if nothing had been asked.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/rollback", tag = "sandboxes",
    request_body = RollbackBody, params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = RollbackResult, description = "It is what it was"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody, description = "No such sandbox, or no such snapshot"),
        (status = 409, body = ErrorBody,
         description = "It does not run, it is busy, or the snapshot is not of its past"),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn rollback(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    JsonBody(body): JsonBody<RollbackBody>,
) -> ApiResult<Response> {
    let snapshot = body.reference()?;
    let (done, took) = rollback_it(&state, &id, &snapshot).await?;
    let result = RollbackResult {
        sandbox_id: done.sandbox.id.to_string(),
        snapshot_id: snapshot,
        operation_id: Uuid::new_v4(),
        status: "READY",
    };
    let mut response = Json(result).into_response();
    timing::add(&mut response, &done.phases, took);
    Ok(response)
}

/// Rolls a sandbox back and counts that.
pub(crate) async fn rollback_it(
    state: &AppState,
    id: &SandboxId,
    snapshot: &str,
) -> ApiResult<(RolledBack, Duration)> {
    let began = Instant::now();
    let done = state.control.sandboxes.rollback(id, snapshot).await?;
    let took = began.elapsed();
    state.metrics.phases(Operation::Rollback, &done.phases);
    Ok((done, took))
}
