//! Which requests are meant for a sandbox, and which sandbox and port they mean.

use cubicle_ids::SandboxId;
use cubicle_protocol::ENVD_PORT;
use http::{HeaderValue, Method, Request, header, request::Parts};

use crate::routes::FileOperation;

const ID_HEADER: &str = "e2b-sandbox-id";
const PORT_HEADER: &str = "e2b-sandbox-port";
const PATH_PREFIX: &str = "/sandbox/";
const FILES: &str = "/files";

/// How a request named its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    /// Headers `E2b-Sandbox-Id` and `E2b-Sandbox-Port`.
    Headers,
    /// `Host: <port>-<id>.<anything>`.
    Host,
    /// Path `/sandbox/<id>/<port>/...`. For scripts and for networks without wildcard names: to a
    /// browser, everything that is reached like this is one origin, the API's own.
    Path,
    /// A signed URL of a file, which names no sandbox.
    Signature,
}

/// A port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The sandbox.
    pub id: SandboxId,
    /// The port inside it.
    pub port: u16,
    /// How the request named them.
    pub via: Via,
}

/// A signed URL of a file, as it was requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedFile {
    /// The file's path, decoded.
    pub path: String,
    /// What is asked for.
    pub operation: FileOperation,
    /// The user in whose name, if one is given.
    pub user: Option<String>,
    /// Until when, in seconds since 1970, as it was written; `None`: for ever.
    pub expiration: Option<String>,
    /// The signature.
    pub signature: String,
}

/// Why a request that is meant for a sandbox cannot be routed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A header is not what it should be.
    #[error("the header {name} is not {expected}")]
    Header {
        /// Which header.
        name: &'static str,
        /// What it should have been.
        expected: &'static str,
    },
    /// The host begins with a port but does not go on with a sandbox id, or the port is none.
    #[error("the host does not begin with <port>-<sandbox id>")]
    Host,
    /// The path begins with `/sandbox/` but does not go on with id and port.
    #[error("the path does not begin with /sandbox/<sandbox id>/<port>/")]
    Path,
}

/// A request of the data plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// It names a port of a sandbox.
    Target(Target),
    /// It is for the guest daemon of whichever sandbox signed the URL.
    Signed(SignedFile),
    /// It means to name a sandbox and does not.
    Refused(Refusal),
}

/// Tells whether a request belongs to the data plane: `None` if it does not.
///
/// A host name that carries port and id wins over headers: clients set headers once for all they
/// do, while a host is chosen for each URL.
pub(crate) fn classify(parts: &Parts) -> Option<Route> {
    if parts.method == Method::CONNECT {
        return None;
    }
    if let Some(outcome) = host(parts).and_then(by_host) {
        return Some(settle(outcome, Via::Host));
    }
    if let Some(id) = parts.headers.get(ID_HEADER) {
        let port = parts.headers.get(PORT_HEADER);
        return Some(settle(
            by_headers(id.as_bytes(), port.map(|port| port.as_bytes())),
            Via::Headers,
        ));
    }
    let path = parts.uri.path();
    if let Some(rest) = path.strip_prefix(PATH_PREFIX) {
        return Some(settle(
            by_path(rest).map(|(id, port, _)| (id, port)),
            Via::Path,
        ));
    }
    signed(parts).map(Route::Signed)
}

fn settle(outcome: Result<(SandboxId, u16), Refusal>, via: Via) -> Route {
    match outcome {
        Ok((id, port)) => Route::Target(Target { id, port, via }),
        Err(refusal) => Route::Refused(refusal),
    }
}

/// The host that a request was sent to, with its port if it has one.
pub(crate) fn host(parts: &Parts) -> Option<&str> {
    match parts.headers.get(header::HOST) {
        Some(host) => host.to_str().ok(),
        None => parts.uri.authority().map(http::uri::Authority::as_str),
    }
}

/// [`host`], for a header.
pub(crate) fn host_value<B>(request: &Request<B>) -> Option<HeaderValue> {
    let authority = || request.uri().authority();
    request
        .headers()
        .get(header::HOST)
        .cloned()
        .or_else(|| authority()?.as_str().parse().ok())
}

fn by_headers(id: &[u8], port: Option<&[u8]>) -> Result<(SandboxId, u16), Refusal> {
    let text = |bytes| {
        std::str::from_utf8(bytes)
            .map(str::trim)
            .unwrap_or_default()
    };
    let id = parse_id(text(id)).ok_or(Refusal::Header {
        name: "E2b-Sandbox-Id",
        expected: "a sandbox id",
    })?;
    let port = match port {
        None => ENVD_PORT,
        Some(port) => parse_port(text(port)).ok_or(Refusal::Header {
            name: "E2b-Sandbox-Port",
            expected: "a port",
        })?,
    };
    Ok((id, port))
}

/// `None` if the host is one of the API's own.
fn by_host(host: &str) -> Option<Result<(SandboxId, u16), Refusal>> {
    // A host of one label is a machine's name, not a sandbox's.
    let (label, _) = host.split_once('.')?;
    let (port, id) = label.split_once('-')?;
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(parse_id(id).zip(parse_port(port)).ok_or(Refusal::Host))
}

/// Takes `<id>/<port>` off the front; the third part is where the rest of the path begins.
fn by_path(path: &str) -> Result<(SandboxId, u16, usize), Refusal> {
    let mut segments = path.splitn(3, '/');
    let (id, port) = (
        segments.next().unwrap_or_default(),
        segments.next().unwrap_or_default(),
    );
    let rest = (id.len() + 1 + port.len()).min(path.len());
    let (id, port) = parse_id(id).zip(parse_port(port)).ok_or(Refusal::Path)?;
    Ok((id, port, rest))
}

/// Splits the path of a request routed [`Via::Path`] into the prefix and the path inside the
/// sandbox, which is `/` if there is nothing after the port.
pub(crate) fn split_prefix(path: &str) -> Option<(&str, &str)> {
    let (_, _, rest) = by_path(path.strip_prefix(PATH_PREFIX)?).ok()?;
    let (prefix, rest) = path.split_at(PATH_PREFIX.len() + rest);
    Some((prefix, if rest.is_empty() { "/" } else { rest }))
}

/// Ids may be followed by `-` and the id of a client, which means nothing here.
fn parse_id(text: &str) -> Option<SandboxId> {
    let id = text.split_once('-').map_or(text, |(id, _)| id);
    id.to_ascii_lowercase().parse().ok()
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

fn signed(parts: &Parts) -> Option<SignedFile> {
    if parts.uri.path() != FILES {
        return None;
    }
    let operation = match parts.method {
        Method::GET | Method::HEAD => FileOperation::Read,
        Method::POST => FileOperation::Write,
        _ => return None,
    };
    let (mut path, mut user, mut expiration, mut signature) = (None, None, None, None);
    for (name, value) in form_urlencoded::parse(parts.uri.query()?.as_bytes()) {
        let slot = match &*name {
            "path" => &mut path,
            "username" => &mut user,
            "signature_expiration" => &mut expiration,
            "signature" => &mut signature,
            _ => continue,
        };
        *slot = Some(value.into_owned());
    }
    Some(SignedFile {
        path: path.unwrap_or_default(),
        operation,
        user: user.filter(|user| !user.is_empty()),
        expiration: expiration.filter(|expiration| !expiration.is_empty()),
        signature: signature?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "i0123456789abcdefghi";

    fn route(uri: &str, headers: &[(&str, &str)]) -> Option<Route> {
        let mut request = Request::get(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        classify(&request.body(()).unwrap().into_parts().0)
    }

    fn target(port: u16, via: Via) -> Option<Route> {
        Some(Route::Target(Target {
            id: ID.parse().unwrap(),
            port,
            via,
        }))
    }

    #[test]
    fn each_way_of_naming_a_sandbox_is_understood() {
        let host = |host: &str| route("/", &[("host", host)]);
        assert_eq!(
            route("/", &[("e2b-sandbox-id", ID)]),
            target(49983, Via::Headers)
        );
        assert_eq!(
            route("/x", &[("E2B-Sandbox-ID", ID), ("E2B-SANDBOX-PORT", "80")]),
            target(80, Via::Headers)
        );
        assert_eq!(
            route(
                "/",
                &[
                    ("e2b-sandbox-id", &format!("{ID}-client9")),
                    ("host", "127.0.0.1:3000")
                ]
            ),
            target(49983, Via::Headers)
        );
        assert_eq!(host(&format!("3000-{ID}.e2b.app")), target(3000, Via::Host));
        assert_eq!(
            host(&format!("3000-{}.LOCALHOST:99", ID.to_uppercase())),
            target(3000, Via::Host)
        );
        assert_eq!(
            host(&format!("49999-{ID}-abc.a.b.c:3000")),
            target(49999, Via::Host)
        );
        assert_eq!(
            route(&format!("http://80-{ID}.a/x"), &[]),
            target(80, Via::Host),
            "HTTP/2"
        );
        assert_eq!(
            route(&format!("/sandbox/{ID}/8080"), &[]),
            target(8080, Via::Path)
        );
        assert_eq!(
            route(&format!("/sandbox/{ID}/8080/a/b?c"), &[]),
            target(8080, Via::Path)
        );
        let both = [
            ("host", format!("80-{ID}.a")),
            ("e2b-sandbox-port", "49983".to_owned()),
        ];
        let both = both.each_ref().map(|(name, value)| (*name, value.as_str()));
        assert_eq!(
            route("/", &both),
            target(80, Via::Host),
            "the host is the more specific"
        );
    }

    #[test]
    fn what_is_not_for_a_sandbox_is_left_to_the_api() {
        for host in [
            "127.0.0.1:3000",
            "[::1]:3000",
            "api.example.com",
            "localhost",
            "a-b.c",
            "-x.y",
            "3-web",
        ] {
            assert_eq!(route("/sandboxes", &[("host", host)]), None, "{host}");
        }
        assert_eq!(route("/sandboxes/i0/connect", &[]), None);
        assert_eq!(
            route("/files?path=/x", &[]),
            None,
            "no signature, no sandbox"
        );
    }

    #[test]
    fn what_names_no_sandbox_is_refused() {
        let refused = |route| matches!(route, Some(Route::Refused(_)));
        assert!(refused(route("/", &[("e2b-sandbox-id", "..")])));
        assert!(refused(route("/", &[("e2b-sandbox-id", "")])));
        for port in ["0", "65536", "-1", "+80", "http", ""] {
            assert!(
                refused(route(
                    "/",
                    &[("e2b-sandbox-id", ID), ("e2b-sandbox-port", port)]
                )),
                "{port}"
            );
            assert!(
                refused(route(&format!("/sandbox/{ID}/{port}/"), &[])),
                "{port}"
            );
        }
        assert!(refused(route("/", &[("host", "3000-.e2b.app")])));
        assert!(refused(route("/", &[("host", "99999-i0.e2b.app")])));
        assert!(refused(route("/", &[("host", "3000-i_0.e2b.app")])));
        for path in [
            "/sandbox/",
            "/sandbox/x",
            "/sandbox//80/",
            "/sandbox/../80/",
        ] {
            assert!(refused(route(path, &[])), "{path}");
        }
    }

    #[test]
    fn a_signed_url_is_decoded() {
        let uri = "/files?path=%2Fa%20b&username=root&signature=v1_x%2By&signature_expiration=17";
        assert_eq!(
            route(uri, &[]),
            Some(Route::Signed(SignedFile {
                path: "/a b".to_owned(),
                operation: FileOperation::Read,
                user: Some("root".to_owned()),
                expiration: Some("17".to_owned()),
                signature: "v1_x+y".to_owned(),
            }))
        );
        let named = [("e2b-sandbox-id", ID)];
        assert_eq!(
            route(uri, &named),
            target(49983, Via::Headers),
            "it is named already"
        );
    }

    proptest! {
        #[test]
        fn names_survive_a_round_trip(id in "[a-z0-9]{1,32}", port in 1_u16.., rest in "(/[a-z%.~0-9]{0,8}){0,4}") {
            let id: SandboxId = id.parse().unwrap();
            let expected = |via| Some(Route::Target(Target { id: id.clone(), port, via }));
            prop_assert_eq!(route("/", &[("host", &format!("{port}-{id}.x"))]), expected(Via::Host));
            let path = format!("/sandbox/{id}/{port}{rest}");
            prop_assert_eq!(route(&path, &[]), expected(Via::Path));
            let (prefix, inner) = split_prefix(&path).unwrap();
            prop_assert_eq!(prefix, format!("/sandbox/{id}/{port}"));
            prop_assert_eq!(inner, if rest.is_empty() { "/" } else { &rest });
        }

        #[test]
        fn no_text_makes_it_panic_or_yields_a_strange_id(text in "\\PC{0,60}", port in "\\PC{0,8}") {
            for outcome in [by_host(&text), by_host(&format!("{port}-{text}")), Some(by_headers(text.as_bytes(), Some(port.as_bytes())))] {
                if let Some(Ok((id, port))) = outcome {
                    prop_assert!(id.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric()));
                    prop_assert!(port > 0);
                }
            }
            let _ = by_path(&text);
            if let Some((prefix, inner)) = split_prefix(&format!("/sandbox/{text}")) {
                prop_assert!(inner.starts_with('/') && !prefix.ends_with('/'));
            }
        }
    }
}
