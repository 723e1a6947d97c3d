//! Sandboxes, looked at.

use axum::{Json, extract::State};
use cubicle_control::{
    fleet::Level,
    lifecycle::Visible,
    sandbox::{Cursor, ListQuery, LogQuery, MAX_LOG_PAGE, MAX_PAGE, Order},
};
use http::{HeaderMap, HeaderValue, header::USER_AGENT};

use super::model::{
    ListedSandbox, SandboxDetail, SandboxLogs, SandboxLogsV2, SandboxMetric, SandboxesWithMetrics,
};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{Query, SandboxPath, next_page, sandbox_id},
    filter,
};

const MAX_SEARCH: usize = 256;

/// Get a sandbox
#[utoipa::path(
    get, path = "/sandboxes/{sandboxID}", tag = "sandboxes", params(("sandboxID" = String, Path)),
    responses(
        (status = 200, body = SandboxDetail),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
) -> ApiResult<Json<SandboxDetail>> {
    let sandbox = state.control.sandboxes.get(&id)?;
    Ok(Json(SandboxDetail::new(&state, &sandbox)))
}

/// List all sandboxes at once
///
/// E2B's clients are told of those that run only, as they expect here; `state` says otherwise.
#[utoipa::path(
    get, path = "/sandboxes", tag = "sandboxes",
    params(
        ("metadata" = Option<String>, Query, description = "A form of pairs that must match"),
        ("state" = Option<String>, Query, description = "`running`, `paused`, or both with a comma"),
    ),
    responses(
        (status = 200, body = Vec<ListedSandbox>),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn list_all(
    State(state): State<AppState>,
    headers: HeaderMap,
    query: Query,
) -> ApiResult<Json<Vec<ListedSandbox>>> {
    let mut states = states(&query)?;
    if states.is_empty() && is_e2b(&headers) {
        states.push(Visible::Running);
    }
    let query = ListQuery {
        metadata: filter::parse(query.text("metadata")?.unwrap_or_default())?,
        states,
        ..ListQuery::default()
    };
    let page = state.control.sandboxes.list(&query).await?;
    Ok(Json(
        page.items
            .iter()
            .map(|sandbox| ListedSandbox::new(&state, sandbox))
            .collect(),
    ))
}

/// Whether a client is one of E2B's own, which say so.
pub(crate) fn is_e2b(headers: &HeaderMap) -> bool {
    let agent = headers.get(USER_AGENT).map(HeaderValue::as_bytes);
    agent.is_some_and(|agent| agent.starts_with(b"e2b-"))
}

/// List sandboxes, page by page
///
/// The header `X-Next-Token` is what to send as `nextToken`; the last page has none.
#[utoipa::path(
    get, path = "/v2/sandboxes", tag = "sandboxes",
    params(
        ("metadata" = Option<String>, Query, description = "A form of pairs that must match"),
        ("state" = Option<String>, Query, description = "`running`, `paused`, or both with a comma"),
        ("order" = Option<String>, Query, description = "`asc` or `desc` (default), by start"),
        ("startedAfter" = Option<String>, Query, description = "RFC 3339; included"),
        ("template" = Option<String>, Query, description = "A template id or name"),
        ("nextToken" = Option<String>, Query),
        ("limit" = Option<u32>, Query, description = "1 to 100 (default)"),
    ),
    responses(
        (status = 200, body = Vec<ListedSandbox>, headers(
            ("X-Next-Token" = String), ("X-Total-Running" = u64),
        )),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn list(
    State(state): State<AppState>,
    query: Query,
) -> ApiResult<(HeaderMap, Json<Vec<ListedSandbox>>)> {
    let parsed = parse_list(&query)?;
    let page = state.control.sandboxes.list(&parsed).await?;
    let running = state.control.sandboxes.counts()["running"];
    let mut headers = next_page(page.next.as_ref());
    headers.insert("x-total-running", running.into());
    let items = page
        .items
        .iter()
        .map(|sandbox| ListedSandbox::new(&state, sandbox))
        .collect();
    Ok((headers, Json(items)))
}

/// The parameter `state` of lists.
fn states(query: &Query) -> ApiResult<Vec<Visible>> {
    let parse = |word: &str| {
        word.parse::<Visible>()
            .map_err(|_| ApiError::field("state", "is neither 'running' nor 'paused'"))
    };
    query.list("state").into_iter().map(parse).collect()
}

fn parse_list(query: &Query) -> ApiResult<ListQuery> {
    let states = states(query)?;
    let order = match query.text("order")? {
        None | Some("desc") => Order::Descending,
        Some("asc") => Order::Ascending,
        Some(_) => return Err(ApiError::field("order", "is neither 'asc' nor 'desc'")),
    };
    let cursor = query
        .text("nextToken")?
        .map(str::parse::<Cursor>)
        .transpose()
        .map_err(|why| ApiError::field("nextToken", why))?;
    let limit = query
        .number("limit", 1..=MAX_PAGE as u64)?
        .unwrap_or(MAX_PAGE as u64);
    Ok(ListQuery {
        metadata: filter::parse(query.text("metadata")?.unwrap_or_default())?,
        states,
        order,
        started_after: query.time("startedAfter")?,
        template: query.text("template")?.map(str::to_owned),
        cursor,
        limit: usize::try_from(limit).ok(),
    })
}

/// What a sandbox used
///
/// One sample every few seconds, oldest first; the last half hour is kept.
#[utoipa::path(
    get, path = "/sandboxes/{sandboxID}/metrics", tag = "sandboxes",
    params(
        ("sandboxID" = String, Path),
        ("start" = Option<i64>, Query, description = "Seconds since 1970; included"),
        ("end" = Option<i64>, Query, description = "Seconds since 1970; included"),
    ),
    responses(
        (status = 200, body = Vec<SandboxMetric>),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn metrics(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> ApiResult<Json<Vec<SandboxMetric>>> {
    let start = query.unix_seconds("start")?;
    // The second that is named is over when the next one begins.
    let second = time::Duration::SECOND - time::Duration::MICROSECOND;
    let end = query
        .unix_seconds("end")?
        .map(|end| end.saturating_add(second));
    if let (Some(start), Some(end)) = (start, end)
        && end < start
    {
        return Err(ApiError::field("end", "is before start"));
    }
    let samples = state.control.sandboxes.metrics(&id, start, end);
    let samples = samples.await?;
    Ok(Json(samples.iter().map(SandboxMetric::from).collect()))
}

/// What several sandboxes use now
#[utoipa::path(
    get, path = "/sandboxes/metrics", tag = "sandboxes",
    params(("sandbox_ids" = Option<String>, Query, description = "Ids with commas; all if left out")),
    responses(
        (status = 200, body = SandboxesWithMetrics),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    ),
)]
pub(crate) async fn latest_metrics(
    State(state): State<AppState>,
    query: Query,
) -> ApiResult<Json<SandboxesWithMetrics>> {
    let ids: Vec<_> = query
        .list("sandbox_ids")
        .into_iter()
        .map(sandbox_id)
        .collect::<ApiResult<_>>()?;
    let ids = (!ids.is_empty()).then_some(ids.as_slice());
    let samples = state.control.sandboxes.latest_metrics(ids).await;
    let sandboxes = samples
        .iter()
        .map(|(id, sample)| (id.to_string(), sample.into()))
        .collect();
    Ok(Json(SandboxesWithMetrics { sandboxes }))
}

/// A sandbox's log
#[utoipa::path(
    get, path = "/sandboxes/{sandboxID}/logs", tag = "sandboxes",
    params(
        ("sandboxID" = String, Path),
        ("start" = Option<i64>, Query, description = "Milliseconds since 1970"),
        ("limit" = Option<u32>, Query, description = "0 to 1000 (default)"),
    ),
    responses(
        (status = 200, body = SandboxLogs),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn logs(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> ApiResult<Json<SandboxLogs>> {
    let query = LogQuery {
        from: query.unix_millis("start")?,
        limit: log_limit(&query)?,
        ..LogQuery::default()
    };
    Ok(Json(state.control.sandboxes.log(&id, &query).await?.into()))
}

/// A sandbox's log, in either direction
#[utoipa::path(
    get, path = "/v2/sandboxes/{sandboxID}/logs", tag = "sandboxes",
    params(
        ("sandboxID" = String, Path),
        ("cursor" = Option<i64>, Query, description = "Milliseconds since 1970"),
        ("limit" = Option<u32>, Query, description = "0 to 1000 (default)"),
        ("direction" = Option<String>, Query, description = "`forward` (default) or `backward`"),
        ("level" = Option<String>, Query, description = "Nothing less grave than this"),
        ("search" = Option<String>, Query, description = "Only messages that contain this"),
    ),
    responses(
        (status = 200, body = SandboxLogsV2),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn logs_v2(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> ApiResult<Json<SandboxLogsV2>> {
    let search = query.text("search")?.map(str::to_owned);
    if search.as_ref().is_some_and(|text| text.len() > MAX_SEARCH) {
        return Err(ApiError::field(
            "search",
            format!("is longer than {MAX_SEARCH} bytes"),
        ));
    }
    let query = LogQuery {
        from: query.unix_millis("cursor")?,
        limit: log_limit(&query)?,
        backward: backward(&query)?,
        level: level(&query)?,
        search,
    };
    let entries = state.control.sandboxes.log(&id, &query).await?;
    Ok(Json(SandboxLogsV2 {
        logs: entries.into_iter().map(Into::into).collect(),
    }))
}

fn log_limit(query: &Query) -> ApiResult<u32> {
    let limit = query.number("limit", 0..=u64::from(MAX_LOG_PAGE))?;
    Ok(limit
        .and_then(|limit| u32::try_from(limit).ok())
        .unwrap_or(MAX_LOG_PAGE))
}

/// The parameter `direction` of logs.
pub(crate) fn backward(query: &Query) -> ApiResult<bool> {
    match query.text("direction")? {
        None | Some("forward") => Ok(false),
        Some("backward") => Ok(true),
        Some(_) => Err(ApiError::field(
            "direction",
            "is neither 'forward' nor 'backward'",
        )),
    }
}

/// The parameter `level` of logs.
pub(crate) fn level(query: &Query) -> ApiResult<Level> {
    let Some(word) = query.text("level")? else {
        return Ok(Level::Debug);
    };
    Level::parse(word)
        .ok_or_else(|| ApiError::field("level", "is none of 'debug', 'info', 'warn', 'error'"))
}
