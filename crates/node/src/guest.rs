//! Calls that the node itself makes to a guest.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cubicle_ids::SandboxId;
use cubicle_protocol::guest_api::{LOGS_PATH, LogEntry, SYNC_PATH};
use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use serde::Deserialize;

use crate::{
    error::{Error, Result},
    link::{Body, Link, empty_body},
    program::{self, RunProgram},
};

/// Longest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 8 << 20;

/// How long a short call may take; a guest that computes under software emulation is slow.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What the guest daemon measures of itself. Sizes in bytes; E2B's field names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct GuestMetrics {
    pub(crate) cpu_count: u32,
    pub(crate) cpu_used_pct: f64,
    pub(crate) mem_total: u64,
    pub(crate) mem_used: u64,
    pub(crate) mem_cache: u64,
    pub(crate) disk_used: u64,
    pub(crate) disk_total: u64,
}

/// The host-only calls of one guest.
pub(crate) struct Guest<'a> {
    pub(crate) id: &'a SandboxId,
    pub(crate) link: &'a Link,
}

impl Guest<'_> {
    /// Whether the daemon says that it is well.
    pub(crate) async fn health(&self) -> Result<()> {
        self.get("GET /health", "/health").await.map(drop)
    }

    /// Has the guest write back everything that its file systems hold.
    pub(crate) async fn sync(&self) -> Result<()> {
        const CALL: &str = "POST /sync";
        let mut request = Request::new(empty_body());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = http::Uri::from_static(SYNC_PATH);
        let status = self.link.call(request).await?.status();
        if status.is_success() {
            Ok(())
        } else {
            Err(self.unreadable(CALL, format!("status {status}")))
        }
    }

    pub(crate) async fn metrics(&self) -> Result<GuestMetrics> {
        const CALL: &str = "GET /metrics";
        let body = self.get(CALL, "/metrics").await?;
        serde_json::from_slice(&body).map_err(|error| self.unreadable(CALL, error))
    }

    /// The lifecycle log, oldest entry first.
    pub(crate) async fn logs(&self) -> Result<Vec<LogEntry>> {
        const CALL: &str = "GET /logs";
        let body = self.get(CALL, LOGS_PATH).await?;
        body.split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).map_err(|error| self.unreadable(CALL, error)))
            .collect()
    }

    /// Runs a program as `user` until it ends; what it prints is dropped.
    pub(crate) async fn run(
        &self,
        user: &str,
        program: &[String],
        patience: Duration,
    ) -> Result<()> {
        let failed = |reason: String| Error::WarmUp {
            program: program.join(" "),
            reason,
        };
        let Some((cmd, args)) = program.split_first() else {
            return Err(failed("there is no program".to_owned()));
        };
        let order = RunProgram {
            program: cmd.clone(),
            args: args.to_vec(),
            user: Some(user.to_owned()),
            deadline: Some(patience),
            ..RunProgram::default()
        };
        match program::run(self.id, self.link, &order, drop).await {
            Ok(end) if end.exit_code == Some(0) => Ok(()),
            Ok(end) => Err(failed(end.status)),
            Err(Error::Program { reason, .. } | Error::NoProgram { reason, .. }) => {
                Err(failed(reason))
            }
            Err(error) => Err(error),
        }
    }

    async fn get(&self, call: &'static str, path: &'static str) -> Result<Bytes> {
        let mut request = Request::new(empty_body());
        *request.uri_mut() = http::Uri::from_static(path);
        let answered = async {
            let response = self.link.call(request).await?;
            let status = response.status();
            if !status.is_success() {
                return Err(self.unreadable(call, format!("status {status}")));
            }
            self.read(call, response).await
        };
        tokio::time::timeout(CALL_TIMEOUT, answered)
            .await
            .unwrap_or_else(|_| Err(self.unreadable(call, format!("nothing in {CALL_TIMEOUT:?}"))))
    }

    async fn read(&self, call: &'static str, response: Response<Body>) -> Result<Bytes> {
        let mut body = response.into_body();
        let mut read = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.unreadable(call, error))?;
            if let Ok(data) = frame.into_data() {
                if read.len() + data.len() > ANSWER_LIMIT {
                    return Err(self.unreadable(call, format!("more than {ANSWER_LIMIT} bytes")));
                }
                read.extend_from_slice(&data);
            }
        }
        Ok(read.freeze())
    }

    fn unreadable(&self, call: &'static str, reason: impl ToString) -> Error {
        Error::GuestAnswer {
            id: self.id.clone(),
            call,
            reason: reason.to_string(),
        }
    }
}
