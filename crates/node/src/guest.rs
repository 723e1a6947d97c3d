//! Calls that the node itself makes to a guest.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{Buf as _, Bytes, BytesMut};
use cubicle_ids::SandboxId;
use cubicle_protocol::guest_api::{LOGS_PATH, LogEntry, SYNC_PATH};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use serde_json::json;

use crate::{
    error::{Error, Result},
    link::{Body, Link, empty_body, full_body},
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
        let message = json!({ "process": { "cmd": cmd, "args": args } }).to_string();
        let request = Request::builder()
            .method(Method::POST)
            .uri("/process.Process/Start")
            .header(header::CONTENT_TYPE, "application/connect+json")
            .header("connect-protocol-version", "1")
            .header(header::AUTHORIZATION, basic(user))
            .body(full_body(envelope(message.as_bytes())))
            .map_err(|error| failed(error.to_string()))?;
        let run = async {
            let response = self.link.call(request).await?;
            let status = response.status();
            let body = self.read("POST /process.Process/Start", response).await?;
            if status != StatusCode::OK {
                return Err(failed(format!(
                    "status {status}: {}",
                    String::from_utf8_lossy(&body)
                )));
            }
            outcome(body).map_err(failed)
        };
        tokio::time::timeout(patience, run)
            .await
            .unwrap_or_else(|_| Err(failed(format!("it did not end within {patience:?}"))))
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

/// envd takes the user of a request from basic authentication without a password.
fn basic(user: &str) -> HeaderValue {
    let value = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:")));
    // Base64 consists of visible ASCII.
    HeaderValue::from_str(&value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Connect's framing of a streamed message: flags, length, content.
fn envelope(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.extend_from_slice(&[0]);
    framed.extend_from_slice(
        &u32::try_from(message.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    framed.extend_from_slice(message);
    framed.freeze()
}

/// Reads a whole stream of process events; why the program failed, if it did.
fn outcome(mut stream: Bytes) -> Result<(), String> {
    /// In Connect's flags: the last message, which may carry an error.
    const END: u8 = 2;
    let mut ended = None;
    while stream.len() >= 5 {
        let flags = stream.get_u8();
        let len = stream.get_u32() as usize;
        if stream.len() < len {
            break;
        }
        let message: serde_json::Value =
            serde_json::from_slice(&stream.split_to(len)).map_err(|error| error.to_string())?;
        if flags & END != 0 {
            if let Some(error) = message.get("error") {
                return Err(error.to_string());
            }
        } else if let Some(end) = message.pointer("/event/end") {
            // A field that is 0 is absent in protobuf's JSON.
            let code = end
                .get("exitCode")
                .and_then(serde_json::Value::as_i64)
                .unwrap_or(0);
            let exited = end
                .get("exited")
                .and_then(serde_json::Value::as_bool)
                .unwrap_or(false);
            ended = Some(if exited && code == 0 {
                Ok(())
            } else {
                Err(end.to_string())
            });
        }
    }
    ended.unwrap_or_else(|| Err("its end was never told".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(messages: &[(u8, &str)]) -> Bytes {
        let mut bytes = BytesMut::new();
        for (flags, message) in messages {
            let mut framed = BytesMut::from(&envelope(message.as_bytes())[..]);
            framed[0] = *flags;
            bytes.extend_from_slice(&framed);
        }
        bytes.freeze()
    }

    #[test]
    fn only_a_program_that_was_seen_to_end_well_has_succeeded() {
        let start = (0, r#"{"event":{"start":{"pid":7}}}"#);
        let end = |fields| format!(r#"{{"event":{{"end":{fields}}}}}"#);
        let good = end(r#"{"exited":true,"status":"exit status 0"}"#);
        assert_eq!(outcome(stream(&[start, (0, &good), (2, "{}")])), Ok(()));
        let bad = end(r#"{"exited":true,"exitCode":3}"#);
        assert!(
            outcome(stream(&[start, (0, &bad), (2, "{}")]))
                .unwrap_err()
                .contains('3')
        );
        let killed = end(r#"{"status":"signal: killed"}"#);
        assert!(outcome(stream(&[start, (0, &killed), (2, "{}")])).is_err());
        assert!(
            outcome(stream(&[start, (2, "{}")]))
                .unwrap_err()
                .contains("never told")
        );
        let refused = r#"{"error":{"code":"not_found","message":"no such user"}}"#;
        assert!(
            outcome(stream(&[(2, refused)]))
                .unwrap_err()
                .contains("no such user")
        );
        assert!(outcome(stream(&[start]).slice(..9)).is_err(), "cut short");
    }
}
