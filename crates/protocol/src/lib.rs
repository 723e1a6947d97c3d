//! What the host and the daemon inside a sandbox agree on, and nothing else.
//!
//! - [`channel`] owns the bytes on the virtio-serial port: how a connection begins, how its
//!   beginning is told apart from whatever was in flight before, and the window sizes of the HTTP/2
//!   that runs on top.
//! - [`guest_api`] owns the JSON of the calls that only the host may make.
//! - [`share`] owns the messages by which a sandbox uses a directory of the host.
//! - [`signature`] owns how a URL of a file is signed.
//! - The constants below are the addresses under which both sides find each other.
//!
//! Invariants:
//! - Framing is pure: [`channel::Stuffer`] and [`channel::Detector`] do no I/O, keep no clock, and
//!   give the same result however their input is cut into pieces.
//! - No payload, whatever it holds, can be mistaken for the beginning of a new life.
//! - Nothing here knows what a sandbox is made of; host-side crates and the guest may both use it.

use std::net::Ipv4Addr;

pub mod channel;
pub mod guest_api;
pub mod share;
pub mod signature;

/// The envd version that sandboxes report. E2B's clients gate features by it; this one stands for
/// the whole protocol that `cubicle-guest` implements.
pub const ENVD_VERSION: &str = "0.6.13";

/// Port of the envd protocol inside a sandbox, fixed by E2B's clients.
pub const ENVD_PORT: u16 = 49983;

/// Port of the code interpreter inside a sandbox, fixed by E2B's clients.
pub const INTERPRETER_PORT: u16 = 49999;

/// Name of the virtio-serial port that joins host and guest, as `/sys/class/virtio-ports/*/name`
/// shows it inside the guest.
pub const CHANNEL_PORT_NAME: &str = "cubicle.channel";

/// `:authority` of envd requests on the channel that the host forwards for others.
pub const ENVD_AUTHORITY: &str = "envd";

/// `:authority` of the host's own requests on the channel. They may ask for what nobody else may,
/// and need no token; no request of others is ever given this authority.
pub const HOST_AUTHORITY: &str = "host";

/// Name of the header by which the guest says why it refused a `CONNECT`.
pub const ERROR_HEADER: &str = "cubicle-error";

/// Value of [`ERROR_HEADER`] when nothing listens on the port that a `CONNECT` named.
pub const ERROR_PORT_CLOSED: &str = "port-closed";

/// Every sandbox has this address inside; its network namespace gives it another one outside.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);

/// Prefix length of [`GUEST_ADDRESS`], in bits.
pub const GUEST_PREFIX_LEN: u8 = 30;

/// The sandbox's default route: the address of the tap device in its network namespace.
pub const GUEST_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);

/// The sandbox's network interface.
pub const GUEST_INTERFACE: &str = "eth0";

/// MTU of [`GUEST_INTERFACE`], in bytes.
pub const GUEST_MTU: u32 = 1500;
