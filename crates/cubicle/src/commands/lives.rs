//! `cubicle sandbox clone`, `rollback`, `pause` and `resume`.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::{
    code,
    several::Several,
    snapshot::{cost, freeze, ms},
};
use crate::{client::Client, error::Error, output};

/// Makes copies; prints the id of each. Fails if one could not be made.
pub(super) async fn clone(
    client: &Client,
    id: &str,
    count: u32,
    timeout: u32,
    json: bool,
) -> Result<ExitCode, Error> {
    let forked = client.fork(id, count, timeout).await?;
    let failed = forked
        .sandboxes
        .iter()
        .filter(|outcome| outcome.sandbox.is_none())
        .count();
    if json {
        output::print_json(&without_tokens(&forked));
    } else {
        for outcome in &forked.sandboxes {
            match (&outcome.sandbox, &outcome.error) {
                (Some(sandbox), _) => println!("{}", sandbox.sandbox_id),
                (None, Some(error)) => eprintln!("error: {}", error.message),
                (None, None) => eprintln!("error: the server does not say why a copy is missing"),
            }
        }
        let total = ms(forked.total_ms);
        eprintln!("{}, {total} in all", freeze(&forked.snapshot));
    }
    Ok(code(failed == 0))
}

/// Puts a sandbox back to a snapshot: the one that is named, or the latest of its own.
pub(super) async fn rollback(
    client: &Client,
    id: &str,
    snapshot: Option<String>,
    json: bool,
) -> Result<ExitCode, Error> {
    let snapshot = match snapshot {
        Some(snapshot) => snapshot,
        None => latest(client, id).await?,
    };
    let done = client.rollback(id, &snapshot).await?;
    if json {
        output::print_json(&done);
    } else {
        println!("{}", done.snapshot_id);
        eprintln!(
            "rolled back in {} (life {} of the sandbox)",
            ms(done.total_ms),
            done.generation
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn latest(client: &Client, sandbox: &str) -> Result<String, Error> {
    let snapshots = client.snapshots(Some(sandbox), false).await?;
    let latest = snapshots
        .into_iter()
        .max_by_key(|snapshot| snapshot.created_at);
    match latest {
        Some(snapshot) => Ok(snapshot.snapshot_id),
        None => Err(Error::Usage(format!(
            "sandbox {sandbox} has no snapshot of its own; name one to roll back to, or take one with \
             `cubicle snapshot create {sandbox}`"
        ))),
    }
}

/// Freezes sandboxes, one after the other.
pub(super) async fn pause(
    client: &Client,
    ids: &[String],
    memory: bool,
    require_healthy: bool,
    json: bool,
) -> Result<ExitCode, Error> {
    let mut several = Several::new(json);
    let mut paused = Vec::new();
    for id in ids {
        let taken = client.pause(id, memory, require_healthy).await;
        let Some(taken) = several.unless_refused(taken)? else {
            continue;
        };
        if !json {
            println!("{id}");
            eprintln!("{}", cost(&taken));
        }
        let mut entry = json!(taken);
        entry["sandboxID"] = id.clone().into();
        paused.push(entry);
    }
    if json {
        output::print_json(&paused);
    }
    Ok(several.code())
}

/// Wakes sandboxes, one after the other.
pub(super) async fn resume(
    client: &Client,
    ids: &[String],
    timeout: u32,
    memory: bool,
    json: bool,
) -> Result<ExitCode, Error> {
    let mut several = Several::new(json);
    let mut woken = Vec::new();
    for id in ids {
        let connected = client.connect(id, timeout, memory).await;
        let Some((sandbox, resumed)) = several.unless_refused(connected)? else {
            continue;
        };
        if !json {
            println!("{}", sandbox.sandbox_id);
            if !resumed {
                eprintln!("{id} was running already");
            }
        }
        woken.push(json!({ "sandboxID": sandbox.sandbox_id, "resumed": resumed }));
    }
    if json {
        output::print_json(&woken);
    }
    Ok(several.code())
}

/// A token on a screen is a token in a screenshot.
fn without_tokens(value: &impl serde::Serialize) -> Value {
    let mut value = json!(value);
    for outcome in value["sandboxes"].as_array_mut().into_iter().flatten() {
        let sandbox = outcome.get_mut("sandbox").and_then(Value::as_object_mut);
        if let Some(fields) = sandbox {
            fields.retain(|name, _| !name.ends_with("AccessToken"));
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_not_shown() {
        let shown = without_tokens(&json!({"sandboxes": [
            {"sandbox": {"sandboxID": "i1", "envdAccessToken": "secret", "trafficAccessToken": "s"}},
            {"error": {"code": 503, "message": "no room"}},
        ]}));
        assert_eq!(
            shown,
            json!({"sandboxes": [
                {"sandbox": {"sandboxID": "i1"}},
                {"error": {"code": 503, "message": "no room"}},
            ]})
        );
    }
}
