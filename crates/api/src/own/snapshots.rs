//! Snapshots, with every number that there is.

use std::time::Instant;

use axum::{Json, extract::State};
use cubicle_control::{
    Error as Control,
    snapshot::{SnapshotState, TreeNode},
};
use cubicle_ids::SnapshotId;
use http::{HeaderMap, StatusCode};

use super::model::{SnapshotBody, SnapshotDetail, SnapshotUsage, Taken, TreePlace, Verified};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{OptionalJsonBody, Query, SandboxPath, Segment, next_page, sandbox_id},
    sandboxes::reference,
    snapshots::{NewSnapshotBody, create_it, page_of},
    timing::millis,
};

/// Take a snapshot
///
/// As E2B's clients do; the answer says what it cost.
#[utoipa::path(
    post, path = "/sandboxes/{sandboxID}/snapshots", tag = "cubicle",
    request_body = NewSnapshotBody, params(("sandboxID" = String, Path)),
    responses(
        (status = 201, body = Taken, description = "It can be used"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 429, body = ErrorBody), (status = 503, body = ErrorBody),
    ),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    OptionalJsonBody(body): OptionalJsonBody<NewSnapshotBody>,
) -> ApiResult<(StatusCode, Json<Taken>)> {
    let (creation, took) = create_it(&state, &id, body).await?;
    let body = Taken::new(&creation.taken, creation.snapshot.names(), took);
    Ok((StatusCode::CREATED, Json(body)))
}

/// List snapshots, page by page
///
/// Newest first. The header `X-Next-Token` is what to send as `nextToken`; the last page has none.
#[utoipa::path(
    get, path = "/snapshots", tag = "cubicle",
    params(
        ("sandboxID" = Option<String>, Query, description = "Taken of this sandbox"),
        ("name" = Option<String>, Query, description = "`name` or `name:tag`"),
        ("state" = Option<String>, Query,
         description = "`publishing`, `ready` (default), `failed`; several with commas"),
        ("nextToken" = Option<String>, Query),
        ("limit" = Option<u32>, Query, description = "1 to 100 (default)"),
    ),
    responses(
        (status = 200, body = Vec<SnapshotBody>, headers(("X-Next-Token" = String))),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(super) async fn list(
    State(state): State<AppState>,
    query: Query,
) -> ApiResult<(HeaderMap, Json<Vec<SnapshotBody>>)> {
    let visible = |word: &str| {
        SnapshotState::parse(word)
            .filter(|state| !matches!(state, SnapshotState::Deleting | SnapshotState::Deleted))
            .ok_or_else(|| ApiError::field("state", "is none of 'publishing', 'ready', 'failed'"))
    };
    let states = query.list("state").into_iter().map(visible);
    let states = states.collect::<ApiResult<Vec<_>>>()?;
    let page = page_of(&state, &query, states).await?;
    let items = page.items.iter().map(SnapshotBody::from).collect();
    Ok((next_page(page.next.as_ref()), Json(items)))
}

/// Get a snapshot
#[utoipa::path(
    get, path = "/snapshots/{snapshotID}", tag = "cubicle",
    params(("snapshotID" = String, Path, description = "Its id, its name, or `name:tag`")),
    responses(
        (status = 200, body = SnapshotDetail),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(super) async fn get(
    State(state): State<AppState>,
    Segment(name): Segment,
) -> ApiResult<Json<SnapshotDetail>> {
    let name = reference("snapshotID", name)?;
    let snapshot = state.control.snapshots.get(&name).await?;
    let trees = state.control.snapshots.tree(None).await?;
    let children = find(&trees, &snapshot.id).map_or(&[][..], |node| &node.children);
    Ok(Json(SnapshotDetail {
        snapshot: (&snapshot).into(),
        children: children.iter().map(|child| child.id.to_string()).collect(),
    }))
}

fn find<'a>(trees: &'a [TreeNode], id: &SnapshotId) -> Option<&'a TreeNode> {
    let mut rest: Vec<&TreeNode> = trees.iter().collect();
    while let Some(node) = rest.pop() {
        if node.id == *id {
            return Some(node);
        }
        rest.extend(&node.children);
    }
    None
}

/// Which snapshot came from which
///
/// Each below its parent, and templates at the roots. A snapshot that was deleted keeps its place
/// where lines of descent part.
#[utoipa::path(
    get, path = "/snapshot-tree", tag = "cubicle",
    params(("sandboxID" = Option<String>, Query, description = "Only those of this sandbox, and what they came from")),
    responses(
        (status = 200, body = Vec<TreePlace>),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(super) async fn tree(
    State(state): State<AppState>,
    query: Query,
) -> ApiResult<Json<Vec<TreePlace>>> {
    let sandbox = query.text("sandboxID")?.map(sandbox_id).transpose()?;
    let trees = state.control.snapshots.tree(sandbox.as_ref()).await?;
    Ok(Json(TreePlace::flat(&trees)))
}

/// What do all snapshots take?
#[utoipa::path(
    get, path = "/snapshot-usage", tag = "cubicle",
    responses((status = 200, body = SnapshotUsage), (status = 401, body = ErrorBody)),
)]
pub(super) async fn usage(State(state): State<AppState>) -> ApiResult<Json<SnapshotUsage>> {
    let usage = state.control.snapshots.usage().await?;
    Ok(Json(SnapshotUsage {
        count: usage.count,
        own_bytes: usage.own_bytes,
        logical_bytes: usage.logical_bytes,
        max_count: usage.max_count,
        max_own_bytes: usage.max_own_bytes,
    }))
}

/// Delete a snapshot
///
/// In any order: sandboxes that were made from it run on, and snapshots that descend from it stay.
#[utoipa::path(
    delete, path = "/snapshots/{snapshotID}", tag = "cubicle",
    params(("snapshotID" = String, Path, description = "Its id, its name, or `name:tag`")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "A paused sandbox consists of it"),
    ),
)]
pub(super) async fn delete(
    State(state): State<AppState>,
    Segment(name): Segment,
) -> ApiResult<StatusCode> {
    let name = reference("snapshotID", name)?;
    state.control.snapshots.delete(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Verify a snapshot
///
/// Reads it back and compares it with what was written. One that is damaged is marked as failed.
#[utoipa::path(
    post, path = "/snapshots/{snapshotID}/verify", tag = "cubicle",
    params(("snapshotID" = String, Path, description = "Its id, its name, or `name:tag`")),
    responses(
        (status = 200, body = Verified, description = "The answer, good or bad"),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(super) async fn verify(
    State(state): State<AppState>,
    Segment(name): Segment,
) -> ApiResult<Json<Verified>> {
    let name = reference("snapshotID", name)?;
    let began = Instant::now();
    let (snapshot_id, reason) = match state.control.snapshots.verify(&name).await {
        Ok(snapshot) => (snapshot.id.to_string(), None),
        Err(Control::SnapshotUnusable { why, .. }) => {
            let id = state.control.snapshots.get(&name).await;
            (
                id.map_or(name, |snapshot| snapshot.id.to_string()),
                Some(why),
            )
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Json(Verified {
        snapshot_id,
        ok: reason.is_none(),
        reason,
        took_ms: millis(began.elapsed()),
    }))
}
