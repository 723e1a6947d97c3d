//! A build in E2B's words: room for it, and what it is made of.

use axum::{Json, extract::State};
use cubicle_control::template::{
    Action, BuildSpec, FilesHash, Origin, Probe, RegistryAuth, Size, Step,
};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::checks;
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, Segments},
};

/// A template to make room for.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
#[schema(as = TemplateBuildRequest)]
pub(crate) struct PrepareBody {
    /// `name` or `name:tag`; a name that exists gets another build.
    name: Option<String>,
    /// The same under its former name.
    alias: Option<String>,
    /// More tags for the build.
    tags: Vec<String>,
    /// CPUs of its sandboxes.
    cpu_count: Option<i64>,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: Option<i64>,
    /// How much of their disk is free after the build, at least, in MiB.
    min_free_disk_mb: Option<i64>,
}

/// Room for a build.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateBuildPrepared)]
pub(crate) struct PreparedBody {
    /// The template.
    #[serde(rename = "templateID")]
    template_id: String,
    /// The build, which waits to be started.
    #[serde(rename = "buildID")]
    build_id: Uuid,
    /// Whether the template is for everyone.
    public: bool,
    /// Names of the template.
    names: Vec<String>,
    /// Tags of the build.
    tags: Vec<String>,
    /// Names of the template.
    aliases: Vec<String>,
}

/// Make room for a template build
///
/// Upload the files of its steps next, then start the build.
#[utoipa::path(
    post, path = "/v3/templates", tag = "templates", request_body = PrepareBody,
    responses(
        (status = 202, body = PreparedBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "The name belongs to something else"),
    ),
)]
pub(crate) async fn prepare(
    State(state): State<AppState>,
    JsonBody(body): JsonBody<PrepareBody>,
) -> ApiResult<(StatusCode, Json<PreparedBody>)> {
    let named = |name: &String| !name.is_empty();
    let name = body.name.filter(named).or(body.alias.filter(named));
    let name = name.ok_or_else(|| ApiError::field("name", "is missing"))?;
    let free = body.min_free_disk_mb.map(|free| ("minFreeDiskMb", free));
    let size = checks::size(Size::default(), body.cpu_count, body.memory_mb, free)?;
    let templates = &state.control.templates;
    let build = templates.prepare(&name, body.tags, size).await?;
    let template = templates.get(build.template.as_str()).await?;
    let prepared = PreparedBody {
        template_id: build.template.to_string(),
        build_id: build.id,
        public: template.public,
        names: template.aliases.clone(),
        tags: build.tags,
        aliases: template.aliases,
    };
    Ok((StatusCode::ACCEPTED, Json(prepared)))
}

/// What a build is made of.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateBuildStart)]
pub(crate) struct StartBody {
    /// Image to begin with; `e2bdev/base` and none at all are the recipe `base`.
    from_image: Option<String>,
    /// Template to begin with, in the place of an image.
    from_template: Option<String>,
    /// Who asks the image's registry.
    from_image_registry: Option<RegistryBody>,
    /// Do everything again, also what was done before.
    force: Option<bool>,
    /// What is done, in order.
    steps: Option<Vec<StepBody>>,
    /// Command that runs in every sandbox.
    start_cmd: Option<String>,
    /// Command that succeeds once the template is ready.
    ready_cmd: Option<String>,
}

/// Who asks a registry.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
#[schema(as = TemplateRegistry)]
pub(crate) enum RegistryBody {
    /// A user with a password or a token.
    Registry {
        /// The user.
        username: String,
        /// The password.
        password: String,
    },
    /// A service account of Google Cloud.
    #[serde(rename_all = "camelCase")]
    Gcp {
        /// Its key, as JSON.
        service_account_json: String,
    },
    /// Not supported.
    Aws {},
}

/// One step.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateStep)]
pub(crate) struct StepBody {
    /// `COPY`, `ENV`, `RUN`, `WORKDIR` or `USER`.
    #[serde(rename = "type")]
    kind: String,
    /// `COPY`: source, destination, owner or empty, mode in octal or empty. `RUN`: command, user if
    /// another than before. `ENV`: names and values in turns. `WORKDIR`: path. `USER`: user.
    #[serde(default)]
    args: Option<Vec<String>>,
    /// Names the uploaded files of a `COPY`.
    #[serde(default)]
    files_hash: Option<String>,
    /// Do it, and all after it, again.
    #[serde(default)]
    force: Option<bool>,
}

impl StartBody {
    fn spec(self) -> ApiResult<BuildSpec> {
        let given = |text: &String| !text.is_empty();
        let auth = self.from_image_registry.map(registry).transpose()?;
        let image = self.from_image.filter(given);
        let origin = match (image, self.from_template.filter(given)) {
            (Some(_), Some(_)) => {
                let why = "is given together with fromTemplate: a build begins with one of them";
                return Err(ApiError::field("fromImage", why));
            }
            (None, Some(template)) => {
                if auth.is_some() {
                    let why = "is for an image, and fromTemplate is none";
                    return Err(ApiError::field("fromImageRegistry", why));
                }
                checks::text("fromTemplate", &template)?;
                Origin::Template(template)
            }
            (image, None) => checks::image("fromImage", image.as_deref().unwrap_or(""), auth)?,
        };
        let steps = self.steps.unwrap_or_default();
        if steps.len() > checks::MAX_STEPS {
            let why = format!("has more than {} of them", checks::MAX_STEPS);
            return Err(ApiError::field("steps", why));
        }
        let steps = steps.into_iter().enumerate();
        let steps = steps.map(|(index, step)| step.step(&format!("steps[{index}]")));
        let command = |field: &str, command: Option<String>| {
            let command = command.filter(|command| !command.trim().is_empty());
            command
                .as_deref()
                .map_or(Ok(()), |command| checks::text(field, command))?;
            ApiResult::Ok(command)
        };
        Ok(BuildSpec {
            steps: steps.collect::<ApiResult<_>>()?,
            start: command("startCmd", self.start_cmd)?,
            ready: command("readyCmd", self.ready_cmd)?.map_or(Probe::None, Probe::Command),
            // Templates of E2B's clients have a user of that name, whatever the image says.
            with_user: true,
            force: self.force.unwrap_or(false),
            ..BuildSpec::new(origin)
        })
    }
}

fn registry(body: RegistryBody) -> ApiResult<RegistryAuth> {
    match body {
        RegistryBody::Registry { username, password } => Ok(RegistryAuth { username, password }),
        // What Google's registries take a key of a service account as.
        RegistryBody::Gcp {
            service_account_json,
        } => Ok(RegistryAuth {
            username: "_json_key".to_owned(),
            password: service_account_json,
        }),
        RegistryBody::Aws {} => Err(ApiError::unsupported(
            "fromImageRegistry of type 'aws' (use 'registry' with the user AWS and a token)",
        )),
    }
}

impl StepBody {
    fn step(self, at: &str) -> ApiResult<Step> {
        let args = self.args.unwrap_or_default();
        for arg in &args {
            checks::text(&format!("{at}.args"), arg)?;
        }
        let wrong = |what: &str| ApiError::field(&format!("{at}.args"), what);
        let force = self.force.unwrap_or(false);
        let action = match (self.kind.as_str(), args.as_slice()) {
            ("COPY", [src, dest, rest @ ..]) if rest.len() <= 2 => {
                checks::filled(&format!("{at}.args"), src)?;
                checks::filled(&format!("{at}.args"), dest)?;
                let option = |index: usize| rest.get(index).filter(|arg| !arg.is_empty());
                Action::Copy {
                    src: src.clone(),
                    dest: dest.clone(),
                    user: option(0).cloned(),
                    mode: option(1)
                        .map(|mode| octal(mode).ok_or_else(|| wrong("the mode is not octal")))
                        .transpose()?,
                    files: files_hash(at, self.files_hash.as_deref())?,
                }
            }
            ("COPY", _) => return Err(wrong("COPY takes source, destination, owner and mode")),
            ("RUN", [command, rest @ ..]) if rest.len() <= 1 => {
                checks::filled(&format!("{at}.args"), command)?;
                Action::Run {
                    command: command.clone(),
                    user: rest.first().filter(|user| !user.is_empty()).cloned(),
                }
            }
            ("RUN", _) => return Err(wrong("RUN takes a command, and a user if need be")),
            ("ENV", vars) if vars.len() % 2 == 0 => {
                let vars = vars.chunks_exact(2);
                let vars: Vec<_> = vars.map(|var| (var[0].clone(), var[1].clone())).collect();
                for (name, value) in &vars {
                    checks::variable(&format!("{at}.args"), name, value)?;
                }
                Action::Env(vars)
            }
            ("ENV", _) => return Err(wrong("ENV takes names and values in turns")),
            ("WORKDIR", [path]) => {
                checks::filled(&format!("{at}.args"), path)?;
                Action::Workdir(path.clone())
            }
            ("WORKDIR", _) => return Err(wrong("WORKDIR takes a path")),
            ("USER", [user]) => {
                checks::filled(&format!("{at}.args"), user)?;
                Action::User(user.clone())
            }
            ("USER", _) => return Err(wrong("USER takes a user")),
            _ => {
                let why = "is none of 'COPY', 'ENV', 'RUN', 'WORKDIR', 'USER'";
                return Err(ApiError::field(&format!("{at}.type"), why));
            }
        };
        Ok(Step { action, force })
    }
}

fn files_hash(at: &str, hash: Option<&str>) -> ApiResult<FilesHash> {
    let field = format!("{at}.filesHash");
    let hash = hash.ok_or_else(|| ApiError::field(&field, "is missing"))?;
    hash.parse().map_err(|why| ApiError::field(&field, why))
}

/// A mode as E2B's clients write it: `0755`, `755`, or with `0o` before it.
pub(super) fn octal(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    let mode = u32::from_str_radix(digits, 8).ok()?;
    (plain && mode <= 0o7777).then_some(mode)
}

/// Start a template build
///
/// Asking twice for the same is asking once.
#[utoipa::path(
    post, path = "/v2/templates/{templateID}/builds/{buildID}", tag = "templates",
    request_body = StartBody,
    params(("templateID" = String, Path), ("buildID" = String, Path)),
    responses(
        (status = 202, description = "It is under way"),
        (status = 400, body = ErrorBody, description = "Also if files of a step were not uploaded"),
        (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It was started another way"),
        (status = 501, body = ErrorBody),
    ),
)]
pub(crate) async fn start(
    State(state): State<AppState>,
    Segments(template, build): Segments,
    JsonBody(body): JsonBody<StartBody>,
) -> ApiResult<StatusCode> {
    let templates = &state.control.templates;
    let spec = body.spec()?;
    let build = templates.build_of(&template, &build).await?;
    need_files(&state, &spec).await?;
    templates.start(&build.template, build.id, spec).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Start a template build
///
/// The same under its path in Cube's API.
#[utoipa::path(
    post, path = "/templates/{templateID}/builds/{buildID}", tag = "templates",
    request_body = StartBody,
    params(("templateID" = String, Path), ("buildID" = String, Path)),
    responses(
        (status = 202, description = "It is under way"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 501, body = ErrorBody),
    ),
)]
pub(crate) async fn start_cube(
    state: State<AppState>,
    path: Segments,
    body: JsonBody<StartBody>,
) -> ApiResult<StatusCode> {
    start(state, path, body).await
}

/// Refuses a build whose files are not there, before anything is started.
pub(super) async fn need_files(state: &AppState, spec: &BuildSpec) -> ApiResult<()> {
    for (index, step) in spec.steps.iter().enumerate() {
        let Action::Copy { files, .. } = &step.action else {
            continue;
        };
        if !state.control.templates.has_files(files).await? {
            let why = format!("the files {files} were not uploaded");
            return Err(ApiError::field(&format!("steps[{index}]"), why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(body: Value) -> ApiResult<BuildSpec> {
        serde_json::from_value::<StartBody>(body)
            .expect("a body")
            .spec()
    }

    #[test]
    fn steps_as_the_clients_send_them() {
        let hash = "ab".repeat(32);
        let spec = spec(json!({
            "fromImage": "python:3",
            "fromImageRegistry": {"type": "registry", "username": "me", "password": "secret"},
            "force": false,
            "steps": [
                {"type": "COPY", "args": ["a*", "/b", "", "0755"], "filesHash": hash, "force": false,
                 "forceUpload": true},
                {"type": "RUN", "args": ["ls", "root"], "force": true},
                {"type": "RUN", "args": ["ls"]},
                {"type": "ENV", "args": ["A", "1", "B", ""], "force": null},
                {"type": "WORKDIR", "args": ["/srv"]},
                {"type": "USER", "args": ["me"]},
            ],
            "startCmd": "serve", "readyCmd": "true",
        }))
        .expect("a spec");
        insta::assert_debug_snapshot!(spec);
    }

    #[test]
    fn the_base_image_is_a_recipe() {
        for body in [
            json!({}),
            json!({"fromImage": "e2bdev/base"}),
            json!({"fromImage": ""}),
        ] {
            assert_eq!(
                spec(body).expect("spec").origin,
                Origin::Recipe("base".into())
            );
        }
    }

    #[test]
    fn modes_are_octal() {
        for (text, mode) in [
            ("0755", 0o755),
            ("755", 0o755),
            ("0o644", 0o644),
            ("7777", 0o7777),
        ] {
            assert_eq!(octal(text), Some(mode), "{text}");
        }
        for bad in ["", "8", "+755", "-1", "10000", "u+x", "0o", "0o0o1"] {
            assert_eq!(octal(bad), None, "{bad}");
        }
    }
}
