//! The template store: what templates there are to be had, and how to get one.

use std::collections::BTreeMap;

use axum::{Json, extract::State, response::Response};
use cubicle_control::{
    store::{Catalogue, Install, Listed},
    template::{Origin, Probe},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    AppState,
    envelope::deadline,
    error::{ApiResult, ErrorBody},
    extract::{OptionalJsonBody, Segment},
    templates::{BuildEvent, followed},
};

pub(crate) fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_for_others))
        .layer(deadline(crate::DEADLINE))
}

/// Under `/cubicle/v1`.
pub(crate) fn own_router() -> OpenApiRouter<AppState> {
    let quick = OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(refresh))
        .routes(routes!(get))
        .layer(deadline(crate::DEADLINE));
    // Without a deadline: the answer is a stream that ends with the build.
    quick.merge(OpenApiRouter::new().routes(routes!(install)))
}

/// The template store.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Store)]
pub(crate) struct StoreBody {
    /// Version of the catalogue's schema.
    version: u32,
    /// Where the catalogue is from: `shipped`, a path or an address.
    source: String,
    /// Why it could not be read anew; what is listed was read before.
    #[serde(skip_serializing_if = "Option::is_none")]
    stale: Option<String>,
    /// What there is.
    templates: Vec<StoreTemplate>,
}

/// A template of the store.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StoreTemplate {
    /// Its name, and the alias that it gets.
    name: String,
    /// What it is.
    description: String,
    /// What it is for, in one word.
    category: String,
    /// CPUs of its sandboxes.
    cpu_count: u32,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    /// Ports that its servers listen on.
    ports: Vec<u16>,
    /// Environment of its sandboxes.
    env: BTreeMap<String, String>,
    /// What runs in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    start: Option<String>,
    /// When it is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    ready: Option<StoreProbe>,
    /// What it is made from.
    from: StoreOrigin,
    /// What is done to that, one line for each step.
    steps: Vec<String>,
    /// What became of it on this server; absent if nothing did.
    #[serde(skip_serializing_if = "Option::is_none")]
    installed: Option<Installed>,
}

/// What a template is made from.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum StoreOrigin {
    /// A recipe of this server.
    Recipe(String),
    /// A container image.
    Image(String),
    /// Another template.
    Template(String),
}

/// What tells that a template is ready.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum StoreProbe {
    /// A shell command succeeds.
    Command(String),
    /// A `GET` is answered well.
    Http {
        /// The port.
        port: u16,
        /// Path and query.
        path: String,
    },
    /// Something listens.
    Tcp {
        /// The port.
        port: u16,
    },
}

/// The template of this server that has the name.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Installed {
    /// The template.
    #[serde(rename = "templateID")]
    template_id: String,
    /// Of its current build, or else of the latest: `waiting`, `building`, `ready` or `error`.
    build_status: &'static str,
    /// Why that failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl From<Listed> for StoreTemplate {
    fn from(Listed { entry, template }: Listed) -> Self {
        let installed = template.and_then(|template| {
            let build = template.build()?;
            Some(Installed {
                template_id: template.id.to_string(),
                build_status: build.status.as_str(),
                reason: build.reason.clone(),
            })
        });
        let spec = entry.spec;
        Self {
            name: entry.name,
            description: entry.description,
            category: entry.category,
            cpu_count: entry.size.cpu_count,
            memory_mb: entry.size.memory_mib,
            disk_size_mb: entry.size.disk_mib,
            ports: spec.ports,
            env: spec.env.into_iter().collect(),
            start: spec.start,
            ready: match spec.ready {
                Probe::None => None,
                Probe::Command(command) => Some(StoreProbe::Command(command)),
                Probe::Http { port, path } => Some(StoreProbe::Http { port, path }),
                Probe::Tcp { port } => Some(StoreProbe::Tcp { port }),
            },
            from: match spec.origin {
                Origin::Recipe(name) => StoreOrigin::Recipe(name),
                Origin::Image { reference, .. } => StoreOrigin::Image(reference),
                Origin::Template(reference) => StoreOrigin::Template(reference),
            },
            steps: spec.steps.iter().map(|s| s.action.to_string()).collect(),
            installed,
        }
    }
}

impl From<Catalogue> for StoreBody {
    fn from(catalogue: Catalogue) -> Self {
        Self {
            version: catalogue.version,
            source: catalogue.source,
            stale: catalogue.stale,
            templates: catalogue.templates.into_iter().map(Into::into).collect(),
        }
    }
}

/// What is to be different from what the store says.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
#[schema(as = InstallTemplate)]
pub(crate) struct InstallBody {
    /// `name` or `name:tag` for it, in the place of its name in the store.
    alias: Option<String>,
    /// More tags for it.
    tags: Vec<String>,
    /// CPUs of its sandboxes.
    cpu_count: Option<u32>,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: Option<u32>,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: Option<u32>,
    /// Build it even if it was built the same way before.
    force: bool,
}

/// List the template store
#[utoipa::path(
    get, path = "/store", tag = "templates", operation_id = "store",
    responses((status = 200, body = StoreBody), (status = 401, body = ErrorBody),
              (status = 503, body = ErrorBody, description = "The catalogue cannot be read")),
)]
async fn list_for_others(State(state): State<AppState>) -> ApiResult<Json<StoreBody>> {
    Ok(Json(state.control.store.list().await?.into()))
}

/// List the template store
#[utoipa::path(
    get, path = "/store", tag = "cubicle", operation_id = "list_store",
    responses((status = 200, body = StoreBody), (status = 401, body = ErrorBody),
              (status = 503, body = ErrorBody, description = "The catalogue cannot be read")),
)]
async fn list(State(state): State<AppState>) -> ApiResult<Json<StoreBody>> {
    list_for_others(State(state)).await
}

/// Read the catalogue of the template store anew
#[utoipa::path(
    post, path = "/store/refresh", tag = "cubicle", operation_id = "refresh_store",
    responses((status = 200, body = StoreBody), (status = 401, body = ErrorBody),
              (status = 503, body = ErrorBody, description = "The catalogue cannot be read")),
)]
async fn refresh(State(state): State<AppState>) -> ApiResult<Json<StoreBody>> {
    state.control.store.refresh().await?;
    list_for_others(State(state)).await
}

/// Show one template of the store
#[utoipa::path(
    get, path = "/store/{name}", tag = "cubicle", operation_id = "get_from_store",
    params(("name" = String, Path)),
    responses((status = 200, body = StoreTemplate), (status = 401, body = ErrorBody),
              (status = 404, body = ErrorBody)),
)]
async fn get(
    State(state): State<AppState>,
    Segment(name): Segment,
) -> ApiResult<Json<StoreTemplate>> {
    Ok(Json(state.control.store.get(&name).await?.into()))
}

/// Build a template of the store and follow it
///
/// Answers one JSON object a line, as it happens; the last is `done` or `failed`. The build goes on
/// when the client goes away.
#[utoipa::path(
    post, path = "/store/{name}/install", tag = "cubicle", operation_id = "install_from_store",
    params(("name" = String, Path)), request_body = InstallBody,
    responses(
        (status = 200, body = BuildEvent, content_type = "application/x-ndjson"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It is being built in another way already"),
    ),
)]
async fn install(
    State(state): State<AppState>,
    Segment(name): Segment,
    OptionalJsonBody(body): OptionalJsonBody<InstallBody>,
) -> ApiResult<Response> {
    let wanted = Install {
        alias: body.alias,
        tags: body.tags,
        cpu_count: body.cpu_count,
        memory_mib: body.memory_mb,
        disk_mib: body.disk_size_mb,
        force: body.force,
    };
    let started = state.control.store.install(&name, wanted).await?;
    Ok(followed(state.control, started))
}
