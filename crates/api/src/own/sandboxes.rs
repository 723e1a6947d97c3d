//! What is done to sandboxes, with every number that there is.

use axum::{Json, extract::State, response::IntoResponse as _, response::Response};
use http::StatusCode;

use super::model::{Forked, RolledBack, Taken, phases};
use crate::{
    AppState,
    error::{ApiResult, ErrorBody},
    extract::{JsonBody, OptionalJsonBody, SandboxPath},
    sandboxes::{ForkBody, ForkResult, PauseBody, RollbackBody, fork_it, pause_it, rollback_it},
    timing::millis,
};

/// Pause a sandbox
///
/// As E2B's clients do; the answer says what it cost.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/pause", tag = "cubicle", request_body = PauseBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = Taken, description = "It is paused"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 503, body = ErrorBody),
    ),
)]
pub(super) async fn pause(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<PauseBody>,
) -> ApiResult<Response> {
    pause_it(&state, &id, &body, |taken, took| {
        Json(Taken::new(taken, Vec::new(), took)).into_response()
    })
    .await
}

/// Copy a running sandbox
///
/// As E2B's clients do; the answer says what it cost.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/fork", tag = "cubicle", request_body = ForkBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 201, body = Forked, description = "As many as were asked for"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 503, body = ErrorBody),
    ),
)]
pub(super) async fn fork(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<ForkBody>,
) -> ApiResult<(StatusCode, Json<Forked>)> {
    let (forked, took) = fork_it(&state, &id, &body).await?;
    let body = Forked {
        snapshot: Taken::new(&forked.taken, Vec::new(), took),
        sandboxes: ForkResult::all(&state, forked.children),
        total_ms: millis(took),
    };
    Ok((StatusCode::CREATED, Json(body)))
}

/// Roll a sandbox back
///
/// As Cube's clients do; the answer says how long each step took.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/rollback", tag = "cubicle", request_body = RollbackBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = RolledBack, description = "It is what it was"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 503, body = ErrorBody),
    ),
)]
pub(super) async fn rollback(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    JsonBody(body): JsonBody<RollbackBody>,
) -> ApiResult<Json<RolledBack>> {
    let (done, took) = rollback_it(&state, &id, &body.reference()?).await?;
    Ok(Json(RolledBack {
        sandbox_id: done.sandbox.id.to_string(),
        snapshot_id: done.snapshot.to_string(),
        generation: done.sandbox.generation,
        total_ms: millis(took),
        phases: phases(&done.phases),
    }))
}
