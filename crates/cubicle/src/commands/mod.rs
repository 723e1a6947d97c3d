//! One module per command.

pub(crate) mod bench;
pub(crate) mod copy;
pub(crate) mod doctor;
pub(crate) mod env;
pub(crate) mod exec;
mod lives;
mod network;
pub(crate) mod sandbox;
mod several;
pub(crate) mod snapshot;
mod store;
pub(crate) mod template;
pub(crate) mod up;
pub(crate) mod volume;

use std::process::ExitCode;

use crate::{
    cli::Global,
    client::{Client, Connection},
    error::Error,
};

/// The client that the global options ask for: named, or the server of this machine.
pub(crate) fn client(global: &Global) -> Result<Client, Error> {
    let connection = match &global.url {
        Some(url) => Connection {
            url: url.trim_end_matches('/').to_owned(),
            api_key: global.api_key.clone().unwrap_or_default(),
            domain: String::new(),
        },
        None => {
            let mut connection = Connection::load(&global.data_dir)?;
            if let Some(key) = &global.api_key {
                connection.api_key.clone_from(key);
            }
            connection
        }
    };
    Client::new(connection)
}

/// How a command ends that has said itself what went wrong, if anything did.
fn code(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
