//! Programs and files that the node itself brings into a guest, for the builds of templates.
//!
//! Programs run as envd runs them; no token is asked for, because the node speaks on the channel.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{Buf as _, Bytes, BytesMut};
use cubicle_ids::SandboxId;
use cubicle_protocol::guest_api::{COPY_PATH, CopyQuery};
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use serde_json::json;

use crate::{
    error::{Error, Result},
    link::{Body, Link, full_body},
};

/// Longest message of the guest's that is read, in bytes.
const MESSAGE_LIMIT: usize = 8 << 20;
/// How much longer than the program may run its end may take to arrive.
const GRACE: Duration = Duration::from_secs(10);

/// A program to be run in a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunProgram {
    /// The program: a path, or a name that is looked for in `PATH`.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Who runs it; `None`: the sandbox's default.
    pub user: Option<String>,
    /// Environment, on top of the sandbox's.
    pub env: BTreeMap<String, String>,
    /// Working directory, which must exist; `None`: the sandbox's default.
    pub cwd: Option<String>,
    /// How long it may run; then it is killed. `None`: as long as it likes.
    pub deadline: Option<Duration>,
}

/// What a program printed, as it arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Printed {
    /// On its standard output.
    Stdout(Bytes),
    /// On its standard error.
    Stderr(Bytes),
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramEnd {
    /// What it exited with; `None` if it was killed.
    pub exit_code: Option<i32>,
    /// `exit status 3`, `signal: killed`.
    pub status: String,
}

/// Runs a program to its end. Dropping the future lets it run on.
pub(crate) async fn run(
    id: &SandboxId,
    link: &Link,
    program: &RunProgram,
    printed: impl FnMut(Printed),
) -> Result<ProgramEnd> {
    let failed = |reason: String| Error::Program {
        id: id.clone(),
        program: program.program.clone(),
        reason,
    };
    let running = async {
        let response = link.call(request(program).map_err(failed)?).await?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(failed(format!("status {status}")));
        }
        follow(response.into_body(), program, printed)
            .await
            .map_err(|error| match error {
                Broken::Missing(reason) => Error::NoProgram {
                    program: program.program.clone(),
                    reason,
                },
                Broken::Other(reason) => failed(reason),
            })
    };
    match program.deadline {
        None => running.await,
        // The guest kills it in time; this is for a guest that does not.
        Some(deadline) => tokio::time::timeout(deadline + GRACE, running)
            .await
            .unwrap_or_else(|_| Err(failed(format!("it did not end within {deadline:?}")))),
    }
}

/// Puts the files of an archive (tar) into their places.
pub(crate) async fn copy(
    id: &SandboxId,
    link: &Link,
    query: &CopyQuery,
    archive: Body,
) -> Result<()> {
    let failed = |reason: String| Error::Copy {
        id: id.clone(),
        src: query.src.clone(),
        dest: query.dest.clone(),
        reason,
    };
    let request = Request::builder()
        .method(Method::POST)
        .uri(uri_of(query))
        .body(archive)
        .map_err(|error| failed(error.to_string()))?;
    let response = link.call(request).await?;
    if response.status().is_success() {
        return Ok(());
    }
    let body = response.into_body().collect().await;
    let body = body.map_err(|error| failed(error.to_string()))?.to_bytes();
    #[derive(Deserialize)]
    struct Refusal {
        message: String,
    }
    let refusal = serde_json::from_slice::<Refusal>(&body);
    Err(failed(refusal.map_or_else(
        |_| String::from_utf8_lossy(&body).into_owned(),
        |refusal| refusal.message,
    )))
}

fn uri_of(query: &CopyQuery) -> String {
    let mut uri =
        form_urlencoded::Serializer::for_suffix(format!("{COPY_PATH}?"), COPY_PATH.len() + 1);
    uri.append_pair("src", &query.src);
    uri.append_pair("dest", &query.dest);
    uri.append_pair("owner", &query.owner);
    if let Some(mode) = query.mode {
        uri.append_pair("mode", &mode.to_string());
    }
    uri.finish()
}

fn request(program: &RunProgram) -> std::result::Result<Request<Body>, String> {
    let mut process = json!({
        "cmd": program.program,
        "args": program.args,
        "envs": program.env,
    });
    if let Some(cwd) = &program.cwd {
        process["cwd"] = json!(cwd);
    }
    let message = json!({ "process": process, "stdin": false }).to_string();
    let mut request = Request::builder()
        .method(Method::POST)
        .uri("/process.Process/Start")
        .header(header::CONTENT_TYPE, "application/connect+json")
        .header("connect-protocol-version", "1");
    if let Some(user) = &program.user {
        request = request.header(header::AUTHORIZATION, basic(user));
    }
    if let Some(deadline) = program.deadline {
        request = request.header("connect-timeout-ms", deadline.as_millis().to_string());
    }
    let request = request.body(full_body(envelope(message.as_bytes())));
    request.map_err(|error| error.to_string())
}

/// Why a stream of process events was of no use.
#[derive(Debug, PartialEq, Eq)]
enum Broken {
    /// There is no such program.
    Missing(String),
    Other(String),
}

/// Reads a stream of process events to the end of the program.
async fn follow(
    mut body: Body,
    program: &RunProgram,
    mut printed: impl FnMut(Printed),
) -> std::result::Result<ProgramEnd, Broken> {
    let mut events = Events::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Broken::Other(error.to_string()))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        events.pending.extend_from_slice(&data);
        while let Some(event) = events.next()? {
            match event {
                Event::Printed(output) => printed(output),
                Event::Ended(end) => return Ok(end),
                Event::Failed { code, .. } if code == "deadline_exceeded" => {
                    let deadline = program.deadline.unwrap_or_default();
                    return Err(Broken::Other(format!("it ran longer than {deadline:?}")));
                }
                // Other things that a request names may be missing as well.
                Event::Failed { code, message }
                    if code == "not_found" && message.starts_with("cannot start") =>
                {
                    return Err(Broken::Missing(message));
                }
                Event::Failed { code, message } => {
                    return Err(Broken::Other(format!("{code}: {message}")));
                }
            }
        }
    }
    Err(Broken::Other("its end was never told".to_owned()))
}

enum Event {
    Printed(Printed),
    Ended(ProgramEnd),
    Failed { code: String, message: String },
}

/// Connect's framing of a streamed message, in the making: flags, length, content.
#[derive(Default)]
struct Events {
    pending: BytesMut,
}

impl Events {
    fn next(&mut self) -> std::result::Result<Option<Event>, Broken> {
        /// In Connect's flags: the last message, which may carry an error.
        const END: u8 = 2;
        loop {
            let Some((flags, len)) = self.head() else {
                return Ok(None);
            };
            if len > MESSAGE_LIMIT {
                return Err(Broken::Other(format!("a message of {len} bytes")));
            }
            if self.pending.len() < 5 + len {
                return Ok(None);
            }
            self.pending.advance(5);
            let content = self.pending.split_to(len);
            let message: serde_json::Value = serde_json::from_slice(&content)
                .map_err(|error| Broken::Other(error.to_string()))?;
            let event = if flags & END == 0 {
                event_of(&message)
            } else {
                message.get("error").map(failure)
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    fn head(&self) -> Option<(u8, usize)> {
        let head = self.pending.get(..5)?;
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        Some((head[0], len as usize))
    }
}

fn event_of(message: &serde_json::Value) -> Option<Event> {
    let bytes = |text: &serde_json::Value| {
        let text = text.as_str().unwrap_or_default();
        Bytes::from(BASE64_STANDARD.decode(text).unwrap_or_default())
    };
    if let Some(data) = message.pointer("/event/data") {
        if let Some(output) = data.get("stdout") {
            return Some(Event::Printed(Printed::Stdout(bytes(output))));
        }
        let output = data.get("stderr")?;
        return Some(Event::Printed(Printed::Stderr(bytes(output))));
    }
    let end = message.pointer("/event/end")?;
    // A field that is 0 is absent in protobuf's JSON.
    let code = end.get("exitCode").and_then(serde_json::Value::as_i64);
    let exited = end.get("exited").and_then(serde_json::Value::as_bool);
    let status = end.get("status").and_then(serde_json::Value::as_str);
    let code = i32::try_from(code.unwrap_or(0)).unwrap_or(-1);
    Some(Event::Ended(ProgramEnd {
        exit_code: exited.unwrap_or(false).then_some(code),
        status: status.unwrap_or("it ended").to_owned(),
    }))
}

fn failure(error: &serde_json::Value) -> Event {
    let text = |field: &str| {
        let text = error.get(field).and_then(serde_json::Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    Event::Failed {
        code: text("code"),
        message: text("message"),
    }
}

/// envd takes the user of a request from basic authentication without a password, up to the last
/// colon.
fn basic(user: &str) -> HeaderValue {
    let value = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:")));
    // Base64 consists of visible ASCII.
    HeaderValue::from_str(&value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

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

    async fn outcome(bytes: Bytes) -> (std::result::Result<ProgramEnd, Broken>, Vec<Printed>) {
        let mut printed = Vec::new();
        let program = RunProgram::default();
        let end = follow(full_body(bytes), &program, |p| printed.push(p)).await;
        (end, printed)
    }

    #[tokio::test]
    async fn only_a_program_that_was_seen_to_end_has_ended() {
        let start = (0, r#"{"event":{"start":{"pid":7}}}"#);
        let data = (0, r#"{"event":{"data":{"stdout":"aGk="}}}"#);
        let end = |fields| format!(r#"{{"event":{{"end":{fields}}}}}"#);
        let good = end(r#"{"exited":true,"status":"exit status 0"}"#);
        let (ended, printed) = outcome(stream(&[start, data, (0, &good), (2, "{}")])).await;
        assert_eq!(ended.unwrap().exit_code, Some(0));
        assert_eq!(printed, [Printed::Stdout("hi".into())]);
        let bad = end(r#"{"exited":true,"exitCode":3,"status":"exit status 3"}"#);
        let (ended, _) = outcome(stream(&[start, (0, &bad), (2, "{}")])).await;
        assert_eq!(ended.unwrap().exit_code, Some(3));
        let killed = end(r#"{"exitCode":-1,"status":"signal: killed"}"#);
        let (ended, _) = outcome(stream(&[start, (0, &killed), (2, "{}")])).await;
        assert_eq!(ended.unwrap().exit_code, None);
        for unfinished in [
            stream(&[start, (2, "{}")]),
            stream(&[start, (0, &good)]).slice(..40),
            Bytes::new(),
        ] {
            assert!(matches!(outcome(unfinished).await.0, Err(Broken::Other(_))));
        }
        let error =
            |code, message| format!(r#"{{"error":{{"code":"{code}","message":"{message}"}}}}"#);
        let missing = error("not_found", "cannot start 'x': exec");
        let (ended, _) = outcome(stream(&[(2, &missing)])).await;
        assert!(matches!(ended, Err(Broken::Missing(_))));
        let late = error("deadline_exceeded", "");
        let (ended, _) = outcome(stream(&[start, (2, &late)])).await;
        assert!(matches!(ended, Err(Broken::Other(why)) if why.contains("longer")));
    }
}
