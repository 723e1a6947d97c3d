//! The rules inside a slot's namespace.
//!
//! ```text
//!   guest ── tap0 ──► forward ─► outbound ─► verdict ──► uplink0 ──► host
//!                        │  spoofed source: dropped      source becomes the slot's address
//!            tap0 ◄── inbound ◄── answers only, same verdict ◄─ uplink0
//! ```
//!
//! Nothing else passes. The VM's process lives in this namespace and has no way out of it but the
//! tap: what the namespace itself sends or receives is dropped, save the errors that the kernel
//! sends to the guest about its own packets.
//!
//! The verdict looks at where a connection was opened to, not at the packet in hand, so a change
//! of policy cuts connections that are under way, in both directions, at the next packet.

use std::{io, net::Ipv4Addr, ops::RangeInclusive};

use ipnet::Ipv4Net;

use crate::{
    EgressPolicy,
    address::{GUEST_ADDRESS, GUEST_MAC, TAP, UPLINK},
    netlink::Netfilter,
    nft::{Batch, CtState, Hook, Name, Policy, Rule, SetKind, Unreachable, read},
    policy::ranges,
};

/// The table's name in the slot's namespace.
pub(crate) const TABLE: &str = "slot";
/// Ranges that no guest ever reaches.
const NEVER: &str = "never";
/// Name servers within those ranges.
const RESOLVERS: &str = "resolvers";
/// Ranges that the policy allows.
const ALLOW: &str = "allow";
/// Ranges that the policy denies.
const DENY: &str = "deny";
/// Counter of packets from the guest that were passed on.
const SENT: &str = "sent";
/// Counter of packets to the guest that were passed on.
const RECEIVED: &str = "received";
/// Counter of packets that the policy, or what is always denied, stopped.
const DENIED: &str = "denied";
/// Counter of packets whose source was not the guest's.
const SPOOFED: &str = "spoofed";

/// What a slot's rules are made from.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// The slot's own address, which the guest's packets leave with.
    pub(crate) address: Ipv4Addr,
    /// Ranges that no guest ever reaches.
    pub(crate) never: Vec<Ipv4Net>,
    /// Name servers within those ranges.
    pub(crate) resolvers: Vec<Ipv4Addr>,
}

/// What went through a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets of the guest that were passed on.
    pub packets_sent: u64,
    /// Their bytes, IP headers included.
    pub bytes_sent: u64,
    /// Packets that were passed to the guest.
    pub packets_received: u64,
    /// Their bytes, IP headers included.
    pub bytes_received: u64,
    /// Packets, in either direction, that the policy or the always-denied ranges stopped.
    pub packets_denied: u64,
    /// Packets of the guest that were dropped because their source was not its own.
    pub packets_spoofed: u64,
}

/// Puts the rules of a fresh slot in place of whatever is there: policy open, counters at zero.
pub(crate) fn install(netfilter: &mut Netfilter, rules: &Rules) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.replace_table(TABLE);
    for counter in [SENT, RECEIVED, DENIED, SPOOFED] {
        batch.add_counter(TABLE, counter);
    }
    for set in [NEVER, RESOLVERS, ALLOW, DENY] {
        batch.add_set(TABLE, set, SetKind::AddressRanges);
    }
    batch.add_ranges(TABLE, NEVER, &ranges(&rules.never));
    batch.add_ranges(TABLE, RESOLVERS, &hosts(&rules.resolvers));
    for chain in ["verdict", "outbound", "inbound"] {
        batch.add_chain(TABLE, chain);
    }

    batch.add_base_chain(TABLE, "input", Hook::Input, Policy::Drop);
    batch.add_base_chain(TABLE, "output", Hook::Output, Policy::Drop);
    let to_guest = Rule::new().output_interface(Name::Is(TAP));
    batch.add_rule(
        TABLE,
        "output",
        to_guest.connection_state(CtState::RELATED).accept(),
    );

    batch.add_base_chain(TABLE, "forward", Hook::Forward, Policy::Drop);
    let from_guest = Rule::new()
        .input_interface(Name::Is(TAP))
        .output_interface(Name::Is(UPLINK));
    batch.add_rule(TABLE, "forward", from_guest.goto("outbound"));
    let to_guest = Rule::new()
        .input_interface(Name::Is(UPLINK))
        .output_interface(Name::Is(TAP))
        .connection_state(CtState::ESTABLISHED_OR_RELATED);
    batch.add_rule(TABLE, "forward", to_guest.goto("inbound"));

    let spoofed = [
        Rule::new().not_ipv4(),
        Rule::new().source_mac_is_not(GUEST_MAC),
        Rule::new().source_is_not(GUEST_ADDRESS),
    ];
    for rule in spoofed {
        batch.add_rule(TABLE, "outbound", rule.count(SPOOFED).drop());
    }
    let invalid = Rule::new().connection_state(CtState::INVALID);
    batch.add_rule(TABLE, "outbound", invalid.drop());
    batch.add_rule(TABLE, "outbound", Rule::new().jump("verdict"));
    batch.add_rule(TABLE, "outbound", Rule::new().count(SENT).accept());
    batch.add_rule(TABLE, "inbound", Rule::new().jump("verdict"));
    batch.add_rule(TABLE, "inbound", Rule::new().count(RECEIVED).accept());

    let never = Rule::new()
        .connection_to(NEVER, true)
        .connection_to(RESOLVERS, false);
    let denied = Rule::new().connection_to(DENY, true);
    // Told at once, a program in the guest fails at once instead of after minutes.
    let refuse = |rule: Rule| rule.count(DENIED).reject(Unreachable::Prohibited);
    batch.add_rule(TABLE, "verdict", refuse(never));
    batch.add_rule(
        TABLE,
        "verdict",
        Rule::new().connection_to(ALLOW, true).back(),
    );
    batch.add_rule(TABLE, "verdict", refuse(denied));

    batch.add_base_chain(TABLE, "postrouting", Hook::SourceNat, Policy::Accept);
    let leaving = Rule::new().output_interface(Name::Is(UPLINK));
    batch.add_rule(TABLE, "postrouting", leaving.source_nat(rules.address));
    batch.commit(netfilter)
}

/// Puts a policy in force, in one step.
pub(crate) fn set_policy(netfilter: &mut Netfilter, policy: &EgressPolicy) -> io::Result<()> {
    let mut batch = Batch::default();
    for (set, nets) in [(ALLOW, &policy.allow_out), (DENY, &policy.deny_out)] {
        batch.flush_set(TABLE, set);
        batch.add_ranges(TABLE, set, &ranges(nets));
    }
    batch.commit(netfilter)
}

/// Reads the counters.
pub(crate) fn traffic(netfilter: &mut Netfilter) -> io::Result<Traffic> {
    let counters = read::counters(netfilter, TABLE)?;
    let count = |name| counters.get(name).copied().unwrap_or_default();
    Ok(Traffic {
        packets_sent: count(SENT).packets,
        bytes_sent: count(SENT).bytes,
        packets_received: count(RECEIVED).packets,
        bytes_received: count(RECEIVED).bytes,
        packets_denied: count(DENIED).packets,
        packets_spoofed: count(SPOOFED).packets,
    })
}

pub(super) fn hosts(addresses: &[Ipv4Addr]) -> Vec<RangeInclusive<u32>> {
    let nets: Vec<Ipv4Net> = addresses.iter().copied().map(Ipv4Net::from).collect();
    ranges(&nets)
}
