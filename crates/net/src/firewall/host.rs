//! The rules on the host, one table for all slots of a pool.
//!
//! They apply to packets that come from or go to a slot's interface and leave all others alone,
//! with one exception. To let guests out, the host has to forward what arrives on its uplinks. An
//! uplink that did not forward before keeps not forwarding between the networks that the host
//! already knew: the `fenced` sets stop exactly that. The first of them also records which
//! settings are ours to take back.
//!
//! Accepting here only ends this table's say: another table may still drop.

use std::{io, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::slot::hosts;
use crate::{
    PoolName,
    netlink::Netfilter,
    nft::{Batch, CtState, Hook, Name, Policy, Rule, SetKind, read},
    policy::ranges,
};

/// Ranges that no guest ever reaches.
const DENY: &str = "deny";
/// Name servers that guests may ask although they are within those ranges or are the host.
const RESOLVERS: &str = "resolvers";
/// Uplinks on which forwarding was switched on for the slots.
const FENCED_UPLINKS: &str = "fenced_uplinks";
/// Networks that such an uplink does not forward to.
const FENCED_OFF: &str = "fenced_off";

/// Counters that the host's table has.
const DROPPED_INPUT: &str = "dropped_input";
const DROPPED_FORWARD: &str = "dropped_forward";
const DNS: u16 = 53;

/// What the host's rules are made from.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// Names the table and the slots' interfaces.
    pub(crate) name: PoolName,
    /// Where all slots' addresses are.
    pub(crate) subnet: Ipv4Net,
    /// Ranges that no guest ever reaches.
    pub(crate) deny: Vec<Ipv4Net>,
    /// Name servers within those ranges.
    pub(crate) resolvers: Vec<Ipv4Addr>,
    /// Uplinks on which forwarding was off.
    pub(crate) fenced_uplinks: Vec<String>,
    /// Interfaces that these uplinks do not forward to.
    pub(crate) fenced_off: Vec<String>,
}

/// Puts the rules in place of those of an earlier process.
pub(crate) fn install(netfilter: &mut Netfilter, rules: &Rules) -> io::Result<()> {
    let table = rules.name.as_str();
    let prefix = &rules.name.prefix();
    let from_slot = || Rule::new().input_interface(Name::StartsWith(prefix));
    let to_slot = || Rule::new().output_interface(Name::StartsWith(prefix));

    let mut batch = Batch::default();
    batch.replace_table(table);
    for counter in [DROPPED_INPUT, DROPPED_FORWARD] {
        batch.add_counter(table, counter);
    }
    batch.add_set(table, DENY, SetKind::AddressRanges);
    batch.add_ranges(table, DENY, &ranges(&rules.deny));
    batch.add_set(table, RESOLVERS, SetKind::AddressRanges);
    batch.add_ranges(table, RESOLVERS, &hosts(&rules.resolvers));
    for (set, interfaces) in [
        (FENCED_UPLINKS, &rules.fenced_uplinks),
        (FENCED_OFF, &rules.fenced_off),
    ] {
        batch.add_set(table, set, SetKind::Interfaces);
        batch.add_interfaces(table, set, interfaces);
    }
    for chain in ["slot_to_host", "from_slot", "to_slot"] {
        batch.add_chain(table, chain);
    }

    batch.add_base_chain(table, "input", Hook::Input, Policy::Accept);
    batch.add_rule(table, "input", from_slot().goto("slot_to_host"));
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        let dns = Rule::new()
            .destination_in(RESOLVERS)
            .protocol(protocol)
            .destination_port(DNS);
        batch.add_rule(table, "slot_to_host", dns.accept());
    }
    batch.add_rule(
        table,
        "slot_to_host",
        Rule::new().count(DROPPED_INPUT).drop(),
    );

    batch.add_base_chain(table, "forward", Hook::Forward, Policy::Accept);
    batch.add_rule(table, "forward", from_slot().goto("from_slot"));
    batch.add_rule(table, "forward", to_slot().goto("to_slot"));
    let fenced = Rule::new()
        .input_interface_in(FENCED_UPLINKS)
        .output_interface_in(FENCED_OFF);
    batch.add_rule(table, "forward", fenced.count(DROPPED_FORWARD).drop());

    let forbidden = [
        Rule::new().not_ipv4(),
        // To another slot, or back into the same one.
        to_slot(),
        Rule::new().source_in(rules.subnet, false),
        Rule::new().connection_state(CtState::INVALID),
    ];
    for rule in forbidden {
        batch.add_rule(table, "from_slot", rule.count(DROPPED_FORWARD).drop());
    }
    batch.add_rule(table, "from_slot", Rule::new().clamp_segment_size());
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        let dns = Rule::new()
            .destination_in(RESOLVERS)
            .protocol(protocol)
            .destination_port(DNS);
        batch.add_rule(table, "from_slot", dns.accept());
    }
    let denied = Rule::new().destination_in(DENY);
    batch.add_rule(table, "from_slot", denied.count(DROPPED_FORWARD).drop());
    batch.add_rule(table, "from_slot", Rule::new().accept());

    batch.add_rule(table, "to_slot", Rule::new().clamp_segment_size());
    let answers = Rule::new().connection_state(CtState::ESTABLISHED_OR_RELATED);
    batch.add_rule(table, "to_slot", answers.accept());
    batch.add_rule(table, "to_slot", Rule::new().count(DROPPED_FORWARD).drop());

    batch.add_base_chain(table, "postrouting", Hook::SourceNat, Policy::Accept);
    let leaving = Rule::new()
        .source_in(rules.subnet, true)
        .output_interface(Name::StartsNotWith(prefix));
    batch.add_rule(table, "postrouting", leaving.masquerade());
    batch.commit(netfilter)
}

/// The uplinks on which a pool switched forwarding on, as the pools' rules record: all pools, or
/// all but one.
pub(crate) fn fenced_uplinks(
    netfilter: &mut Netfilter,
    except: Option<&PoolName>,
) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for table in read::tables(netfilter)? {
        if except.is_none_or(|name| name.as_str() != table) {
            found.append(&mut read::interfaces(netfilter, &table, FENCED_UPLINKS)?);
        }
    }
    Ok(found)
}

/// Removes the rules, if there are any.
pub(crate) fn remove(netfilter: &mut Netfilter, name: &PoolName) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.add_table(name.as_str());
    batch.delete_table(name.as_str());
    batch.commit(netfilter)
}
