//! `cubicle template`: list, build, look at, tag and remove templates.

mod build;
mod follow;

use std::{process::ExitCode, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use time::OffsetDateTime;

pub(super) use self::follow::follow;
use super::several;
use crate::{
    cli::{Global, Template},
    client::{
        Client, reference,
        templates::{TemplateInfo, TemplateTag},
    },
    error::Error,
    output,
};

/// How long to wait between two looks at a build.
const LOOK_EVERY: Duration = Duration::from_millis(300);

pub(crate) async fn run(global: &Global, command: Template) -> Result<ExitCode, Error> {
    let client = super::client(global)?;
    match command {
        Template::Store(command) => super::store::run(&client, command, global.json).await?,
        Template::Ls => list(&client, global.json).await?,
        Template::Build(options) => return build::run(&client, *options, global.json).await,
        Template::Info { template } => info(&client, &template, global.json).await?,
        Template::Logs {
            template,
            build,
            follow,
        } => logs(&client, &template, build, follow, global.json).await?,
        Template::Tag {
            template,
            tags,
            delete: true,
        } => {
            client.delete_tags(&template, &tags).await?;
            if global.json {
                output::print_json(&json!({ "removed": tags }));
            }
        }
        Template::Tag { template, tags, .. } => {
            let assigned = client.assign_tags(&template, &tags).await?;
            if global.json {
                output::print_json(&assigned);
            }
        }
        Template::Rm { ids } => {
            let delete = async |id: &str| {
                let path = format!("/templates/{}", reference(id)?);
                client.delete(&path).await
            };
            return several::remove(&ids, "template", "removed", global.json, delete).await;
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

async fn info(client: &Client, template: &str, json: bool) -> Result<(), Error> {
    let info = client.template(template).await?;
    let tags = client.template_tags(&info.template_id).await?;
    if json {
        let mut value = serde_json::to_value(&info).unwrap_or_default();
        value["tags"] = json!(tags);
        output::print_json(&value);
        return Ok(());
    }
    for line in describe(&info, &tags, OffsetDateTime::now_utc()) {
        println!("{line}");
    }
    Ok(())
}

/// A template for a person, line by line.
fn describe(info: &TemplateInfo, tags: &[TemplateTag], now: OffsetDateTime) -> Vec<String> {
    let ago = |at: OffsetDateTime| format!("{} ago", output::span((now - at).whole_seconds()));
    let mut lines = vec![
        format!("template  {}", info.template_id),
        format!("names     {}", info.aliases.join(", ")),
        format!("status    {}", info.build_status),
        format!("made of   {}", info.image_info),
        format!(
            "size      {} CPU, {} MiB memory, {} MiB disk",
            info.cpu_count, info.memory_mb, info.disk_size_mb
        ),
        format!("created   {}", ago(info.created_at)),
        format!("sandboxes {}", info.spawn_count),
    ];
    if !info.exposed_ports.is_empty() {
        let ports: Vec<String> = info.exposed_ports.iter().map(ToString::to_string).collect();
        lines.push(format!("ports     {}", ports.join(", ")));
    }
    if let Some(error) = &info.last_error {
        lines.push(format!("error     {error}"));
    }
    for build in &info.builds {
        let names: Vec<&str> = tags
            .iter()
            .filter(|tag| tag.build_id == build.build_id)
            .map(|tag| tag.tag.as_str())
            .collect();
        let took = build.finished_at.map(|end| {
            let took = Duration::try_from(end - build.created_at).unwrap_or_default();
            format!(" in {}", output::millis(took))
        });
        let line = format!(
            "build     {}  {}{}, {}  {}",
            build.build_id,
            build.status,
            took.unwrap_or_default(),
            ago(build.created_at),
            names.join(", ")
        );
        lines.push(line.trim_end().to_owned());
    }
    lines
}

async fn logs(
    client: &Client,
    template: &str,
    build: Option<String>,
    follow: bool,
    json: bool,
) -> Result<(), Error> {
    let build = match build {
        Some(build) => build,
        None => {
            let builds = client.template(template).await?.builds;
            let latest = builds.into_iter().next().map(|build| build.build_id);
            latest.ok_or_else(|| Error::Usage(format!("{template} was never built")))?
        }
    };
    let mut offset = 0;
    loop {
        let state = client.build_state(template, &build, offset).await?;
        offset += state.log_entries.len();
        for line in &state.log_entries {
            if json {
                println!("{}", json!(line));
            } else {
                let step = line.step.as_deref().unwrap_or_default();
                println!("{step:>8}  {}", line.message.trim_end());
            }
        }
        let more = !state.log_entries.is_empty();
        if state.is_over() || (!follow && !more) {
            if let Some(reason) = state.reason.filter(|_| !json) {
                let step = reason.step.unwrap_or_default();
                eprintln!("{step:>8}  failed: {}", reason.message);
            }
            return Ok(());
        }
        if !more {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::templates::TemplateBuild;

    #[test]
    fn a_template_for_a_person() {
        let at = OffsetDateTime::from_unix_timestamp(1_800_000_000).expect("a time");
        let info = TemplateInfo {
            template_id: "tpl-1".into(),
            build_id: "b2".into(),
            aliases: vec!["web".into()],
            build_status: "ready".into(),
            cpu_count: 2,
            memory_mb: 1024,
            disk_size_mb: 8192,
            created_at: at,
            spawn_count: 7,
            image_info: "python:3.12".into(),
            exposed_ports: vec![80, 443],
            last_error: None,
            builds: vec![
                TemplateBuild {
                    build_id: "b2".into(),
                    status: "building".into(),
                    created_at: at + Duration::from_secs(60),
                    finished_at: None,
                },
                TemplateBuild {
                    build_id: "b1".into(),
                    status: "ready".into(),
                    created_at: at,
                    finished_at: Some(at + Duration::from_secs(12)),
                },
            ],
        };
        let tags = [TemplateTag {
            tag: "default".into(),
            build_id: "b1".into(),
        }];
        let lines = describe(&info, &tags, at + Duration::from_secs(90));
        insta::assert_snapshot!(lines.join("\n"));
    }
}
