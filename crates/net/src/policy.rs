//! What a guest may reach, and the arithmetic of address ranges behind it.

use std::ops::RangeInclusive;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// What a slot's guest may send to, on top of what no guest may ever reach
/// ([`PoolConfig::deny`](crate::PoolConfig::deny)).
///
/// The decision for a destination: always-denied ranges first, then `allow_out`, then `deny_out`,
/// then yes. So an allowed range wins over a denied one, and neither opens the host's networks.
/// A change takes effect on the next packet, in both directions, of connections that exist too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressPolicy {
    /// Destinations that are reachable even if `deny_out` covers them.
    pub allow_out: Vec<Ipv4Net>,
    /// Destinations that are not reachable unless `allow_out` covers them.
    pub deny_out: Vec<Ipv4Net>,
}

impl EgressPolicy {
    /// Everything that is not always denied. What a fresh slot has.
    #[must_use]
    pub fn allow_all() -> Self {
        Self::default()
    }

    /// Nothing at all, name servers included: a sandbox without internet access.
    #[must_use]
    pub fn deny_all() -> Self {
        Self {
            allow_out: Vec::new(),
            deny_out: vec![Ipv4Net::default()],
        }
    }

    /// Whether this is what a fresh slot has.
    #[must_use]
    pub fn is_allow_all(&self) -> bool {
        self.allow_out.is_empty() && self.deny_out.is_empty()
    }
}

/// The addresses of `nets` as ascending ranges of which no two touch. Sets in the kernel refuse
/// ranges that overlap.
pub(crate) fn ranges<'a>(nets: impl IntoIterator<Item = &'a Ipv4Net>) -> Vec<RangeInclusive<u32>> {
    let mut all: Vec<(u32, u32)> = nets
        .into_iter()
        .map(|net| (u32::from(net.network()), u32::from(net.broadcast())))
        .collect();
    all.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
        .into_iter()
        .map(|(first, last)| first..=last)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn net() -> impl Strategy<Value = Ipv4Net> {
        // Few distinct leading bits, so that ranges meet, nest and repeat.
        (0_u32..64, 0_u8..=32).prop_map(|(bits, prefix)| {
            Ipv4Net::new(Ipv4Addr::from(bits << 26 | bits), prefix)
                .unwrap()
                .trunc()
        })
    }

    proptest! {
        #[test]
        fn ranges_cover_the_same_addresses_and_never_touch(
            nets in prop::collection::vec(net(), 0..24),
            probes in prop::collection::vec(any::<u32>(), 32),
        ) {
            let ranges = ranges(&nets);
            let edges = nets.iter().flat_map(|net| {
                let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                [first, last, first.wrapping_sub(1), last.wrapping_add(1)]
            });
            for address in probes.into_iter().chain(edges) {
                let expected = nets.iter().any(|net| net.contains(&Ipv4Addr::from(address)));
                prop_assert_eq!(ranges.iter().any(|range| range.contains(&address)), expected);
            }
            for pair in ranges.windows(2) {
                prop_assert!(u64::from(*pair[0].end()) + 1 < u64::from(*pair[1].start()));
            }
        }
    }

    #[test]
    fn deny_all_covers_every_address() {
        assert_eq!(
            ranges(&EgressPolicy::deny_all().deny_out),
            vec![0..=u32::MAX]
        );
        assert!(EgressPolicy::allow_all().is_allow_all());
        assert!(!EgressPolicy::deny_all().is_allow_all());
    }
}
