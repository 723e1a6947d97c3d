//! A build as it happens, one JSON object a line.

use std::convert::Infallible;

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse as _, Response},
};
use cubicle_control::{
    Control,
    template::{BuildStatus, Started},
};
use futures::{Stream, StreamExt as _};
use http::header::CONTENT_TYPE;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

/// One line of the answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(
    tag = "type",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub(crate) enum BuildEvent {
    /// The build is under way, or was before.
    Started {
        /// The template.
        template_id: String,
        /// The build.
        build_id: Uuid,
    },
    /// The build works on `step`.
    Progress {
        /// `base`, the number of a step from 1 on, or `finalize`.
        step: String,
        /// What happens, or a line that the step printed.
        message: String,
        /// `debug`, `info`, `warn` or `error`.
        level: &'static str,
    },
    /// The template can be used.
    Done {
        /// The template.
        template_id: String,
        /// The build.
        build_id: Uuid,
        /// Whether the current build was made the same way, so that nothing had to be done.
        cached: bool,
    },
    /// The build failed.
    Failed {
        /// Where, as in `progress`.
        step: Option<String>,
        /// Why.
        message: String,
    },
}

/// The answer that follows a build.
pub(crate) fn followed(control: Control, started: Started) -> Response {
    let lines = follow(control, started).map(|event| Ok::<_, Infallible>(line(&event)));
    let body = Body::from_stream(lines);
    ([(CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

fn follow(control: Control, started: Started) -> impl Stream<Item = BuildEvent> + Send + 'static {
    let Started { build, cached } = started;
    let first = BuildEvent::Started {
        template_id: build.template.to_string(),
        build_id: build.id,
    };
    let log = (!cached).then(|| control.templates.follow(build.id));
    // What cannot be read is missing here; how the build ended is said all the same.
    let lines = futures::stream::iter(log).flatten();
    let progress = lines.filter_map(|line| async move {
        let line = line.ok()?;
        Some(BuildEvent::Progress {
            step: line.step.unwrap_or_default(),
            message: line.message,
            level: line.level.as_str(),
        })
    });
    let end = async move {
        let failed = |message: String| BuildEvent::Failed {
            step: None,
            message,
        };
        let template_id = build.template.to_string();
        let id = build.id.to_string();
        match control.templates.build_of(&template_id, &id).await {
            Ok(ended) if ended.status == BuildStatus::Ready => BuildEvent::Done {
                template_id,
                build_id: build.id,
                cached,
            },
            Ok(ended) => BuildEvent::Failed {
                step: ended.failed_step,
                message: ended.reason.unwrap_or("the build did not end".into()),
            },
            Err(error) => failed(error.to_string()),
        }
    };
    let first = futures::stream::once(async { first });
    first.chain(progress).chain(futures::stream::once(end))
}

fn line(event: &BuildEvent) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line.into()
}
