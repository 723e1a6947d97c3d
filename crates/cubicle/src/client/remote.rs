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
                Ok(entry(&found["entry"]))
            }
            Self::Volume(volume) => {
                let request = volume.request(client, Method::GET, "path", path);
                Ok(entry(&client.json(request, path).await?))
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
                Ok(entries.map(entry).collect())
            }
            Self::Volume(volume) => {
                let request = volume.request(client, Method::GET, "dir", path);
                let found: Vec<Value> = client.json(request, path).await?;
                Ok(found.iter().map(entry).collect())
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

    /// Makes sure that the directory is there which a file is about to be written to.
    pub(crate) async fn make_room(&self, client: &Client, directory: &str) -> Result<(), Error> {
        match self {
            // Its daemon makes what is missing when it writes.
            Self::Sandbox(_) => Ok(()),
            Self::Volume(volume) => {
                let request = volume.request(client, Method::POST, "dir", directory);
                let request = request.query(&[("force", "true")]);
                client.send(request).await.map(drop)
            }
        }
    }

    /// Writes a file, in place of one that is there.
    pub(crate) async fn write(
        &self,
        client: &Client,
        path: &str,
        content: Body,
    ) -> Result<(), Error> {
        match self {
            Self::Sandbox(sandbox) => client.write_file(sandbox, path, content).await,
            Self::Volume(volume) => {
                let request = volume.request(client, Method::PUT, "file", path);
                let request = request.query(&[("force", "true")]).body(content);
                client.send(request).await.map(drop)
            }
        }
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

/// As either of them tells it.
fn entry(found: &Value) -> RemoteEntry {
    let kind = found["type"].as_str();
    RemoteEntry {
        path: found["path"].as_str().unwrap_or_default().to_owned(),
        is_directory: matches!(kind, Some("FILE_TYPE_DIRECTORY" | "directory")),
    }
}
