//! What `cubicle template store` understands.

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum Store {
    /// List the templates that there are to be had
    #[command(visible_alias = "list")]
    Ls {
        /// Read the catalogue anew, however fresh it is
        #[arg(long)]
        refresh: bool,
    },
    /// Show one of them
    Info {
        /// Its name
        name: String,
    },
    /// Build one of them here
    Install(Install),
}

#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Its name in the store
    pub(crate) name: String,
    /// What to call it here [default: its name in the store]
    #[arg(long = "as", value_name = "NAME[:TAG]")]
    pub(crate) alias: Option<String>,
    /// CPUs of its sandboxes [default: what the store says]
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Memory of its sandboxes [default: what the store says]
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Their root disk [default: what the store says]
    #[arg(long, value_name = "MIB")]
    pub(crate) disk: Option<u32>,
    /// Build it even if nothing changed
    #[arg(long)]
    pub(crate) force: bool,
}
