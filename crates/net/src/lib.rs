//! Network slots: a place on the network for each sandbox, made ahead of time.
//!
//! A *slot* is a network namespace with a tap for the VM, a link to the host and rules. All
//! guests have the same addresses ([`GUEST_ADDRESS`], [`GATEWAY_ADDRESS`], [`GUEST_MAC`]), so a
//! restored guest needs no reconfiguration; outside, each slot has an address of its own.
//!
//! ```text
//!  VM ─ eth0 169.254.0.21/30 ═ tap0 169.254.0.22 ┐ slot's namespace
//!                 first rules, SNAT to 10.233.0.5 │ (the VM's process is in it)
//!                    uplink0 10.233.0.5/31 ───────┘
//!                        ║
//!                    cubicle-2 10.233.0.4/31 ── second rules, masquerade ── the host's uplink
//! ```
//!
//! [`SlotPool`] keeps slots ready, hands them out as [`Slot`]s and makes them new after use.
//! [`EgressPolicy`] says what a slot's guest may reach; [`probe()`] says whether this host can
//! have slots and what it lacks.
//!
//! This crate owns the namespaces under `run_dir/netns`, the interfaces `<pool name>-<number>`
//! and the nftables table `inet <pool name>` in the namespace where the pool was opened. All of it
//! is done by system calls and netlink; no program is run.
//!
//! # Invariants
//!
//! - A guest reaches no other slot, no service of the host and none of the always-denied ranges,
//!   whatever its policy; two sets of rules, in the slot and on the host, each see to that.
//! - A guest sends with its own hardware and IP address or not at all. IPv6 is off.
//! - A process in a slot's namespace reaches nothing except through the tap it was given.
//! - A change of policy is one transaction and holds for connections under way.
//! - A slot that is acquired knows nothing of earlier sandboxes: no connection, counter, rule,
//!   neighbour or queued packet.
//! - What exists says whether a slot is in use: a slot with a tap is, one without is not. So a
//!   process that is killed loses nothing that a VM uses, and the next one finds the rest and
//!   removes it.
//! - No thread that runs other code is ever in another namespace than its process.
//!
//! # Forwarding
//!
//! `net.ipv4.ip_forward` is not touched. Forwarding is switched on for the slots' interfaces and
//! for the host's uplinks (the interfaces with a default route when the pool is opened). Where it
//! was off on an uplink, the host's rules keep it from forwarding between networks that the host
//! had before, and closing an unused pool switches it off again. A firewall of the host that drops
//! forwarded packets by default, as Docker's does, must let the slots' interfaces through;
//! [`probe()`] finds those it can see.

mod address;
mod config;
mod conntrack;
mod error;
mod firewall;
mod forwarding;
mod host;
mod links;
mod netlink;
mod netns;
mod nft;
mod numbers;
mod policy;
mod pool;
mod probe;
mod provision;
mod slot;
mod sweep;
mod sysctl;
mod tap;

pub use address::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX_LEN, MTU, SlotIndex,
};
pub use config::{DEFAULT_DENY, PoolConfig, PoolName};
pub use error::{Error, Result};
pub use firewall::slot::Traffic;
pub use policy::EgressPolicy;
pub use pool::{CloseReport, Counts, SlotPool};
pub use probe::{Capability, Report, State, probe};
pub use slot::Slot;
pub use sweep::SweepReport;
