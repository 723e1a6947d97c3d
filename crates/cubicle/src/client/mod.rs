//! The command line's own client of the HTTP API.
//!
//! It speaks the same E2B dialect as everybody else's client, so that what the command line can do
//! any program can do.

pub(crate) mod envd;
pub(crate) mod remote;
pub(crate) mod snapshots;
pub(crate) mod templates;

use std::path::{Path, PathBuf};

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::Error;

/// How to reach a server, as `cubicle up` leaves it for the other commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Connection {
    /// Base URL, without a slash at its end.
    pub(crate) url: String,
    /// API key; empty if the server asks for none.
    pub(crate) api_key: String,
    /// Domain of the sandboxes' host names.
    pub(crate) domain: String,
}

impl Connection {
    /// Where the local server's connection is written down, readable by its owner alone.
    pub(crate) fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("client.json")
    }

    /// Reads the local server's connection.
    pub(crate) fn load(data_dir: &Path) -> Result<Self, Error> {
        let path = Self::path(data_dir);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoLocalServer { path });
            }
            Err(source) => {
                return Err(Error::File {
                    action: "read",
                    path,
                    source,
                });
            }
        };
        serde_json::from_str(&text).map_err(|source| Error::File {
            action: "understand",
            path,
            source: source.into(),
        })
    }

    /// Writes the connection so that only its owner can read it, and never half of it.
    pub(crate) fn save(&self, data_dir: &Path) -> Result<(), Error> {
        use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
        let path = Self::path(data_dir);
        let fresh = path.with_extension("json.new");
        let write = || {
            let _ = std::fs::remove_file(&fresh);
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            std::fs::rename(&fresh, &path)
        };
        write().map_err(|source| Error::File {
            action: "write",
            path: path.clone(),
            source,
        })
    }
}

/// A sandbox as `POST /v2/sandboxes` answers it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CreatedSandbox {
    #[serde(rename = "sandboxID")]
    pub(crate) sandbox_id: String,
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    #[serde(default)]
    pub(crate) envd_access_token: Option<String>,
    #[serde(default)]
    pub(crate) domain: Option<String>,
}

/// A sandbox as the lists and `GET /sandboxes/{id}` answer it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxInfo {
    #[serde(rename = "sandboxID")]
    pub(crate) sandbox_id: String,
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    #[serde(default)]
    pub(crate) alias: Option<String>,
    pub(crate) state: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(crate) started_at: time::OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(crate) end_at: time::OffsetDateTime,
    pub(crate) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(crate) memory_mb: u64,
    #[serde(default)]
    pub(crate) metadata: Option<std::collections::BTreeMap<String, String>>,
    #[serde(default, skip_serializing)]
    pub(crate) envd_access_token: Option<String>,
}

/// A client of one server.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    connection: Connection,
}

impl Client {
    pub(crate) fn new(connection: Connection) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("cubicle/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .build()
            .map_err(|source| Error::setup("set up an HTTP client", source))?;
        Ok(Self { http, connection })
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// A request to the control plane; `path` begins with a slash.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self
            .http
            .request(method, format!("{}{path}", self.connection.url));
        if self.connection.api_key.is_empty() {
            request
        } else {
            request.header("X-API-Key", &self.connection.api_key)
        }
    }

    /// A request to the daemon of a sandbox.
    pub(crate) fn envd(&self, sandbox: &SandboxRef, method: Method, path: &str) -> RequestBuilder {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.connection.url))
            .header("E2b-Sandbox-Id", &sandbox.id)
            .header("E2b-Sandbox-Port", cubicle_protocol::ENVD_PORT.to_string());
        if let Some(token) = &sandbox.token {
            request = request.header("X-Access-Token", token);
        }
        if let Some(user) = &sandbox.user {
            request = request.basic_auth(user, Some(""));
        }
        request
    }

    /// Sends a request and turns a refusal into an error that carries the server's own words.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let response = request.send().await.map_err(|source| {
            if source.is_connect() {
                Error::ServerDown {
                    url: self.connection.url.clone(),
                    source,
                }
            } else {
                Error::Transport {
                    what: self.connection.url.clone(),
                    source,
                }
            }
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        Err(Error::Refused {
            status: status.as_u16(),
            message: refusal(status, &text),
        })
    }

    /// Sends a request and reads its JSON answer.
    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        what: &str,
    ) -> Result<T, Error> {
        let response = self.send(request).await?;
        let bytes = response.bytes().await.map_err(|source| Error::Transport {
            what: what.to_owned(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Unexpected {
            what: what.to_owned(),
            source: source.into(),
        })
    }

    /// Creates a sandbox; `body` is E2B's create request.
    pub(crate) async fn create(&self, body: &serde_json::Value) -> Result<CreatedSandbox, Error> {
        self.json(
            self.request(Method::POST, "/v2/sandboxes").json(body),
            "create a sandbox",
        )
        .await
    }

    /// One sandbox.
    pub(crate) async fn info(&self, id: &str) -> Result<SandboxInfo, Error> {
        self.json(
            self.request(Method::GET, &format!("/sandboxes/{}", segment(id)?)),
            "get a sandbox",
        )
        .await
    }

    /// All sandboxes, page by page.
    pub(crate) async fn list(
        &self,
        metadata: &[(String, String)],
    ) -> Result<Vec<SandboxInfo>, Error> {
        let filter = |mut request: RequestBuilder| {
            request = request.query(&[("state", "running,paused")]);
            if !metadata.is_empty() {
                request = request.query(&[("metadata", metadata_filter(metadata))]);
            }
            request
        };
        self.pages("/v2/sandboxes", filter, "list sandboxes").await
    }

    /// Every item of a list that comes in pages.
    async fn pages<T: DeserializeOwned>(
        &self,
        path: &str,
        filter: impl Fn(RequestBuilder) -> RequestBuilder,
        what: &str,
    ) -> Result<Vec<T>, Error> {
        let mut all = Vec::new();
        let mut token = String::new();
        loop {
            let request = self.request(Method::GET, path);
            let mut request = filter(request.query(&[("limit", "100")]));
            if !token.is_empty() {
                request = request.query(&[("nextToken", &token)]);
            }
            let response = self.send(request).await?;
            token = response
                .headers()
                .get("x-next-token")
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned();
            let page: Vec<T> = response.json().await.map_err(|source| Error::Unexpected {
                what: what.to_owned(),
                source: source.into(),
            })?;
            all.extend(page);
            if token.is_empty() {
                return Ok(all);
            }
        }
    }

    /// Kills a sandbox; false if there is none of that id.
    pub(crate) async fn kill(&self, id: &str) -> Result<bool, Error> {
        self.delete(&format!("/sandboxes/{}", segment(id)?)).await
    }

    /// Deletes what is at a path; `false` if nothing was.
    pub(crate) async fn delete(&self, path: &str) -> Result<bool, Error> {
        match self.send(self.request(Method::DELETE, path)).await {
            Ok(_) => Ok(true),
            Err(Error::Refused { status: 404, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What the data plane needs to know of a sandbox.
    pub(crate) async fn sandbox(
        &self,
        id: &str,
        user: Option<String>,
    ) -> Result<SandboxRef, Error> {
        let info = self.info(id).await?;
        Ok(SandboxRef {
            id: info.sandbox_id,
            token: info.envd_access_token,
            user,
        })
    }
}

/// A sandbox as the data plane is asked for it.
#[derive(Debug, Clone)]
pub(crate) struct SandboxRef {
    pub(crate) id: String,
    pub(crate) token: Option<String>,
    /// User in the sandbox; none is the template's default.
    pub(crate) user: Option<String>,
}

/// An id as a path segment. What is no id can't be asked for, so it is refused here.
pub(crate) fn segment(id: &str) -> Result<&str, Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b':');
    if !id.is_empty() && id.len() <= 256 && id.bytes().all(plain) {
        return Ok(id);
    }
    Err(Error::Usage(format!(
        "{id:?} is not an id: it has letters, digits, '-', '_' and ':' only"
    )))
}

/// An id or a name of a snapshot as one path segment: the slash of a namespace is encoded.
pub(crate) fn reference(name: &str) -> Result<String, Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b':' | b'.' | b'/');
    if name.is_empty() || name.len() > 256 || !name.bytes().all(plain) || name.starts_with('.') {
        return Err(Error::Usage(format!(
            "{name:?} is not an id or a name: it has letters, digits, '-', '_', '.', ':' and '/' only"
        )));
    }
    Ok(name.replace('/', "%2F"))
}

/// E2B's filter: a form whose keys and values were percent-encoded before.
fn metadata_filter(pairs: &[(String, String)]) -> String {
    let encode = |text: &str| -> String {
        text.bytes()
            .map(|b| {
                if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~') {
                    char::from(b).to_string()
                } else {
                    // The form's own encoding comes on top of ours.
                    format!("%25{b:02X}")
                }
            })
            .collect()
    };
    let pairs: Vec<String> = pairs
        .iter()
        .map(|(key, value)| format!("{}={}", encode(key), encode(value)))
        .collect();
    pairs.join("&")
}

fn refusal(status: StatusCode, text: &str) -> String {
    #[derive(Deserialize)]
    struct Body {
        message: String,
    }
    match serde_json::from_str::<Body>(text) {
        Ok(body) if status == StatusCode::UNAUTHORIZED => format!("not allowed: {}", body.message),
        Ok(body) => body.message,
        Err(_) if text.trim().is_empty() => format!("the server answered {status}"),
        Err(_) => format!("the server answered {status}: {}", text.trim()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_connection_is_private_and_comes_back() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = std::env::temp_dir().join(format!("cubicle-cli-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("temporary directory");
        let connection = Connection {
            url: "http://127.0.0.1:3000".into(),
            api_key: "e2b_00".into(),
            domain: "cubicle.localhost".into(),
        };
        connection.save(&dir).expect("saved");
        connection.save(&dir).expect("saved again over the old one");
        let mode = std::fs::metadata(Connection::path(&dir))
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(Connection::load(&dir).expect("loaded"), connection);
        std::fs::remove_dir_all(&dir).expect("removed");
    }

    #[test]
    fn the_metadata_filter_is_encoded_twice() {
        // reqwest encodes once more, which gives E2B's recorded `a%252520b%3Dc%252526d`.
        assert_eq!(
            metadata_filter(&[("a b".into(), "c&d".into())]),
            "a%2520b=c%2526d"
        );
    }

    #[test]
    fn ids_cannot_leave_their_segment() {
        for bad in ["", "a/b", "..", "a?b", "a b", "é"] {
            assert!(segment(bad).is_err(), "{bad:?}");
        }
        assert!(segment("tpl-1:default").is_ok());
        for bad in ["", "..", "a?b", "a b", "é", "a%2Fb"] {
            assert!(reference(bad).is_err(), "{bad:?}");
        }
        assert_eq!(reference("team/a:v1.2").expect("a name"), "team%2Fa:v1.2");
    }
}
