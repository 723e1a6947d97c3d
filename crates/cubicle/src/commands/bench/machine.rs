//! What was measured on: a number without its machine means nothing.

use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    client::{Client, segment},
    error::Error,
};

/// The server and its machine, in the server's own words.
pub(super) async fn machine(client: &Client) -> Result<Value, Error> {
    let get = |path: &'static str| {
        client.json::<Value>(client.request(Method::GET, path), "ask for the server")
    };
    let mut server = get("/cubicle/v1/version").await?;
    let nodes = get("/cubicle/v1/nodes").await?;
    let node = &nodes[0];
    for field in ["hypervisor", "cpuModel", "kernel"] {
        server[field] = node[field].clone();
    }
    server["cpuCount"] = (node["capacity"]["cpuMilli"].as_u64().unwrap_or(0) / 1000).into();
    Ok(server)
}

/// How long the template takes to boot where nothing is restored, measured by the server now.
pub(super) async fn cold_boot(client: &Client, template: &str) -> Result<Option<Duration>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Boot {
        boot_ms: f64,
    }
    let path = format!("/cubicle/v1/templates/{}/boot", segment(template)?);
    match client
        .json::<Boot>(client.request(Method::POST, &path), "boot the template")
        .await
    {
        Ok(boot) => Ok(Some(Duration::from_secs_f64(boot.boot_ms / 1e3))),
        Err(Error::Refused {
            status: 404 | 405 | 501,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The machine on one line, as [`machine`] found it.
pub(super) fn machine_line(server: &Value) -> String {
    let text = |field: &str| match &server[field] {
        Value::String(text) => text.clone(),
        Value::Null => "?".to_owned(),
        other => other.to_string(),
    };
    let commit = match server["commit"].as_str() {
        Some(commit) => format!(" ({commit})"),
        None => String::new(),
    };
    format!(
        "cubicle {}{commit} on {} ({} cores, kernel {}), {}",
        text("version"),
        text("cpuModel"),
        text("cpuCount"),
        text("kernel"),
        text("hypervisor"),
    )
}
