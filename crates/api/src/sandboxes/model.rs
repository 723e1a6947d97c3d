//! Sandboxes as clients see them.

use std::{collections::BTreeMap, sync::Arc};

use cubicle_control::{lifecycle::Visible, sandbox};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, macros::datetime};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    volumes::{self, VolumeMountBody},
};

/// Longest id or name that anything is looked up by.
pub(crate) const MAX_REFERENCE: usize = 256;

/// What stands for "never" where clients want a time.
pub(crate) const NEVER: OffsetDateTime = datetime!(9999-12-31 23:59:59 UTC);

/// What a client needs in order to use a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Sandbox)]
pub(crate) struct SandboxBody {
    /// The sandbox.
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// The template it was made from.
    #[serde(rename = "templateID")]
    template_id: String,
    /// The template's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    /// The node it runs on.
    #[serde(rename = "clientID")]
    client_id: String,
    /// Version of its guest daemon.
    envd_version: String,
    /// What requests to its guest daemon must present as `X-Access-Token`.
    envd_access_token: String,
    /// What requests to its other ports must present as `e2b-traffic-access-token`, if they are
    /// not public.
    #[serde(skip_serializing_if = "Option::is_none")]
    traffic_access_token: Option<String>,
    /// Its ports are at `<port>-<sandboxID>.<domain>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
}

impl SandboxBody {
    pub(crate) fn new(state: &AppState, sandbox: &sandbox::Sandbox) -> Self {
        Self {
            sandbox_id: sandbox.id.to_string(),
            template_id: sandbox.template.to_string(),
            alias: sandbox.alias.clone(),
            client_id: state.config.node_id.clone(),
            envd_version: sandbox.envd_version.clone(),
            envd_access_token: sandbox.envd_token.clone(),
            traffic_access_token: sandbox.traffic_token.clone(),
            domain: state.config.domain.clone(),
        }
    }
}

/// A sandbox in a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListedSandbox {
    /// The sandbox.
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// The template it was made from.
    #[serde(rename = "templateID")]
    template_id: String,
    /// The template's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    /// The node it runs on.
    #[serde(rename = "clientID")]
    client_id: String,
    /// When it began to answer.
    #[serde(with = "time::serde::rfc3339")]
    started_at: OffsetDateTime,
    /// When its time is up; the last second of the year 9999 stands for never.
    #[serde(with = "time::serde::rfc3339")]
    end_at: OffsetDateTime,
    /// CPUs it has.
    cpu_count: u32,
    /// Memory it has, in MiB.
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    /// Size of its root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    /// `running` or `paused`.
    state: &'static str,
    /// Version of its guest daemon.
    envd_version: String,
    /// What its creator attached to it.
    metadata: BTreeMap<String, String>,
    /// The volumes that it has mounted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    volume_mounts: Vec<VolumeMountBody>,
}

impl ListedSandbox {
    pub(crate) fn new(state: &AppState, sandbox: &sandbox::Sandbox) -> Self {
        Self {
            sandbox_id: sandbox.id.to_string(),
            template_id: sandbox.template.to_string(),
            alias: sandbox.alias.clone(),
            client_id: state.config.node_id.clone(),
            started_at: sandbox.started_at,
            end_at: sandbox.end_at.unwrap_or(NEVER),
            cpu_count: sandbox.cpu_count,
            memory_mb: sandbox.memory_mib,
            disk_size_mb: sandbox.disk_mib,
            state: sandbox.state.visible().unwrap_or(Visible::Running).as_str(),
            envd_version: sandbox.envd_version.clone(),
            metadata: sandbox.metadata.clone(),
            volume_mounts: volumes::mounted(sandbox),
        }
    }
}

/// All about a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxDetail {
    #[serde(flatten)]
    listed: ListedSandbox,
    /// What requests to its guest daemon must present as `X-Access-Token`.
    envd_access_token: String,
    /// Its ports are at `<port>-<sandboxID>.<domain>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    /// What was said about it at creation, if anything.
    allow_internet_access: Option<bool>,
    /// What it may reach and who may reach it.
    network: NetworkDetail,
    /// What happens when its time is up.
    lifecycle: Lifecycle,
    /// What its pause has kept: `full`, its memory and its disk, or `filesystem`, its disk only.
    /// While it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_mode: Option<&'static str>,
}

/// What a sandbox may reach and who may reach it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetworkDetail {
    /// Whether its ports are open to requests without its traffic token.
    allow_public_traffic: bool,
    /// Destinations that are allowed whatever else is said.
    allow_out: Vec<String>,
    /// Destinations that are refused.
    deny_out: Vec<String>,
    /// What its servers are told as `Host`.
    #[serde(skip_serializing_if = "Option::is_none")]
    mask_request_host: Option<String>,
}

/// What happens when a sandbox's time is up.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Lifecycle {
    /// Whether a request to it resumes it.
    auto_resume: bool,
    /// `kill` or `pause`.
    on_timeout: &'static str,
}

impl SandboxDetail {
    pub(crate) fn new(state: &AppState, sandbox: &sandbox::Sandbox) -> Self {
        let texts = |nets: &[ipnet::Ipv4Net]| nets.iter().map(ToString::to_string).collect();
        let network = &sandbox.network;
        Self {
            listed: ListedSandbox::new(state, sandbox),
            envd_access_token: sandbox.envd_token.clone(),
            domain: state.config.domain.clone(),
            allow_internet_access: network.allow_internet,
            network: NetworkDetail {
                allow_public_traffic: network.allow_public_traffic.unwrap_or(true),
                allow_out: texts(&network.allow_out),
                deny_out: texts(&network.deny_out),
                mask_request_host: network.mask_request_host.clone(),
            },
            lifecycle: Lifecycle {
                auto_resume: sandbox.lifecycle.auto_resume,
                on_timeout: if sandbox.lifecycle.auto_pause {
                    "pause"
                } else {
                    "kill"
                },
            },
            pause_mode: sandbox
                .pause
                .as_ref()
                .filter(|_| sandbox.state.visible() == Some(Visible::Paused))
                .map(|pause| pause.mode.as_str()),
        }
    }
}

/// What a sandbox used at one instant. Sizes in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxMetric {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    timestamp: OffsetDateTime,
    /// When, in seconds since 1970.
    timestamp_unix: i64,
    /// CPUs it has.
    cpu_count: u32,
    /// How busy they were, in percent of one.
    cpu_used_pct: f64,
    /// Memory that its processes used.
    mem_used: u64,
    /// Memory it has.
    mem_total: u64,
    /// Memory that held its page cache.
    mem_cache: u64,
    /// Used part of its root file system.
    disk_used: u64,
    /// Size of its root file system.
    disk_total: u64,
}

impl From<&sandbox::Sample> for SandboxMetric {
    fn from(sample: &sandbox::Sample) -> Self {
        let usage = &sample.usage;
        Self {
            timestamp: sample.at,
            timestamp_unix: sample.at.unix_timestamp(),
            cpu_count: usage.cpu_count,
            cpu_used_pct: usage.cpu_used_pct,
            mem_used: usage.mem_used,
            mem_total: usage.mem_total,
            mem_cache: usage.mem_cache,
            disk_used: usage.disk_used,
            disk_total: usage.disk_total,
        }
    }
}

/// The latest metric of several sandboxes.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SandboxesWithMetrics {
    /// By sandbox id.
    pub(crate) sandboxes: BTreeMap<String, SandboxMetric>,
}

/// A line of a log, as text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SandboxLog {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    timestamp: OffsetDateTime,
    /// What.
    line: String,
}

/// A line of a log, in parts.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SandboxLogEntry {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    timestamp: OffsetDateTime,
    /// What, for a person.
    message: String,
    /// `debug`, `info`, `warn` or `error`.
    level: &'static str,
    /// What, for a program.
    fields: BTreeMap<String, String>,
}

impl From<sandbox::LogEntry> for SandboxLogEntry {
    fn from(entry: sandbox::LogEntry) -> Self {
        Self {
            timestamp: entry.at,
            message: entry.message,
            level: entry.level.as_str(),
            fields: entry.fields,
        }
    }
}

/// A part of a sandbox's log.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxLogs {
    logs: Vec<SandboxLog>,
    log_entries: Vec<SandboxLogEntry>,
}

impl From<Vec<sandbox::LogEntry>> for SandboxLogs {
    fn from(entries: Vec<sandbox::LogEntry>) -> Self {
        let line = |e: &sandbox::LogEntry| SandboxLog {
            timestamp: e.at,
            line: e.message.clone(),
        };
        Self {
            logs: entries.iter().map(line).collect(),
            log_entries: entries.into_iter().map(Into::into).collect(),
        }
    }
}

/// A part of a sandbox's log.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SandboxLogsV2 {
    pub(crate) logs: Vec<SandboxLogEntry>,
}

/// A new end for a sandbox.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TimeoutBody {
    /// Seconds from now; 0 ends it, -1 is never.
    pub(crate) timeout: i64,
}

/// More time for a sandbox.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct RefreshBody {
    /// Seconds from now that it has at least; up to 3600, 15 if left out.
    pub(crate) duration: Option<i64>,
}

/// How to connect to a sandbox.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct ConnectBody {
    /// Seconds from now that it has at least, 300 if left out; -1 is for ever.
    pub(crate) timeout: Option<i64>,
    /// Whether to resume with its memory, if it is paused. `false` is possible where its pause kept
    /// none.
    pub(crate) memory: Option<bool>,
}

/// How to resume a sandbox.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ResumeBody {
    /// Seconds from now that it lives, 15 if left out; -1 is for ever.
    pub(crate) timeout: Option<i64>,
    /// Whether it is paused when they are over; as before if left out.
    pub(crate) auto_pause: Option<bool>,
    /// Whether to resume with its memory. `false` is possible where its pause kept none.
    pub(crate) memory: Option<bool>,
}

/// How to pause a sandbox.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PauseBody {
    /// Whether to keep its memory. `false`: its disk only, so that resuming it boots it.
    memory: Option<bool>,
    /// Whether to refuse with 503 if its guest daemon does not answer.
    require_healthy_guest: Option<bool>,
}

impl PauseBody {
    pub(crate) fn request(&self) -> sandbox::PauseSandbox {
        let memory = self.memory.unwrap_or(true);
        sandbox::PauseSandbox {
            memory,
            // Where the memory is dropped, what the guest has not written is lost: it has to be
            // there to write it.
            require_healthy: self.require_healthy_guest.unwrap_or(false) || !memory,
        }
    }
}

/// Copies of a sandbox to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct ForkBody {
    /// Seconds that the copies live, 15 if left out; -1 is for ever.
    timeout: Option<i64>,
    /// How many, 1 (default) to 100.
    count: Option<i64>,
}

impl ForkBody {
    pub(crate) fn request(&self) -> ApiResult<sandbox::ForkSandbox> {
        let count = self.count.unwrap_or(1);
        let count = u32::try_from(count)
            .ok()
            .filter(|count| (1..=sandbox::MAX_FORKS).contains(count))
            .ok_or_else(|| {
                let why = format!(
                    "{count} is no number of copies between 1 and {}",
                    sandbox::MAX_FORKS
                );
                ApiError::field("count", why)
            })?;
        let lifetime = sandbox::Lifetime::from_seconds("timeout", self.timeout.unwrap_or(15))?;
        Ok(sandbox::ForkSandbox { count, lifetime })
    }
}

/// One copy of a sandbox, or why there is none.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum ForkResult {
    /// It runs.
    Sandbox(SandboxBody),
    /// It does not.
    Error(ErrorBody),
}

impl ForkResult {
    pub(crate) fn all(
        state: &AppState,
        children: Vec<cubicle_control::Result<Arc<sandbox::Sandbox>>>,
    ) -> Vec<Self> {
        children
            .into_iter()
            .map(|child| match child {
                Ok(sandbox) => Self::Sandbox(SandboxBody::new(state, &sandbox)),
                Err(error) => Self::Error(ApiError::of_create(error).into_body()),
            })
            .collect()
    }
}

/// Where to roll a sandbox back to.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct RollbackBody {
    /// A snapshot of it, or one that it descends from: its id or its name.
    #[serde(rename = "snapshotID", alias = "snapshotId")]
    snapshot_id: String,
}

impl RollbackBody {
    /// The reference, if it can be one.
    pub(crate) fn reference(self) -> ApiResult<String> {
        reference("snapshotID", self.snapshot_id)
    }
}

/// What a client calls a snapshot or a template, if it can be called so.
pub(crate) fn reference(field: &str, text: String) -> ApiResult<String> {
    if (1..=MAX_REFERENCE).contains(&text.len()) {
        Ok(text)
    } else {
        let why = format!("an id or a name has 1 to {MAX_REFERENCE} bytes");
        Err(ApiError::field(field, why))
    }
}

/// A rollback that is done.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RollbackResult {
    /// The sandbox.
    #[serde(rename = "sandboxID")]
    pub(crate) sandbox_id: String,
    /// What it went back to, as it was asked for.
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    /// Names this rollback.
    #[serde(rename = "operationID")]
    pub(crate) operation_id: Uuid,
    /// `READY`.
    pub(crate) status: &'static str,
}
