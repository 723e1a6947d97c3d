//! Templates, looked at, changed and deleted.

use axum::{Json, extract::State};
use cubicle_control::{Error, template::Template};
use http::{HeaderMap, HeaderValue, StatusCode, header::USER_AGENT};

use super::model::{
    AliasBody, TemplateBody, TemplateUpdate, TemplateUpdated, TemplateWithBuilds, is_default,
};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, Query, Segment, next_page},
};

const MAX_PAGE: u64 = 100;

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
    let templates = state.control.templates.list().await?;
    Ok(Json(
        templates
            .iter()
            .filter(|template| is_default(template))
            .filter_map(TemplateBody::new)
            .collect(),
    ))
}

/// Get a template
#[utoipa::path(
    get, path = "/templates/{templateID}", tag = "templates",
    params(
        ("templateID" = String, Path, description = "Its id or a name"),
        ("nextToken" = Option<String>, Query, description = "For its builds"),
        ("limit" = Option<u32>, Query, description = "For its builds: 1 to 100 (default)"),
    ),
    responses(
        (status = 200, body = TemplateWithBuilds, headers(("X-Next-Token" = String))),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    Segment(reference): Segment,
    query: Query,
) -> ApiResult<(HeaderMap, Json<TemplateWithBuilds>)> {
    let template = state.control.templates.get(&reference).await?;
    with_builds(&state, &template, &query)
}

/// A template with a page of its builds.
pub(super) fn with_builds(
    state: &AppState,
    template: &Template,
    query: &Query,
) -> ApiResult<(HeaderMap, Json<TemplateWithBuilds>)> {
    let limit = query.number("limit", 1..=MAX_PAGE)?.unwrap_or(MAX_PAGE);
    let mut builds = template.builds.as_slice();
    if let Some(last) = query.text("nextToken")? {
        let place = builds.iter().position(|build| build.id.to_string() == last);
        let place = place.ok_or_else(|| ApiError::field("nextToken", "names no build"))?;
        builds = &builds[place + 1..];
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = builds.len() > limit;
    builds = &builds[..limit.min(builds.len())];
    let last = builds.last().filter(|_| more);
    let headers = next_page(last.map(|build| &build.id));
    let body = TemplateWithBuilds::new(template, builds, &state.config.node_id);
    let body = body.ok_or_else(|| ApiError::internal(&"a template without a build"))?;
    Ok((headers, Json(body)))
}

/// Delete a template or a snapshot
///
/// Sandboxes that were made from a snapshot run on, and snapshots that descend from it stay. So it
/// is with a template that is deleted by force; otherwise one that sandboxes were made from stays.
#[utoipa::path(
    delete, path = "/templates/{templateID}", tag = "templates",
    params(
        ("templateID" = String, Path,
         description = "Its id or a name, of a template or a snapshot; one segment, encoded"),
        ("force" = Option<bool>, Query,
         description = "Whether to delete a template that sandboxes were made from; if nothing is \
                        said, E2B's clients and our own mean it and others do not"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "Sandboxes use it"),
    ),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    Segment(reference): Segment,
    query: Query,
    headers: HeaderMap,
) -> ApiResult<StatusCode> {
    let force = match query.text("force")? {
        Some("true") => true,
        Some("false") => false,
        Some(_) => return Err(ApiError::field("force", "is neither 'true' nor 'false'")),
        // Cube's clients, who expect to be refused, do not say who they are.
        None => crate::sandboxes::is_e2b(&headers) || is_own(&headers),
    };
    let control = &state.control;
    if !force && control.templates.find_id(&reference).await?.is_some() {
        match control.delete_unused(&reference).await {
            // What is made from a snapshot has that in the place of its template.
            Err(Error::TemplateNotFound { .. }) => {}
            done => return Ok(done.map(|()| StatusCode::NO_CONTENT)?),
        }
    }
    control.delete(&reference).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether a client is our own command line, which says so.
fn is_own(headers: &HeaderMap) -> bool {
    let agent = headers.get(USER_AGENT).map(HeaderValue::as_bytes);
    agent.is_some_and(|agent| agent.starts_with(b"cubicle/"))
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
