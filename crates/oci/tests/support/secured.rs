//! Registries that want to know who asks, or that are asked over TLS.

use std::{path::PathBuf, sync::Arc};

use base64::{
    Engine as _, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD,
};
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};

use super::registry::Registry;

/// With Basic authentication.
pub(crate) fn with_password(user: &str, password: &str) -> Registry {
    // The hash is bcrypt's of "correct horse", which is all that this is used with.
    assert_eq!(password, "correct horse");
    let hash = PASSWORD_HASH;
    Registry::start_with(|place| {
        let file = place.join("htpasswd");
        fs_err::write(&file, format!("{user}:{hash}\n")).unwrap();
        format!(
            "auth:\n  htpasswd:\n    realm: test\n    path: {}",
            file.display()
        )
    })
}

const PASSWORD_HASH: &str = "$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2";
const SERVICE: &str = "the registry";
const ISSUER: &str = "the issuer";

/// Hands out tokens to one user.
pub(crate) struct Tokens {
    signer: Arc<Signer>,
    task: JoinHandle<()>,
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Tokens {
    pub(crate) fn for_everything(&self) -> String {
        let access =
            json!([{"type": "repository", "name": "team/app", "actions": ["pull", "push"]}]);
        self.signer.token(access)
    }
}

struct Signer {
    key: EcdsaKeyPair,
    certificate: Vec<u8>,
    credentials: String,
}

impl Signer {
    fn token(&self, access: serde_json::Value) -> String {
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let header = json!({
            "typ": "JWT",
            "alg": "ES256",
            "x5c": [STANDARD.encode(&self.certificate)],
        });
        let claims = json!({
            "iss": ISSUER, "sub": "", "aud": SERVICE, "jti": "1",
            "nbf": now - 60, "iat": now - 60, "exp": now + 3600,
            "access": access,
        });
        let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", encode(header), encode(claims));
        let signature = self
            .key
            .sign(&SystemRandom::new(), message.as_bytes())
            .unwrap();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// Answers one request: with a token for whoever knows the password, which nobody else gets.
    fn answer(&self, request: &str) -> String {
        let authorization = request.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("authorization")
                .then(|| value.trim().to_owned())
        });
        if authorization != Some(format!("Basic {}", self.credentials)) {
            return "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                .to_owned();
        }
        let access = json!([{"type": "repository", "name": "team/app", "actions": ["pull"]}]);
        let body = json!({"token": self.token(access), "expires_in": 3600}).to_string();
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            body.len()
        )
    }
}

/// With a server for tokens beside it.
pub(crate) async fn with_tokens(user: &str, password: &str) -> (Registry, Tokens) {
    let authority = Authority::new();
    let pair = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["tokens".to_owned()]).unwrap();
    let certificate = params.signed_by(&pair, &authority.issuer).unwrap();
    let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    let key = EcdsaKeyPair::from_pkcs8(algorithm, &pair.serialize_der(), &SystemRandom::new());
    let signer = Arc::new(Signer {
        key: key.unwrap(),
        certificate: certificate.der().to_vec(),
        credentials: STANDARD.encode(format!("{user}:{password}")),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let shared = signer.clone();
    let task = tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if client.read(&mut byte).await.unwrap_or(0) == 0 {
                    break;
                }
                request.push(byte[0]);
            }
            let answer = shared.answer(&String::from_utf8_lossy(&request));
            client.write_all(answer.as_bytes()).await.ok();
            client.shutdown().await.ok();
        }
    });
    let registry = Registry::start_with(|_| {
        format!(
            "auth:\n  token:\n    realm: http://127.0.0.1:{port}/token\n    service: {SERVICE}\n    \
             issuer: {ISSUER}\n    rootcertbundle: {}",
            authority.file().display()
        )
    });
    // The file was read at the start.
    drop(authority);
    (registry, Tokens { signer, task })
}

/// Whoever signs certificates.
pub(crate) struct Authority {
    place: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let place = tempfile::tempdir().unwrap();
        let authority = Authority { place, issuer };
        fs_err::write(authority.file(), authority.issuer.pem()).unwrap();
        authority
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.place.path().join("ca.pem")
    }

    /// A client that trusts nobody else.
    pub(crate) fn client(&self) -> reqwest::Client {
        let pem = fs_err::read(self.file()).unwrap();
        reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&pem).unwrap()])
            .build()
            .unwrap()
    }
}

/// Over TLS, with a certificate from an authority that nobody knows.
pub(crate) fn with_tls() -> (Registry, Authority) {
    let authority = Authority::new();
    let pair = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&pair, &authority.issuer).unwrap();
    let registry = Registry::start_with(|place| {
        let (cert, key) = (place.join("cert.pem"), place.join("key.pem"));
        fs_err::write(&cert, certificate.pem()).unwrap();
        fs_err::write(&key, pair.serialize_pem()).unwrap();
        let (cert, key) = (cert.display(), key.display());
        format!("  tls:\n    certificate: {cert}\n    key: {key}")
    });
    (registry, authority)
}
