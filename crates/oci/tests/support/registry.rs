//! A registry on this machine: Debian's `docker-registry`, as it is.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cubicle_oci::Digest;
use reqwest::{Client, StatusCode};
use tempfile::TempDir;

use super::image::{TestImage, index};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A running registry, stopped when dropped.
pub(crate) struct Registry {
    process: Child,
    pub(crate) port: u16,
    place: TempDir,
}

impl Registry {
    pub(crate) fn start() -> Registry {
        Registry::start_with(|_| String::new())
    }

    /// With more of a configuration, which may use files in the directory that it is given.
    pub(crate) fn start_with(more: impl FnOnce(&Path) -> String) -> Registry {
        let place = tempfile::tempdir().unwrap();
        let port = free_port();
        let more = more(place.path());
        // What is indented goes on with the part `http`.
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n  \
             delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n{more}\n",
            place.path().join("data").display(),
        );
        let path = place.path().join("config.yml");
        fs_err::write(&path, config).unwrap();
        let log = fs_err::File::create(place.path().join("log")).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.into_file())
            .spawn()
            .expect("the package docker-registry is needed by this test");
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline || process.try_wait().unwrap().is_some() {
                let log = fs_err::read_to_string(place.path().join("log")).unwrap();
                process.kill().ok();
                process.wait().ok();
                panic!("the registry does not start: {log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Registry {
            process,
            port,
            place,
        }
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Where it keeps a blob.
    pub(crate) fn blob_file(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let blobs = self
            .place
            .path()
            .join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    pub(crate) async fn push(&self, name: &str, tag: &str, image: &TestImage) {
        let pusher = Pusher::new(format!("http://{}", self.host()));
        pusher.push(name, tag, image).await;
    }

    pub(crate) async fn push_index(
        &self,
        name: &str,
        tag: &str,
        images: &[(&TestImage, &str, &str)],
    ) -> Digest {
        let pusher = Pusher::new(format!("http://{}", self.host()));
        for (image, _, _) in images {
            let digest = image.digest().to_string();
            pusher.push(name, &digest, image).await;
        }
        let index = index(images);
        pusher.manifest(name, tag, INDEX, &index).await;
        Digest::of(&index)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Speaks the side of the protocol that is not under test.
pub(crate) struct Pusher {
    base: String,
    pub(crate) client: Client,
    pub(crate) auth: Option<(String, String)>,
}

impl Pusher {
    pub(crate) fn new(base: String) -> Pusher {
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        Pusher {
            base,
            client: Client::new(),
            auth: None,
        }
    }

    fn with_auth(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.auth {
            Some((user, password)) if password.is_empty() => request.bearer_auth(user),
            Some((user, password)) => request.basic_auth(user, Some(password)),
            None => request,
        }
    }

    pub(crate) async fn push(&self, name: &str, tag: &str, image: &TestImage) {
        for blob in image.blobs() {
            self.blob(name, blob).await;
        }
        self.manifest(name, tag, MANIFEST, &image.manifest).await;
    }

    pub(crate) async fn blob(&self, name: &str, blob: &[u8]) {
        let begin = self
            .client
            .post(format!("{}/v2/{name}/blobs/uploads/", self.base));
        let answer = self.with_auth(begin).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::ACCEPTED);
        let to = answer.headers()["location"].to_str().unwrap().to_owned();
        let to = if to.starts_with('/') {
            format!("{}{to}", self.base)
        } else {
            to
        };
        let put = self.client.put(format!("{to}&digest={}", Digest::of(blob)));
        let put = put
            .header("content-type", "application/octet-stream")
            .body(blob.to_vec());
        let answer = self.with_auth(put).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::CREATED);
    }

    pub(crate) async fn manifest(&self, name: &str, tag: &str, kind: &str, manifest: &[u8]) {
        let put = self
            .client
            .put(format!("{}/v2/{name}/manifests/{tag}", self.base));
        let put = put.header("content-type", kind).body(manifest.to_vec());
        let answer = self.with_auth(put).send().await.unwrap();
        let status = answer.status();
        assert_eq!(status, StatusCode::CREATED, "{:?}", answer.text().await);
    }
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
