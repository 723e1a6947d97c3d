//! The command line: what can be said, and how it is explained.

mod bench;
mod sandbox;
mod snapshot;
mod store;
mod template;
mod volume;

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub(crate) use self::{
    bench::{Bench, BenchCreate, BenchMatrix},
    sandbox::{Egress, Sandbox},
    snapshot::{Snapshot, SnapshotLimits},
    store::{Install, Store},
    template::{Probe, Template, TemplateBuild},
    volume::{Volume, VolumeMount},
};

/// Where Cubicle keeps its state unless it is told otherwise.
pub(crate) const DEFAULT_DATA_DIR: &str = "/var/lib/cubicle";

/// Under what the options of every command are listed, after a command's own.
const GLOBAL: &str = "Global options";

/// Sandboxes for AI agents: every agent gets a microVM of its own, in milliseconds.
#[derive(Debug, Parser)]
#[command(
    name = "cubicle",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command understands. They come last in every help.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print machine-readable JSON instead of text
    #[arg(long, global = true,
        help_heading = GLOBAL)]
    pub(crate) json: bool,
    /// Where Cubicle keeps its state on this machine
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        env = "CUBICLE_DATA_DIR",
        hide_env_values = true,
        value_name = "DIR",
        default_value = DEFAULT_DATA_DIR
    )]
    pub(crate) data_dir: PathBuf,
    /// Server to talk to [default: the one running on this machine]
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        env = "CUBICLE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(crate) url: Option<String>,
    /// API key [default: the local server's own]
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        env = "CUBICLE_API_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub(crate) api_key: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server in the foreground and show that it works
    Up(Box<Up>),
    /// Print the environment that points E2B's and Cube's clients at the running server
    ///
    /// Use it as `eval "$(cubicle env)"`.
    Env(Env),
    /// Check what this machine offers, and say how to mend what is missing
    Doctor,
    /// Create, use and remove sandboxes
    #[command(subcommand, visible_alias = "sbx")]
    Sandbox(Sandbox),
    /// Freeze sandboxes, and look after what was frozen
    #[command(subcommand, visible_alias = "snap")]
    Snapshot(Snapshot),
    /// List, build and remove templates
    #[command(subcommand, visible_alias = "tpl")]
    Template(Template),
    /// Make, list and delete directories that outlive sandboxes
    #[command(subcommand, visible_alias = "vol")]
    Volume(Volume),
    /// Measure the running server
    #[command(subcommand)]
    Bench(Bench),
    /// Print a completion script for a shell
    Completions {
        /// The shell to complete in
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Address to listen on
    #[arg(
        long,
        env = "CUBICLE_LISTEN",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:3000"
    )]
    pub(crate) listen: SocketAddr,
    /// Accept requests without an API key (loopback only)
    #[arg(long)]
    pub(crate) no_auth: bool,
    /// Domain under which sandboxes are named: <port>-<sandbox>.<domain>
    #[arg(long, env = "CUBICLE_DOMAIN", default_value = "cubicle.localhost")]
    pub(crate) domain: String,
    /// Accelerator for the VMs
    #[arg(long, value_enum, default_value_t = Accelerator::Auto)]
    pub(crate) accelerator: Accelerator,
    /// Name server for the sandboxes, may be repeated
    #[arg(long = "dns", value_name = "IPV4", default_values = ["1.1.1.1", "8.8.8.8"])]
    pub(crate) dns: Vec<std::net::Ipv4Addr>,
    /// Most sandboxes that may exist at the same time
    #[arg(long, default_value_t = 200)]
    pub(crate) max_sandboxes: u32,
    /// How many VMs wait, restored, for sandboxes to come, and how many sandboxes keep theirs for a
    /// minute after they were paused; 0 for none [default: two for each CPU]
    #[arg(long, value_name = "N")]
    pub(crate) spares: Option<usize>,
    /// How the memory that a sandbox has written is found: `auto`, `soft-dirty`, `anonymous-pages`
    /// or `full`
    #[arg(long, value_name = "TIER", default_value = "auto")]
    pub(crate) memory_tier: cubicle_cow::memory::TierChoice,
    /// Directory of this host that sandboxes may mount, with all below it; may be repeated
    #[arg(
        long,
        env = "CUBICLE_HOST_MOUNT_ALLOW",
        value_name = "DIR",
        value_delimiter = ':'
    )]
    pub(crate) host_mount_allow: Vec<PathBuf>,
    /// Largest size of the store, when Cubicle has to make a file system of its own for it
    #[arg(long, value_name = "GIB", default_value_t = 64)]
    pub(crate) store_gib: u64,
    #[command(flatten)]
    pub(crate) snapshots: SnapshotLimits,
    #[command(flatten)]
    pub(crate) images: crate::server::ImageOptions,
    /// Catalogue of the template store: a file or an address [default: the one that is shipped]
    #[arg(
        long,
        env = "CUBICLE_STORE",
        value_name = "URL|FILE",
        hide_env_values = true
    )]
    pub(crate) store: Option<String>,
    /// The guest kernel: a bzImage, or an ELF file that can start by PVH [default: the distribution's]
    #[arg(long, env = "CUBICLE_KERNEL", value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Its modules, a directory like /lib/modules/<release>; without, all that sandboxes need is
    /// built in
    #[arg(
        long,
        env = "CUBICLE_KERNEL_MODULES",
        value_name = "DIR",
        requires = "kernel"
    )]
    pub(crate) kernel_modules: Option<PathBuf>,
    /// The guest daemon [default: `cubicle-guest` beside this program]
    #[arg(long, env = "CUBICLE_GUEST", value_name = "FILE")]
    pub(crate) guest: Option<PathBuf>,
    /// Do not create a sandbox to show that it works
    #[arg(long)]
    pub(crate) no_self_check: bool,
    /// Set everything up, show that it works, and stop again
    #[arg(long)]
    pub(crate) once: bool,
    /// Leave the sandboxes running when the server stops; the next start takes them back
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accelerator {
    /// Probe what can run the guest kernel
    Auto,
    /// Hardware virtualisation
    Kvm,
    /// Software emulation: for development, CI and trusted code only
    Tcg,
}

#[derive(Debug, Args)]
pub(crate) struct Env {
    /// What to print
    #[arg(long, value_enum, default_value_t = EnvFormat::Sh)]
    pub(crate) format: EnvFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EnvFormat {
    /// `export NAME='value'`
    Sh,
    /// `set -gx NAME 'value'`
    Fish,
    /// `NAME=value`, for .env files
    Dotenv,
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn pairs() {
        assert_eq!(parse_pair("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert!(parse_pair("=b").is_err());
        assert!(parse_pair("A").is_err());
    }

    #[test]
    fn help() {
        insta::assert_snapshot!(Cli::command().term_width(100).render_help().to_string());
    }

    /// The help of a command below others, as a person sees it.
    fn help_of(path: &[&str]) -> String {
        let mut command = Cli::command();
        command.build();
        for name in path {
            command = command
                .find_subcommand(name)
                .expect("a command of that name")
                .clone();
        }
        command.term_width(100).render_long_help().to_string()
    }

    #[test]
    fn help_of_what_freezes_and_wakes() {
        for path in [
            &["snapshot"][..],
            &["snapshot", "create"],
            &["snapshot", "ls"],
            &["snapshot", "tree"],
            &["snapshot", "verify"],
            &["sandbox"],
            &["sandbox", "create"],
            &["sandbox", "network"],
            &["sandbox", "clone"],
            &["sandbox", "rollback"],
            &["sandbox", "pause"],
            &["sandbox", "resume"],
            &["bench"],
            &["bench", "snapshot"],
            &["template"],
            &["template", "build"],
            &["template", "logs"],
            &["template", "tag"],
        ] {
            insta::assert_snapshot!(format!("help_{}", path.join("_")), help_of(path));
        }
    }

    #[test]
    fn snapshots_are_bounded_as_is_said() {
        let config = |line: &str| {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            let Command::Up(up) = cli.command else {
                panic!("{line} starts a server");
            };
            let config = up.snapshots.config();
            (config.max_count, config.max_own_bytes, config.default_ttl)
        };
        assert_eq!(config("cubicle up"), (Some(10_000), None, None));
        let bounds = "--max-snapshots 3 --snapshot-space 2 --snapshot-ttl 60";
        let minute = std::time::Duration::from_secs(60);
        assert_eq!(
            config(&format!("cubicle up {bounds}")),
            (Some(3), Some(2 << 30), Some(minute))
        );
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        let refused = |line: &str| {
            let words = line.split(' ');
            let error = Cli::try_parse_from(words).expect_err(line).to_string();
            error.lines().next().unwrap_or_default().to_owned()
        };
        let lines = [
            "cubicle sandbox clone i1 -n 0",
            "cubicle sandbox clone i1 -n 101",
            "cubicle sandbox clone",
            "cubicle sandbox create --auto-resume",
            "cubicle sandbox network",
            "cubicle sandbox network i1 --reset --no-internet",
            "cubicle sandbox pause",
            "cubicle snapshot create",
            "cubicle snapshot rm",
            "cubicle snapshot verify --all snap-1",
            "cubicle bench snapshot --dirty 10,x",
            "cubicle bench pause -c 0",
            "cubicle template build a . --image b",
            "cubicle template build a --image b --from c",
            "cubicle template build a -f Dockerfile --recipe b",
            "cubicle template build a --image b --registry-user c",
            "cubicle template build a --ready tcp:x",
            "cubicle template tag a",
            "cubicle up --kernel-modules a",
            "cubicle up --snapshot-space 0",
            "cubicle up --snapshot-ttl 0",
        ];
        let said: Vec<String> = lines
            .iter()
            .map(|l| format!("{l}\n  {}", refused(l)))
            .collect();
        insta::assert_snapshot!(said.join("\n"));
    }

    #[test]
    fn every_shell_gets_completions_of_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cubicle", &mut script);
            let script = String::from_utf8(script).expect("text");
            for word in [
                "snapshot", "verify", "rollback", "clone", "resume", "bench", "template", "logs",
            ] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }
}
