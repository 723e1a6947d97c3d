//! `cubicle bench create`: from nothing to a sandbox that has run a command.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    guest::run_true,
    machine::{cold_boot, machine, machine_line},
    summary::{Summary, millis, server_timing},
};
use crate::{
    cli::{BenchCreate, Global},
    client::{Client, CreatedSandbox, SandboxRef, segment},
    error::Error,
    output,
};

/// One measured sandbox.
struct Sample {
    created: f64,
    first_command: f64,
    killed: f64,
    phases: Vec<(String, f64)>,
    private_mib: Option<f64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    template: String,
    concurrency: usize,
    /// The machine and the server, in the server's own words.
    server: Value,
    create_ms: Summary,
    first_command_ms: Summary,
    kill_ms: Summary,
    phases_ms: BTreeMap<String, Summary>,
    private_mib: Option<Summary>,
    cold_boot_ms: Option<f64>,
    /// Sandboxes that took over a VM that was waiting for them; the others were restored.
    from_spares: usize,
    /// Cold boot of the same template until its daemon answers, over the median create call.
    times_faster_than_boot: Option<f64>,
    creates_per_second: f64,
}

/// Facts that a sandbox's host knows about its VM.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Usage {
    private_bytes: u64,
}

pub(super) async fn create(global: &Global, options: BenchCreate) -> Result<(), Error> {
    if options.count == 0 || options.concurrency == 0 {
        return Err(Error::Usage(
            "a benchmark needs at least one sandbox at a time".to_owned(),
        ));
    }
    let client = crate::commands::client(global)?;
    let server = machine(&client).await?;
    let cold_boot = cold_boot(&client, &options.template).await?;

    let total = options.warm_up + options.count;
    let bar = indicatif::ProgressBar::new(total as u64);
    if global.json {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    run(
        &client,
        &options.template,
        options.warm_up,
        options.concurrency,
        &bar,
    )
    .await?;
    let started = Instant::now();
    let samples = run(
        &client,
        &options.template,
        options.count,
        options.concurrency,
        &bar,
    )
    .await?;
    let elapsed = started.elapsed();
    bar.finish_and_clear();

    let report = report(&options, server, cold_boot, &samples, elapsed)?;
    if global.json {
        output::print_json(&report);
    } else {
        print(&report);
    }
    Ok(())
}

async fn run(
    client: &Client,
    template: &str,
    count: usize,
    concurrency: usize,
    bar: &indicatif::ProgressBar,
) -> Result<Vec<Sample>, Error> {
    stream::iter(0..count)
        .map(|_| async {
            let sample = sample(client, template).await;
            bar.inc(1);
            sample
        })
        .buffer_unordered(concurrency)
        .try_collect()
        .await
}

async fn sample(client: &Client, template: &str) -> Result<Sample, Error> {
    let start = Instant::now();
    let body = json!({ "templateID": template, "timeout": 60 });
    let response = client
        .send(client.request(Method::POST, "/v2/sandboxes").json(&body))
        .await?;
    let phases = response
        .headers()
        .get("server-timing")
        .and_then(|value| value.to_str().ok())
        .map(server_timing)
        .unwrap_or_default();
    let sandbox: CreatedSandbox = response.json().await.map_err(|source| Error::Unexpected {
        what: "create a sandbox".to_owned(),
        source: source.into(),
    })?;
    let created = millis(start);
    let measured = in_sandbox(client, &sandbox, start).await;
    let kill = Instant::now();
    client.kill(&sandbox.sandbox_id).await?;
    let (first_command, private_mib) = measured?;
    Ok(Sample {
        created,
        first_command,
        killed: millis(kill),
        phases,
        private_mib,
    })
}

async fn in_sandbox(
    client: &Client,
    sandbox: &CreatedSandbox,
    start: Instant,
) -> Result<(f64, Option<f64>), Error> {
    let path = format!(
        "/cubicle/v1/sandboxes/{}/usage",
        segment(&sandbox.sandbox_id)?
    );
    let usage: Option<Usage> = match client
        .json(client.request(Method::GET, &path), "ask for the memory")
        .await
    {
        Ok(usage) => Some(usage),
        Err(Error::Refused {
            status: 404 | 405 | 501,
            ..
        }) => None,
        Err(error) => return Err(error),
    };
    // The question above is ours, not the user's: its time is taken out again.
    let asked = Instant::now();
    let before = asked.duration_since(start);
    let reference = SandboxRef {
        id: sandbox.sandbox_id.clone(),
        token: sandbox.envd_access_token.clone(),
        user: None,
    };
    run_true(client, &reference).await?;
    let private = usage.map(|usage| usage.private_bytes as f64 / f64::from(1 << 20));
    let command = asked.elapsed();
    Ok(((before + command).as_secs_f64() * 1e3, private))
}

fn report(
    options: &BenchCreate,
    server: Value,
    cold_boot: Option<Duration>,
    samples: &[Sample],
    elapsed: Duration,
) -> Result<Report, Error> {
    let summary = |value: fn(&Sample) -> f64| {
        Summary::of(samples.iter().map(value).collect())
            .ok_or_else(|| Error::Usage("nothing was measured".to_owned()))
    };
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, duration) in samples.iter().flat_map(|sample| &sample.phases) {
        phases.entry(name.clone()).or_default().push(*duration);
    }
    let phases_ms: BTreeMap<String, Summary> = phases
        .into_iter()
        .filter_map(|(name, values)| Some((name, Summary::of(values)?)))
        .collect();
    let cold_boot_ms = cold_boot.map(|boot| boot.as_secs_f64() * 1e3);
    let create_ms = summary(|sample| sample.created)?;
    let claimed = |sample: &&Sample| sample.phases.iter().any(|(name, _)| name == "claim");
    Ok(Report {
        template: options.template.clone(),
        concurrency: options.concurrency,
        server,
        first_command_ms: summary(|sample| sample.first_command)?,
        kill_ms: summary(|sample| sample.killed)?,
        private_mib: Summary::of(samples.iter().filter_map(|s| s.private_mib).collect()),
        from_spares: samples.iter().filter(claimed).count(),
        times_faster_than_boot: cold_boot_ms.map(|boot| boot / create_ms.p50),
        create_ms,
        cold_boot_ms,
        phases_ms,
        creates_per_second: samples.len() as f64 / elapsed.as_secs_f64(),
    })
}

fn print(report: &Report) {
    println!("{}", machine_line(&report.server));
    println!(
        "{} sandboxes from `{}`, {} at a time; {} took over a spare\n",
        report.create_ms.n, report.template, report.concurrency, report.from_spares
    );
    let mut table = output::table(&["", "p50", "p95", "max"]);
    let row = |name: &str, summary: &Summary, unit: &str| {
        let cell = |value: f64| format!("{value:.1} {unit}");
        [
            name.to_owned(),
            cell(summary.p50),
            cell(summary.p95),
            cell(summary.max),
        ]
    };
    table.add_row(row("create call returned", &report.create_ms, "ms"));
    table.add_row(row("first `true` has run", &report.first_command_ms, "ms"));
    table.add_row(row("kill call returned", &report.kill_ms, "ms"));
    if let Some(private) = &report.private_mib {
        table.add_row(row("private memory, idle", private, "MiB"));
    }
    for (name, summary) in &report.phases_ms {
        table.add_row(row(&format!("  phase {name}"), summary, "ms"));
    }
    output::print_table(&table);
    if let Some(boot) = report.cold_boot_ms {
        println!("\ncold boot of the same template: {boot:.0} ms");
    }
    if let Some(ratio) = report.times_faster_than_boot {
        println!("the create call is {ratio:.1} times faster");
    }
}
