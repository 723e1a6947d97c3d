//! `cubicle`: the server and its command line in one program.
//!
//! Everything that does work lives in the other crates; here they are put together (`up`) and
//! talked to over HTTP (all other commands), as any other client would.

mod cli;
mod client;
mod commands;
mod dockerfile;
mod error;
mod output;
mod server;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::{
    cli::{Cli, Command},
    error::Error,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.global.json;
    if !matches!(cli.command, Command::Up(_)) {
        end_with_the_reader();
    }
    // Fails only if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(source) => {
            Error::setup("start the runtime", source).print(json);
            return ExitCode::FAILURE;
        }
    };
    let code = match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => {
            error.print(json);
            ExitCode::FAILURE
        }
    };
    // A read of standard input may still be waiting on a thread; it must not hold us up.
    runtime.shutdown_background();
    code
}

/// Makes a command end, without a word, when nobody reads its output any more, as in `cubicle ... |
/// head`. The runtime ignores the signal that programs usually end by, because sockets may raise it,
/// too; `println!` panics then.
fn end_with_the_reader() {
    /// What a shell says of a program that SIGPIPE ended.
    const BROKEN_PIPE: i32 = 128 + 13;
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if message.starts_with("failed printing to std") && message.contains("Broken pipe") {
            std::process::exit(BROKEN_PIPE);
        }
        report(panic);
    }));
}

async fn run(cli: Cli) -> Result<ExitCode, Error> {
    let Cli { global, command } = cli;
    match command {
        Command::Up(options) => commands::up::run(&global, *options).await,
        Command::Env(options) => {
            commands::env::run(&global, options.format).map(|()| ExitCode::SUCCESS)
        }
        Command::Doctor => commands::doctor::run(&global).await,
        Command::Sandbox(command) => commands::sandbox::run(&global, command).await,
        Command::Template(command) => commands::template::run(&global, command).await,
        Command::Snapshot(command) => commands::snapshot::run(&global, command).await,
        Command::Volume(command) => commands::volume::run(&global, command).await,
        Command::Bench(command) => commands::bench::run(&global, command)
            .await
            .map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "cubicle",
                &mut std::io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}
