//! What `cubicle sandbox` understands.

use clap::{Args, Subcommand};

use super::{
    parse_pair,
    volume::{self, VolumeMount},
};

/// What a sandbox may reach. Private networks are never among it.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Egress {
    /// Cut it off from every network, but for what --allow-out names
    #[arg(long)]
    pub(crate) no_internet: bool,
    /// IPv4 address or range that it may reach whatever else is said; may be repeated
    #[arg(long, value_name = "NET")]
    pub(crate) allow_out: Vec<String>,
    /// IPv4 address or range that it may not reach; may be repeated
    #[arg(long, value_name = "NET")]
    pub(crate) deny_out: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Sandbox {
    /// Create a sandbox and print its id
    Create {
        /// Template (id, alias) or snapshot to create it from
        #[arg(default_value = "base")]
        template: String,
        /// Seconds until it is killed
        #[arg(long, short, value_name = "SECONDS", default_value_t = 300)]
        timeout: u32,
        /// Environment variable of all its commands, may be repeated
        #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_pair)]
        env: Vec<(String, String)>,
        /// Label to find it by, may be repeated
        #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse_pair)]
        metadata: Vec<(String, String)>,
        /// Volume to mount, may be repeated; `:ro` behind it for one that it cannot change
        #[arg(long = "volume", value_name = "NAME:PATH[:ro]", value_parser = volume::mount)]
        volumes: Vec<VolumeMount>,
        #[command(flatten)]
        egress: Egress,
        /// Pause it when its time is up, instead of killing it
        #[arg(long)]
        auto_pause: bool,
        /// Wake it up when a request comes for it while it is paused
        #[arg(long, requires = "auto_pause")]
        auto_resume: bool,
    },
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls {
        /// Only those that carry this label, may be repeated
        #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse_pair)]
        metadata: Vec<(String, String)>,
    },
    /// Show one sandbox
    Info {
        /// Its id
        id: String,
    },
    /// Run a command in a sandbox; its exit code becomes ours
    Exec {
        /// The sandbox
        id: String,
        /// User to run it as
        #[arg(long, short)]
        user: Option<String>,
        /// Directory to run it in
        #[arg(long, short = 'w', value_name = "DIR")]
        cwd: Option<String>,
        /// Environment variable, may be repeated
        #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_pair)]
        env: Vec<(String, String)>,
        /// Pass our standard input on
        #[arg(long, short)]
        interactive: bool,
        /// The command and its arguments; a single word is run by bash
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Open a terminal in a sandbox
    Shell {
        /// The sandbox
        id: String,
        /// User to be
        #[arg(long, short)]
        user: Option<String>,
    },
    /// Copy files or directories into a sandbox or out of it
    ///
    /// One side is `<sandbox>:<path>`; a relative path there starts at the user's home.
    Cp {
        /// From where
        source: String,
        /// To where
        destination: String,
        /// User whose files they are in the sandbox
        #[arg(long, short)]
        user: Option<String>,
    },
    /// Print what happened in a sandbox
    Logs {
        /// The sandbox
        id: String,
        /// Go on printing until the sandbox is gone
        #[arg(long, short)]
        follow: bool,
    },
    /// Make running copies of a sandbox: its memory, its processes and its disk
    ///
    /// The sandbox runs on. The copies have ids and tokens of their own.
    #[command(visible_alias = "fork")]
    Clone {
        /// The sandbox
        id: String,
        /// How many copies to make
        #[arg(short = 'n', long, value_name = "N", default_value_t = 1,
              value_parser = clap::value_parser!(u32).range(1..=100))]
        count: u32,
        /// Seconds until the copies are killed
        #[arg(long, short, value_name = "SECONDS", default_value_t = 300)]
        timeout: u32,
    },
    /// Put a sandbox back to what it was when a snapshot was taken
    ///
    /// Its id and its address stay. If anything goes wrong, it runs on as if nothing had been asked.
    Rollback {
        /// The sandbox
        id: String,
        /// A snapshot of it, or of what it was made from [default: the latest one of it]
        snapshot: Option<String>,
    },
    /// Freeze sandboxes and free what they take of the machine
    Pause {
        /// Their ids
        #[arg(required = true)]
        ids: Vec<String>,
        /// Keep the disk only: waking it up boots it
        #[arg(long)]
        no_memory: bool,
        /// Refuse to pause one whose daemon does not answer
        #[arg(long)]
        require_healthy: bool,
    },
    /// Wake paused sandboxes up, and give them time
    ///
    /// Does nothing to one that runs but to give it at least that much time.
    #[command(visible_alias = "connect")]
    Resume {
        /// Their ids
        #[arg(required = true)]
        ids: Vec<String>,
        /// Seconds that it lives from now on, at least
        #[arg(long, short, value_name = "SECONDS", default_value_t = 300)]
        timeout: u32,
        /// Boot from the disk and forget the memory
        #[arg(long)]
        no_memory: bool,
    },
    /// Show or replace what a running sandbox may reach
    ///
    /// What is said replaces all of what was said before, at once, for connections that exist, too. With
    /// nothing but the id it shows what is in force.
    Network {
        /// The sandbox
        id: String,
        #[command(flatten)]
        egress: Egress,
        /// Let it reach again what sandboxes reach by default
        #[arg(long, conflicts_with_all = ["no_internet", "allow_out", "deny_out"])]
        reset: bool,
    },
    /// Kill sandboxes
    #[command(visible_alias = "rm")]
    Kill {
        /// Their ids
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// Kill all of them
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}
