//! Templates as clients see them.

use cubicle_control::template::{self, BuildLine, BuildSpec, BuildStatus, Origin, Probe};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::status::Job;

/// A template.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Template)]
pub(crate) struct TemplateBody {
    /// The template.
    #[serde(rename = "templateID")]
    template_id: String,
    /// The build that it stands for.
    #[serde(rename = "buildID")]
    build_id: Uuid,
    /// CPUs of its sandboxes.
    cpu_count: u32,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    /// Whether it is for everyone.
    public: bool,
    /// Its names.
    aliases: Vec<String>,
    /// Its names.
    names: Vec<String>,
    /// When it was first asked for.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When it last changed.
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
    /// Always null: a server has one owner.
    created_by: Option<Creator>,
    /// When a sandbox was last made from it.
    #[serde(with = "time::serde::rfc3339::option")]
    last_spawned_at: Option<OffsetDateTime>,
    /// How many sandboxes were made from it.
    spawn_count: u64,
    /// How many times it was built.
    build_count: usize,
    /// Version of the guest daemon in it.
    envd_version: String,
    /// How far that build is: `waiting`, `building`, `ready` or `error`.
    build_status: &'static str,
    /// The same in Cube's words: `PENDING`, `BUILDING`, `READY` or `FAILED`.
    status: &'static str,
    /// Why the latest build failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
    /// Whether this server comes with it.
    is_default: bool,
    /// The latest build in Cube's words.
    #[serde(rename = "jobID")]
    job_id: String,
    /// What it begins with: an image, or `recipe` or `template` and a name.
    image_info: String,
    /// Always `cubebox`.
    instance_type: &'static str,
    /// Always `tap`.
    network_type: &'static str,
    /// Always true: less is asked for when a sandbox is created.
    allow_internet_access: bool,
    /// The tag of the build that it stands for; of several, the first.
    version: String,
    /// Ports that its servers listen on.
    exposed_ports: Vec<u16>,
}

/// Who made a template.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Creator {}

impl TemplateBody {
    /// `None` for a template without any build, which the store does not make.
    pub(crate) fn new(template: &template::Template) -> Option<Self> {
        let build = template.build()?;
        let latest = template.builds.first().unwrap_or(build);
        Some(Self {
            is_default: is_default(template),
            job_id: Job(latest.id).to_string(),
            image_info: build.spec.as_ref().map(origin).unwrap_or_default(),
            instance_type: "cubebox",
            network_type: "tap",
            allow_internet_access: true,
            version: build.tags.first().cloned().unwrap_or_default(),
            exposed_ports: build.defaults.ports.clone(),
            template_id: template.id.to_string(),
            build_id: build.id,
            cpu_count: build.cpu_count,
            memory_mb: build.memory_mib,
            disk_size_mb: build.disk_mib,
            public: template.public,
            aliases: template.aliases.clone(),
            names: template.aliases.clone(),
            created_at: template.created_at,
            updated_at: template.updated_at,
            created_by: None,
            last_spawned_at: template.last_spawned_at,
            spawn_count: template.spawn_count,
            build_count: template.builds.len(),
            envd_version: build.envd_version.clone(),
            build_status: build.status.as_str(),
            status: in_cubes_words(build.status),
            last_error: template
                .builds
                .first()
                .and_then(|build| build.reason.clone()),
        })
    }
}

/// The names of what this server comes with.
const DEFAULT_TEMPLATES: [&str; 2] = [template::BASE_RECIPE, "code-interpreter-v1"];

/// Whether this server comes with a template.
pub(super) fn is_default(template: &template::Template) -> bool {
    let mut names = template.aliases.iter();
    names.any(|name| DEFAULT_TEMPLATES.contains(&name.as_str()))
}

fn origin(spec: &BuildSpec) -> String {
    match &spec.origin {
        Origin::Image { reference, .. } => reference.clone(),
        other => other.to_string(),
    }
}

pub(super) const fn in_cubes_words(status: BuildStatus) -> &'static str {
    match status {
        BuildStatus::Waiting => "PENDING",
        BuildStatus::Building => "BUILDING",
        BuildStatus::Ready => "READY",
        BuildStatus::Error => "FAILED",
    }
}

/// A template with its builds.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TemplateWithBuilds {
    #[serde(flatten)]
    template: TemplateBody,
    /// Newest first.
    builds: Vec<TemplateBuildBody>,
    /// Where it is, in Cube's words.
    replicas: Vec<Replica>,
    /// What it was asked for with, in Cube's words; without secrets.
    #[serde(skip_serializing_if = "Option::is_none")]
    create_request: Option<CreateRequest>,
}

impl TemplateWithBuilds {
    /// A template and some of its builds. `None` for one without any build.
    pub(crate) fn new(
        template: &template::Template,
        builds: &[template::Build],
        node: &str,
    ) -> Option<Self> {
        let build = template.build()?;
        let ready = build.snapshot.is_some();
        let replica = Replica {
            node_id: node.to_owned(),
            status: in_cubes_words(build.status),
            job_id: Job(build.id).to_string(),
        };
        Some(Self {
            template: TemplateBody::new(template)?,
            builds: builds.iter().map(Into::into).collect(),
            replicas: ready.then_some(replica).into_iter().collect(),
            create_request: build
                .spec
                .as_ref()
                .map(|spec| CreateRequest::new(spec, build)),
        })
    }
}

/// A template on a node.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateReplica)]
pub(crate) struct Replica {
    /// The node.
    #[serde(rename = "nodeID")]
    node_id: String,
    /// `READY`.
    status: &'static str,
    /// What made it.
    #[serde(rename = "jobID")]
    job_id: String,
}

/// What a template was asked for with.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateCreateRequest)]
pub(crate) struct CreateRequest {
    /// What it begins with.
    image: String,
    /// Thousandths of a CPU.
    cpu: u32,
    /// Memory, in MiB.
    memory: u32,
    /// Variables that were set; their values may be secrets and are not told.
    env: Vec<String>,
    /// Ports that were named.
    exposed_ports: Vec<u16>,
    /// Name servers.
    dns: Vec<String>,
    /// What was to be started in the place of the image's own command.
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
    /// Port of the probe.
    #[serde(skip_serializing_if = "Option::is_none")]
    probe_port: Option<u16>,
    /// Path of the probe.
    #[serde(skip_serializing_if = "Option::is_none")]
    probe_path: Option<String>,
}

impl CreateRequest {
    fn new(spec: &BuildSpec, build: &template::Build) -> Self {
        let (probe_port, probe_path) = match &spec.ready {
            Probe::Http { port, path } => (Some(*port), Some(path.clone())),
            Probe::Tcp { port } => (Some(*port), None),
            Probe::None | Probe::Command(_) => (None, None),
        };
        Self {
            image: origin(spec),
            cpu: build.cpu_count.saturating_mul(1000),
            memory: build.memory_mib,
            env: spec.env.iter().map(|(name, _)| name.clone()).collect(),
            exposed_ports: spec.ports.clone(),
            dns: spec.dns.iter().map(ToString::to_string).collect(),
            command: spec.command.clone(),
            probe_port,
            probe_path,
        }
    }
}

/// One build of a template.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateBuild)]
pub(crate) struct TemplateBuildBody {
    /// The build.
    #[serde(rename = "buildID")]
    build_id: Uuid,
    /// How far it is.
    status: &'static str,
    /// When it was asked for.
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When its status last changed.
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
    /// When it ended.
    #[serde(
        with = "time::serde::rfc3339::option",
        skip_serializing_if = "Option::is_none"
    )]
    finished_at: Option<OffsetDateTime>,
    /// CPUs of its sandboxes.
    cpu_count: u32,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    /// Size of their root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    /// Version of the guest daemon in it.
    envd_version: String,
}

impl From<&template::Build> for TemplateBuildBody {
    fn from(build: &template::Build) -> Self {
        Self {
            build_id: build.id,
            status: build.status.as_str(),
            created_at: build.created_at,
            updated_at: build.updated_at,
            finished_at: build.finished_at,
            cpu_count: build.cpu_count,
            memory_mb: build.memory_mib,
            disk_size_mb: build.disk_mib,
            envd_version: build.envd_version.clone(),
        }
    }
}

/// What a name stands for.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AliasBody {
    /// The template.
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    /// Whether it is for everyone.
    pub(crate) public: bool,
}

/// A change of a template.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct TemplateUpdate {
    /// Whether it is for everyone.
    pub(crate) public: Option<bool>,
}

/// A template that was changed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TemplateUpdated {
    /// Its names.
    pub(crate) names: Vec<String>,
}

/// One line of a build's log.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BuildLogEntry {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    timestamp: OffsetDateTime,
    /// What.
    message: String,
    /// `debug`, `info`, `warn` or `error`.
    level: &'static str,
    /// The step it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<String>,
}

impl From<BuildLine> for BuildLogEntry {
    fn from(line: BuildLine) -> Self {
        Self {
            timestamp: line.at,
            message: line.message,
            level: line.level.as_str(),
            step: line.step,
        }
    }
}

/// How far a build is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BuildInfo {
    /// The template.
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    /// The build.
    #[serde(rename = "buildID")]
    pub(crate) build_id: Uuid,
    /// `waiting`, `building`, `ready` or `error`.
    pub(crate) status: &'static str,
    /// Always empty; see `logEntries`.
    pub(crate) logs: Vec<String>,
    /// Lines from `logsOffset` on; empty once all have been read.
    pub(crate) log_entries: Vec<BuildLogEntry>,
    /// Why it failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<BuildReason>,
}

/// Why a build failed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BuildReason {
    /// For a person.
    pub(crate) message: String,
    /// Where: `base`, the number of a step from 1 on, or `finalize`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) step: Option<String>,
    /// What was said there last.
    pub(crate) log_entries: Vec<BuildLogEntry>,
}

/// A part of a build's log.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BuildLogs {
    /// Its lines.
    pub(crate) logs: Vec<BuildLogEntry>,
}
