//! Templates in Cube's words: a template of an image, built again, renamed.

use std::net::Ipv4Addr;

use axum::{Json, extract::State};
use cubicle_control::template::{
    Build, BuildSpec, BuildTemplate, Origin, Probe, Reference, RegistryAuth, Size,
};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{checks, model::TemplateWithBuilds, status::JobBody};
use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, OptionalJsonBody, Query, Segment},
};

/// What Cube's templates have unless something else is asked for: 2000 millicores, 2000 MB.
const SIZE: (u32, u32) = (2, 2000);
/// Where Cube's probe asks if it is given a port alone.
const PROBE_PATH: &str = "/health";

/// A template of an image.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = NewCubeTemplate)]
pub(crate) struct CubeBody {
    /// The image, as `python:3.12`, `registry.example/name:tag` or `name@sha256:...`.
    #[serde(default)]
    image: String,
    /// What it is called; made up if neither this nor `templateID` is given.
    name: Option<String>,
    /// The same, from older clients. Ids are given by the server.
    #[serde(rename = "templateID")]
    template_id: Option<String>,
    /// Names this request: a second one with the same id is answered like the first.
    #[serde(rename = "requestID")]
    request_id: Option<String>,
    /// `cubebox`, which is the only type there is.
    instance_type: Option<String>,
    /// What is free on its disk, at least: `1G`, `512Mi`.
    writable_layer_size: Option<String>,
    /// Ports that its servers listen on.
    exposed_ports: Option<Vec<i64>>,
    /// Port that is asked whether the template is ready.
    probe_port: Option<i64>,
    /// What it is asked for.
    probe_path: Option<String>,
    /// Another way of asking; in the place of `probePort`.
    probe: Option<ProbeBody>,
    /// Thousandths of a CPU; rounded up to whole ones.
    cpu: Option<i64>,
    /// Memory, in MiB.
    memory: Option<i64>,
    /// Variables, each as `NAME=VALUE`.
    env: Option<Vec<String>>,
    /// In the place of the image's Entrypoint.
    command: Option<Vec<String>>,
    /// In the place of the image's Cmd.
    args: Option<Vec<String>>,
    /// Name servers.
    dns: Option<Vec<String>>,
    /// User at the image's registry.
    registry_username: Option<String>,
    /// Its password.
    registry_password: Option<String>,
    /// `tap`, which is the only type there is.
    network_type: Option<String>,
    /// Nodes that are to have it.
    nodes: Option<Vec<String>>,
    /// Must not be false: say so when a sandbox is created.
    allow_internet_access: Option<bool>,
    /// Not supported here: say so when a sandbox is created.
    allow_out: Option<Vec<String>>,
    /// Not supported here: say so when a sandbox is created.
    deny_out: Option<Vec<String>>,
    /// Not supported.
    enable_ivshmem: Option<bool>,
}

/// How to find out whether a template is ready.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "camelCase")]
#[schema(as = TemplateProbe)]
pub(crate) enum ProbeBody {
    /// It is ready once it runs.
    None {},
    /// It is ready when a command succeeds in it.
    #[serde(alias = "command")]
    Exec {
        /// The command, for a shell.
        command: String,
    },
    /// It is ready when a request is answered with a status below 400.
    Http {
        /// Port on the sandbox's localhost.
        port: i64,
        /// Path and query; `/` if it is left out.
        #[serde(default)]
        path: Option<String>,
    },
    /// It is ready when something listens.
    Tcp {
        /// Port on the sandbox's localhost.
        port: i64,
    },
}

impl ProbeBody {
    pub(super) fn probe(self, field: &str) -> ApiResult<Probe> {
        Ok(match self {
            Self::None {} => Probe::None,
            Self::Exec { command } => {
                checks::filled(field, &command)?;
                Probe::Command(command)
            }
            Self::Http { port, path } => http_probe(field, port, path.unwrap_or("/".into()))?,
            Self::Tcp { port } => Probe::Tcp {
                port: checks::port(field, port)?,
            },
        })
    }
}

fn http_probe(field: &str, port: i64, path: String) -> ApiResult<Probe> {
    let port = checks::port(field, port)?;
    let printable = path.bytes().all(|b| b.is_ascii_graphic());
    if !path.starts_with('/') || !printable || path.len() > 2048 {
        let why = "a path begins with '/' and has no blanks, and not more than 2048 characters";
        return Err(ApiError::field(field, why));
    }
    Ok(Probe::Http { port, path })
}

impl CubeBody {
    fn order(self, headers: &HeaderMap, node: &str) -> ApiResult<BuildTemplate> {
        self.refuse_what_is_not_there(node)?;
        if self.image.trim().is_empty() {
            return Err(ApiError::field("image", "is missing"));
        }
        let auth = auth(self.registry_username, self.registry_password)?;
        let image = self.image.trim();
        let origin = checks::image("image", image, auth)?;
        let request_id = checks::request_id(headers, self.request_id)?.or_else(|| {
            // What Cube's own server tells repetitions by.
            let id = headers.get("x-request-id")?.to_str().ok()?;
            Some(id.to_owned())
        });
        let name = name(self.name, self.template_id, image, request_id.as_deref())?;

        let mut spec = BuildSpec {
            run_image_command: true,
            ..BuildSpec::new(origin)
        };
        for pair in self.env.unwrap_or_default() {
            let (name, value) = pair.split_once('=').ok_or_else(|| {
                let why = format!("{:?} is not NAME=VALUE", shorten(&pair));
                ApiError::field("env", why)
            })?;
            checks::variable("env", name, value)?;
            spec.env.push((name.to_owned(), value.to_owned()));
        }
        for port in self.exposed_ports.unwrap_or_default() {
            let port = checks::port("exposedPorts", port)?;
            if !spec.ports.contains(&port) {
                spec.ports.push(port);
            }
        }
        for server in self.dns.unwrap_or_default() {
            let server: Ipv4Addr = server.parse().map_err(|_| {
                let why = format!("{:?} is no IPv4 address", shorten(&server));
                ApiError::field("dns", why)
            })?;
            spec.dns.push(server);
        }
        spec.ready = match (self.probe, self.probe_port, self.probe_path) {
            (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
                let why = "is given together with probePort or probePath; send one of them";
                return Err(ApiError::field("probe", why));
            }
            (Some(probe), None, None) => probe.probe("probe")?,
            (None, Some(port), path) => {
                http_probe("probePort", port, path.unwrap_or(PROBE_PATH.into()))?
            }
            (None, None, Some(path)) => match spec.ports.first() {
                Some(&port) => http_probe("probePath", i64::from(port), path)?,
                None => return Err(ApiError::field("probePath", "is given without probePort")),
            },
            (None, None, None) => Probe::None,
        };
        let words = |field: &str, words: Option<Vec<String>>| {
            let words = words.filter(|words| !words.is_empty());
            for word in words.iter().flatten() {
                checks::text(field, word)?;
            }
            ApiResult::Ok(words)
        };
        spec.command = match (words("command", self.command)?, words("args", self.args)?) {
            (Some(command), args) => Some([command, args.unwrap_or_default()].concat()),
            (None, None) => None,
            (None, Some(_)) => {
                let what = "args without command (name the program in command)";
                return Err(ApiError::unsupported(what));
            }
        };

        let free = self.writable_layer_size.as_deref().map(mebibytes);
        let free = free.transpose()?.map(|free| ("writableLayerSize", free));
        let size = Size {
            cpu_count: SIZE.0,
            memory_mib: SIZE.1,
            ..Size::default()
        };
        let cpus = self.cpu.map(|millis| match millis {
            ..=0 => millis,
            millis => millis.saturating_add(999) / 1000,
        });
        let mut order = BuildTemplate::new(name, spec);
        order.size = checks::size(size, cpus, self.memory, free)?;
        order.request_id = request_id;
        Ok(order)
    }

    fn refuse_what_is_not_there(&self, node: &str) -> ApiResult<()> {
        if self.allow_internet_access == Some(false) {
            let what =
                "allowInternetAccess false for a template (say it when a sandbox is created)";
            return Err(ApiError::unsupported(what));
        }
        for (field, hosts) in [("allowOut", &self.allow_out), ("denyOut", &self.deny_out)] {
            if hosts.as_ref().is_some_and(|hosts| !hosts.is_empty()) {
                let what = format!("{field} of a template (say it when a sandbox is created)");
                return Err(ApiError::unsupported(&what));
            }
        }
        if self.enable_ivshmem == Some(true) {
            return Err(ApiError::unsupported("enableIvshmem"));
        }
        let only = |field: &str, value: &Option<String>, only: &str| match value.as_deref() {
            Some(value) if !value.is_empty() && value != only => {
                let what = format!("{field} {:?}", shorten(value));
                Err(ApiError::unsupported(&what))
            }
            _ => Ok(()),
        };
        only("instanceType", &self.instance_type, "cubebox")?;
        only("networkType", &self.network_type, "tap")?;
        let nodes = self.nodes.iter().flatten();
        if let Some(other) = nodes.into_iter().find(|name| *name != node) {
            let why = format!("there is no node {:?}, only {node:?}", shorten(other));
            return Err(ApiError::field("nodes", why));
        }
        Ok(())
    }
}

fn auth(username: Option<String>, password: Option<String>) -> ApiResult<Option<RegistryAuth>> {
    let given = |text: &String| !text.is_empty();
    match (username.filter(given), password.filter(given)) {
        (None, None) => Ok(None),
        (Some(username), Some(password)) => {
            checks::text("registryUsername", &username)?;
            checks::text("registryPassword", &password)?;
            Ok(Some(RegistryAuth { username, password }))
        }
        (Some(_), None) => Err(ApiError::field("registryPassword", "is missing")),
        (None, Some(_)) => Err(ApiError::field("registryUsername", "is missing")),
    }
}

/// What a template is called: what the client says, or the image's own name and something that
/// nobody else has.
fn name(
    name: Option<String>,
    id: Option<String>,
    image: &str,
    request: Option<&str>,
) -> ApiResult<String> {
    let given = |text: &String| !text.trim().is_empty();
    // Ids are given by the server: one that a client made up says nothing.
    let id = id.filter(|id| !id.starts_with("tpl-"));
    if let Some(name) = name.filter(given).or(id.filter(given)) {
        return Ok(name.trim().to_owned());
    }
    let last = image.split('@').next().unwrap_or(image);
    let last = last.rsplit('/').next().unwrap_or(last);
    let plain: String = last
        .chars()
        .take(40)
        .map(|c| match c.to_ascii_lowercase() {
            c if c.is_ascii_alphanumeric() => c,
            _ => '-',
        })
        .collect();
    // The same request has to mean the same template.
    let tail = match request {
        Some(request) => Sha256::digest(request)[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        None => Uuid::new_v4().simple().to_string()[..12].to_owned(),
    };
    Ok(match plain.trim_matches('-') {
        "" => format!("image-{tail}"),
        plain => format!("{plain}-{tail}"),
    })
}

/// `1G`, `512Mi`, `1.5GiB`, or a number of bytes, rounded up to MiB.
fn mebibytes(text: &str) -> ApiResult<i64> {
    let wrong = || {
        let why = format!("{:?} is no size: write it as 1G or 512Mi", shorten(text));
        ApiError::field("writableLayerSize", why)
    };
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.'));
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let unit = unit.trim().to_ascii_uppercase();
    let unit = unit.strip_suffix('B').unwrap_or(&unit);
    let bytes: f64 = match unit.strip_suffix('I').unwrap_or(unit) {
        "" => 1.0,
        "K" => 1024.0,
        "M" => 1024.0 * 1024.0,
        "G" => 1024.0 * 1024.0 * 1024.0,
        "T" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    // What is too large for a disk is refused where disks are.
    Ok((number * bytes / (1024.0 * 1024.0)).ceil() as i64)
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Build a template of an image
///
/// Answers with a job to ask for. With the header `Idempotency-Key`, `requestID` in the body, or
/// the header `X-Request-Id`, a repetition is answered with the first one's job.
#[utoipa::path(
    post, path = "/templates", tag = "templates", request_body = CubeBody,
    params(
        ("Idempotency-Key" = Option<String>, Header),
        ("X-Request-Id" = Option<String>, Header),
    ),
    responses(
        (status = 202, body = JobBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 409, body = ErrorBody,
         description = "It is being built another way, or the request id is in use"),
        (status = 501, body = ErrorBody),
    ),
)]
pub(crate) async fn build(
    State(state): State<AppState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<CubeBody>,
) -> ApiResult<(StatusCode, Json<JobBody>)> {
    let order = body.order(&headers, &state.config.node_id)?;
    let started = state.control.templates.build(order).await?;
    accepted(&state, started.build).await
}

/// How to build a template again.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[schema(as = RebuildCubeTemplate)]
pub(crate) struct RebuildBody {
    /// User at the image's registry. Nothing is kept from the first build.
    registry_username: Option<String>,
    /// Its password.
    registry_password: Option<String>,
    /// Names this request, as for the first build.
    #[serde(rename = "requestID")]
    request_id: Option<String>,
}

/// Build a template again
///
/// Of what it was built of last, without anything that was kept from then.
#[utoipa::path(
    post, path = "/templates/{templateID}", tag = "templates", request_body = RebuildBody,
    params(
        ("templateID" = String, Path, description = "Its id or a name"),
        ("Idempotency-Key" = Option<String>, Header),
    ),
    responses(
        (status = 202, body = JobBody),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It is being built already"),
    ),
)]
pub(crate) async fn rebuild(
    State(state): State<AppState>,
    Segment(reference): Segment,
    headers: HeaderMap,
    OptionalJsonBody(body): OptionalJsonBody<RebuildBody>,
) -> ApiResult<(StatusCode, Json<JobBody>)> {
    let templates = &state.control.templates;
    let template = templates.get(&reference).await?;
    let conflict = |why: &str| ApiError::new(StatusCode::CONFLICT, why);
    let last = template.builds.iter().find(|build| build.spec.is_some());
    let Some((last, mut spec)) = last.and_then(|build| Some((build, build.spec.clone()?))) else {
        return Err(conflict(
            "nobody has said yet what this template is made of",
        ));
    };
    let Some(name) = template.aliases.first() else {
        return Err(conflict(
            "this template has no name to be built under; give it an alias",
        ));
    };
    let given = auth(body.registry_username, body.registry_password)?;
    if let Origin::Image { auth, .. } = &mut spec.origin {
        *auth = given;
    }
    spec.force = true;
    let mut order = BuildTemplate::new(name, spec);
    order.tags.clone_from(&last.tags);
    order.size = Size {
        cpu_count: last.cpu_count,
        memory_mib: last.memory_mib,
        disk_mib: last.disk_mib,
    };
    order.request_id = checks::request_id(&headers, body.request_id)?;
    let started = templates.build(order).await?;
    accepted(&state, started.build).await
}

async fn accepted(state: &AppState, build: Build) -> ApiResult<(StatusCode, Json<JobBody>)> {
    Ok((
        StatusCode::ACCEPTED,
        Json(JobBody::new(state, build).await?),
    ))
}

/// Another name for a template.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
#[schema(as = TemplateAlias)]
pub(crate) struct AliasBody {
    /// The name; empty for none.
    alias: Option<String>,
}

/// Give a template another name
///
/// In the place of those that it has.
#[utoipa::path(
    put, path = "/templates/{templateID}/alias", tag = "templates", request_body = AliasBody,
    params(("templateID" = String, Path, description = "Its id or a name")),
    responses(
        (status = 200, body = TemplateWithBuilds),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "Another template has that name"),
    ),
)]
pub(crate) async fn set_alias(
    State(state): State<AppState>,
    Segment(reference): Segment,
    JsonBody(body): JsonBody<AliasBody>,
) -> ApiResult<Json<TemplateWithBuilds>> {
    let alias = body.alias.filter(|alias| !alias.is_empty());
    let alias = alias.map(|alias| alias.parse::<Reference>());
    let alias = alias.transpose();
    let alias = alias.map_err(|why| ApiError::field("alias", why))?;
    if alias.as_ref().is_some_and(|alias| alias.tag.is_some()) {
        return Err(ApiError::field("alias", "has a tag; tags are for builds"));
    }
    let alias = alias.map(|alias| alias.name);
    let templates = &state.control.templates;
    let template = templates.set_alias(&reference, alias.as_deref()).await?;
    super::read::with_builds(&state, &template, &Query::default()).map(|(_, body)| body)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn order(body: Value) -> ApiResult<BuildTemplate> {
        let body: CubeBody = serde_json::from_value(body).expect("a body");
        body.order(&HeaderMap::new(), "local")
    }

    #[test]
    fn a_template_as_the_clients_ask_for_it() {
        let order = order(json!({
            "image": " python:3.12-slim ", "name": "py", "instanceType": "cubebox",
            "writableLayerSize": "20G", "exposedPorts": [8000, 8000, 9000], "probePort": 8000,
            "cpu": 1500, "memory": 1024, "env": ["A=1", "B=x=y"], "allowInternetAccess": true,
            "networkType": "tap", "nodes": ["local"], "registryUsername": "me",
            "registryPassword": "secret", "command": ["python"], "args": ["-m", "http.server"],
            "dns": ["1.1.1.1"], "allowOut": [], "requestID": "r1",
        }))
        .expect("an order");
        insta::assert_debug_snapshot!(order);
    }

    #[test]
    fn names_that_nobody_gave() {
        let made = |image, request| name(None, None, image, request).expect("a name");
        assert_eq!(
            made("a/Py_thon:3@sha256:00", Some("r")),
            made("a/Py_thon:3", Some("r"))
        );
        assert!(made("a/Py_thon:3", Some("r")).starts_with("py-thon-3-"));
        assert_ne!(made("x", None), made("x", None));
        assert!(made("x", None).parse::<Reference>().is_ok());
        let older = name(None, Some("mine".into()), "x", None);
        assert_eq!(older, Ok("mine".into()));
        let id = name(None, Some("tpl-123".into()), "x", None).expect("a name");
        assert!(id.starts_with("x-"), "{id}");
    }

    #[test]
    fn sizes() {
        for (text, mib) in [
            ("1G", 1024),
            ("512Mi", 512),
            ("1.5GiB", 1536),
            ("1", 1),
            ("2048K", 2),
        ] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        for bad in ["", "G", "-1G", "1X", "1.2.3G", "1e3G", "1 G G"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }
}
