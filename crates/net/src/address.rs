//! Which slot has which addresses and names. Everything follows from the slot's index, so nothing
//! about a slot has to be written down to be found again.

use std::{fmt, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The address that every guest has on its `eth0`.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The address of the tap, the guest's gateway.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Prefix length of the link between guest and gateway.
pub const GUEST_PREFIX_LEN: u8 = 30;
/// The guest's hardware address, the same in every sandbox.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xcb, 0x1c, 0x1e, 0x00, 0x21];
/// The tap's hardware address, the same in every slot: a guest that is restored elsewhere still
/// has it in its neighbour table.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xcb, 0x1c, 0x1e, 0x00, 0x22];
/// Largest packet, in bytes, on every link of a slot.
pub const MTU: u32 = 1500;

/// Name of the guest-facing interface inside a slot's namespace.
pub(crate) const TAP: &str = "tap0";
/// Name of the host-facing interface inside a slot's namespace.
pub(crate) const UPLINK: &str = "uplink0";

/// Number of a slot, from 0. A free number is used again; it also selects the user id of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SlotIndex(pub u32);

impl fmt::Display for SlotIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How many slots a subnet has room for: each takes a pair of addresses.
pub(crate) fn capacity(subnet: Ipv4Net) -> u64 {
    1 << (31 - u64::from(subnet.prefix_len().min(31)))
}

/// The two ends of the link between a slot and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// The host's end: even.
    pub(crate) host: Ipv4Addr,
    /// The slot's end: odd, and what the host's side sees as the source of all the guest sends.
    pub(crate) slot: Ipv4Addr,
}

/// Prefix length of the link between a slot and the host (RFC 3021).
pub(crate) const LINK_PREFIX_LEN: u8 = 31;

/// The addresses of slot `index` in `subnet`.
pub(crate) fn link(subnet: Ipv4Net, index: SlotIndex) -> Result<Link> {
    if u64::from(index.0) >= capacity(subnet) {
        return Err(Error::Config(format!(
            "the subnet {subnet} has room for {} slots, there is none with number {index}",
            capacity(subnet)
        )));
    }
    let host = u32::from(subnet.network()) + 2 * index.0;
    Ok(Link {
        host: Ipv4Addr::from(host),
        slot: Ipv4Addr::from(host + 1),
    })
}

/// Hardware address of the host's end of a slot's link.
pub(crate) fn host_mac(index: SlotIndex) -> [u8; 6] {
    let [a, b, c, d] = index.0.to_be_bytes();
    [0x06, 0xcb, a, b, c, d]
}

/// Hardware address of the slot's end of its link to the host.
pub(crate) fn uplink_mac(index: SlotIndex) -> [u8; 6] {
    let [a, b, c, d] = index.0.to_be_bytes();
    [0x0a, 0xcb, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_subnet_of_16_bits_holds_32768_slots() {
        let subnet: Ipv4Net = "10.233.0.0/16".parse().unwrap();
        assert_eq!(capacity(subnet), 32768);
        let last = link(subnet, SlotIndex(32767)).unwrap();
        assert_eq!(last.slot, Ipv4Addr::new(10, 233, 255, 255));
        assert!(link(subnet, SlotIndex(32768)).is_err());
        assert_eq!(capacity("10.0.0.0/31".parse().unwrap()), 1);
    }

    proptest! {
        #[test]
        fn no_two_slots_share_an_address(prefix in 16_u8..=31, a in 0_u32..32768, b in 0_u32..32768) {
            let subnet = Ipv4Net::new(Ipv4Addr::new(10, 233, 0, 0), prefix).unwrap();
            if let (Ok(x), Ok(y)) = (link(subnet, SlotIndex(a)), link(subnet, SlotIndex(b))) {
                for address in [x.host, x.slot] {
                    prop_assert!(subnet.contains(&address));
                    prop_assert_eq!(a == b, address == y.host || address == y.slot);
                }
                prop_assert_eq!(a == b, host_mac(SlotIndex(a)) == host_mac(SlotIndex(b)));
            }
        }
    }
}
