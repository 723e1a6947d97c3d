//! Files at the other end: a sandbox's, through its daemon, or a volume's, through the server.

use reqwest::{Body, Method, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Client, SandboxRef, segment};
use crate::error::Error;

/// Whose files they are.
#[derive(Debug)]
pub(crate) enum Remote {
    Sandbox(SandboxRef),
    Volume(VolumeRef),
}

/// A volume as its content is asked for.
#[derive(Debug, Deserialize)]
pub(crate) struct VolumeRef {
    #[serde(rename = "volumeID")]
    id: String,
    token: String,
}

/// Something at the other end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RemoteEntry {
    /// Absolute.
    pub(crate) path: String,
    pub(crate) is_directory: bool,
}

impl Client {
    /// What is needed to ask for the content of a volume.
    pub(crate) async fn volume(&self, reference: &str) -> Result<VolumeRef, Error> {
        let path = format!("/volumes/{}", segment(reference)?);
        let request = self.request(Method::GET, &path);
        self.json(request, "get a volume").await
    }
}

impl Remote {
    /// What is at a path.
    pub(crate) async fn stat(&self, client: &Client, path: &str) -> Result<RemoteEntry, Error> {
        match self {
            Self::Sandbox(sandbox) => {
                let asked = json!({ "path": path });
                let method = "filesystem.Filesystem/Stat";
                let found = client.unary(sandbox, method, &asked).await?;
                Ok(of_sandbox(&found["entry"]))
            }
            Self::Volume(volume) => {
                let request = volume.request(client, Method::GET, "path", path);
                Ok(of_volume(&client.json(request, path).await?))
            }
        }
    }

    /// What is in a directory, and not below.
    pub(crate) async fn list(
        &self,
        client: &Client,
        path: &str,
    ) -> Result<Vec<RemoteEntry>, Error> {
        match self {
            Self::Sandbox(sandbox) => {
                let asked = json!({ "path": path });
                let method = "filesystem.Filesystem/ListDir";
                let found = client.unary(sandbox, method, &asked).await?;
                let entries = found["entries"].as_array().into_iter().flatten();
                Ok(entries.map(of_sandbox).collect())
            }
            Self::Volume(volume) => {
                let request = volume.request(client, Method::GET, "dir", path);
                let found: Vec<Value> = client.json(request, path).await?;
                Ok(found.iter().map(of_volume).collect())
            }
        }
    }

    /// Reads a file.
    pub(crate) async fn read(&self, client: &Client, path: &str) -> Result<Response, Error> {
        match self {
            Self::Sandbox(sandbox) => client.read_file(sandbox, path).await,
            Self::Volume(volume) => {
                let request = volume.request(client, Method::GET, "file", path);
                client.send(request).await
            }
        }
    }

    /// Writes a file, in place of one that is there; missing directories are made.
    pub(crate) async fn write(
        &self,
        client: &Client,
        path: &str,
        content: Body,
    ) -> Result<(), Error> {
        let volume = match self {
            Self::Sandbox(sandbox) => return client.write_file(sandbox, path, content).await,
            Self::Volume(volume) => volume,
        };
        if let Some((above, _)) = path.rsplit_once('/').filter(|(above, _)| !above.is_empty()) {
            let request = volume.request(client, Method::POST, "dir", above);
            client.send(request.query(&[("force", "true")])).await?;
        }
        let request = volume.request(client, Method::PUT, "file", path);
        let request = request.query(&[("force", "true")]).body(content);
        client.send(request).await.map(drop)
    }
}

impl VolumeRef {
    fn request(
        &self,
        client: &Client,
        method: Method,
        what: &str,
        path: &str,
    ) -> reqwest::RequestBuilder {
        // Without any name, it is the top.
        let path = if path.is_empty() { "/" } else { path };
        client
            .request(method, &format!("/volumecontent/{}/{what}", self.id))
            .bearer_auth(&self.token)
            .query(&[("path", path)])
    }
}

fn of_sandbox(entry: &Value) -> RemoteEntry {
    RemoteEntry {
        path: text(entry),
        is_directory: entry["type"] == "FILE_TYPE_DIRECTORY",
    }
}

fn of_volume(entry: &Value) -> RemoteEntry {
    RemoteEntry {
        path: text(entry),
        is_directory: entry["type"] == "directory",
    }
}

fn text(entry: &Value) -> String {
    entry["path"].as_str().unwrap_or_default().to_owned()
}
