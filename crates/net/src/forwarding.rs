//! Forwarding on the host without making a router of it.
//!
//! The kernel decides by the interface that a packet arrives on whether it may be forwarded. So
//! `net.ipv4.conf.<interface>.forwarding` is switched on for each slot's interface and for the
//! uplinks, those with a default route, and the host-wide `net.ipv4.ip_forward` is left alone.
//! An uplink where it was off gets a fence in the host's rules.

use crate::{
    Result,
    links::{self, Destination, Interface},
    netlink::Route,
    provision::ALIAS_PREFIX,
    sysctl,
};

/// The host-wide switch, as the kernel's `all` pseudo-interface.
const EVERYWHERE: &str = "ipv4/conf/all/forwarding";

pub(crate) fn key(interface: &str) -> String {
    format!("ipv4/conf/{interface}/forwarding")
}

/// What has to change for guests to get out.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Uplinks that would not forward, were it not for the slots.
    pub(crate) fenced_uplinks: Vec<String>,
    /// Interfaces that these must not forward to.
    pub(crate) fenced_off: Vec<String>,
    /// Whether there is any uplink at all.
    pub(crate) has_uplink: bool,
}

/// Looks at the calling thread's namespace. `ours` are the uplinks that a pool has switched on, an
/// earlier process or another pool.
pub(crate) fn plan(route: &mut Route, ours: &[String]) -> Result<Plan> {
    let interfaces = links::list(route)?;
    let uplinks: Vec<u32> = links::routes(route)?
        .into_iter()
        .filter(Destination::is_default)
        .flat_map(|destination| destination.interfaces)
        .collect();
    let host_forwards = sysctl::is_on(EVERYWHERE)?;
    let mut plan = Plan {
        has_uplink: !uplinks.is_empty(),
        ..Plan::default()
    };
    if host_forwards {
        // The host is a router by its owner's will.
        return Ok(plan);
    }
    for link in interfaces {
        if link.name == "lo" || is_slots(&link) {
            continue;
        }
        let was_off = ours.contains(&link.name) || !sysctl::is_on(&key(&link.name))?;
        if uplinks.contains(&link.index) && was_off {
            plan.fenced_uplinks.push(link.name.clone());
        }
        plan.fenced_off.push(link.name);
    }
    Ok(plan)
}

/// Whether an interface is that of a slot, of this pool or another.
fn is_slots(link: &Interface) -> bool {
    link.alias
        .as_deref()
        .is_some_and(|alias| alias.starts_with(ALIAS_PREFIX))
}

/// Switches forwarding on. The fence is up already.
pub(crate) fn enable(plan: &Plan) -> Result<()> {
    plan.fenced_uplinks
        .iter()
        .try_for_each(|uplink| sysctl::set(&key(uplink), "1"))
}

/// Switches forwarding off again where it was, unless another pool needs it.
pub(crate) fn restore(uplinks: &[String], others: &[String]) -> Result<()> {
    if sysctl::is_on(EVERYWHERE)? {
        return Ok(());
    }
    uplinks
        .iter()
        .filter(|uplink| !others.contains(uplink))
        .try_for_each(|uplink| sysctl::set_if_present(&key(uplink), "0"))
}
