//! `POST /cubicle/v1/templates/{name}/build`: build a template and follow it.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use axum::{extract::State, response::Response};
use cubicle_control::template::{
    Action, BASE_RECIPE, BuildSpec, BuildTemplate, FilesHash, Origin, Probe, RegistryAuth, Size,
    Step,
};
use http::HeaderMap;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    checks,
    cube::ProbeBody,
    follow::{BuildEvent, followed},
    start::{need_files, octal},
};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{OptionalJsonBody, Segment},
};

/// What to build.
///
/// It begins with one of `recipe`, `image` and `template`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = NewTemplateBuild)]
pub(crate) struct BuildBody {
    /// Do everything again, also what was done before.
    #[serde(default)]
    force: bool,
    /// Name of a recipe of this server; `base` if nothing else is said.
    recipe: Option<String>,
    /// Name of a container image: `python:3.12`, `registry.example/name:tag`, `name@sha256:...`.
    image: Option<String>,
    /// Who asks the image's registry. Nothing of it is kept.
    registry_auth: Option<RegistryAuthBody>,
    /// Another template: its id, `name`, `name:tag`, or a snapshot.
    template: Option<String>,
    /// What is done, in order.
    #[serde(default)]
    steps: Vec<OwnStep>,
    /// Command that runs in every sandbox.
    start: Option<String>,
    /// Program that runs in every sandbox, with its arguments, in the place of the image's
    /// Entrypoint and Cmd.
    command: Option<Vec<String>>,
    /// Whether the image's Entrypoint and Cmd run in every sandbox if neither `start` nor
    /// `command` is given; they do if nothing is said.
    run_image_command: Option<bool>,
    /// When it is ready.
    ready: Option<ProbeBody>,
    /// How long that may take, in seconds.
    ready_within_seconds: Option<u64>,
    /// Environment on top of the origin's.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Ports that its servers listen on.
    #[serde(default)]
    ports: Vec<i64>,
    /// Name servers of its sandboxes.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    dns: Vec<Ipv4Addr>,
    /// Whether commands run as the user `user`, who is made if need be, as in templates of E2B's
    /// clients. Otherwise as the image says.
    #[serde(default)]
    with_user: bool,
    /// More tags for it.
    #[serde(default)]
    tags: Vec<String>,
    /// CPUs of its sandboxes.
    cpu_count: Option<i64>,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: Option<i64>,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: Option<u32>,
    /// Names this request: a second one with the same id is answered like the first.
    #[serde(rename = "requestID")]
    request_id: Option<String>,
}

/// Who asks a registry.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = RegistryAuth)]
pub(crate) struct RegistryAuthBody {
    /// The user.
    username: String,
    /// Its password or token.
    password: String,
}

/// One step.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "camelCase")]
#[schema(as = BuildStep)]
pub(crate) enum OwnStep {
    /// Copies files that were uploaded.
    Copy {
        /// Path in the archive: a file, or a directory whose contents are meant.
        src: String,
        /// Where to.
        dest: String,
        /// Whose they become: a user, or `user:group`.
        user: Option<String>,
        /// Their mode, in octal.
        mode: Option<String>,
        /// Names the archive.
        #[schema(value_type = String)]
        files: FilesHash,
    },
    /// Runs a command in a shell.
    Run {
        /// The command.
        command: String,
        /// Who runs it, if not the user of before.
        user: Option<String>,
    },
    /// Sets environment variables; `$NAME` in them stands for what was set before.
    Env {
        /// The variables.
        env: BTreeMap<String, String>,
    },
    /// Changes the directory of what follows.
    Workdir {
        /// The directory.
        path: String,
    },
    /// Changes the user of what follows.
    User {
        /// The user.
        user: String,
    },
}

impl OwnStep {
    fn step(self, at: &str) -> ApiResult<Step> {
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        let action = match self {
            Self::Copy {
                src,
                dest,
                user,
                mode,
                files,
            } => {
                checks::filled(&format!("{at}.src"), &src)?;
                checks::filled(&format!("{at}.dest"), &dest)?;
                let octal = |mode: String| {
                    let why = "is no mode in octal, as 0644";
                    octal(&mode).ok_or_else(|| ApiError::field(&format!("{at}.mode"), why))
                };
                Action::Copy {
                    src,
                    dest,
                    user: some(user),
                    mode: some(mode).map(octal).transpose()?,
                    files,
                }
            }
            Self::Run { command, user } => {
                checks::filled(&format!("{at}.command"), &command)?;
                Action::Run {
                    command,
                    user: some(user),
                }
            }
            Self::Env { env } => {
                for (name, value) in &env {
                    checks::variable(&format!("{at}.env"), name, value)?;
                }
                Action::Env(env.into_iter().collect())
            }
            Self::Workdir { path } => {
                checks::filled(&format!("{at}.path"), &path)?;
                Action::Workdir(path)
            }
            Self::User { user } => {
                checks::filled(&format!("{at}.user"), &user)?;
                Action::User(user)
            }
        };
        Ok(action.into())
    }
}

impl BuildBody {
    fn order(self, name: String, headers: &HeaderMap) -> ApiResult<BuildTemplate> {
        let auth = self.registry_auth.map(|auth| RegistryAuth {
            username: auth.username,
            password: auth.password,
        });
        if auth.is_some() && self.image.is_none() {
            return Err(ApiError::field(
                "registryAuth",
                "is for an image, and there is none",
            ));
        }
        let origin = match (self.recipe, self.image, self.template) {
            (None, None, None) => Origin::Recipe(BASE_RECIPE.to_owned()),
            (Some(recipe), None, None) => {
                checks::filled("recipe", &recipe)?;
                Origin::Recipe(recipe)
            }
            (None, Some(image), None) => {
                checks::filled("image", &image)?;
                checks::image("image", image.trim(), auth)?
            }
            (None, None, Some(template)) => {
                checks::filled("template", &template)?;
                Origin::Template(template)
            }
            _ => {
                let message = "a build begins with one of recipe, image and template";
                return Err(ApiError::bad_request(message));
            }
        };
        if self.steps.len() > checks::MAX_STEPS {
            let why = format!("has more than {} of them", checks::MAX_STEPS);
            return Err(ApiError::field("steps", why));
        }
        let steps = self.steps.into_iter().enumerate();
        let steps = steps.map(|(index, step)| step.step(&format!("steps[{index}]")));
        let steps = steps.collect::<ApiResult<_>>()?;
        for (name, value) in &self.env {
            checks::variable("env", name, value)?;
        }
        if let Some(start) = &self.start {
            checks::filled("start", start)?;
        }
        for word in self.command.iter().flatten() {
            checks::text("command", word)?;
        }
        if self.command.as_ref().is_some_and(Vec::is_empty) {
            return Err(ApiError::field("command", "is empty"));
        }
        let ready = self.ready.map(|probe| probe.probe("ready")).transpose()?;
        let within = match self.ready_within_seconds {
            None => BuildSpec::READY_WITHIN,
            Some(seconds @ 1..=86_400) => Duration::from_secs(seconds),
            Some(_) => {
                let why = "is not between 1 and 86400 seconds";
                return Err(ApiError::field("readyWithinSeconds", why));
            }
        };
        let port = |port: i64| checks::port("ports", port);
        let spec = BuildSpec {
            steps,
            start: self.start,
            ready: ready.unwrap_or(Probe::None),
            ready_within: within,
            env: self.env.into_iter().collect(),
            ports: self.ports.into_iter().map(port).collect::<ApiResult<_>>()?,
            dns: self.dns,
            command: self.command,
            run_image_command: self.run_image_command.unwrap_or(true),
            with_user: self.with_user,
            force: self.force,
            ..BuildSpec::new(origin)
        };
        let mut size = checks::size(Size::default(), self.cpu_count, self.memory_mb, None)?;
        size.disk_mib = self.disk_size_mb.unwrap_or(size.disk_mib);
        Ok(BuildTemplate {
            tags: self.tags,
            size,
            request_id: checks::request_id(headers, self.request_id)?,
            ..BuildTemplate::new(name, spec)
        })
    }
}

/// Build a template and follow it
///
/// Answers one JSON object a line, as it happens: `started` first, `done` or `failed` last. The build
/// goes on when the client goes away. With the header `Idempotency-Key`, or `requestID` in the body,
/// a repetition follows the first one's build.
#[utoipa::path(
    post, path = "/templates/{name}/build", tag = "cubicle", request_body = BuildBody,
    params(
        ("name" = String, Path, description = "`name` or `name:tag`"),
        ("Idempotency-Key" = Option<String>, Header),
    ),
    responses(
        (status = 200, body = BuildEvent, content_type = "application/x-ndjson"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody,
         description = "It is being built another way, or the request id is in use"),
    ),
)]
pub(crate) async fn build(
    State(state): State<AppState>,
    Segment(name): Segment,
    headers: HeaderMap,
    OptionalJsonBody(body): OptionalJsonBody<BuildBody>,
) -> ApiResult<Response> {
    let order = body.order(name, &headers)?;
    need_files(&state, &order.spec).await?;
    let started = state.control.templates.build(order).await?;
    Ok(followed(state.control, started))
}
