//! What a sandbox may reach and who may reach it: said when it is created, changed while it runs.

use axum::extract::State;
use cubicle_control::fleet::NetworkOptions;
use http::StatusCode;
use ipnet::Ipv4Net;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::{
    AppState,
    error::{ApiError, ApiResult, ErrorBody},
    extract::{JsonBody, SandboxPath},
};

/// Most entries of one list.
const MAX_ENTRIES: usize = 1024;
/// Longest host mask: what a DNS name can have, a port, and the placeholder.
const MAX_HOST: usize = 300;

/// What a sandbox may reach and who may reach it.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct NetworkBody {
    /// `false`: requests to its ports need its traffic token.
    allow_public_traffic: Option<bool>,
    /// IPv4 addresses and ranges that are allowed whatever else is said.
    allow_out: Option<Vec<String>>,
    /// IPv4 addresses and ranges that are refused.
    deny_out: Option<Vec<String>>,
    /// What its servers are told as `Host`; `${PORT}` stands for the port.
    mask_request_host: Option<String>,
    /// Not supported yet: must be empty.
    dns_servers: Option<Vec<Value>>,
    /// Not supported yet: must be null.
    egress_proxy: Option<Value>,
    /// Not supported yet: must be empty.
    https_ports: Option<Vec<Value>>,
    /// Not supported yet: must be empty.
    rules: Option<Value>,
}

/// What a running sandbox may reach from now on.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct NetworkUpdateBody {
    #[serde(flatten)]
    network: NetworkBody,
    /// `false`: nothing but what `allowOut` lists.
    #[serde(rename = "allow_internet_access", alias = "allowInternetAccess")]
    allow_internet_access: Option<bool>,
}

/// Change a sandbox's network
///
/// Replaces what it may reach: what is left out allows or refuses nothing more. In force on return, for
/// connections that exist, too. `allowPublicTraffic` and `maskRequestHost` stay as they are if they are
/// left out.
#[utoipa::path(
    put, path = "/sandboxes/{sandboxID}/network", tag = "sandboxes",
    request_body = NetworkUpdateBody, params(("sandboxID" = String, Path)),
    responses(
        (status = 204, description = "It is in force"),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "It does not run, or it is busy"),
        (status = 500, body = ErrorBody),
    ),
)]
pub(crate) async fn update(
    State(state): State<AppState>,
    SandboxPath(id): SandboxPath,
    JsonBody(body): JsonBody<NetworkUpdateBody>,
) -> ApiResult<StatusCode> {
    let options = body.network.options(body.allow_internet_access)?;
    state.control.sandboxes.set_network(&id, options).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl NetworkBody {
    pub(crate) fn options(self, allow_internet: Option<bool>) -> ApiResult<NetworkOptions> {
        let given = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if given(&self.dns_servers) {
            return Err(ApiError::unsupported("network.dnsServers"));
        }
        if given(&self.https_ports) {
            return Err(ApiError::unsupported("network.httpsPorts"));
        }
        if self.egress_proxy.is_some_and(|proxy| !proxy.is_null()) {
            return Err(ApiError::unsupported("network.egressProxy"));
        }
        if self.rules.as_ref().is_some_and(|rules| !is_empty(rules)) {
            return Err(ApiError::unsupported("network.rules"));
        }
        let mask_request_host = self.mask_request_host.filter(|mask| !mask.is_empty());
        if let Some(mask) = &mask_request_host {
            let host = mask.replace("${PORT}", "65535");
            let is_host = |host: &str| host.parse::<http::uri::Authority>().is_ok();
            if mask.len() > MAX_HOST || !is_host(&host) || host.contains('@') {
                return Err(ApiError::field(
                    "network.maskRequestHost",
                    "is no host name, for example localhost:${PORT}",
                ));
            }
        }
        Ok(NetworkOptions {
            allow_internet,
            allow_out: ranges("network.allowOut", self.allow_out)?,
            deny_out: ranges("network.denyOut", self.deny_out)?,
            allow_public_traffic: self.allow_public_traffic,
            mask_request_host,
        })
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn ranges(field: &'static str, list: Option<Vec<String>>) -> ApiResult<Vec<Ipv4Net>> {
    let list = list.unwrap_or_default();
    if list.len() > MAX_ENTRIES {
        return Err(ApiError::field(
            field,
            format!("has more than {MAX_ENTRIES} entries"),
        ));
    }
    list.iter().map(|text| range(field, text)).collect()
}

fn range(field: &'static str, text: &str) -> ApiResult<Ipv4Net> {
    if let Ok(net) = text.parse::<Ipv4Net>() {
        return Ok(net.trunc());
    }
    if let Ok(address) = text.parse::<std::net::Ipv4Addr>() {
        return Ok(Ipv4Net::from(address));
    }
    if text.parse::<ipnet::Ipv6Net>().is_ok() || text.parse::<std::net::Ipv6Addr>().is_ok() {
        return Err(ApiError::unsupported(&format!("IPv6 in {field}")));
    }
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_*".contains(&b))
    };
    if field == "network.allowOut"
        && text.len() <= 253
        && text.split('.').all(label)
        && text.bytes().any(|b| b.is_ascii_alphabetic() || b == b'*')
    {
        return Err(ApiError::unsupported("a domain name in network.allowOut"));
    }
    let shown: String = text.chars().take(60).collect();
    Err(ApiError::field(
        field,
        format!("'{shown}' is no IPv4 address and no range like 10.0.0.0/8"),
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: Value) -> Result<NetworkOptions, String> {
        let body: NetworkBody = serde_json::from_value(body).expect("shape");
        body.options(None).map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn addresses_and_ranges_are_understood() {
        let options = parse(json!({
            "allowOut": ["8.8.8.8", "10.1.2.3/8"], "denyOut": ["0.0.0.0/0"],
            "allowPublicTraffic": false, "maskRequestHost": "localhost:${PORT}",
            "rules": {}, "httpsPorts": [], "dnsServers": null, "egressProxy": null,
        }))
        .expect("options");
        assert_eq!(
            options.allow_out,
            ["8.8.8.8/32", "10.0.0.0/8"].map(|n| n.parse().expect("net"))
        );
        assert_eq!(options.deny_out, [Ipv4Net::default()]);
        assert_eq!(
            options.mask_request_host.as_deref(),
            Some("localhost:${PORT}")
        );
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let cases = [
            (
                json!({"allowOut": ["example.com"]}),
                StatusCode::NOT_IMPLEMENTED,
            ),
            (
                json!({"allowOut": ["*.example.com"]}),
                StatusCode::NOT_IMPLEMENTED,
            ),
            (json!({"allowOut": ["::/0"]}), StatusCode::NOT_IMPLEMENTED),
            (json!({"denyOut": ["example.com"]}), StatusCode::BAD_REQUEST),
            (json!({"denyOut": ["10.0.0.0/33"]}), StatusCode::BAD_REQUEST),
            (json!({"denyOut": [""]}), StatusCode::BAD_REQUEST),
            (
                json!({"denyOut": vec!["1.1.1.1"; MAX_ENTRIES + 1]}),
                StatusCode::BAD_REQUEST,
            ),
            (json!({"maskRequestHost": "a b"}), StatusCode::BAD_REQUEST),
            (
                json!({"maskRequestHost": "x".repeat(10_000)}),
                StatusCode::BAD_REQUEST,
            ),
            (
                json!({"dnsServers": ["1.1.1.1"]}),
                StatusCode::NOT_IMPLEMENTED,
            ),
            (json!({"httpsPorts": [443]}), StatusCode::NOT_IMPLEMENTED),
            (
                json!({"egressProxy": {"address": "a:1"}}),
                StatusCode::NOT_IMPLEMENTED,
            ),
            (json!({"rules": [{}]}), StatusCode::NOT_IMPLEMENTED),
        ];
        for (body, status) in cases {
            let refusal = parse(body.clone()).expect_err("refused");
            assert!(refusal.contains(status.as_str()), "{body}: {refusal}");
        }
    }
}
