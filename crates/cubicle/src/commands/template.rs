//! `cubicle template`: list, build and remove templates.

use std::process::ExitCode;

use bytes::BytesMut;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    cli::{Global, Template},
    client::{Client, segment},
    error::Error,
    output,
};

pub(crate) async fn run(global: &Global, command: Template) -> Result<ExitCode, Error> {
    let client = super::client(global)?;
    match command {
        Template::Ls => list(&client, global.json).await?,
        Template::Build { name, force } => build(&client, &name, force, global.json).await?,
        Template::Rm { ids } => {
            for id in &ids {
                let path = format!("/templates/{}", segment(id)?);
                client.send(client.request(Method::DELETE, &path)).await?;
                if !global.json {
                    println!("{id}");
                }
            }
            if global.json {
                output::print_json(&json!({ "removed": ids }));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(client: &Client, json: bool) -> Result<(), Error> {
    let templates: Value = client
        .json(client.request(Method::GET, "/templates"), "list templates")
        .await?;
    if json {
        output::print_json(&templates);
        return Ok(());
    }
    let mut table = output::table(&[
        "TEMPLATE", "NAMES", "STATUS", "CPU", "MEMORY", "DISK", "CREATED",
    ]);
    for template in templates.as_array().into_iter().flatten() {
        let text = |field: &str| match &template[field] {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let names: Vec<&str> = template["aliases"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        table.add_row([
            text("templateID"),
            names.join(","),
            text("buildStatus"),
            text("cpuCount"),
            format!("{} MiB", text("memoryMB")),
            format!("{} MiB", text("diskSizeMB")),
            text("createdAt"),
        ]);
    }
    output::print_table(&table);
    Ok(())
}

/// One line of a build's progress.
#[derive(Debug, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
enum BuildEvent {
    /// The build works on `step`; `fraction` is 0 to 1 where it can be known.
    Progress {
        step: String,
        message: String,
        fraction: Option<f64>,
    },
    /// The template can be used.
    Done { template_id: String, cached: bool },
    /// The build failed.
    Failed { message: String },
}

async fn build(client: &Client, name: &str, force: bool, json: bool) -> Result<(), Error> {
    let path = format!("/cubicle/v1/templates/{}/build", segment(name)?);
    let request = client
        .request(Method::POST, &path)
        .json(&json!({ "force": force }));
    let mut response = client.send(request).await?;
    let bar = super::up::progress_bar(json);
    let mut buffer = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|source| Error::Transport {
        what: "build a template".to_owned(),
        source,
    })? {
        buffer.extend_from_slice(&chunk);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = buffer.split_to(end + 1);
            if line.trim_ascii().is_empty() {
                continue;
            }
            let event = serde_json::from_slice(&line).map_err(|source| Error::Unexpected {
                what: "build a template".to_owned(),
                source: source.into(),
            })?;
            match event {
                BuildEvent::Progress {
                    step,
                    message,
                    fraction,
                } => {
                    super::up::show_progress(&bar, &step, &message, fraction);
                }
                BuildEvent::Done {
                    template_id,
                    cached,
                } => {
                    bar.finish_and_clear();
                    if json {
                        let done = json!({ "templateID": template_id, "cached": cached });
                        output::print_json(&done);
                    } else {
                        let how = if cached { " (nothing had changed)" } else { "" };
                        println!("{template_id}{how}");
                    }
                    return Ok(());
                }
                BuildEvent::Failed { message } => {
                    bar.finish_and_clear();
                    return Err(Error::Usage(message));
                }
            }
        }
    }
    Err(Error::Usage(
        "the server stopped in the middle of the build".to_owned(),
    ))
}
