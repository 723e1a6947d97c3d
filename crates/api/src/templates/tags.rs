//! Tags: names of the builds of a template.

use axum::{Json, extract::State};
use cubicle_control::template::{Reference, Tag};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, Query, Segment},
};

/// Most tags in one request.
const MAX_TAGS: usize = 100;

/// Tags to give to a build.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = AssignTemplateTags)]
pub(crate) struct AssignBody {
    /// The build, as `name:tag`.
    target: String,
    /// What else it is to be called.
    tags: Vec<String>,
}

/// Tags that a build has been given.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = AssignedTemplateTags)]
pub(crate) struct AssignedBody {
    /// The tags.
    tags: Vec<String>,
    /// The build.
    #[serde(rename = "buildID")]
    build_id: Uuid,
}

/// Tags to take away.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = DeleteTemplateTags)]
pub(crate) struct DeleteBody {
    /// The template.
    name: String,
    /// Its tags.
    tags: Vec<String>,
}

/// A tag.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateTag)]
pub(crate) struct TagBody {
    /// The tag.
    tag: String,
    /// What it stands for.
    #[serde(rename = "buildID")]
    build_id: Uuid,
    /// Since when.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

impl From<Tag> for TagBody {
    fn from(tag: Tag) -> Self {
        Self {
            tag: tag.tag,
            build_id: tag.build,
            created_at: tag.assigned_at,
        }
    }
}

/// Give a build more tags
#[utoipa::path(
    post, path = "/templates/tags", tag = "templates", request_body = AssignBody,
    responses(
        (status = 201, body = AssignedBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn assign(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<AssignBody>,
) -> ApiResult<(StatusCode, Json<AssignedBody>)> {
    let target: Result<Reference, _> = body.target.parse();
    target.map_err(|why| ApiError::field("target", why))?;
    let tags = distinct(body.tags)?;
    let templates = &state.control.templates;
    let build_id = templates.assign_tags(&body.target, &tags).await?;
    Ok((StatusCode::CREATED, Json(AssignedBody { tags, build_id })))
}

/// Take tags away from a template
///
/// A build that has no tag left is gone.
#[utoipa::path(
    delete, path = "/templates/tags", tag = "templates", request_body = DeleteBody,
    responses(
        (status = 204, description = "They are gone"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn delete(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<DeleteBody>,
) -> ApiResult<StatusCode> {
    let name: Result<Reference, _> = body.name.parse();
    let name = name.map_err(|why| ApiError::field("name", why))?;
    if name.tag.is_some() {
        return Err(ApiError::field("name", "has a tag; list it in tags"));
    }
    let tags = distinct(body.tags)?;
    let templates = &state.control.templates;
    templates.delete_tags(&body.name, &tags).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn distinct(tags: Vec<String>) -> ApiResult<Vec<String>> {
    if tags.is_empty() || tags.len() > MAX_TAGS {
        let why = format!("has not 1 to {MAX_TAGS} of them");
        return Err(ApiError::field("tags", why));
    }
    let mut kept = Vec::with_capacity(tags.len());
    for tag in tags {
        if !cubicle_control::template::is_tag(&tag) {
            let why = cubicle_control::template::BadName::Tag;
            return Err(ApiError::field("tags", why));
        }
        if !kept.contains(&tag) {
            kept.push(tag);
        }
    }
    Ok(kept)
}

/// List the tags of a template
#[utoipa::path(
    get, path = "/templates/{templateID}/tags", tag = "templates",
    params(("templateID" = String, Path, description = "Its id or a name")),
    responses(
        (status = 200, body = Vec<TagBody>),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    Segment(template): Segment,
) -> ApiResult<Json<Vec<TagBody>>> {
    let tags = state.control.templates.tags(&template).await?;
    Ok(Json(tags.into_iter().map(Into::into).collect()))
}

/// How many tags a template has.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TemplateTagCount)]
pub(crate) struct CountBody {
    /// So many.
    total: usize,
}

/// Count the tags of a template
#[utoipa::path(
    get, path = "/templates/{templateID}/tags/count", tag = "templates",
    params(("templateID" = String, Path, description = "Its id or a name")),
    responses(
        (status = 200, body = CountBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn count(
    State(state): State<AppState>,
    Segment(template): Segment,
) -> ApiResult<Json<CountBody>> {
    let total = state.control.templates.tags(&template).await?.len();
    Ok(Json(CountBody { total }))
}

/// Whether a template has a tag.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateTagExists)]
pub(crate) struct ExistsBody {
    /// Whether it has.
    exists: bool,
    /// The tag.
    normalized_tag: String,
}

/// Look up a tag of a template
#[utoipa::path(
    get, path = "/templates/{templateID}/tags/exists", tag = "templates",
    params(
        ("templateID" = String, Path, description = "Its id or a name"),
        ("tag" = String, Query),
    ),
    responses(
        (status = 200, body = ExistsBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn exists(
    State(state): State<AppState>,
    Segment(template): Segment,
    query: Query,
) -> ApiResult<Json<ExistsBody>> {
    let wanted = query.text("tag")?;
    let wanted = wanted.ok_or_else(|| ApiError::field("tag", "is missing"))?;
    let tags = state.control.templates.tags(&template).await?;
    let exists = tags.iter().any(|tag| tag.tag == wanted);
    Ok(Json(ExistsBody {
        exists,
        normalized_tag: wanted.to_owned(),
    }))
}
