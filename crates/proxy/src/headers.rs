//! What changes in the head of a message on its way through.

use std::net::SocketAddr;

use axum::extract::ConnectInfo;
use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue,
    header::{
        CONNECTION, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER,
        TRANSFER_ENCODING, UPGRADE,
    },
};

/// The token for ports that are not public, under both names that clients know.
pub(crate) const TRAFFIC_TOKENS: [&str; 2] =
    ["e2b-traffic-access-token", "cube-traffic-access-token"];
/// What named the sandbox; it means nothing inside.
const ROUTING: [&str; 2] = ["e2b-sandbox-id", "e2b-sandbox-port"];
const KEEP_ALIVE: &str = "keep-alive";
const PROXY_CONNECTION: &str = "proxy-connection";
const FORWARDED_FOR: &str = "x-forwarded-for";
const FORWARDED_HOST: &str = "x-forwarded-host";
const FORWARDED_PREFIX: &str = "x-forwarded-prefix";
const FORWARDED_PROTO: &str = "x-forwarded-proto";

/// Removes what concerns one connection only (RFC 9110, section 7.6.1), and `Trailer` and
/// `Transfer-Encoding`, which the next connection decides anew.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    // Whoever asks for trailers gets them; anything else in TE is about the connection.
    let trailers = headers.get_all(TE).iter().any(|value| {
        value.to_str().is_ok_and(|te| {
            te.split(',')
                .any(|te| te.trim().eq_ignore_ascii_case("trailers"))
        })
    });
    for name in [
        CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        headers.remove(name);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// The protocol that a request or response switches to, if it does.
pub(crate) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = headers.get_all(CONNECTION).iter().any(|value| {
        value.to_str().is_ok_and(|names| {
            names
                .split(',')
                .any(|name| name.trim().eq_ignore_ascii_case("upgrade"))
        })
    });
    headers.get(UPGRADE).filter(|_| asked).cloned()
}

/// Marks a message as switching to `protocol`.
pub(crate) fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}

/// Makes the head of a client's request the head of the request to the sandbox.
pub(crate) fn prepare_request(
    headers: &mut HeaderMap,
    extensions: &Extensions,
    host: Option<HeaderValue>,
    masked: Option<HeaderValue>,
    prefix: Option<&str>,
) {
    strip_hop_by_hop(headers);
    // This server has said "continue" already.
    headers.remove(EXPECT);
    for name in ROUTING.into_iter().chain(TRAFFIC_TOKENS) {
        headers.remove(name);
    }
    if let Some(ConnectInfo(client)) = extensions.get::<ConnectInfo<SocketAddr>>() {
        let before = headers
            .get(FORWARDED_FOR)
            .and_then(|value| value.to_str().ok());
        let chain = match before {
            Some(before) => format!("{before}, {}", client.ip()),
            None => client.ip().to_string(),
        };
        set(headers, FORWARDED_FOR, &chain);
    }
    if let Some(host) = &host
        && !headers.contains_key(FORWARDED_HOST)
    {
        headers.insert(FORWARDED_HOST, host.clone());
    }
    // What a TLS terminator in front has said stays.
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    match prefix {
        Some(prefix) => set(headers, FORWARDED_PREFIX, prefix),
        None => drop(headers.remove(FORWARDED_PREFIX)),
    }
    if let Some(host) = masked.or(host) {
        headers.insert(HOST, host);
    }
}

fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn what_concerns_one_connection_is_removed() {
        let mut headers = map(&[
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, trailers"),
            ("upgrade", "h2c"),
            ("accept", "*/*"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("te", "trailers"), ("accept", "*/*")]));
    }

    #[test]
    fn an_upgrade_needs_both_headers() {
        let websocket = map(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ]);
        assert_eq!(upgrade(&websocket).unwrap(), "websocket");
        assert_eq!(upgrade(&map(&[("upgrade", "websocket")])), None);
        assert_eq!(upgrade(&map(&[("connection", "upgrade")])), None);
    }

    #[test]
    fn the_request_says_where_it_came_from() {
        let mut headers = map(&[
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-prefix", "/forged"),
            ("e2b-sandbox-id", "i0"),
            ("e2b-traffic-access-token", "secret"),
            ("expect", "100-continue"),
        ]);
        let mut extensions = Extensions::new();
        extensions.insert(ConnectInfo(SocketAddr::from(([10, 0, 0, 2], 1))));
        let host = Some(HeaderValue::from_static("a.example"));
        let masked = Some(HeaderValue::from_static("localhost:80"));
        prepare_request(&mut headers, &extensions, host, masked, None);
        assert_eq!(
            headers,
            map(&[
                ("x-forwarded-for", "10.0.0.1, 10.0.0.2"),
                ("x-forwarded-host", "a.example"),
                ("x-forwarded-proto", "http"),
                ("host", "localhost:80"),
            ])
        );
    }
}
