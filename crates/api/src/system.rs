//! The server itself: is it well, what can it do, how full is it.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, header::CONTENT_TYPE};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    AppState, auth,
    auth::AuthMode,
    envelope::deadline,
    error::{ApiError, ApiResult, ErrorBody},
    extract::Segment,
};

/// Open to everyone.
pub(crate) fn open_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(metrics))
        .layer(deadline(crate::DEADLINE))
}

/// What Cube's dashboard asks for.
pub(crate) fn cluster_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(config))
        .routes(routes!(overview))
        .routes(routes!(nodes))
        .routes(routes!(node))
        .layer(deadline(crate::DEADLINE))
}

/// Under `/cubicle/v1`.
pub(crate) fn own_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(version))
        .routes(routes!(own_nodes))
        .layer(deadline(crate::DEADLINE))
}

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`.
    status: &'static str,
    /// Sandboxes that clients can see.
    sandboxes: usize,
}

/// Is the server well?
#[utoipa::path(
    get, path = "/health", tag = "system", security(()), responses((status = 200, body = Health)),
)]
async fn health(State(state): State<AppState>) -> Json<Health> {
    Json(Health {
        status: "ok",
        sandboxes: state.control.sandboxes.all().len(),
    })
}

/// Metrics for Prometheus
///
/// Needs a key, unless the server is told to leave it open.
#[utoipa::path(
    get, path = "/metrics", tag = "system",
    responses(
        (status = 200, body = String, content_type = "application/openmetrics-text"),
        (status = 401, body = ErrorBody),
    ),
)]
async fn metrics(State(state): State<AppState>, headers: HeaderMap) -> ApiResult<Response> {
    if !state.config.open_metrics {
        auth::check(&state, &headers)?;
    }
    let text = state
        .metrics
        .render(&state.control)
        .await
        .map_err(|e| ApiError::internal(&e))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], text).into_response())
}

/// What this server is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Version {
    /// Version of the server.
    version: &'static str,
    /// Version of the guest daemon in templates built today.
    envd_version: &'static str,
    /// What the server was built from, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<&'static str>,
}

/// What is this server?
#[utoipa::path(
    get, path = "/version", tag = "cubicle",
    responses((status = 200, body = Version), (status = 401, body = ErrorBody)),
)]
async fn version(State(state): State<AppState>) -> Json<Version> {
    let envd_version = cubicle_control::ENVD_VERSION;
    Json(Version {
        version: env!("CARGO_PKG_VERSION"),
        envd_version,
        commit: state.config.commit,
    })
}

/// How the server is set up.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    /// Whether callers need a key.
    auth_enabled: bool,
    /// Requests a second and key; 0 is no limit.
    rate_limit_per_sec: u32,
    /// Sandboxes' ports are at `<port>-<sandboxID>.<domain>`.
    sandbox_domain: Option<String>,
    /// What kind of machine a sandbox is.
    instance_type: &'static str,
    /// What a sandbox is made from if a person does not care.
    default_template_id: Option<String>,
}

/// How is the server set up?
#[utoipa::path(
    get, path = "/config", tag = "cluster",
    responses((status = 200, body = Config), (status = 401, body = ErrorBody)),
)]
async fn config(State(state): State<AppState>) -> ApiResult<Json<Config>> {
    let base = state.control.templates.find_id("base").await?;
    Ok(Json(Config {
        auth_enabled: state.config.auth == AuthMode::Key,
        rate_limit_per_sec: 0,
        sandbox_domain: state.config.domain.clone(),
        instance_type: "microvm",
        default_template_id: base.map(|id| id.to_string()),
    }))
}

/// All machines together.
#[derive(Debug, Default, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Overview {
    node_count: usize,
    healthy_nodes: usize,
    /// CPUs, in thousandths.
    total_cpu_milli: u64,
    /// CPUs that are promised to nobody, in thousandths.
    allocatable_cpu_milli: u64,
    /// Memory, in MiB.
    #[serde(rename = "totalMemoryMB")]
    total_memory_mb: u64,
    /// Memory that is promised to nobody, in MiB.
    #[serde(rename = "allocatableMemoryMB")]
    allocatable_memory_mb: u64,
    /// Sandboxes that there can be.
    max_mvm_slots: u64,
}

/// All machines together
#[utoipa::path(
    get, path = "/cluster/overview", tag = "cluster",
    responses((status = 200, body = Overview), (status = 401, body = ErrorBody)),
)]
async fn overview(State(state): State<AppState>) -> ApiResult<Json<Overview>> {
    let mut sum = Overview::default();
    for node in all_nodes(&state).await? {
        sum.node_count += 1;
        sum.healthy_nodes += usize::from(node.healthy);
        sum.total_cpu_milli += node.capacity.cpu_milli;
        sum.allocatable_cpu_milli += node.allocatable.cpu_milli;
        sum.total_memory_mb += node.capacity.memory_mb;
        sum.allocatable_memory_mb += node.allocatable.memory_mb;
        sum.max_mvm_slots += u64::from(node.max_mvm_slots);
    }
    Ok(Json(sum))
}

/// A machine.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Node)]
pub(crate) struct NodeBody {
    /// Its name.
    #[serde(rename = "nodeID")]
    node_id: String,
    /// Its address.
    #[serde(rename = "hostIP")]
    host_ip: String,
    /// What kind of machine its sandboxes are.
    instance_type: &'static str,
    /// Whether it answers.
    healthy: bool,
    /// What it has.
    capacity: Resources,
    /// What is promised to nobody.
    allocatable: Resources,
    /// Promised CPUs in percent of what it has; more than 100 is overcommitted.
    cpu_saturation: u64,
    /// Promised memory in percent of what may be promised.
    memory_saturation: u64,
    /// Sandboxes that it has room for.
    max_mvm_slots: u32,
    /// Sandboxes on it.
    used_mvm_slots: u32,
    /// Network slots that wait ready-made.
    ready_slots: u32,
    /// The hypervisor and its accelerator.
    hypervisor: String,
    /// Model of its processor.
    cpu_model: String,
    /// Release of its kernel.
    kernel: String,
    /// When it last reported.
    #[serde(with = "time::serde::rfc3339")]
    heartbeat_time: OffsetDateTime,
    /// Templates whose snapshots it has.
    local_templates: Vec<String>,
}

/// What a machine has.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Resources {
    /// CPUs, in thousandths.
    cpu_milli: u64,
    /// Memory, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
}

async fn all_nodes(state: &AppState) -> ApiResult<Vec<NodeBody>> {
    let machines = state
        .control
        .fleet
        .machines()
        .await
        .map_err(cubicle_control::Error::from)?;
    let templates = state.control.templates.list().await?;
    let local: Vec<String> = templates
        .iter()
        .filter(|template| template.current.is_some())
        .map(|template| template.id.to_string())
        .collect();
    let percent = |part: u64, whole: u64| part.saturating_mul(100) / whole.max(1);
    let node = |machine: cubicle_control::fleet::Machine| NodeBody {
        host_ip: machine.address.to_string(),
        instance_type: "microvm",
        healthy: true,
        capacity: Resources {
            cpu_milli: machine.cpu_milli,
            memory_mb: machine.memory_mib,
        },
        allocatable: Resources {
            cpu_milli: machine.cpu_milli.saturating_sub(machine.cpu_milli_used),
            memory_mb: machine.memory_mib.saturating_sub(machine.memory_mib_used),
        },
        cpu_saturation: percent(machine.cpu_milli_used, machine.cpu_milli),
        memory_saturation: percent(machine.memory_mib_used, machine.memory_mib),
        max_mvm_slots: machine.slots,
        used_mvm_slots: machine.slots_used,
        ready_slots: machine.slots_ready,
        hypervisor: machine.hypervisor,
        cpu_model: machine.cpu_model,
        kernel: machine.kernel,
        heartbeat_time: machine.heartbeat,
        local_templates: local.clone(),
        node_id: machine.id,
    };
    Ok(machines.into_iter().map(node).collect())
}

/// List machines
#[utoipa::path(
    get, path = "/nodes", tag = "cluster",
    responses((status = 200, body = Vec<NodeBody>), (status = 401, body = ErrorBody)),
)]
async fn nodes(State(state): State<AppState>) -> ApiResult<Json<Vec<NodeBody>>> {
    all_nodes(&state).await.map(Json)
}

/// List machines
#[utoipa::path(
    get, path = "/nodes", tag = "cubicle", operation_id = "own_nodes",
    responses((status = 200, body = Vec<NodeBody>), (status = 401, body = ErrorBody)),
)]
async fn own_nodes(State(state): State<AppState>) -> ApiResult<Json<Vec<NodeBody>>> {
    all_nodes(&state).await.map(Json)
}

/// Get a machine
#[utoipa::path(
    get, path = "/nodes/{nodeID}", tag = "cluster", params(("nodeID" = String, Path)),
    responses(
        (status = 200, body = NodeBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
async fn node(State(state): State<AppState>, Segment(id): Segment) -> ApiResult<Json<NodeBody>> {
    let node = all_nodes(&state)
        .await?
        .into_iter()
        .find(|node| node.node_id == id);
    node.map(Json)
        .ok_or_else(|| ApiError::new(http::StatusCode::NOT_FOUND, "there is no node of that name"))
}
