//! Snapshots, clones, rollbacks, pauses and resumes, with the numbers that only our own API tells.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{Client, CreatedSandbox, reference, segment};
use crate::error::Error;

/// One step of an operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) ms: f64,
}

/// What freezing a sandbox came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Taken {
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    #[serde(default)]
    pub(crate) names: Vec<String>,
    #[serde(default)]
    pub(crate) parent: Option<String>,
    pub(crate) tier: String,
    pub(crate) bytes_scanned: u64,
    pub(crate) bytes_dirty: u64,
    pub(crate) bytes_written: u64,
    pub(crate) frozen_ms: f64,
    pub(crate) total_ms: f64,
    #[serde(default)]
    pub(crate) phases: Vec<Phase>,
}

/// A snapshot as the server keeps it. What the store says of it may be missing.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotInfo {
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    #[serde(default)]
    pub(crate) names: Vec<String>,
    #[serde(rename = "sandboxID")]
    pub(crate) sandbox_id: String,
    /// `publishing`, `ready` or `failed`.
    pub(crate) state: String,
    /// False: its disk only.
    pub(crate) memory: bool,
    #[serde(with = "time::serde::rfc3339")]
    pub(crate) created_at: OffsetDateTime,
    #[serde(default)]
    pub(crate) tier: Option<String>,
    #[serde(default)]
    pub(crate) logical_bytes: Option<u64>,
    #[serde(default)]
    pub(crate) own_bytes: Option<u64>,
    #[serde(default)]
    pub(crate) durable: Option<bool>,
}

/// A place in the tree of snapshots. They come parents first, children below them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TreePlace {
    /// How far below its root it is.
    pub(crate) depth: usize,
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    /// `template`, `snapshot` or `deleted`.
    pub(crate) kind: String,
    /// A template's name.
    #[serde(default)]
    pub(crate) alias: Option<String>,
    /// What is there, if that is a snapshot.
    #[serde(default)]
    pub(crate) snapshot: Option<SnapshotInfo>,
}

/// What all snapshots take.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotUsage {
    pub(crate) count: u64,
    pub(crate) own_bytes: u64,
    pub(crate) logical_bytes: u64,
    #[serde(default)]
    pub(crate) max_count: Option<u64>,
    #[serde(default)]
    pub(crate) max_own_bytes: Option<u64>,
}

/// Whether a snapshot is what was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Verified {
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    pub(crate) ok: bool,
    #[serde(default)]
    pub(crate) reason: Option<String>,
    pub(crate) took_ms: f64,
}

/// A sandbox in another life.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RolledBack {
    #[serde(rename = "sandboxID")]
    pub(crate) sandbox_id: String,
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    pub(crate) generation: u64,
    pub(crate) total_ms: f64,
    #[serde(default)]
    pub(crate) phases: Vec<Phase>,
}

/// The copies of a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Forked {
    /// The freeze that all copies were made from.
    pub(crate) snapshot: Taken,
    pub(crate) sandboxes: Vec<ForkOutcome>,
    pub(crate) total_ms: f64,
}

/// One copy, or why there is none.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ForkOutcome {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sandbox: Option<CreatedSandbox>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<ForkError>,
}

/// Why there is no copy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ForkError {
    pub(crate) code: u16,
    pub(crate) message: String,
}

/// What a snapshot is to be.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NewSnapshot {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) memory: bool,
    /// Refuse if the guest does not answer.
    pub(crate) require_healthy_guest: bool,
    /// Seconds that it is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ttl: Option<u32>,
}

impl Client {
    /// Freezes a sandbox for an instant.
    pub(crate) async fn snapshot(&self, id: &str, new: &NewSnapshot) -> Result<Taken, Error> {
        let path = format!("/cubicle/v1/sandboxes/{}/snapshots", segment(id)?);
        let request = self.request(Method::POST, &path).json(new);
        self.json(request, "take a snapshot").await
    }

    /// The snapshots that there are, page by page.
    pub(crate) async fn snapshots(
        &self,
        sandbox: Option<&str>,
        all: bool,
    ) -> Result<Vec<SnapshotInfo>, Error> {
        let filter = |mut request: RequestBuilder| {
            if let Some(sandbox) = sandbox {
                request = request.query(&[("sandboxID", sandbox)]);
            }
            let states = if all {
                "publishing,ready,failed"
            } else {
                "ready"
            };
            request.query(&[("state", states)])
        };
        self.pages("/cubicle/v1/snapshots", filter, "list snapshots")
            .await
    }

    /// The same, each below its parent.
    pub(crate) async fn snapshot_tree(
        &self,
        sandbox: Option<&str>,
    ) -> Result<Vec<TreePlace>, Error> {
        let mut request = self.request(Method::GET, "/cubicle/v1/snapshot-tree");
        if let Some(sandbox) = sandbox {
            request = request.query(&[("sandboxID", sandbox)]);
        }
        self.json(request, "draw the snapshots").await
    }

    /// What all snapshots take.
    pub(crate) async fn snapshot_usage(&self) -> Result<SnapshotUsage, Error> {
        let request = self.request(Method::GET, "/cubicle/v1/snapshot-usage");
        self.json(request, "ask what snapshots take").await
    }

    /// One snapshot, with everything that the server says about it.
    pub(crate) async fn snapshot_info(&self, id: &str) -> Result<Value, Error> {
        let path = format!("/cubicle/v1/snapshots/{}", reference(id)?);
        self.json(self.request(Method::GET, &path), "get a snapshot")
            .await
    }

    /// Deletes a snapshot; false if there is none of that id.
    pub(crate) async fn delete_snapshot(&self, id: &str) -> Result<bool, Error> {
        let path = format!("/cubicle/v1/snapshots/{}", reference(id)?);
        self.delete(&path).await
    }

    /// Compares a snapshot with what was written.
    pub(crate) async fn verify_snapshot(&self, id: &str) -> Result<Verified, Error> {
        let path = format!("/cubicle/v1/snapshots/{}/verify", reference(id)?);
        self.json(self.request(Method::POST, &path), "verify a snapshot")
            .await
    }

    /// Puts a sandbox back to a snapshot.
    pub(crate) async fn rollback(&self, id: &str, snapshot: &str) -> Result<RolledBack, Error> {
        let path = format!("/cubicle/v1/sandboxes/{}/rollback", segment(id)?);
        let request = self
            .request(Method::POST, &path)
            .json(&json!({ "snapshotID": snapshot }));
        self.json(request, "roll a sandbox back").await
    }

    /// Makes running copies of a sandbox.
    pub(crate) async fn fork(&self, id: &str, count: u32, timeout: u32) -> Result<Forked, Error> {
        let path = format!("/cubicle/v1/sandboxes/{}/fork", segment(id)?);
        let request = self
            .request(Method::POST, &path)
            .json(&json!({ "count": count, "timeout": timeout }));
        self.json(request, "clone a sandbox").await
    }

    /// Freezes a sandbox and drops its VM.
    pub(crate) async fn pause(
        &self,
        id: &str,
        memory: bool,
        require_healthy: bool,
    ) -> Result<Taken, Error> {
        let path = format!("/cubicle/v1/sandboxes/{}/pause", segment(id)?);
        let request = self
            .request(Method::POST, &path)
            .json(&json!({ "memory": memory, "requireHealthyGuest": require_healthy }));
        self.json(request, "pause a sandbox").await
    }

    /// Wakes a sandbox, if it sleeps, and gives it time. True if it slept.
    pub(crate) async fn connect(
        &self,
        id: &str,
        timeout: u32,
        memory: bool,
    ) -> Result<(CreatedSandbox, bool), Error> {
        let path = format!("/v2/sandboxes/{}/connect", segment(id)?);
        let mut body = json!({ "timeout": timeout });
        if !memory {
            body["memory"] = false.into();
        }
        let response = self
            .send(self.request(Method::POST, &path).json(&body))
            .await?;
        let resumed = response.status() == StatusCode::CREATED;
        let sandbox = response.json().await.map_err(|source| Error::Unexpected {
            what: "resume a sandbox".to_owned(),
            source: source.into(),
        })?;
        Ok((sandbox, resumed))
    }
}
