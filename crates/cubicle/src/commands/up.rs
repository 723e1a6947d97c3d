//! `cubicle up`: the server in the foreground, from nothing to "it works", and back to nothing.

use std::{
    io::IsTerminal as _,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::{Global, Up},
    error::{Chain, Error},
    output::millis,
    server::{SelfCheck, Server, Starting, self_check},
};

/// A line that shows what is being done now.
pub(crate) fn progress_bar(json: bool) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if json || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    } else {
        bar.enable_steady_tick(Duration::from_millis(120));
    }
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar
}

/// Shows one step of longer work.
pub(crate) fn show_progress(bar: &ProgressBar, step: &str, message: &str, fraction: Option<f64>) {
    let percent = fraction.map_or_else(String::new, |f| format!(" {:.0} %", f * 100.0));
    bar.set_message(format!("{step}: {message}{percent}"));
}

pub(crate) async fn run(global: &Global, options: Up) -> Result<ExitCode, Error> {
    init_log();
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Terminal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Terminal)?;
    let bar = progress_bar(global.json);
    let json = global.json;
    let shown_step = Mutex::new(String::new());
    let report = |event: Starting| match event {
        Starting::Progress {
            step,
            message,
            fraction,
        } => {
            if json {
                let fraction = fraction.map(|f| (f * 1000.0).round() / 1000.0);
                println!(
                    "{}",
                    json!({ "event": "progress", "step": step, "message": message, "fraction": fraction })
                );
            } else if bar.is_hidden() {
                // A line a step is progress enough in a log.
                let mut shown = shown_step.lock().unwrap_or_else(PoisonError::into_inner);
                if *shown != step {
                    println!("{step:>12}  {message}");
                    *shown = step;
                }
            } else {
                show_progress(&bar, &step, &message, fraction);
            }
        }
        Starting::Done { step, message } => {
            if json {
                println!(
                    "{}",
                    json!({ "event": "done", "step": step, "message": message })
                );
            } else {
                bar.suspend(|| println!("{step:>12}  {message}"));
            }
        }
    };
    // Dropping the start undoes what it has begun; what survives even that, the next start sweeps.
    let server = tokio::select! {
        server = Server::start(&global.data_dir, &options, &report) => server?,
        _ = interrupt.recv() => return Ok(ExitCode::from(130)),
        _ = terminate.recv() => return Ok(ExitCode::from(143)),
    };
    let mut failed = None;
    if !options.no_self_check {
        show_progress(&bar, "check", "a sandbox is created and used", None);
        match self_check(&server.connection).await {
            Ok(check) if !json => bar.suspend(|| print_check(&check)),
            Ok(_) => {}
            Err(error) => failed = Some(error),
        }
    }
    bar.finish_and_clear();
    match &failed {
        Some(error) if !options.once => {
            eprintln!("warning: the self-check failed: {}", Chain(error));
        }
        _ => {}
    }
    if json {
        let connection = &server.connection;
        println!(
            "{}",
            json!({ "event": "ready", "url": connection.url, "accelerator": server.accelerator })
        );
    } else {
        print_ready(&server, &options);
    }
    if !options.once {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if !json {
            println!("stopping");
        }
    }
    server.stop().await?;
    match failed {
        Some(error) if options.once => Err(error),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn print_check(check: &SelfCheck) {
    println!(
        "{:>12}  sandbox {} created in {}",
        "check",
        check.sandbox,
        millis(check.create)
    );
    let (kernel, took) = &check.kernel;
    println!("{:>12}  uname -a: {kernel} ({})", "", millis(*took));
    let (sum, took) = &check.python;
    println!(
        "{:>12}  python3 -c 'print(2+2)': {sum} ({})",
        "",
        millis(*took)
    );
    println!("{:>12}  killed in {}", "", millis(check.kill));
}

fn print_ready(server: &Server, options: &Up) {
    let connection = &server.connection;
    println!("\nCubicle is up at {}", connection.url);
    if options.no_auth {
        println!("no API key is asked for (--no-auth)");
    } else {
        println!("API key: {}", connection.api_key);
    }
    println!("\nIn another shell:");
    println!("  eval \"$(cubicle env)\"       # points E2B's and Cube's clients here");
    println!("  cubicle sandbox create");
    println!("\nCtrl-C stops it.");
}

/// Logs go to standard error as JSON lines; `RUST_LOG` says how many (warnings by default).
fn init_log() {
    use tracing_subscriber::{
        EnvFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let terminal = std::io::stderr().is_terminal();
    let text = terminal.then(|| fmt::layer().with_writer(std::io::stderr).with_target(false));
    let lines = (!terminal).then(|| fmt::layer().json().with_writer(std::io::stderr));
    // A second subscriber in one process can only be a test's; the first one stays.
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(text)
        .with(lines)
        .try_init();
}
