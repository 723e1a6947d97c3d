//! `cubicle template store`: look at the templates that there are to be had, and install them.

use reqwest::Method;
use serde::Serialize;
use serde_json::Value;

use crate::{
    cli::{Install, Store},
    client::{Client, segment},
    error::Error,
    output,
};

const STORE: &str = "/cubicle/v1/store";

/// What is to be different from what the store says.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Wanted<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_count: Option<u32>,
    #[serde(rename = "memoryMB", skip_serializing_if = "Option::is_none")]
    memory_mb: Option<u32>,
    #[serde(rename = "diskSizeMB", skip_serializing_if = "Option::is_none")]
    disk_size_mb: Option<u32>,
    force: bool,
}

pub(super) async fn run(client: &Client, command: Store, json: bool) -> Result<(), Error> {
    match command {
        Store::Ls { refresh } => list(client, refresh, json).await,
        Store::Info { name } => {
            let path = format!("{STORE}/{}", segment(&name)?);
            let request = client.request(Method::GET, &path);
            let template: Value = client.json(request, "look into the store").await?;
            output::print_json(&template);
            Ok(())
        }
        Store::Install(install) => {
            let Install {
                name,
                alias,
                cpus,
                memory,
                disk,
                force,
            } = install;
            let wanted = Wanted {
                alias: alias.as_deref(),
                cpu_count: cpus,
                memory_mb: memory,
                disk_size_mb: disk,
                force,
            };
            let path = format!("{STORE}/{}/install", segment(&name)?);
            let request = client.request(Method::POST, &path).json(&wanted);
            super::template::follow(client.send(request).await?, json).await
        }
    }
}

async fn list(client: &Client, refresh: bool, json: bool) -> Result<(), Error> {
    let request = if refresh {
        client.request(Method::POST, &format!("{STORE}/refresh"))
    } else {
        client.request(Method::GET, STORE)
    };
    let store: Value = client.json(request, "list the store").await?;
    if json {
        output::print_json(&store);
        return Ok(());
    }
    if let Some(why) = store["stale"].as_str() {
        eprintln!("warning: what follows may be out of date: {why}");
    }
    let mut table = output::table(&[
        "NAME",
        "CATEGORY",
        "CPU",
        "MEMORY",
        "DISK",
        "INSTALLED",
        "WHAT IT IS",
    ]);
    for template in store["templates"].as_array().into_iter().flatten() {
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        table.add_row([
            text(&template["name"]),
            text(&template["category"]),
            text(&template["cpuCount"]),
            format!("{} MiB", text(&template["memoryMB"])),
            format!("{} MiB", text(&template["diskSizeMB"])),
            text(&template["installed"]["buildStatus"]),
            text(&template["description"]),
        ]);
    }
    output::print_table(&table);
    Ok(())
}
