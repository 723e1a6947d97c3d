//! `POST /sandboxes/{id}/snapshots`.

use std::time::{Duration, Instant};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use cubicle_control::snapshot::SnapshotCreation;
use cubicle_ids::SandboxId;
use http::StatusCode;

use super::model::{SnapshotBody, SnapshotInfo};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{OptionalJsonBody, SandboxPath},
    observe::Operation,
    timing,
};

/// Take a snapshot
///
/// The sandbox is frozen for an instant, and runs on. What it was can be made sandboxes from, and be
/// gone back to.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/snapshots", tag = "snapshots",
    request_body = SnapshotBody, params(("sandboxID" = String, Path)),
    responses(
        (status = 201, body = SnapshotInfo, description = "It can be used"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The sandbox does not run, or is busy"),
        (status = 429, body = ErrorBody, description = "There are as many as may be"),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn create(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<SnapshotBody>,
) -> ApiResult<Response> {
    let (creation, took) = create_it(&state, &id, body).await?;
    let body = SnapshotInfo::from(&creation);
    let mut response = (StatusCode::CREATED, Json(body)).into_response();
    timing::add(&mut response, &creation.taken.phases, took);
    timing::cost(&mut response, &creation.taken);
    Ok(response)
}

/// Takes a snapshot and counts that.
pub(crate) async fn create_it(
    state: &AppState,
    id: &SandboxId,
    body: SnapshotBody,
) -> ApiResult<(SnapshotCreation, Duration)> {
    let request = body.request()?;
    let began = Instant::now();
    let result = state.control.snapshots.create(id, request).await;
    let took = began.elapsed();
    let creation = result.map_err(ApiError::of_pause)?;
    let phases = &creation.taken.phases;
    state.metrics.phases(Operation::Snapshot, phases);
    Ok((creation, took))
}
