//! Commands, terminals and files of a sandbox, through the envd protocol.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::{Buf as _, BytesMut};
use reqwest::{Method, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Client, SandboxRef};
use crate::error::Error;

/// Length of a Connect frame's header: one byte of flags, four of length (big endian).
const FRAME_HEADER: usize = 5;
/// Flag of the last frame of a Connect stream.
const END_OF_STREAM: u8 = 0x02;

/// What to run.
#[derive(Debug, Default)]
pub(crate) struct Command {
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: Option<String>,
    pub(crate) stdin: bool,
    /// Columns and rows, for a command in a terminal.
    pub(crate) terminal: Option<(u16, u16)>,
}

/// What a running command says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Started {
        pid: u32,
    },
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// How it ended: its exit code (128 + signal when a signal ended it) and envd's own words.
    Ended {
        code: i32,
        status: String,
    },
}

/// The events of one command.
pub(crate) struct Events {
    response: Response,
    buffer: BytesMut,
}

impl Client {
    /// Starts a command; its events follow.
    pub(crate) async fn start(
        &self,
        sandbox: &SandboxRef,
        command: &Command,
    ) -> Result<Events, Error> {
        let mut process = json!({ "cmd": command.program, "args": command.args });
        if !command.env.is_empty() {
            let env: serde_json::Map<String, Value> = command
                .env
                .iter()
                .map(|(k, v)| (k.clone(), v.clone().into()))
                .collect();
            process["envs"] = env.into();
        }
        if let Some(cwd) = &command.cwd {
            process["cwd"] = cwd.clone().into();
        }
        let mut body = json!({ "process": process, "stdin": command.stdin });
        if let Some((cols, rows)) = command.terminal {
            body["pty"] = json!({ "size": { "cols": cols, "rows": rows } });
        }
        let request = self
            .envd(sandbox, Method::POST, "/process.Process/Start")
            .header("Content-Type", "application/connect+json")
            .header("Connect-Protocol-Version", "1")
            .body(frame(&body));
        let response = self.send(request).await?;
        Ok(Events {
            response,
            buffer: BytesMut::new(),
        })
    }

    /// Calls a method that has one request and one answer.
    pub(crate) async fn unary(
        &self,
        sandbox: &SandboxRef,
        method: &str,
        body: &Value,
    ) -> Result<Value, Error> {
        let request = self
            .envd(sandbox, Method::POST, &format!("/{method}"))
            .header("Connect-Protocol-Version", "1")
            .json(body);
        self.json(request, method).await
    }

    /// Sends bytes to the standard input or the terminal of a command.
    pub(crate) async fn input(
        &self,
        sandbox: &SandboxRef,
        pid: u32,
        terminal: bool,
        bytes: &[u8],
    ) -> Result<(), Error> {
        let stream = if terminal { "pty" } else { "stdin" };
        let body = json!({
            "process": { "pid": pid },
            "input": { stream: BASE64.encode(bytes) },
        });
        self.unary(sandbox, "process.Process/SendInput", &body)
            .await
            .map(drop)
    }

    /// Ends the standard input of a command.
    pub(crate) async fn close_input(&self, sandbox: &SandboxRef, pid: u32) -> Result<(), Error> {
        let body = json!({ "process": { "pid": pid } });
        self.unary(sandbox, "process.Process/CloseStdin", &body)
            .await
            .map(drop)
    }

    /// Tells a terminal its new size.
    pub(crate) async fn resize(
        &self,
        sandbox: &SandboxRef,
        pid: u32,
        (cols, rows): (u16, u16),
    ) -> Result<(), Error> {
        let body = json!({
            "process": { "pid": pid },
            "pty": { "size": { "cols": cols, "rows": rows } },
        });
        self.unary(sandbox, "process.Process/Update", &body)
            .await
            .map(drop)
    }

    /// Kills a command.
    pub(crate) async fn signal_kill(&self, sandbox: &SandboxRef, pid: u32) -> Result<(), Error> {
        let body = json!({ "process": { "pid": pid }, "signal": "SIGNAL_SIGKILL" });
        self.unary(sandbox, "process.Process/SendSignal", &body)
            .await
            .map(drop)
    }

    /// Reads a file as a stream.
    pub(crate) async fn read_file(
        &self,
        sandbox: &SandboxRef,
        path: &str,
    ) -> Result<Response, Error> {
        let mut request = self
            .envd(sandbox, Method::GET, "/files")
            .query(&[("path", path)]);
        if let Some(user) = &sandbox.user {
            request = request.query(&[("username", user)]);
        }
        self.send(request).await
    }

    /// Writes a file from a stream; missing directories are made.
    pub(crate) async fn write_file(
        &self,
        sandbox: &SandboxRef,
        path: &str,
        content: reqwest::Body,
    ) -> Result<(), Error> {
        let mut request = self
            .envd(sandbox, Method::POST, "/files")
            .query(&[("path", path)])
            .header("Content-Type", "application/octet-stream")
            .body(content);
        if let Some(user) = &sandbox.user {
            request = request.query(&[("username", user)]);
        }
        self.send(request).await.map(drop)
    }

    /// Runs a command to its end and returns its output; for our own checks.
    pub(crate) async fn run(
        &self,
        sandbox: &SandboxRef,
        command: &Command,
    ) -> Result<(i32, String), Error> {
        let mut events = self.start(sandbox, command).await?;
        let mut output = Vec::new();
        while let Some(event) = events.next().await? {
            match event {
                Event::Started { .. } => {}
                Event::Stdout(bytes) | Event::Stderr(bytes) => output.extend(bytes),
                Event::Ended { code, .. } => {
                    return Ok((code, String::from_utf8_lossy(&output).into_owned()));
                }
            }
        }
        Err(Error::Usage(
            "the command's stream ended before the command did".to_owned(),
        ))
    }
}

impl Events {
    /// The next event; none after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            while let Some((flags, payload)) = take_frame(&mut self.buffer) {
                if flags & END_OF_STREAM != 0 {
                    return end_of_stream(&payload).map(|()| None);
                }
                if let Some(event) = parse_event(&payload)? {
                    return Ok(Some(event));
                }
            }
            let chunk = self
                .response
                .chunk()
                .await
                .map_err(|source| Error::Transport {
                    what: "the command's stream".to_owned(),
                    source,
                })?;
            match chunk {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}

fn frame(body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut frame = Vec::with_capacity(FRAME_HEADER + body.len());
    frame.push(0);
    frame.extend(length.to_be_bytes());
    frame.extend(body.as_bytes());
    frame
}

fn take_frame(buffer: &mut BytesMut) -> Option<(u8, BytesMut)> {
    let header = buffer.get(..FRAME_HEADER)?;
    let flags = header[0];
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if buffer.len() < FRAME_HEADER + length {
        return None;
    }
    buffer.advance(FRAME_HEADER);
    Some((flags, buffer.split_to(length)))
}

#[derive(Debug, Deserialize)]
struct ErrorBody {
    code: String,
    #[serde(default)]
    message: String,
}

fn end_of_stream(payload: &[u8]) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct End {
        #[serde(default)]
        error: Option<ErrorBody>,
    }
    let end: End = serde_json::from_slice(payload).map_err(unexpected)?;
    match end.error {
        None => Ok(()),
        Some(error) => Err(Error::Refused {
            status: 0,
            message: format!("{} ({})", error.message, error.code),
        }),
    }
}

fn unexpected(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Unexpected {
        what: "process.Process/Start".to_owned(),
        source: source.into(),
    }
}

fn parse_event(payload: &[u8]) -> Result<Option<Event>, Error> {
    #[derive(Deserialize)]
    struct Message {
        event: Body,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Body {
        start: Option<Start>,
        data: Option<Data>,
        end: Option<End>,
    }
    #[derive(Deserialize)]
    struct Start {
        pid: u32,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Data {
        stdout: Option<String>,
        stderr: Option<String>,
        pty: Option<String>,
    }
    #[derive(Deserialize, Default)]
    #[serde(default, rename_all = "camelCase")]
    struct End {
        exit_code: i32,
        status: String,
    }
    let message: Message = serde_json::from_slice(payload).map_err(unexpected)?;
    let decode = |text: &str| BASE64.decode(text).map_err(unexpected);
    let Body { start, data, end } = message.event;
    if let Some(Start { pid }) = start {
        return Ok(Some(Event::Started { pid }));
    }
    if let Some(end) = end {
        return Ok(Some(Event::Ended {
            code: end.exit_code,
            status: end.status,
        }));
    }
    let Some(data) = data else { return Ok(None) };
    if let Some(bytes) = data.stdout.as_deref().or(data.pty.as_deref()) {
        return decode(bytes).map(|bytes| Some(Event::Stdout(bytes)));
    }
    match data.stderr {
        Some(bytes) => decode(&bytes).map(|bytes| Some(Event::Stderr(bytes))),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_whole_or_not_at_all() {
        let wire = [frame(&json!({"a": 1})), frame(&json!({}))].concat();
        let mut buffer = BytesMut::new();
        let mut frames = Vec::new();
        for byte in wire {
            buffer.extend_from_slice(&[byte]);
            while let Some((_, payload)) = take_frame(&mut buffer) {
                frames.push(payload.to_vec());
            }
        }
        assert_eq!(frames, [br#"{"a":1}"#.to_vec(), b"{}".to_vec()]);
    }

    #[test]
    fn events_of_a_command() {
        let parse = |value: Value| parse_event(value.to_string().as_bytes()).expect("understood");
        assert_eq!(
            parse(json!({"event": {"start": {"pid": 7}}})),
            Some(Event::Started { pid: 7 })
        );
        assert_eq!(
            parse(json!({"event": {"data": {"stderr": "aGk="}}})),
            Some(Event::Stderr(b"hi".to_vec()))
        );
        assert_eq!(
            parse(json!({"event": {"end": {"status": "exit status 0", "exited": true}}})),
            Some(Event::Ended {
                code: 0,
                status: "exit status 0".into()
            })
        );
        assert_eq!(parse(json!({"event": {"keepalive": {}}})), None);
        assert!(end_of_stream(b"{}").is_ok());
        assert!(end_of_stream(br#"{"error":{"code":"not_found"}}"#).is_err());
    }
}
