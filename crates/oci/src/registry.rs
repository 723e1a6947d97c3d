//! Registries, by way of `oci-client`.

use std::{net::IpAddr, time::Duration};

use futures::StreamExt as _;
use oci_client::{
    Client, Reference, RegistryOperation,
    client::{BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol},
    errors::{OciDistributionError, OciErrorCode},
    manifest::{
        IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
        OCI_IMAGE_MEDIA_TYPE,
    },
    secrets::RegistryAuth,
};

use crate::{
    blobs::{Incoming, Source},
    config::{Auth, Config, Mirror},
    digest::Digest,
    document::{Descriptor, Document, Manifest, choose},
    error::{Error, Result},
};

const ACCEPTED: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long a registry may be silent.
const READ_WITHIN: Duration = Duration::from_secs(60);
/// How long fetching a manifest may take altogether.
const MANIFEST_WITHIN: Duration = Duration::from_secs(120);

/// How registries are spoken to.
#[derive(Debug)]
pub(crate) struct Registries {
    certificates: Vec<Certificate>,
    insecure: Vec<String>,
    mirrors: Vec<Mirror>,
}

/// An image in a registry.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    /// Where it was found: in the registry that was named or in a mirror of it. By its digest.
    reference: Reference,
    is_mirror: bool,
    pub(crate) digest: Digest,
    pub(crate) manifest: Manifest,
}

impl Registries {
    pub(crate) fn new(config: &Config) -> Result<Registries> {
        // The first one that is installed stays; any does.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let read = |path: &std::path::PathBuf| {
            let unusable = |reason: String| Error::Setting {
                what: format!("the certificates in `{}`", path.display()),
                reason,
            };
            let data = fs_err::read(path).map_err(|error| unusable(error.to_string()))?;
            let found = reqwest::Certificate::from_pem_bundle(&data)
                .map_err(|error| unusable(reasons(&error)))?;
            if found.is_empty() {
                return Err(unusable("there are none, in PEM, in it".to_owned()));
            }
            let encoding = CertificateEncoding::Pem;
            Ok(Certificate { encoding, data })
        };
        Ok(Registries {
            certificates: config.ca_files.iter().map(read).collect::<Result<_>>()?,
            insecure: config.insecure.clone(),
            mirrors: config.mirrors.clone(),
        })
    }

    /// Finds an image, in a mirror if one has it.
    pub(crate) async fn resolve(&self, name: &Reference, auth: Option<&Auth>) -> Result<Remote> {
        for mirror in self.mirrors.iter().filter(|m| m.of == name.registry()) {
            let repository = match &mirror.prefix {
                Some(prefix) => format!("{prefix}/{}", name.repository()),
                None => name.repository().to_owned(),
            };
            let there = at(&mirror.host, &repository, name);
            // The credentials are for the registry that was named.
            match self.resolve_at(&there, None, true).await {
                Ok(remote) => return Ok(remote),
                Err(error) => {
                    tracing::debug!(image = %name, mirror = %mirror.host, %error, "not there");
                }
            }
        }
        self.resolve_at(name, auth, false).await
    }

    async fn resolve_at(
        &self,
        name: &Reference,
        auth: Option<&Auth>,
        is_mirror: bool,
    ) -> Result<Remote> {
        let session = self.session(name, auth).await?;
        let image = name.to_string();
        let mut wanted = name.clone();
        // An index may be within an index, but not for ever.
        for _ in 0..3 {
            let (bytes, digest) = session.manifest(&wanted).await?;
            match Document::parse(&bytes, &image)? {
                Document::Manifest(manifest) => {
                    return Ok(Remote {
                        reference: wanted.clone_with_digest(digest.to_string()),
                        is_mirror,
                        digest,
                        manifest,
                    });
                }
                Document::Index(entries) => {
                    let entry = choose(&entries, &image)?;
                    wanted = wanted.clone_with_digest(entry.digest.to_string());
                }
            }
        }
        Err(Error::Document {
            what: "the index",
            image,
            reason: "it is nested too deep".to_owned(),
        })
    }

    /// The way to an image's blobs.
    pub(crate) async fn blobs(&self, remote: &Remote, auth: Option<&Auth>) -> Result<Session> {
        let auth = auth.filter(|_| !remote.is_mirror);
        self.session(&remote.reference, auth).await
    }

    async fn session(&self, name: &Reference, auth: Option<&Auth>) -> Result<Session> {
        let host = name.resolve_registry().to_owned();
        let protocol = if self.speaks_plainly(&host).await? {
            ClientProtocol::HttpsExcept(vec![host.clone()])
        } else {
            ClientProtocol::Https
        };
        let config = ClientConfig {
            protocol,
            extra_root_certificates: self.certificates.clone(),
            connect_timeout: Some(CONNECT_WITHIN),
            read_timeout: Some(READ_WITHIN),
            user_agent: concat!("cubicle/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|error| Error::Setting {
            what: "TLS".to_owned(),
            reason: format!(
                "{} (is the package ca-certificates installed?)",
                reasons(&error)
            ),
        })?;
        let session = Session {
            client,
            host,
            reference: name.clone(),
            auth: match auth {
                Some(auth) => RegistryAuth::Basic(auth.username.clone(), auth.password.clone()),
                None => RegistryAuth::Anonymous,
            },
        };
        let logged_in = session
            .client
            .auth(name, &session.auth, RegistryOperation::Pull)
            .await;
        logged_in.map_err(|error| session.error("log in", error))?;
        Ok(session)
    }

    /// Whether a registry is to be spoken to without encryption: only one where that is allowed,
    /// and which does not answer as one that wants TLS.
    async fn speaks_plainly(&self, host: &str) -> Result<bool> {
        let is_allowed = is_loopback(host)
            || self
                .insecure
                .iter()
                .any(|known| known == host || Some(known.as_str()) == without_port(host));
        if !is_allowed {
            return Ok(false);
        }
        let unreachable = |error: &reqwest::Error| Error::Registry {
            action: "get an answer".to_owned(),
            registry: host.to_owned(),
            reason: reasons(error),
        };
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .timeout(READ_WITHIN)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| unreachable(&error))?;
        match client.get(format!("http://{host}/v2/")).send().await {
            // What servers say to those who speak HTTP where TLS is expected.
            Ok(answer) => Ok(answer.status() != reqwest::StatusCode::BAD_REQUEST),
            Err(error) if error.is_connect() => Err(unreachable(&error)),
            Err(_) => Ok(false),
        }
    }
}

/// A registry that has been logged in to, for one image.
pub(crate) struct Session {
    client: Client,
    host: String,
    reference: Reference,
    auth: RegistryAuth,
}

impl Session {
    async fn manifest(&self, name: &Reference) -> Result<(Vec<u8>, Digest)> {
        let pull = self.client.pull_manifest_raw(name, &self.auth, &ACCEPTED);
        let pulled = tokio::time::timeout(MANIFEST_WITHIN, pull).await;
        let pulled = pulled.map_err(|_| Error::Registry {
            action: format!("fetch the manifest of `{name}`"),
            registry: self.host.clone(),
            reason: format!("it takes more than {} s", MANIFEST_WITHIN.as_secs()),
        })?;
        let (bytes, digest) = pulled.map_err(|error| match error {
            OciDistributionError::DigestError(error) => Error::Document {
                what: "the manifest",
                image: name.to_string(),
                reason: error.to_string(),
            },
            error => self.error(&format!("fetch the manifest of `{name}`"), error),
        })?;
        // What the registry itself calls it is not what it is.
        let actual = Digest::of(&bytes);
        drop(digest);
        Ok((bytes.to_vec(), actual))
    }

    fn error(&self, action: &str, error: OciDistributionError) -> Error {
        let unauthorized = || Error::Unauthorized {
            registry: self.host.clone(),
            image: self.reference.to_string(),
            had_credentials: self.auth != RegistryAuth::Anonymous,
        };
        let not_found = || Error::NotFound {
            image: self.reference.to_string(),
            place: format!("the registry `{}`", self.host),
        };
        let other = |reason: String| Error::Registry {
            action: action.to_owned(),
            registry: self.host.clone(),
            reason,
        };
        match error {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_)
            | OciDistributionError::ServerError {
                code: 401 | 403, ..
            } => unauthorized(),
            OciDistributionError::ServerError { code: 404, .. }
            | OciDistributionError::ImageManifestNotFoundError(_) => not_found(),
            OciDistributionError::ServerError { code, message, .. } => {
                let message: String = message.chars().take(200).collect();
                other(format!("it answers with status {code}: {message}"))
            }
            OciDistributionError::RegistryError { envelope, .. } => {
                let has = |codes: &[OciErrorCode]| {
                    envelope.errors.iter().any(|e| codes.contains(&e.code))
                };
                if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    return unauthorized();
                }
                if has(&[
                    OciErrorCode::ManifestUnknown,
                    OciErrorCode::NameUnknown,
                    OciErrorCode::NotFound,
                ]) {
                    return not_found();
                }
                other(envelope.to_string())
            }
            error => other(reasons(&error)),
        }
    }
}

impl Source for Session {
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<Option<Incoming>> {
        let digest = blob.digest.to_string();
        let response = self
            .client
            // Only the digest: other addresses that a manifest may name are not followed.
            .pull_blob_stream_partial(&self.reference, &*digest, offset, None)
            .await;
        let (from, stream) = match response {
            Ok(BlobResponse::Full(stream)) => (0, stream),
            Ok(BlobResponse::Partial(stream)) => (offset, stream),
            // There is nothing from there on.
            Err(OciDistributionError::ServerError { code: 416, .. }) => return Ok(None),
            Err(error) => {
                let error = self.error(&format!("fetch the blob {digest}"), error);
                return Err(match error {
                    Error::NotFound { place, .. } => Error::NotFound {
                        image: format!("{}@{digest}", self.reference.repository()),
                        place,
                    },
                    other => other,
                });
            }
        };
        let bytes = stream.stream.boxed();
        Ok(Some(Incoming { from, bytes }))
    }

    fn place(&self) -> String {
        self.host.clone()
    }
}

fn at(host: &str, repository: &str, name: &Reference) -> Reference {
    let (host, repository) = (host.to_owned(), repository.to_owned());
    let tag = || name.tag().unwrap_or("latest").to_owned();
    match name.digest() {
        Some(digest) => Reference::with_digest(host, repository, digest.to_owned()),
        None => Reference::with_tag(host, repository, tag()),
    }
}

fn without_port(host: &str) -> Option<&str> {
    host.rsplit_once(':').map(|(name, _)| name)
}

fn is_loopback(host: &str) -> bool {
    let name = without_port(host).unwrap_or(host);
    name == "localhost"
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// An error with everything that is below it.
fn reasons(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        below = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "10.0.0.1:5000",
            "127.0.0.1.example",
            "ghcr.io",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
