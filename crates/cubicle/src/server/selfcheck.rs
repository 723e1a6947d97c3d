//! Showing that it works: one sandbox created, used and killed, as any client would do it.

use std::time::{Duration, Instant};

use serde_json::json;

use super::BASE;
use crate::{
    client::{Client, Connection, SandboxRef, envd::Command},
    error::Error,
};

/// What was seen.
#[derive(Debug, Clone)]
pub(crate) struct SelfCheck {
    pub(crate) sandbox: String,
    pub(crate) create: Duration,
    /// `uname -a` in the sandbox, and how long it took.
    pub(crate) kernel: (String, Duration),
    /// `2+2` in Python, and how long it took.
    pub(crate) python: (String, Duration),
    pub(crate) kill: Duration,
}

pub(crate) async fn self_check(connection: &Connection) -> Result<SelfCheck, Error> {
    let client = Client::new(connection.clone())?;
    let begun = Instant::now();
    let created = client
        .create(&json!({ "templateID": BASE, "timeout": 60 }))
        .await?;
    let create = begun.elapsed();
    let sandbox = SandboxRef {
        id: created.sandbox_id.clone(),
        token: created.envd_access_token,
        user: None,
    };
    let used = async {
        let kernel = run(&client, &sandbox, "uname", &["-a"]).await?;
        let python = run(&client, &sandbox, "python3", &["-c", "print(2+2)"]).await?;
        Ok::<_, Error>((kernel, python))
    }
    .await;
    let begun = Instant::now();
    client.kill(&created.sandbox_id).await?;
    let kill = begun.elapsed();
    let (kernel, python) = used?;
    Ok(SelfCheck {
        sandbox: created.sandbox_id,
        create,
        kernel,
        python,
        kill,
    })
}

async fn run(
    client: &Client,
    sandbox: &SandboxRef,
    program: &str,
    args: &[&str],
) -> Result<(String, Duration), Error> {
    let begun = Instant::now();
    let command = Command {
        program: program.to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        ..Command::default()
    };
    let (code, output) = client.run(sandbox, &command).await?;
    if code == 0 {
        return Ok((output.trim().to_owned(), begun.elapsed()));
    }
    Err(Error::Usage(format!(
        "`{program}` failed in the sandbox with code {code}: {output}"
    )))
}
