//! The first process: brings the machine up, starts the daemon, keeps it running.
//!
//! It runs from the initramfs, needs no other program, and takes any root file system: without a
//! shell, without mount points, read-only. Order of events:
//!
//! 1. `mounts`: the kernel's file systems; `modules`: the drivers that the initramfs brought.
//! 2. `root`: waits for the disk (`uevents`), mounts it, moves over. Same process, no exec.
//! 3. `mounts` again: what programs expect; `settings`: host name, resolver, limits; `identity`;
//!    `network`.
//! 4. Opens the channel's port, and holds it for as long as the machine runs.
//! 5. `supervisor`: forks the daemon, which inherits the port, and starts it anew when it dies;
//!    collects orphans; shuts down on request.
//!
//! What a sandbox can do without goes wrong with a line in the kernel's log; what it can't, the
//! root file system, ends the machine, which the host sees at once.

mod cmdline;
mod console;
mod identity;
mod modules;
mod mounts;
mod network;
mod root;
mod settings;
mod supervisor;
mod uevents;

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use cubicle_protocol::{CHANNEL_PORT_NAME, GUEST_INTERFACE};

pub use console::log_to_kernel;

use crate::channel::Port;
use cmdline::Options;
use uevents::Uevents;

/// How long a device may take to appear after its driver has been loaded.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the machine could not be brought up, or a part of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file system could not be mounted.
    #[error("cannot mount {what} on {}: {source}", target.display())]
    Mount {
        /// The device or the kind of file system.
        what: String,
        /// The mount point.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file or directory could not be read, written or made.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// `read`, `write`, `make`, `enter`.
        what: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A driver could not be loaded.
    #[error("cannot load module {name}: {source}")]
    Module {
        /// Its file name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel's device events cannot be followed.
    #[error("cannot follow device events: {0}")]
    Uevents(#[source] io::Error),
    /// A device did not appear.
    #[error("{what} did not appear within {} s", DEVICE_TIMEOUT.as_secs())]
    NoDevice {
        /// Which one.
        what: String,
    },
    /// A part of the network could not be set up.
    #[error("cannot {what}: {source}")]
    Network {
        /// What was attempted.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A process could not be made or waited for.
    #[error("cannot {what}: {source}")]
    Process {
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Brings the machine up and keeps the daemon running until the machine is shut down.
///
/// Must be called in the first process, from an initramfs.
pub fn run() -> ! {
    let error = match boot() {
        Ok(port) => supervisor::supervise(port),
        Err(error) => error,
    };
    console::say(&format!("fatal: {error}"));
    supervisor::power_off()
}

/// Everything before the daemon. Returns the channel's port.
fn boot() -> Result<Option<OwnedFd>, Error> {
    mounts::kernel_file_systems()?;
    console::open();
    let options = Options::read();
    log_to_kernel(options.log);
    // Before the first driver, so that no device comes unnoticed.
    let mut events = Uevents::open()?;
    modules::load_all();
    root::switch(&options, &mut events)?;
    mounts::programs_file_systems();
    settings::apply();
    identity::cover();
    if options.network {
        network::configure(GUEST_INTERFACE);
    }
    let port = open_port(&mut events);
    Ok(port
        .inspect_err(|error| console::say(&error.to_string()))
        .ok())
}

fn open_port(events: &mut Uevents) -> Result<OwnedFd, Error> {
    let failed = |source| Error::File {
        what: "look for",
        path: PathBuf::from("/sys/class/virtio-ports"),
        source,
    };
    let until = Instant::now() + DEVICE_TIMEOUT;
    loop {
        if let Some(path) = Port::find().map_err(failed)? {
            let failed = |source| Error::File {
                what: "open",
                path: path.clone(),
                source,
            };
            return Port::open(&path).map_err(failed);
        }
        if !events.wait(until)? {
            return Err(Error::NoDevice {
                what: format!("the port {CHANNEL_PORT_NAME}"),
            });
        }
    }
}
