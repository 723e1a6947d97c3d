//! `POST /cubicle/v1/templates/{name}/build`: build a template and follow it.

use std::convert::Infallible;

use axum::{
    body::{Body, Bytes},
    extract::State,
    response::{IntoResponse as _, Response},
};
use cubicle_control::{
    Control,
    template::{BuildSpec, BuildStatus, BuildTemplate, Size, Started},
};
use futures::{Stream, StreamExt as _};
use http::header::CONTENT_TYPE;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    AppState,
    error::{ApiResult, ErrorBody},
    extract::{OptionalJsonBody, Segment},
};

/// What to build.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
#[schema(as = NewTemplateBuild)]
pub(crate) struct BuildBody {
    /// Build even if the current build was made the same way.
    force: bool,
    /// Name of the recipe that makes its root file system.
    recipe: String,
    /// More tags for it.
    tags: Vec<String>,
    /// CPUs of its sandboxes.
    cpu_count: u32,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
}

impl Default for BuildBody {
    fn default() -> Self {
        let size = Size::default();
        Self {
            force: false,
            recipe: "base".to_owned(),
            tags: Vec::new(),
            cpu_count: size.cpu_count,
            memory_mb: size.memory_mib,
            disk_size_mb: size.disk_mib,
        }
    }
}

/// One line of the answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(
    tag = "type",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub(crate) enum BuildEvent {
    /// The build works on `step`.
    Progress {
        /// The step.
        step: String,
        /// What happens.
        message: String,
        /// 0 to 1, where it can be known.
        fraction: Option<f64>,
    },
    /// The template can be used.
    Done {
        /// The template.
        template_id: String,
        /// The build.
        build_id: uuid::Uuid,
        /// Whether the current build was made the same way, so that nothing had to be done.
        cached: bool,
    },
    /// The build failed.
    Failed {
        /// Why.
        message: String,
    },
}

/// Build a template and follow it
///
/// Answers one JSON object a line, as it happens; the last is `done` or `failed`. The build goes on
/// when the client goes away.
#[utoipa::path(
    post, path = "/templates/{name}/build", tag = "cubicle", request_body = BuildBody,
    params(("name" = String, Path, description = "`name` or `name:tag`")),
    responses(
        (status = 200, body = BuildEvent, content_type = "application/x-ndjson"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It is being built already"),
    ),
)]
pub(crate) async fn build(
    State(state): State<AppState>,
    Segment(name): Segment,
    OptionalJsonBody(body): OptionalJsonBody<BuildBody>,
) -> ApiResult<Response> {
    let size = Size {
        cpu_count: body.cpu_count,
        memory_mib: body.memory_mb,
        disk_mib: body.disk_size_mb,
    };
    let BuildBody {
        force,
        recipe,
        tags,
        ..
    } = body;
    let request = BuildTemplate {
        name,
        tags,
        size,
        spec: BuildSpec {
            force,
            ..BuildSpec::recipe(recipe)
        },
        request_id: None,
    };
    let started = state.control.templates.build(request).await?;
    let lines = follow(state.control, started).map(|event| Ok::<_, Infallible>(line(&event)));
    Ok((
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response())
}

fn follow(control: Control, started: Started) -> impl Stream<Item = BuildEvent> + Send + 'static {
    let Started { build, cached } = started;
    let log = (!cached).then(|| control.templates.follow(build.id));
    let progress = futures::stream::iter(log).flatten().map(|line| match line {
        Ok(line) => BuildEvent::Progress {
            step: line.step.unwrap_or_default(),
            message: line.message,
            fraction: None,
        },
        Err(error) => BuildEvent::Failed {
            message: error.to_string(),
        },
    });
    let end = async move {
        let failed = |message: String| BuildEvent::Failed { message };
        let template_id = build.template.to_string();
        match control
            .templates
            .build_of(&template_id, &build.id.to_string())
            .await
        {
            Ok(ended) if ended.status == BuildStatus::Ready => BuildEvent::Done {
                template_id,
                build_id: build.id,
                cached,
            },
            Ok(ended) => failed(
                ended
                    .reason
                    .unwrap_or_else(|| "the build did not end".into()),
            ),
            Err(error) => failed(error.to_string()),
        }
    };
    progress.chain(futures::stream::once(end))
}

fn line(event: &BuildEvent) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line.into()
}
