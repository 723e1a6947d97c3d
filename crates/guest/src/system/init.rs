//! The host tells the sandbox who it is, after every boot and every restore and before anybody else
//! can reach it.

use std::{io, path::PathBuf, time::Duration};

use cubicle_protocol::{
    ENVD_VERSION,
    guest_api::{InitRequest, InitResponse, Introduced, Mount, Timestamp},
};
use rustix::time::{ClockId, Timespec, clock_settime};

use super::{entropy, names::Names};
use crate::{
    access::{AccessToken, State, User},
    share,
};

/// A clock that is off by less is left alone: stepping it would only disturb.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(1);

/// Why the sandbox could not be told who it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine id is none.
    #[error("invalid machine id '{0}': 32 lower-case hexadecimal digits are needed")]
    MachineId(String),
    /// Clones would share their randomness.
    #[error("cannot give the kernel's random generator a new key: {0}")]
    Entropy(io::Error),
    /// The clock stays wrong.
    #[error("cannot set the clock to {time}: {source}")]
    Clock {
        /// What it should have shown.
        time: Timestamp,
        /// What the kernel said.
        source: io::Error,
    },
    /// The name stays the old one.
    #[error("cannot set the host name to '{name}': {source}")]
    Hostname {
        /// The new name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file that says who the sandbox is stays the old one.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory of the host is not where it should be.
    #[error(transparent)]
    Share(#[from] share::Error),
}

/// Becomes what an [`InitRequest`] says, and tells what came of it.
pub(crate) async fn introduce(state: &State, request: InitRequest) -> Introduced {
    match become_what(state, request).await {
        Ok(response) => Introduced::Became(response),
        Err(error) => Introduced::Refused(error.to_string()),
    }
}

/// Does all that an [`InitRequest`] asks for, or fails: a sandbox that is half itself is not to be
/// used.
async fn become_what(state: &State, mut request: InitRequest) -> Result<InitResponse, Error> {
    let mounts = request.mounts.take();
    // Not on another thread: what it writes is in memory, and nobody else is served yet.
    let response = apply(state, request)?;
    if let Some(mounts) = mounts {
        mount(state, mounts).await?;
    }
    Ok(response)
}

/// Mounts what the host shares. Everything in it belongs to the user of requests that name none, or
/// to root in a sandbox that hasn't that user.
async fn mount(state: &State, mounts: Vec<Mount>) -> Result<(), Error> {
    if mounts.is_empty() && !state.shares.any() {
        return Ok(());
    }
    let user = match state.user(None) {
        Ok(user) => user,
        Err(error) => {
            tracing::warn!(%error, "what is shared with the sandbox belongs to root");
            root()
        }
    };
    Ok(state.shares.reconcile(mounts, &user).await?)
}

fn root() -> User {
    User {
        name: "root".to_owned(),
        uid: 0,
        gid: 0,
        home: PathBuf::from("/root"),
        shell: PathBuf::from("/bin/sh"),
    }
}

fn apply(state: &State, request: InitRequest) -> Result<InitResponse, Error> {
    // First what everything else may depend upon: the clock, and keys that nobody shares.
    if let Some(time) = request.timestamp {
        set_clock(time)?;
    }
    if let Some(entropy) = &request.entropy {
        entropy::mix(entropy.as_bytes()).map_err(Error::Entropy)?;
    }
    let names = Names { root: state.root() };
    if let Some(id) = &request.machine_id {
        names.set_machine_id(id)?;
    }
    if let Some(name) = &request.hostname {
        names.set_hostname(name)?;
    }
    if !request.dns_servers.is_empty() {
        names.set_resolvers(&request.dns_servers)?;
    }
    let sandbox_id = request.sandbox_id.map(|id| id.to_string());
    let template_id = request.template_id.map(|id| id.to_string());
    let marks = [
        ("E2B_SANDBOX", Some("true")),
        ("E2B_SANDBOX_ID", sandbox_id.as_deref()),
        ("E2B_TEMPLATE_ID", template_id.as_deref()),
    ];
    let marks: Vec<_> = marks
        .iter()
        .filter_map(|(name, value)| Some((*name, (*value)?)))
        .collect();
    names.set_marks(&marks)?;

    let previous_nonce = state.update(|settings| {
        settings.env_vars = request.env_vars;
        if let Some(token) = request.access_token {
            settings.access_token = AccessToken::new(token);
        }
        if let Some(user) = request.default_user {
            settings.default_user = Some(user).filter(|user| !user.is_empty());
        }
        if let Some(workdir) = request.default_workdir {
            settings.default_workdir = Some(PathBuf::from(workdir));
            settings
                .default_workdir
                .take_if(|workdir| workdir.as_os_str().is_empty());
        }
        settings.sandbox_id = sandbox_id.or(settings.sandbox_id.take());
        settings.template_id = template_id.or(settings.template_id.take());
        settings.generation = request.generation.or(settings.generation);
        match request.nonce {
            Some(nonce) => settings.nonce.replace(nonce),
            None => settings.nonce.clone(),
        }
    });
    Ok(InitResponse {
        previous_nonce,
        envd_version: ENVD_VERSION.to_owned(),
    })
}

fn set_clock(time: Timestamp) -> Result<(), Error> {
    let off = Duration::from_nanos(Timestamp::now().0.abs_diff(time.0));
    if off < CLOCK_TOLERANCE {
        return Ok(());
    }
    let wanted = Timespec {
        // 2^64 nanoseconds are less than 2^63 seconds.
        tv_sec: i64::try_from(time.seconds()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, wanted).map_err(|errno| Error::Clock {
        time,
        source: errno.into(),
    })
}
