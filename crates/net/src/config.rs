//! How a pool is set up.

use std::{net::Ipv4Addr, path::PathBuf, str::FromStr, time::Duration};

use ipnet::Ipv4Net;

use crate::{Error, GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_PREFIX_LEN, Result, SlotIndex, address};

/// Name of a pool: of its table of rules on the host and, with a number, of its interfaces.
///
/// 1 to 9 characters from `a` to `z` and `0` to `9`, the first a letter: an interface name has
/// room for 15, and a hyphen and five digits follow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolName(String);

impl PoolName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What all the host's interfaces of this pool, and no others, begin with.
    pub(crate) fn prefix(&self) -> String {
        format!("{}-", self.0)
    }

    /// Name of the host's end of a slot's link.
    pub(crate) fn interface(&self, index: SlotIndex) -> String {
        format!("{}-{index}", self.0)
    }

    /// The slot whose link to the host has this name.
    pub(crate) fn index_of(&self, interface: &str) -> Option<SlotIndex> {
        let number = interface.strip_prefix(&self.0)?.strip_prefix('-')?;
        let index = SlotIndex(number.parse().ok()?);
        (self.interface(index) == interface).then_some(index)
    }
}

impl Default for PoolName {
    fn default() -> Self {
        Self("cubicle".into())
    }
}

impl FromStr for PoolName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fits = (1..=9).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if fits {
            Ok(Self(text.into()))
        } else {
            Err(Error::Config(format!(
                "`{text}` is no name for a pool: 1 to 9 characters of a-z and 0-9, a letter first"
            )))
        }
    }
}

/// How a pool is set up. [`PoolConfig::default`] is what a machine of its own wants.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Distinguishes pools in one host namespace.
    pub name: PoolName,
    /// Directory, on a file system in memory, that holds the slots' namespaces (`netns/<index>`).
    pub run_dir: PathBuf,
    /// Slots that are kept ready beyond those in use. Up to twice as many stay ready after use,
    /// until nobody has taken one for [`linger`](Self::linger).
    pub size_min: usize,
    /// Slots that may exist at once, in use or ready.
    pub size_max: usize,
    /// How long after a slot was last taken more than [`size_min`](Self::size_min) of them stay
    /// ready.
    pub linger: Duration,
    /// Where the addresses of the links between slots and the host come from, two a slot. Used on
    /// this host only; choose a private range that nothing else here uses.
    pub subnet: Ipv4Net,
    /// Destinations that no guest ever reaches, whatever its policy. `subnet` and the guests' own
    /// link are denied whether listed or not.
    pub deny: Vec<Ipv4Net>,
    /// Name servers inside denied ranges, this host's own addresses included, that guests may
    /// nevertheless ask: port 53 of TCP and UDP, nothing else.
    pub allow_hosts: Vec<Ipv4Addr>,
}

/// What [`PoolConfig::deny`] is unless configured: networks that only the host should reach,
/// cloud metadata services, and everything that is not an address of a single host.
pub const DEFAULT_DENY: [Ipv4Net; 9] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4),
];

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            name: PoolName::default(),
            run_dir: PathBuf::from("/run/cubicle"),
            size_min: 8,
            size_max: 1024,
            linger: Duration::from_secs(10),
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 233, 0, 0), 16),
            deny: DEFAULT_DENY.to_vec(),
            allow_hosts: Vec::new(),
        }
    }
}

impl PoolConfig {
    /// The default for a pool of this name, with a subnet that follows from the name: pools of
    /// different names can very likely live on one host. The default name has the default subnet.
    #[must_use]
    pub fn named(name: PoolName) -> Self {
        let default = Self::default();
        if name == default.name {
            return default;
        }
        // FNV-1a: the same on every machine and in every version, as adoption needs.
        let hash = name.as_str().bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        // One of 10.128.0.0/16 to 10.232.0.0/16.
        let second = 128 + (hash % 105) as u8;
        let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, second, 0, 0), 16);
        Self {
            name,
            subnet,
            ..default
        }
    }

    /// Everything that is always denied.
    pub(crate) fn always_denied(&self) -> Vec<Ipv4Net> {
        let guests = Ipv4Net::new_assert(GUEST_ADDRESS, GUEST_PREFIX_LEN);
        self.deny
            .iter()
            .copied()
            .chain([self.subnet, guests])
            .collect()
    }

    pub(crate) fn netns_dir(&self) -> PathBuf {
        self.run_dir.join("netns")
    }

    pub(crate) fn netns_path(&self, index: SlotIndex) -> PathBuf {
        self.netns_dir().join(index.to_string())
    }

    pub(crate) fn check(&self) -> Result<()> {
        let config = |text: String| Err(Error::Config(text));
        if self.size_max == 0 || self.size_min > self.size_max {
            return config(format!(
                "at least one slot must be allowed and no more kept ready than allowed, not {} of {}",
                self.size_min, self.size_max
            ));
        }
        if self.subnet.prefix_len() == 32 || self.subnet.trunc() != self.subnet {
            return config(format!("{} is not a subnet", self.subnet));
        }
        if address::capacity(self.subnet) < self.size_max as u64 {
            return config(format!(
                "the subnet {} has room for {} slots, {} are allowed",
                self.subnet,
                address::capacity(self.subnet),
                self.size_max
            ));
        }
        if self.size_max > 100_000 {
            return config("no more than 100000 slots fit their interfaces' names".into());
        }
        if self.subnet.contains(&GUEST_ADDRESS) || self.subnet.contains(&GATEWAY_ADDRESS) {
            return config(format!(
                "the subnet {} holds the guests' own address",
                self.subnet
            ));
        }
        if !self.run_dir.is_absolute() {
            return config(format!(
                "{} is not an absolute path",
                self.run_dir.display()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_round_trip_and_are_told_from_others() {
        let name: PoolName = "cubicle".parse().unwrap();
        let interface = name.interface(SlotIndex(99_999));
        assert!(interface.len() <= 15, "{interface}");
        assert_eq!(name.index_of(&interface), Some(SlotIndex(99_999)));
        for other in [
            "cubicle",
            "cubicle-",
            "cubicle-x",
            "cubicle-01",
            "cubicle2-1",
            "cub-1",
            "cubicle-+1",
        ] {
            assert_eq!(name.index_of(other), None, "{other}");
        }
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        for bad in ["", "Cube", "1cube", "cube-", "abcdefghij", "cüb"] {
            assert!(bad.parse::<PoolName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_named_pool_has_a_subnet_of_its_own_each_time() {
        let subnet = |name: &str| PoolConfig::named(name.parse().unwrap()).subnet.to_string();
        assert_eq!(subnet("cubicle"), "10.233.0.0/16");
        assert_eq!(subnet("a"), "10.168.0.0/16");
        assert_eq!(subnet("b"), "10.225.0.0/16");
        PoolConfig::named("b".parse().unwrap()).check().unwrap();
    }

    #[test]
    fn a_config_that_cannot_work_says_why() {
        let text = |config: PoolConfig| config.check().unwrap_err().to_string();
        PoolConfig::default().check().unwrap();
        let small = PoolConfig {
            subnet: "10.9.0.0/28".parse().unwrap(),
            ..Default::default()
        };
        assert!(text(small).contains("room for 8 slots, 1024 are allowed"));
        let more = PoolConfig {
            size_min: 5,
            size_max: 4,
            ..Default::default()
        };
        assert!(text(more).contains("5 of 4"));
        let link_local = PoolConfig {
            subnet: "169.254.0.0/16".parse().unwrap(),
            ..Default::default()
        };
        assert!(text(link_local).contains("guests' own address"));
        let relative = PoolConfig {
            run_dir: "run".into(),
            ..Default::default()
        };
        assert!(text(relative).contains("absolute"));
    }
}
