//! How far a build is and what it says, in E2B's words and in Cube's.
//!
//! The two dialects have the same paths and different answers. What tells them apart is the name of
//! the build: E2B's clients know it by its id, Cube's by that of a [`Job`].

use std::{fmt, str::FromStr};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use cubicle_control::{
    fleet::Level,
    template::{Build, BuildLine, BuildStatus, LogPage},
};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::model::{BuildInfo, BuildLogEntry, BuildLogs, BuildReason, in_cubes_words};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{Query, Segments},
};

/// Most lines in one answer.
const MAX_PAGE: u64 = 100;
/// Most lines of a failed step that are told with the reason.
const REASON_LINES: u32 = 20;
/// Most lines that are told to Cube's clients, which read a log whole.
const MAX_LINES: u32 = 10_000;

/// A build as Cube's clients know it: `job-` and its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Job(pub(super) Uuid);

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job-{}", self.0.simple())
    }
}

impl FromStr for Job {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let id = text.strip_prefix("job-").ok_or(())?;
        Uuid::try_parse(id).map(Self).map_err(|_| ())
    }
}

/// How far a build is, in Cube's words.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateJob)]
pub(crate) struct JobBody {
    /// The job.
    #[serde(rename = "jobID")]
    job_id: String,
    /// The same.
    #[serde(rename = "buildID")]
    build_id: String,
    /// The template.
    #[serde(rename = "templateID")]
    template_id: String,
    /// `PENDING`, `BUILDING`, `READY` or `FAILED`.
    status: &'static str,
    /// What is done now, or was done last: `base`, the number of a step, `finalize`.
    phase: String,
    /// How many of its parts are done, in percent; parts take different times.
    progress: u64,
    /// What it says last.
    message: String,
    /// Why it failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
    /// When it was asked for.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When it ended.
    #[serde(
        with = "time::serde::rfc3339::option",
        skip_serializing_if = "Option::is_none"
    )]
    finished_at: Option<OffsetDateTime>,
}

impl JobBody {
    pub(super) async fn new(state: &AppState, build: Build) -> ApiResult<Self> {
        let last = LogPage {
            newest_first: true,
            ..LogPage::from(0, 1)
        };
        let last = state
            .control
            .templates
            .build_log(build.id, last)
            .await?
            .pop();
        let step = build
            .failed_step
            .clone()
            .or_else(|| last.as_ref().and_then(|line| line.step.clone()));
        Ok(Self {
            job_id: Job(build.id).to_string(),
            build_id: Job(build.id).to_string(),
            template_id: build.template.to_string(),
            status: in_cubes_words(build.status),
            progress: progress(&build, step.as_deref()),
            phase: step.unwrap_or_default(),
            message: last.map(|line| line.message).unwrap_or_default(),
            error_message: build.reason,
            created_at: build.created_at,
            finished_at: build.finished_at,
        })
    }
}

/// Of the parts of a build (its base, each step, the end), the percentage that is done.
fn progress(build: &Build, step: Option<&str>) -> u64 {
    if build.status == BuildStatus::Ready {
        return 100;
    }
    let steps = build.spec.as_ref().map_or(0, |spec| spec.steps.len()) as u64;
    let done = match step {
        Some("finalize") => steps + 1,
        Some(step) => step.parse().unwrap_or(0).min(steps),
        None => 0,
    };
    done * 100 / (steps + 2)
}

/// A build's log in Cube's words.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TemplateJobLogs)]
pub(crate) struct JobLogs {
    /// Its lines.
    lines: Vec<String>,
    /// `PENDING`, `BUILDING`, `READY` or `FAILED`.
    status: &'static str,
    /// In percent.
    progress: u64,
}

/// How far a build is
///
/// By a build's id in E2B's words, by the `jobID` of Cube's API in Cube's: `TemplateJob`.
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
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn status(
    State(state): State<AppState>,
    Segments(template, build): Segments,
    query: Query,
) -> ApiResult<Response> {
    let templates = &state.control.templates;
    if let Ok(Job(id)) = build.parse() {
        let build = templates.build_of(&template, &id.to_string()).await?;
        return Ok(Json(JobBody::new(&state, build).await?).into_response());
    }
    let page = LogPage {
        offset: query.number("logsOffset", 0..=u64::MAX)?.unwrap_or(0),
        limit: limit(&query)?,
        level: crate::sandboxes::level(&query)?,
        newest_first: false,
    };
    // Read before the log, so that a build that has ended has said all that it will say.
    let build = templates.build_of(&template, &build).await?;
    let lines = templates.build_log(build.id, page).await?;
    let reason = reason(&state, &build).await?;
    let info = BuildInfo {
        template_id: build.template.to_string(),
        build_id: build.id,
        status: build.status.as_str(),
        logs: Vec::new(),
        log_entries: lines.into_iter().map(Into::into).collect(),
        reason,
    };
    Ok(Json(info).into_response())
}

/// Why a build failed, with the last lines of the step that did.
async fn reason(state: &AppState, build: &Build) -> ApiResult<Option<BuildReason>> {
    let Some(message) = build.reason.clone() else {
        return Ok(None);
    };
    let page = LogPage {
        newest_first: true,
        ..LogPage::from(0, REASON_LINES)
    };
    let mut lines = state.control.templates.build_log(build.id, page).await?;
    lines.retain(|line| line.step == build.failed_step);
    lines.reverse();
    Ok(Some(BuildReason {
        message,
        step: build.failed_step.clone(),
        log_entries: lines.into_iter().map(Into::into).collect(),
    }))
}

/// A build's log
///
/// By a build's id in E2B's words, by the `jobID` of Cube's API in Cube's: `TemplateJobLogs`.
#[utoipa::path(
    get, path = "/templates/{templateID}/builds/{buildID}/logs", tag = "templates",
    params(
        ("templateID" = String, Path), ("buildID" = String, Path),
        ("cursor" = Option<i64>, Query, description = "Milliseconds since 1970"),
        ("limit" = Option<u32>, Query, description = "0 to 100 (default)"),
        ("direction" = Option<String>, Query, description = "`forward` (default) or `backward`"),
        ("level" = Option<String>, Query, description = "Nothing less grave than this"),
        ("source" = Option<String>, Query, description = "`temporary` or `persistent`: there is one"),
    ),
    responses(
        (status = 200, body = BuildLogs),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
    ),
)]
pub(crate) async fn logs(
    State(state): State<AppState>,
    Segments(template, build): Segments,
    query: Query,
) -> ApiResult<Response> {
    let templates = &state.control.templates;
    if let Ok(Job(id)) = build.parse() {
        let build = templates.build_of(&template, &id.to_string()).await?;
        let lines = templates
            .build_log(build.id, LogPage::from(0, MAX_LINES))
            .await?;
        let step = lines.last().and_then(|line| line.step.as_deref());
        let logs = JobLogs {
            status: in_cubes_words(build.status),
            progress: progress(&build, step),
            lines: lines.iter().map(plain).collect(),
        };
        return Ok(Json(logs).into_response());
    }
    if !matches!(
        query.text("source")?,
        None | Some("temporary" | "persistent")
    ) {
        let why = "is neither 'temporary' nor 'persistent'";
        return Err(ApiError::field("source", why));
    }
    let cursor = query.unix_millis("cursor")?;
    let backward = crate::sandboxes::backward(&query)?;
    let limit = limit(&query)?;
    let level = crate::sandboxes::level(&query)?;
    let build = templates.build_of(&template, &build).await?;
    let lines = page_from(&state, build.id, cursor, level, backward, limit).await?;
    let logs: Vec<BuildLogEntry> = lines.into_iter().map(Into::into).collect();
    Ok(Json(BuildLogs { logs }).into_response())
}

/// The first `limit` lines at a time or later, or at that time or earlier.
async fn page_from(
    state: &AppState,
    build: Uuid,
    cursor: Option<OffsetDateTime>,
    level: Level,
    newest_first: bool,
    limit: u32,
) -> ApiResult<Vec<BuildLine>> {
    let wanted = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut page = LogPage {
        offset: 0,
        limit: 1000,
        level,
        newest_first,
    };
    let mut found = Vec::new();
    while found.len() < wanted {
        let lines = state.control.templates.build_log(build, page).await?;
        if lines.is_empty() {
            break;
        }
        page.offset += lines.len() as u64;
        let in_reach = |line: &BuildLine| match cursor {
            None => true,
            Some(at) if newest_first => millis(line.at) <= millis(at),
            Some(at) => millis(line.at) >= millis(at),
        };
        found.extend(lines.into_iter().filter(in_reach));
    }
    found.truncate(wanted);
    Ok(found)
}

/// Cursors have no smaller parts.
fn millis(at: OffsetDateTime) -> i128 {
    at.unix_timestamp_nanos().div_euclid(1_000_000)
}

/// A line of a log as text.
fn plain(line: &BuildLine) -> String {
    match &line.step {
        Some(step) => format!("[{step}] {}", line.message),
        None => line.message.clone(),
    }
}

fn limit(query: &Query) -> ApiResult<u32> {
    let limit = query.number("limit", 0..=MAX_PAGE)?.unwrap_or(MAX_PAGE);
    Ok(u32::try_from(limit).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_a_build_under_another_name() {
        let id = Uuid::from_u128(7);
        let job = Job(id).to_string();
        assert_eq!(job, "job-00000000000000000000000000000007");
        assert_eq!(job.parse(), Ok(Job(id)));
        for bad in [
            "",
            "job-",
            "job-7",
            &id.to_string(),
            &format!("job-job-{id}"),
        ] {
            assert_eq!(bad.parse::<Job>(), Err(()), "{bad}");
        }
    }
}
