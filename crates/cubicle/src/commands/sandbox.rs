//! `cubicle sandbox`: create, list, use and kill sandboxes.

use std::{process::ExitCode, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{copy, exec, lives, network, several};
use crate::{
    cli::{Global, Sandbox, VolumeMount},
    client::{Client, SandboxInfo, envd::Command, segment},
    error::Error,
    output,
};

pub(crate) async fn run(global: &Global, command: Sandbox) -> Result<ExitCode, Error> {
    let client = super::client(global)?;
    match command {
        Sandbox::Create {
            template,
            timeout,
            env,
            metadata,
            volumes,
            egress,
            auto_pause,
            auto_resume,
        } => {
            let mut body = json!({
                "templateID": template,
                "timeout": timeout,
                "envVars": map(env),
                "metadata": map(metadata),
            });
            network::add_to_create(&mut body, &egress);
            if !volumes.is_empty() {
                let mount = |mount: VolumeMount| {
                    json!({
                        "name": mount.name,
                        "path": mount.path,
                        "readOnly": mount.read_only,
                    })
                };
                body["volumeMounts"] = volumes.into_iter().map(mount).collect();
            }
            if auto_pause {
                body["autoPause"] = true.into();
                body["autoResume"] = json!({ "enabled": auto_resume });
            }
            let created = client.create(&body).await?;
            if global.json {
                output::print_json(&created);
            } else {
                println!("{}", created.sandbox_id);
            }
        }
        Sandbox::Ls { metadata } => {
            let sandboxes = client.list(&metadata).await?;
            if global.json {
                output::print_json(&sandboxes);
            } else {
                print_list(&sandboxes);
            }
        }
        Sandbox::Info { id } => {
            let path = format!("/sandboxes/{}", segment(&id)?);
            let mut info: Value = client
                .json(client.request(Method::GET, &path), "get a sandbox")
                .await?;
            // A token on a screen is a token in a screenshot.
            if let Some(fields) = info.as_object_mut() {
                fields.remove("envdAccessToken");
                fields.remove("trafficAccessToken");
            }
            output::print_json(&info);
        }
        Sandbox::Exec {
            id,
            user,
            cwd,
            env,
            interactive,
            command,
        } => {
            let sandbox = client.sandbox(&id, user).await?;
            let (program, args) = exec::command_line(command);
            let command = Command {
                program,
                args,
                env,
                cwd,
                stdin: interactive,
                ..Command::default()
            };
            return exec::exec(&client, &sandbox, command).await;
        }
        Sandbox::Shell { id, user } => {
            let sandbox = client.sandbox(&id, user).await?;
            return exec::shell(&client, &sandbox).await;
        }
        Sandbox::Cp {
            source,
            destination,
            user,
        } => {
            let end = copy::End::Sandbox { user };
            let copied = copy::copy(&client, end, &source, &destination).await?;
            copied.print(global.json);
        }
        Sandbox::Logs { id, follow } => logs(&client, &id, follow, global.json).await?,
        Sandbox::Clone { id, count, timeout } => {
            return lives::clone(&client, &id, count, timeout, global.json).await;
        }
        Sandbox::Rollback { id, snapshot } => {
            return lives::rollback(&client, &id, snapshot, global.json).await;
        }
        Sandbox::Pause {
            ids,
            no_memory,
            require_healthy,
        } => return lives::pause(&client, &ids, !no_memory, require_healthy, global.json).await,
        Sandbox::Resume {
            ids,
            timeout,
            no_memory,
        } => return lives::resume(&client, &ids, timeout, !no_memory, global.json).await,
        Sandbox::Network { id, egress, reset } => {
            network::run(&client, &id, &egress, reset, global.json).await?;
        }
        Sandbox::Kill { ids, all } => return kill(&client, ids, all, global.json).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn map(pairs: Vec<(String, String)>) -> Value {
    pairs
        .into_iter()
        .map(|(key, value)| (key, Value::from(value)))
        .collect()
}

fn print_list(sandboxes: &[SandboxInfo]) {
    let mut table = output::table(&[
        "SANDBOX", "TEMPLATE", "STATE", "AGE", "LEFT", "CPU", "MEMORY", "METADATA",
    ]);
    let now = OffsetDateTime::now_utc();
    for sandbox in sandboxes {
        let metadata: Vec<String> = sandbox
            .metadata
            .iter()
            .flatten()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        table.add_row([
            sandbox.sandbox_id.clone(),
            sandbox
                .alias
                .clone()
                .unwrap_or_else(|| sandbox.template_id.clone()),
            sandbox.state.clone(),
            output::span((now - sandbox.started_at).whole_seconds()),
            left(sandbox.end_at - now),
            sandbox.cpu_count.to_string(),
            format!("{} MiB", sandbox.memory_mb),
            metadata.join(","),
        ]);
    }
    output::print_table(&table);
}

/// How long a sandbox lives. The server says the end of the calendar where it means never, as for a
/// sandbox that is paused.
fn left(span: time::Duration) -> String {
    if span > time::Duration::days(365_000) {
        "-".to_owned()
    } else {
        output::span(span.whole_seconds())
    }
}

async fn logs(client: &Client, id: &str, follow: bool, json: bool) -> Result<(), Error> {
    let path = format!("/v2/sandboxes/{}/logs", segment(id)?);
    let mut cursor: i64 = 0;
    let mut seen_at_cursor: Vec<String> = Vec::new();
    loop {
        let request = client.request(Method::GET, &path).query(&[
            ("cursor", cursor.to_string()),
            ("direction", "forward".to_owned()),
        ]);
        let page: Value = match client.json(request, "read the logs").await {
            // Following a sandbox ends with it.
            Err(Error::Refused { status: 404, .. }) if cursor > 0 => return Ok(()),
            other => other?,
        };
        for entry in page["logs"].as_array().into_iter().flatten() {
            let line = entry.to_string();
            if seen_at_cursor.contains(&line) {
                continue;
            }
            let time = entry["timestamp"].as_str().unwrap_or_default();
            if let Some(millis) = unix_millis(time).filter(|millis| *millis > cursor) {
                cursor = millis;
                seen_at_cursor.clear();
            }
            seen_at_cursor.push(line);
            if json {
                println!("{entry}");
            } else {
                let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
                println!("{time} {:5} {}", text("level"), text("message"));
            }
        }
        if !follow {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn unix_millis(text: &str) -> Option<i64> {
    let format = &time::format_description::well_known::Rfc3339;
    let time = OffsetDateTime::parse(text, format).ok()?;
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok()
}

async fn kill(
    client: &Client,
    mut ids: Vec<String>,
    all: bool,
    json: bool,
) -> Result<ExitCode, Error> {
    if all {
        ids = client
            .list(&[])
            .await?
            .into_iter()
            .map(|sandbox| sandbox.sandbox_id)
            .collect();
    }
    let kill = async |id: &str| client.kill(id).await;
    several::remove(&ids, "sandbox", "killed", json, kill).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_has_no_time_left() {
        let end = time::macros::datetime!(9999-12-31 23:59:59 UTC);
        assert_eq!(left(end - OffsetDateTime::now_utc()), "-");
        assert_eq!(left(time::Duration::minutes(5)), "5m00s");
    }
}
