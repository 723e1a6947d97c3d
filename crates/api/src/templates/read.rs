//! Templates, looked at, changed and deleted.

use axum::{Json, extract::State};
use cubicle_control::{
    fleet::Level,
    template::{BuildLine, LogPage, Template},
};
use http::{HeaderMap, StatusCode};

use super::model::{
    AliasBody, BuildInfo, BuildLogs, BuildReason, TemplateBody, TemplateBuildBody, TemplateUpdate,
    TemplateUpdated, TemplateWithBuilds,
};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, Query, Segment, Segments, next_page},
};

const MAX_PAGE: u64 = 100;
/// What this server comes with.
const DEFAULT_TEMPLATES: [&str; 1] = ["base"];

/// List templates
#[utoipa::path(
    get, path = "/templates", tag = "templates",
    responses((status = 200, body = Vec<TemplateBody>), (status = 401, body = ErrorBody)),
)]
pub(crate) async fn list(State(state): State<AppState>) -> ApiResult<Json<Vec<TemplateBody>>> {
    let templates = state.control.templates.list().await?;
    Ok(Json(
        templates.iter().filter_map(TemplateBody::new).collect(),
    ))
}

/// List templates, page by page
#[utoipa::path(
    get, path = "/v2/templates", tag = "templates",
    params(
        ("nextToken" = Option<String>, Query),
        ("limit" = Option<u32>, Query, description = "1 to 100 (default)"),
    ),
    responses(
        (status = 200, body = Vec<TemplateBody>, headers(("X-Next-Token" = String))),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn list_v2(
    State(state): State<AppState>,
    query: Query,
) -> ApiResult<(HeaderMap, Json<Vec<TemplateBody>>)> {
    let limit = query.number("limit", 1..=MAX_PAGE)?.unwrap_or(MAX_PAGE);
    let mut templates = state.control.templates.list().await?;
    if let Some(last) = query.text("nextToken")? {
        let place = templates
            .iter()
            .position(|template| template.id.as_str() == last);
        let place = place.ok_or_else(|| ApiError::field("nextToken", "names no template"))?;
        templates.drain(..=place);
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = templates.len() > limit;
    templates.truncate(limit);
    let last = templates.last().filter(|_| more);
    let headers = next_page(last.map(|template| &template.id));
    let page = templates.iter().filter_map(TemplateBody::new).collect();
    Ok((headers, Json(page)))
}

/// List the templates that this server comes with
#[utoipa::path(
    get, path = "/default-templates", tag = "templates",
    responses((status = 200, body = Vec<TemplateBody>), (status = 401, body = ErrorBody)),
)]
pub(crate) async fn defaults(State(state): State<AppState>) -> ApiResult<Json<Vec<TemplateBody>>> {
    let is_default = |template: &&Template| {
        template
            .aliases
            .iter()
            .any(|alias| DEFAULT_TEMPLATES.contains(&alias.as_str()))
    };
    let templates = state.control.templates.list().await?;
    Ok(Json(
        templates
            .iter()
            .filter(is_default)
            .filter_map(TemplateBody::new)
            .collect(),
    ))
}

/// Get a template
#[utoipa::path(
    get, path = "/templates/{templateID}", tag = "templates",
    params(("templateID" = String, Path, description = "Its id or a name")),
    responses(
        (status = 200, body = TemplateWithBuilds),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    Segment(reference): Segment,
) -> ApiResult<Json<TemplateWithBuilds>> {
    let template = state.control.templates.get(&reference).await?;
    let builds = template
        .builds
        .iter()
        .map(TemplateBuildBody::from)
        .collect();
    let body = TemplateBody::new(&template).ok_or_else(|| ApiError::internal(&"no build"))?;
    Ok(Json(TemplateWithBuilds {
        template: body,
        builds,
    }))
}

/// Delete a template or a snapshot
///
/// Sandboxes that were made from it run on, and snapshots that descend from it stay.
#[utoipa::path(
    delete, path = "/templates/{templateID}", tag = "templates",
    params(("templateID" = String, Path,
            description = "Its id or a name, of a template or a snapshot; one segment, encoded")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "A paused sandbox consists of it"),
    ),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Segment(reference): Segment,
) -> ApiResult<StatusCode> {
    state.control.delete(&reference).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Change a template
#[utoipa::path(
    patch, path = "/templates/{templateID}", tag = "templates", request_body = TemplateUpdate,
    params(("templateID" = String, Path, description = "Its id or a name")),
    responses(
        (status = 200, body = TemplateUpdated),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn update(
    state: State<AppState>,
    reference: Segment,
    body: JsonBody<TemplateUpdate>,
) -> ApiResult<Json<TemplateUpdated>> {
    update_v2(state, reference, body).await
}

/// Change a template
#[utoipa::path(
    patch, path = "/v2/templates/{templateID}", tag = "templates", request_body = TemplateUpdate,
    params(("templateID" = String, Path, description = "Its id or a name")),
    responses(
        (status = 200, body = TemplateUpdated),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn update_v2(
    State(state): State<AppState>,
    Segment(reference): Segment,
    JsonBody(body): JsonBody<TemplateUpdate>,
) -> ApiResult<Json<TemplateUpdated>> {
    let templates = &state.control.templates;
    let template = match body.public {
        Some(public) => templates.set_public(&reference, public).await?,
        None => templates.get(&reference).await?,
    };
    Ok(Json(TemplateUpdated {
        names: template.aliases,
    }))
}

/// Look up a name
#[utoipa::path(
    get, path = "/templates/aliases/{alias}", tag = "templates",
    params(("alias" = String, Path)),
    responses(
        (status = 200, body = AliasBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn alias(
    State(state): State<AppState>,
    Segment(alias): Segment,
) -> ApiResult<Json<AliasBody>> {
    let template = state.control.templates.get(&alias).await?;
    Ok(Json(AliasBody {
        template_id: template.id.to_string(),
        public: template.public,
    }))
}

/// How far a build is
#[utoipa::path(
    get, path = "/templates/{templateID}/builds/{buildID}/status", tag = "templates",
    params(
        ("templateID" = String, Path), ("buildID" = String, Path),
        ("logsOffset" = Option<u64>, Query, description = "Lines read already"),
        ("limit" = Option<u32>, Query, description = "0 to 100 (default)"),
        ("level" = Option<String>, Query, description = "Nothing less grave than this"),
    ),
    responses(
        (status = 200, body = BuildInfo),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn build_status(
    State(state): State<AppState>,
    Segments(template, build): Segments,
    query: Query,
) -> ApiResult<Json<BuildInfo>> {
    let build = state.control.templates.build_of(&template, &build).await?;
    let offset = query.number("logsOffset", 0..=u64::MAX)?.unwrap_or(0);
    let lines = lines(&state, build.id, offset, &query).await?;
    Ok(Json(BuildInfo {
        template_id: build.template.to_string(),
        build_id: build.id,
        status: build.status.as_str(),
        logs: Vec::new(),
        log_entries: lines.into_iter().map(Into::into).collect(),
        reason: build.reason.map(|message| BuildReason { message }),
    }))
}

/// A build's log
#[utoipa::path(
    get, path = "/templates/{templateID}/builds/{buildID}/logs", tag = "templates",
    params(
        ("templateID" = String, Path), ("buildID" = String, Path),
        ("cursor" = Option<i64>, Query, description = "Milliseconds since 1970"),
        ("limit" = Option<u32>, Query, description = "0 to 100 (default)"),
        ("direction" = Option<String>, Query, description = "`forward` (default) or `backward`"),
        ("level" = Option<String>, Query, description = "Nothing less grave than this"),
    ),
    responses(
        (status = 200, body = BuildLogs),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn build_logs(
    State(state): State<AppState>,
    Segments(template, build): Segments,
    query: Query,
) -> ApiResult<Json<BuildLogs>> {
    let build = state.control.templates.build_of(&template, &build).await?;
    let cursor = query.unix_millis("cursor")?;
    let backward = crate::sandboxes::backward(&query)?;
    let limit = page(&query)?;
    let level = crate::sandboxes::level(&query)?;
    let mut lines = state
        .control
        .templates
        .build_log(build.id, LogPage::from(0, u32::MAX))
        .await?;
    if backward {
        lines.reverse();
    }
    lines.retain(|line| {
        let in_reach = cursor.is_none_or(|at| {
            if backward {
                line.at <= at
            } else {
                line.at >= at
            }
        });
        in_reach && line.level >= level
    });
    lines.truncate(limit);
    Ok(Json(BuildLogs {
        logs: lines.into_iter().map(Into::into).collect(),
    }))
}

/// One page of a build's log. Lines that are not grave enough count for the offset all the same.
async fn lines(
    state: &AppState,
    build: uuid::Uuid,
    offset: u64,
    query: &Query,
) -> ApiResult<Vec<BuildLine>> {
    let level: Level = crate::sandboxes::level(query)?;
    let limit = u32::try_from(page(query)?).unwrap_or(u32::MAX);
    let mut lines = state
        .control
        .templates
        .build_log(build, LogPage::from(offset, limit))
        .await?;
    lines.retain(|line| line.level >= level);
    Ok(lines)
}

fn page(query: &Query) -> ApiResult<usize> {
    let limit = query.number("limit", 0..=MAX_PAGE)?.unwrap_or(MAX_PAGE);
    Ok(usize::try_from(limit).unwrap_or(usize::MAX))
}
