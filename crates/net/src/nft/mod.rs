//! Rules of the kernel's packet filter (nftables), written and read over netlink.
//!
//! A thin layer over the message types of `netlink-packet-netfilter`: [`Batch`] collects changes
//! and commits them as one transaction, [`Rule`] spells rules in the words of the `nft` tool, and
//! [`read`] fetches back what is there. All tables are of the family `inet`.

mod batch;
pub(crate) mod read;
mod rule;
#[cfg(test)]
mod tests;

pub(crate) use batch::{Batch, Hook, Policy, SetKind};
pub(crate) use rule::{CtState, Name, Rule, Unreachable};

/// Network byte order of a number, as nftables wants its attributes.
fn be32(value: u32) -> Vec<u8> {
    value.to_be_bytes().to_vec()
}

/// A text with the end mark that the kernel expects.
fn text(value: &str) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// An interface name as the kernel compares it: 16 bytes, the rest zero.
fn interface_key(name: &str) -> Vec<u8> {
    let mut key = name.as_bytes().to_vec();
    key.resize(libc::IFNAMSIZ, 0);
    key
}
