//! Measuring the server, under `/cubicle/v1`: what a sandbox takes, and what it takes to boot one.

use axum::{Json, extract::State};
use cubicle_control::fleet::FleetError;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    AppState,
    error::{ApiResult, ErrorBody},
    extract::{SandboxPath, Segment},
};

pub(crate) fn own_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(usage))
        .routes(routes!(boot))
}

/// What a sandbox takes of its host. Sizes in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxUsage {
    /// Memory that only its VM has: what killing it frees.
    private_bytes: u64,
    /// Memory that its VM has mapped, shared with others or not.
    resident_bytes: u64,
    /// CPU time of its VM's process since it was started, in seconds.
    cpu_seconds: f64,
}

/// What does a sandbox take of its host?
#[utoipa::path(
    get, path = "/sandboxes/{sandboxID}/usage", tag = "cubicle",
    params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = SandboxUsage),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
async fn usage(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> ApiResult<Json<SandboxUsage>> {
    state.control.sandboxes.get(&id)?;
    let usage = match state.control.fleet.host_usage(&id).await {
        Err(FleetError::NoSandbox { id }) => {
            return Err(cubicle_control::Error::SandboxNotFound { id }.into());
        }
        other => other.map_err(cubicle_control::Error::from)?,
    };
    Ok(Json(SandboxUsage {
        private_bytes: usage.private_bytes,
        resident_bytes: usage.resident_bytes,
        cpu_seconds: usage.cpu_time_us as f64 / 1e6,
    }))
}

/// How a cold boot went.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ColdBoot {
    /// From the start of the VM until its guest answered, in milliseconds.
    boot_ms: f64,
}

/// Boot a template's image
///
/// Where a sandbox is restored, this boots what the template was built from, once, and throws it
/// away: something to compare a restore with.
#[utoipa::path(
    post, path = "/templates/{name}/boot", tag = "cubicle",
    params(("name" = String, Path, description = "`name`, or the template's id")),
    responses(
        (status = 200, body = ColdBoot),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
async fn boot(State(state): State<AppState>, Segment(name): Segment) -> ApiResult<Json<ColdBoot>> {
    let took = state.control.templates.measure_boot(&name).await?;
    Ok(Json(ColdBoot {
        boot_ms: took.as_secs_f64() * 1e3,
    }))
}
