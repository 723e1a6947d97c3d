//! `cubicle-guest`: the first process of a sandbox and its daemon, in one program.

use std::process::ExitCode;

use cubicle_guest::{daemon, init, units};
use tracing::level_filters::LevelFilter;

const USAGE: &str = "\
cubicle-guest is the first process of a Cubicle sandbox; a kernel starts it as /init.

usage:
  cubicle-guest serve      only the daemon, on its TCP port: no channel, nothing is mounted
  cubicle-guest systemctl  what systemctl does for the services of the code interpreter
  cubicle-guest --version
";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    match std::env::args().nth(1).as_deref() {
        Some("serve") => {
            init::log_to_kernel(LevelFilter::WARN);
            let Err(error) = daemon::run(None);
            eprintln!("cubicle-guest: {error}");
            ExitCode::FAILURE
        }
        Some("systemctl") => units::systemctl(std::env::args().skip(2)),
        Some("--version") => {
            println!("cubicle-guest {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
