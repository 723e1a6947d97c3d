//! Templates: their builds, what those said, their tags, and the files that they are made of.

use std::io::{self, BufWriter, Write};

use bytes::{Bytes, BytesMut};
use reqwest::{Body, Method, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::mpsc;

use super::{Client, reference, segment};
use crate::{dockerfile::Files, error::Error};

/// Bytes of an upload that are read ahead at a time.
const CHUNK: usize = 1 << 18;
/// Chunks that wait for the network.
const CHUNKS: usize = 4;
/// Most lines of a log in one answer.
const LOG_PAGE: usize = 100;

/// A template.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TemplateInfo {
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    #[serde(rename = "buildID")]
    pub(crate) build_id: String,
    pub(crate) aliases: Vec<String>,
    pub(crate) build_status: String,
    pub(crate) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(crate) memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    pub(crate) disk_size_mb: u32,
    #[serde(with = "time::serde::rfc3339")]
    pub(crate) created_at: OffsetDateTime,
    pub(crate) spawn_count: u64,
    #[serde(default)]
    pub(crate) image_info: String,
    #[serde(default)]
    pub(crate) exposed_ports: Vec<u16>,
    #[serde(default)]
    pub(crate) last_error: Option<String>,
    pub(crate) builds: Vec<TemplateBuild>,
}

/// One build of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TemplateBuild {
    #[serde(rename = "buildID")]
    pub(crate) build_id: String,
    pub(crate) status: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(crate) created_at: OffsetDateTime,
    #[serde(default, with = "time::serde::rfc3339::option")]
    pub(crate) finished_at: Option<OffsetDateTime>,
}

/// A name of a build.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TemplateTag {
    pub(crate) tag: String,
    #[serde(rename = "buildID")]
    pub(crate) build_id: String,
}

/// How far a build is, and what it has said since.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BuildState {
    pub(crate) status: String,
    pub(crate) log_entries: Vec<BuildLine>,
    #[serde(default)]
    pub(crate) reason: Option<BuildReason>,
}

/// Why a build failed.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct BuildReason {
    pub(crate) message: String,
    #[serde(default)]
    pub(crate) step: Option<String>,
}

/// What a build said.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BuildLine {
    pub(crate) timestamp: String,
    pub(crate) level: String,
    pub(crate) message: String,
    #[serde(default)]
    pub(crate) step: Option<String>,
}

impl BuildState {
    /// Whether there is nothing more to come.
    pub(crate) fn is_over(&self) -> bool {
        !matches!(self.status.as_str(), "waiting" | "building") && self.log_entries.len() < LOG_PAGE
    }
}

/// One line of a build that is followed.
#[derive(Debug, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub(crate) enum BuildEvent {
    /// The build is under way.
    Started {
        template_id: String,
        build_id: String,
    },
    /// It works on `step`, or that printed something.
    Progress {
        step: String,
        message: String,
        level: String,
    },
    /// The template can be used.
    Done {
        template_id: String,
        build_id: String,
        cached: bool,
    },
    /// The build failed.
    Failed {
        step: Option<String>,
        message: String,
    },
}

/// A build as it goes.
pub(crate) struct Following {
    response: Response,
    buffer: BytesMut,
}

impl Following {
    pub(crate) fn new(response: Response) -> Self {
        Self {
            response,
            buffer: BytesMut::new(),
        }
    }

    /// What happened next; `None` once the server says no more.
    pub(crate) async fn next(&mut self) -> Result<Option<BuildEvent>, Error> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).map_err(|source| {
                    Error::Unexpected {
                        what: "build a template".to_owned(),
                        source: source.into(),
                    }
                });
            }
            let chunk = self.response.chunk().await;
            match chunk.map_err(|source| Error::Transport {
                what: "build a template".to_owned(),
                source,
            })? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}

impl Client {
    /// Starts a build; `body` is our own build request.
    pub(crate) async fn build_template(
        &self,
        name: &str,
        body: &Value,
    ) -> Result<Following, Error> {
        let path = format!("/cubicle/v1/templates/{}/build", reference(name)?);
        let response = self
            .send(self.request(Method::POST, &path).json(body))
            .await?;
        Ok(Following::new(response))
    }

    /// One template with its builds.
    pub(crate) async fn template(&self, template: &str) -> Result<TemplateInfo, Error> {
        let path = format!("/templates/{}", reference(template)?);
        self.json(self.request(Method::GET, &path), "get a template")
            .await
    }

    /// Its tags.
    pub(crate) async fn template_tags(&self, template: &str) -> Result<Vec<TemplateTag>, Error> {
        let path = format!("/templates/{}/tags", reference(template)?);
        self.json(self.request(Method::GET, &path), "list tags")
            .await
    }

    /// Gives a build more tags; returns the build.
    pub(crate) async fn assign_tags(&self, target: &str, tags: &[String]) -> Result<Value, Error> {
        let request = self.request(Method::POST, "/templates/tags");
        let body = json!({ "target": target, "tags": tags });
        self.json(request.json(&body), "assign tags").await
    }

    /// Takes tags away from a template.
    pub(crate) async fn delete_tags(&self, name: &str, tags: &[String]) -> Result<(), Error> {
        let request = self.request(Method::DELETE, "/templates/tags");
        let body = json!({ "name": name, "tags": tags });
        self.send(request.json(&body)).await.map(drop)
    }

    /// How far a build is, with what it said from the `offset`th line on.
    pub(crate) async fn build_state(
        &self,
        template: &str,
        build: &str,
        offset: usize,
    ) -> Result<BuildState, Error> {
        let template = reference(template)?;
        let path = format!("/templates/{template}/builds/{}/status", segment(build)?);
        let request = self.request(Method::GET, &path);
        let query = [("logsOffset", offset), ("limit", LOG_PAGE)];
        self.json(request.query(&query), "follow a build").await
    }

    /// Whether the server has files already.
    pub(crate) async fn has_files(&self, hash: &str) -> Result<bool, Error> {
        #[derive(Deserialize)]
        struct Present {
            present: bool,
        }
        let path = format!("/cubicle/v1/files/{}", segment(hash)?);
        let request = self.request(Method::GET, &path);
        let answer: Present = self.json(request, "look for files").await?;
        Ok(answer.present)
    }

    /// Uploads files as they are read; `sent` is told of every part that has been read.
    pub(crate) async fn upload_files(
        &self,
        files: Files,
        sent: impl Fn(u64) + Send + 'static,
    ) -> Result<(), Error> {
        let path = format!("/cubicle/v1/files/{}", segment(&files.hash)?);
        let (chunks, waiting) = mpsc::channel(CHUNKS);
        let writer = tokio::task::spawn_blocking(move || {
            let errors = chunks.clone();
            let to = BufWriter::with_capacity(CHUNK, Upload { chunks, sent });
            if let Err(error) = files.write_tar(to) {
                // The archive breaks off: the server must not take it for whole.
                let again = io::Error::new(error.kind(), error.to_string());
                let _ = errors.blocking_send(Err(error));
                return Err(again);
            }
            Ok(())
        });
        let body = futures::stream::unfold(waiting, |mut waiting| async move {
            waiting.recv().await.map(|chunk| (chunk, waiting))
        });
        let request = self
            .request(Method::PUT, &path)
            .body(Body::wrap_stream(body));
        let answer = self.send(request).await;
        let read = writer
            .await
            .unwrap_or_else(|why| Err(io::Error::other(why)));
        match (answer, read) {
            (Ok(_), _) => Ok(()),
            // Who was not listened to any more only knows that the pipe broke.
            (Err(error), Err(read)) if read.kind() == io::ErrorKind::BrokenPipe => Err(error),
            (Err(_), Err(read)) => Err(Error::setup("read the files to copy", read)),
            (Err(error), Ok(())) => Err(error),
        }
    }
}

/// A writer whose chunks become a request's body.
struct Upload<F> {
    chunks: mpsc::Sender<io::Result<Bytes>>,
    sent: F,
}

impl<F: Fn(u64)> Write for Upload<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.chunks
            .blocking_send(Ok(Bytes::copy_from_slice(bytes)))
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        (self.sent)(bytes.len() as u64);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
