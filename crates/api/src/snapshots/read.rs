//! Snapshots, listed.

use axum::{Json, extract::State};
use cubicle_control::snapshot::{SnapshotPage, SnapshotQuery, SnapshotState};
use http::HeaderMap;

use super::model::{ListedSnapshot, name_of};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{Query, next_page, sandbox_id},
};

const MAX_PAGE: u64 = cubicle_control::sandbox::MAX_PAGE as u64;

/// List snapshots, page by page
///
/// Newest first. The header `X-Next-Token` is what to send as `nextToken`; the last page has none.
#[utoipa::path(
    get, path = "/snapshots", tag = "snapshots",
    params(
        ("sandboxID" = Option<String>, Query, description = "Taken of this sandbox"),
        ("name" = Option<String>, Query, description = "`name` or `name:tag`"),
        ("nextToken" = Option<String>, Query),
        ("limit" = Option<u32>, Query, description = "1 to 100 (default)"),
    ),
    responses(
        (status = 200, body = Vec<ListedSnapshot>, headers(("X-Next-Token" = String))),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    query: Query,
) -> ApiResult<(HeaderMap, Json<Vec<ListedSnapshot>>)> {
    let page = page_of(&state, &query, Vec::new()).await?;
    let items = page.items.iter().map(ListedSnapshot::from).collect();
    Ok((next_page(page.next.as_ref()), Json(items)))
}

/// The page that a query asks for, of snapshots in these states.
pub(crate) async fn page_of(
    state: &AppState,
    query: &Query,
    states: Vec<SnapshotState>,
) -> ApiResult<SnapshotPage> {
    let cursor = query.text("nextToken")?.map(|token| {
        token
            .parse()
            .map_err(|why| ApiError::field("nextToken", why))
    });
    let limit = query.number("limit", 1..=MAX_PAGE)?.unwrap_or(MAX_PAGE);
    let query = SnapshotQuery {
        sandbox: query.text("sandboxID")?.map(sandbox_id).transpose()?,
        name: name_of(query.text("name")?)?,
        states,
        cursor: cursor.transpose()?,
        limit: usize::try_from(limit).ok(),
    };
    Ok(state.control.snapshots.list(&query).await?)
}
