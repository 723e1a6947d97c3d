//! `POST /sandboxes` and `POST /v2/sandboxes`.

use std::{collections::BTreeMap, time::Instant};

use axum::{Json, extract::State, response::IntoResponse as _, response::Response};
use cubicle_control::sandbox::{CreateSandbox, Idempotency, LifecycleOptions, Lifetime};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;

use super::{
    model::{SandboxBody, reference},
    network::NetworkBody,
};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::RawJsonBody,
    timing,
    volumes::{self, VolumeMountBody},
};

/// Lifetimes where the request says nothing, in seconds.
const TIMEOUT_V1: i64 = 15;
const TIMEOUT_V2: i64 = 300;

const MAX_METADATA: usize = 128;
const MAX_METADATA_KEY: usize = 256;
const MAX_METADATA_VALUE: usize = 8 << 10;
const MAX_ENV: usize = 1024;
const MAX_ENV_NAME: usize = 256;
/// What the kernel allows one `NAME=value` to have, less the name and the zero byte.
const MAX_ENV_VALUE: usize = (128 << 10) - MAX_ENV_NAME - 2;

/// A sandbox to create. Unknown fields are ignored; known ones do what they say or are refused.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = NewSandbox)]
pub(crate) struct CreateBody {
    /// What to make it from: a template id, a name, `name:tag`, or a snapshot id.
    #[serde(rename = "templateID", alias = "templateId")]
    template_id: String,
    /// Seconds that it lives; -1 is for ever. 15 if left out, 300 in v2.
    timeout: Option<i64>,
    /// CPUs, if it is to have another number than its template's sandboxes. The first of a size takes
    /// as long as booting it.
    cpu_count: Option<u32>,
    /// Memory in MiB, likewise.
    #[serde(rename = "memoryMB")]
    memory_mb: Option<u32>,
    /// Attached to it, for filters.
    metadata: Option<BTreeMap<String, String>>,
    /// Environment of every process that is started in it. `envs` means the same.
    #[serde(alias = "envs")]
    env_vars: Option<BTreeMap<String, String>>,
    /// Has no effect: the guest daemon always asks for the sandbox's access token.
    #[allow(
        dead_code,
        reason = "any value is right, a value of another type is not"
    )]
    secure: Option<bool>,
    /// `false`: it reaches nothing outside but what `network.allowOut` lists.
    /// `allowInternetAccess` means the same.
    #[serde(rename = "allow_internet_access", alias = "allowInternetAccess")]
    allow_internet_access: Option<bool>,
    /// What it may reach and who may reach it.
    network: Option<NetworkBody>,
    /// Pause it when its time is up, instead of killing it.
    auto_pause: Option<bool>,
    /// `false`: that pause keeps its disk only, and resuming it boots it. Only with `autoPause`, and
    /// not with `autoResume`.
    auto_pause_memory: Option<bool>,
    /// Whether requests wake it while it is paused.
    auto_resume: Option<AutoResume>,
    /// The same as `autoPause` and `autoResume`, in Cube's words.
    lifecycle: Option<LifecycleBody>,
    /// For the client, which starts the MCP gateway itself.
    #[allow(
        dead_code,
        reason = "the server has no part in it, but the type is checked"
    )]
    mcp: Option<serde_json::Map<String, Value>>,
    /// Not supported yet: must be empty.
    iam: Option<Iam>,
    /// Volumes to mount. Without any, a sandbox that is made from a snapshot has those that the
    /// snapshot had.
    volume_mounts: Option<Vec<VolumeMountBody>>,
    /// Not supported yet: must be empty.
    distribution_scope: Option<Vec<Value>>,
}

/// Whether requests resume a paused sandbox.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct AutoResume {
    enabled: bool,
}

/// What happens when a sandbox's time is up, as Cube's clients say it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LifecycleBody {
    on_timeout: Option<String>,
    auto_resume: Option<bool>,
}

/// Workload identity.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Iam {
    tokens: Option<serde_json::Map<String, Value>>,
}

impl CreateBody {
    fn request(self, default_timeout: i64) -> ApiResult<CreateSandbox> {
        self.refuse_what_is_missing()?;
        let lifecycle = self.lifecycle()?;
        let template = reference("templateID", self.template_id)?;
        let mut metadata = self.metadata.unwrap_or_default();
        let mounts = volumes::requested(self.volume_mounts, &mut metadata)?;
        check_metadata(&metadata)?;
        let env_vars = self.env_vars.unwrap_or_default();
        check_env(&env_vars)?;
        let network = self
            .network
            .unwrap_or_default()
            .options(self.allow_internet_access)?;
        Ok(CreateSandbox {
            template,
            lifetime: Lifetime::from_seconds("timeout", self.timeout.unwrap_or(default_timeout))?,
            metadata,
            env_vars: env_vars.into_iter().collect(),
            mounts,
            network,
            lifecycle,
            cpu_count: self.cpu_count,
            memory_mib: self.memory_mb,
            idempotency: None,
        })
    }

    /// What both dialects say about the end of its time; they may both be used, but not disagree.
    fn lifecycle(&self) -> ApiResult<LifecycleOptions> {
        let cube = self.lifecycle.as_ref();
        let on_timeout = match cube.and_then(|cube| cube.on_timeout.as_deref()) {
            None => None,
            Some("kill") => Some(false),
            Some("pause") => Some(true),
            Some(_) => {
                let why = "is neither 'kill' nor 'pause'";
                return Err(ApiError::field("lifecycle.onTimeout", why));
            }
        };
        let agreed = |field: &str, ours: Option<bool>, theirs: Option<bool>| match (ours, theirs) {
            (Some(a), Some(b)) if a != b => Err(ApiError::field(
                field,
                "contradicts what the request says elsewhere",
            )),
            _ => Ok(ours.or(theirs).unwrap_or(false)),
        };
        let auto_resume = self.auto_resume.as_ref().map(|resume| resume.enabled);
        let cube_resume = cube.and_then(|cube| cube.auto_resume);
        let options = LifecycleOptions {
            auto_pause: agreed("lifecycle.onTimeout", self.auto_pause, on_timeout)?,
            auto_pause_memory: self.auto_pause_memory.unwrap_or(true),
            auto_resume: agreed("lifecycle.autoResume", auto_resume, cube_resume)?,
        };
        options.check()?;
        Ok(options)
    }

    fn refuse_what_is_missing(&self) -> ApiResult<()> {
        let given = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
        let tokens = self.iam.as_ref().and_then(|iam| iam.tokens.as_ref());
        let refused = [
            (tokens.is_some_and(|tokens| !tokens.is_empty()), "iam"),
            (given(&self.distribution_scope), "distributionScope"),
        ];
        match refused.into_iter().find(|(asked, _)| *asked) {
            Some((_, what)) => Err(ApiError::unsupported(what)),
            None => Ok(()),
        }
    }
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> ApiResult<()> {
    if metadata.len() > MAX_METADATA {
        return Err(ApiError::field(
            "metadata",
            format!("has more than {MAX_METADATA} pairs"),
        ));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_METADATA_KEY {
            return Err(ApiError::field(
                "metadata",
                format!(
                    "a key has 1 to {MAX_METADATA_KEY} bytes, one has {}",
                    key.len()
                ),
            ));
        }
        if value.len() > MAX_METADATA_VALUE {
            return Err(ApiError::field(
                "metadata",
                format!("the value of '{key}' has more than {MAX_METADATA_VALUE} bytes"),
            ));
        }
    }
    Ok(())
}

fn check_env(vars: &BTreeMap<String, String>) -> ApiResult<()> {
    if vars.len() > MAX_ENV {
        return Err(ApiError::field(
            "envVars",
            format!("has more than {MAX_ENV} variables"),
        ));
    }
    for (name, value) in vars {
        let named = (1..=MAX_ENV_NAME).contains(&name.len()) && !name.contains(['=', '\0']);
        if !named {
            let shown: String = name.chars().take(40).collect();
            return Err(ApiError::field(
                "envVars",
                format!("'{shown}' is no variable name: 1 to {MAX_ENV_NAME} bytes without '='"),
            ));
        }
        if value.len() > MAX_ENV_VALUE || value.contains('\0') {
            return Err(ApiError::field(
                "envVars",
                format!(
                    "the value of '{name}' is longer than {MAX_ENV_VALUE} bytes or has a zero byte"
                ),
            ));
        }
    }
    Ok(())
}

/// Create a sandbox
///
/// Answers once the sandbox does. Lives 15 seconds unless told otherwise.
#[utoipa::path(
    post, path = "/sandboxes", tag = "sandboxes", request_body = CreateBody,
    responses(
        (status = 201, body = SandboxBody, description = "It answers"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody, description = "No such template"),
        (status = 500, body = ErrorBody), (status = 501, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "No room; try again later"),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn create_v1(
    State(state): State<AppState>,
    body: RawJsonBody<CreateBody>,
) -> ApiResult<Response> {
    create(&state, body.value.request(TIMEOUT_V1)?).await
}

/// Create a sandbox
///
/// Answers once the sandbox does. Lives 300 seconds unless told otherwise. With the header
/// `Idempotency-Key`, a repetition within a day returns the same sandbox.
#[utoipa::path(
    post, path = "/v2/sandboxes", tag = "sandboxes", request_body = CreateBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 of a-z, 0-9, '-'")),
    responses(
        (status = 201, body = SandboxBody, description = "It answers"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody, description = "No such template"),
        (status = 409, body = ErrorBody, description = "The idempotency key is in use"),
        (status = 500, body = ErrorBody), (status = 501, body = ErrorBody),
        (status = 503, body = ErrorBody, description = "No room; try again later"),
        (status = 504, body = ErrorBody),
    ),
)]
pub(crate) async fn create_v2(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: RawJsonBody<CreateBody>,
) -> ApiResult<Response> {
    let idempotency = idempotency(&headers, &body.bytes)?;
    create(
        &state,
        CreateSandbox {
            idempotency,
            ..body.value.request(TIMEOUT_V2)?
        },
    )
    .await
}

async fn create(state: &AppState, request: CreateSandbox) -> ApiResult<Response> {
    let began = Instant::now();
    let result = state.control.sandboxes.create(request).await;
    let outcome = match &result {
        Ok(creation) if creation.replayed => "replayed",
        Ok(_) => "created",
        Err(_) => "failed",
    };
    let phases = result.as_ref().map_or(&[][..], |creation| &creation.phases);
    state.metrics.create(outcome, phases, began.elapsed());
    let creation = result.map_err(ApiError::of_create)?;
    let body = SandboxBody::new(state, &creation.sandbox);
    let mut response = (StatusCode::CREATED, Json(body)).into_response();
    timing::add(&mut response, &creation.phases, began.elapsed());
    Ok(response)
}

/// What makes two requests the same: the key, and what the bodies say, however they spell it.
fn idempotency(headers: &HeaderMap, body: &[u8]) -> ApiResult<Option<Idempotency>> {
    let Some(key) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    let key = key.to_str().unwrap_or_default();
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !(1..=255).contains(&key.len()) || !key.bytes().all(allowed) {
        return Err(ApiError::field(
            "Idempotency-Key",
            "has 1 to 255 of a-z, 0-9 and '-'",
        ));
    }
    let value: Value = serde_json::from_slice(body)
        .map_err(|why| ApiError::bad_request(format!("the request body is no JSON: {why}")))?;
    let body_hash = Sha256::digest(value.to_string()).into();
    Ok(Some(Idempotency {
        key: key.to_owned(),
        body_hash,
    }))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn two_spellings_of_one_body_are_the_same_request() {
        let headers = HeaderMap::from_iter([(
            http::HeaderName::from_static("idempotency-key"),
            HeaderValue::from_static("a-1"),
        )]);
        let hash = |body: &str| {
            idempotency(&headers, body.as_bytes())
                .expect("key")
                .expect("key")
                .body_hash
        };
        assert_eq!(hash(r#"{"a":1,"b":2}"#), hash(r#" {"b": 2, "a": 1} "#));
        assert_ne!(hash(r#"{"a":1}"#), hash(r#"{"a":2}"#));
    }
}
