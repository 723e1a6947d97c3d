//! Pause, resume, connect.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use cubicle_control::{
    fleet::SnapshotTaken,
    sandbox::{Connected, Lifetime, PauseMode, ResumeSandbox},
};
use cubicle_ids::SandboxId;
use http::StatusCode;

use super::model::{ConnectBody, PauseBody, ResumeBody, SandboxBody};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{OptionalJsonBody, SandboxPath},
    observe::Operation,
    timing,
};

/// Life that a connect gives at least, in seconds, where the request says nothing.
const CONNECT_TIMEOUT: i64 = 300;
/// Life that a resume gives, in seconds, where the request says nothing.
const RESUME_TIMEOUT: i64 = 15;

/// Pause a sandbox
///
/// What it is becomes a snapshot, and what it takes of the machine is free. If that fails it runs
/// on. The headers `Cubicle-Tier`, `Cubicle-Bytes-Written` and their like say what it cost.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/pause", tag = "sandboxes", request_body = PauseBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 204, description = "It is paused"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It is paused already, or busy"),
        (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "Its guest daemon does not answer"),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn pause(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<PauseBody>,
) -> ApiResult<Response> {
    pause_it(&state, &id, &body, |_, _| {
        StatusCode::NO_CONTENT.into_response()
    })
    .await
}

/// Pauses a sandbox, counts that, and has `answer` word the answer.
pub(crate) async fn pause_it(
    state: &AppState,
    id: &SandboxId,
    body: &PauseBody,
    answer: impl FnOnce(&SnapshotTaken, Duration) -> Response,
) -> ApiResult<Response> {
    let began = Instant::now();
    let result = state.control.sandboxes.pause(id, body.request()).await;
    let took = began.elapsed();
    let taken = result.map_err(ApiError::of_pause)?.taken;
    state.metrics.phases(Operation::Pause, &taken.phases);
    let mut response = answer(&taken, took);
    timing::add(&mut response, &taken.phases, took);
    timing::cost(&mut response, &taken);
    Ok(response)
}

/// Resume a sandbox
///
/// Older clients' way to wake one; `connect` does more.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/resume", tag = "sandboxes", request_body = ResumeBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 201, body = SandboxBody, description = "It runs"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It is running already, or busy"),
        (status = 500, body = ErrorBody), (status = 501, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "No room; try again later"),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn resume(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<ResumeBody>,
) -> ApiResult<Response> {
    let seconds = body.timeout.unwrap_or(RESUME_TIMEOUT);
    let request = ResumeSandbox {
        lifetime: Lifetime::from_seconds("timeout", seconds)?,
        auto_pause: body.auto_pause,
    };
    check_memory(&state, &id, body.memory)?;
    let began = Instant::now();
    let result = state.control.sandboxes.resume(&id, request).await;
    answer(&state, result, began)
}

/// Connect to a sandbox
///
/// Returns what a client needs in order to use it, wakes it if it is paused, and gives it at least
/// `timeout` from now; 300 seconds if that is left out.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/connect", tag = "sandboxes", request_body = ConnectBody,
    params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = SandboxBody, description = "It runs, and ran before"),
        (status = 201, body = SandboxBody, description = "It runs again"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 501, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "No room; try again later"),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn connect_v1(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<ConnectBody>,
) -> ApiResult<Response> {
    let seconds = body.timeout.unwrap_or(CONNECT_TIMEOUT);
    let lifetime = Lifetime::from_seconds("timeout", seconds)?;
    check_memory(&state, &id, body.memory)?;
    let began = Instant::now();
    let result = state.control.sandboxes.connect(&id, lifetime).await;
    answer(&state, result, began)
}

/// Connect to a sandbox
///
/// The same as without `/v2`.
#[utoipa::path(
    post, path = "/v2/sandboxes/{sandboxID}/connect", tag = "sandboxes",
    request_body = ConnectBody, params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = SandboxBody, description = "It runs, and ran before"),
        (status = 201, body = SandboxBody, description = "It runs again"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 501, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "No room; try again later"),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn connect_v2(
    state: State<AppState>,
    id: SandboxPath,
    body: OptionalJsonBody<ConnectBody>,
) -> ApiResult<Response> {
    connect_v1(state, id, body).await
}

/// Refuses to forget the memory of a sandbox that was paused with it: that would be a boot where
/// the caller has a memory to lose, and this server does not do it.
fn check_memory(state: &AppState, id: &SandboxId, memory: Option<bool>) -> ApiResult<()> {
    let sandbox = state.control.sandboxes.get(id)?;
    let kept = sandbox.pause.as_ref().map(|pause| pause.mode);
    if memory == Some(false) && kept == Some(PauseMode::Full) {
        return Err(ApiError::unsupported(
            "memory: false for a sandbox that was paused with its memory",
        ));
    }
    Ok(())
}

fn answer(
    state: &AppState,
    result: cubicle_control::Result<Connected>,
    began: Instant,
) -> ApiResult<Response> {
    let took = began.elapsed();
    let connected = result.map_err(ApiError::of_create)?;
    state.metrics.phases(Operation::Resume, &connected.phases);
    let status = if connected.resumed {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let body = SandboxBody::new(state, &connected.sandbox);
    let mut response = (status, Json(body)).into_response();
    timing::add(&mut response, &connected.phases, took);
    Ok(response)
}
