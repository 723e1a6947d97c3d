//! How a slot is made, made new again, and unmade. Each runs in a thread of its own.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::task::JoinSet;

use crate::{
    Error, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX_LEN, MTU,
    PoolConfig, Result, SlotIndex,
    address::{self, LINK_PREFIX_LEN, Link, TAP, UPLINK, host_mac, uplink_mac},
    conntrack, firewall, forwarding,
    links::{self, End, Settings},
    netlink::{Netfilter, Route},
    netns::{self, Netns, in_thread},
    sysctl, tap,
};

/// A slot as the pool keeps it.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) index: SlotIndex,
    pub(crate) link: Link,
    pub(crate) namespace: Netns,
    /// A socket in the slot's namespace, so that a change of policy need not enter it.
    pub(crate) netfilter: Arc<Mutex<Netfilter>>,
    /// The tap, until a VM gets it.
    pub(crate) tap: Option<OwnedFd>,
}

/// Locks what a panicking holder cannot leave half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Settings of a slot's namespace, made before it has interfaces, which take over the defaults.
const SLOT_SETTINGS: [(&str, &str); 9] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/default/rp_filter", "1"),
    // The guest learns the hardware address of its gateway, and of nothing behind it.
    ("ipv4/conf/default/arp_ignore", "1"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    // A guest is told about each denied packet, not only about one a second.
    ("ipv4/icmp_ratemask", "0"),
];

/// Makes slot `index`. Nothing is left of it on failure.
pub(crate) async fn build(config: Arc<PoolConfig>, host: Netns, index: SlotIndex) -> Result<Parts> {
    in_thread("make a network slot", move || {
        build_here(&config, &host, index).inspect_err(|_| {
            let undone = host.enter().and_then(|()| destroy_here(&config, index));
            if let Err(error) = undone {
                tracing::warn!(slot = %index, %error, "a half-made network slot is left behind");
            }
        })
    })
    .await
}

fn build_here(config: &PoolConfig, host: &Netns, index: SlotIndex) -> Result<Parts> {
    let link = address::link(config.subnet, index)?;
    let interface = config.name.interface(index);
    let namespace = Netns::create(&config.netns_path(index))?;

    for (key, value) in SLOT_SETTINGS {
        sysctl::set(key, value)?;
    }
    for scope in ["all", "default"] {
        sysctl::set_if_present(&format!("ipv6/conf/{scope}/disable_ipv6"), "1")?;
    }
    let netfilter = install_rules(config, link)?;
    let mut route = links::open()?;
    let here = End {
        name: UPLINK,
        mac: uplink_mac(index),
    };
    let there = End {
        name: &interface,
        mac: host_mac(index),
    };
    links::create_veth(&mut route, &here, &there, host.as_fd())?;
    let uplink = present(&mut route, index, UPLINK)?;
    links::configure(&mut route, uplink, &Settings::default())?;
    links::add_address(&mut route, uplink, link.slot, LINK_PREFIX_LEN)?;
    links::add_default_route(&mut route, uplink, link.host)?;
    let tap = make_tap(&mut route, index)?;

    host.enter()?;
    sysctl::set_if_present(&format!("ipv6/conf/{interface}/disable_ipv6"), "1")?;
    sysctl::set(&forwarding::key(&interface), "1")?;
    for (key, value) in [
        ("rp_filter", "1"),
        ("send_redirects", "0"),
        ("accept_redirects", "0"),
    ] {
        sysctl::set(&format!("ipv4/conf/{interface}/{key}"), value)?;
    }
    let inside = route;
    let mut route = links::open()?;
    let outside = present(&mut route, index, &interface)?;
    let alias = alias(config);
    let settings = Settings {
        alias: Some(&alias),
        ..Settings::default()
    };
    links::configure(&mut route, outside, &settings)?;
    links::add_address(&mut route, outside, link.host, LINK_PREFIX_LEN)?;
    links::settle(&inside, UPLINK)?;

    Ok(Parts {
        index,
        link,
        namespace,
        netfilter: Arc::new(Mutex::new(netfilter)),
        tap: Some(tap),
    })
}

/// What a slot's interface on the host says of its owner.
pub(crate) fn alias(config: &PoolConfig) -> String {
    format!("{ALIAS_PREFIX}{}", config.run_dir.display())
}

/// The part of [`alias`] before the owner's run directory.
pub(crate) const ALIAS_PREFIX: &str = "network slot of ";

/// A socket in the current namespace after putting a fresh slot's rules there.
fn install_rules(config: &PoolConfig, link: Link) -> Result<Netfilter> {
    let mut netfilter = open_netfilter()?;
    firewall::slot::install(&mut netfilter, &rules(config, link))
        .map_err(Error::kernel("install a network slot's rules"))?;
    Ok(netfilter)
}

pub(crate) fn open_netfilter() -> Result<Netfilter> {
    Netfilter::open().map_err(Error::system("open a netlink socket for rules"))
}

fn rules(config: &PoolConfig, link: Link) -> firewall::slot::Rules {
    firewall::slot::Rules {
        address: link.slot,
        never: config.always_denied(),
        resolvers: config.allow_hosts.clone(),
    }
}

/// Makes the tap and everything about it that goes when it goes.
fn make_tap(route: &mut Route, index: SlotIndex) -> Result<OwnedFd> {
    let tap = tap::create(index)?;
    let number = present(route, index, TAP)?;
    let settings = Settings {
        mac: Some(GATEWAY_MAC),
        mtu: Some(MTU),
        ..Settings::default()
    };
    links::configure(route, number, &settings)?;
    links::add_address(route, number, GATEWAY_ADDRESS, GUEST_PREFIX_LEN)?;
    links::add_neighbour(route, number, GUEST_ADDRESS, GUEST_MAC)?;
    Ok(tap)
}

fn present(route: &mut Route, index: SlotIndex, interface: &str) -> Result<u32> {
    links::index_of(route, interface)?.ok_or_else(|| Error::Damaged {
        index,
        interface: interface.to_owned(),
    })
}

/// Makes a used slot like new: a tap without a past, the rules of a fresh slot with counters at
/// zero, no connection remembered on either side.
pub(crate) async fn recycle(
    config: Arc<PoolConfig>,
    host: Netns,
    mut parts: Parts,
) -> (SlotIndex, Result<Parts>) {
    let index = parts.index;
    let namespace = parts.namespace.clone();
    let outcome = namespace.run("recycle a network slot", move || {
        let mut route = links::open()?;
        present(&mut route, index, UPLINK)?;
        if parts.tap.is_none() {
            parts.tap = Some(make_tap(&mut route, index)?);
        }
        let mut netfilter = lock(&parts.netfilter);
        // Looking through all connections of the host takes milliseconds, and many sandboxes never
        // open one that leaves the slot. Who cannot tell looks.
        let traffic = firewall::slot::traffic(&mut netfilter);
        let has_sent = traffic.map_or(true, |traffic| traffic.packets_sent > 0);
        firewall::slot::install(&mut netfilter, &rules(&config, parts.link)).map_err(
            Error::kernel(format!("renew the rules of network slot {index}")),
        )?;
        conntrack::flush(&mut netfilter).map_err(Error::kernel(format!(
            "forget the connections of network slot {index}"
        )))?;
        drop(netfilter);

        host.enter()?;
        let interface = config.name.interface(index);
        present(&mut links::open()?, index, &interface)?;
        if has_sent {
            conntrack::forget_from(&mut open_netfilter()?, parts.link.slot).map_err(
                Error::kernel(format!(
                    "forget the host's connections of network slot {index}"
                )),
            )?;
        }
        Ok(parts)
    });
    (index, outcome.await)
}

/// Removes slot `index`: its interfaces and the name of its namespace. What is not there is no
/// error. Runs in the host's namespace.
pub(crate) fn destroy_here(config: &PoolConfig, index: SlotIndex) -> Result<()> {
    let interface = config.name.interface(index);
    links::delete(&mut links::open()?, &interface)?;
    netns::forget(&config.netns_path(index))
}

/// What is to be removed: a slot by its number, and its parts where the pool holds them.
#[derive(Debug)]
pub(crate) struct Condemned {
    pub(crate) index: SlotIndex,
    pub(crate) parts: Option<Parts>,
}

impl From<SlotIndex> for Condemned {
    fn from(index: SlotIndex) -> Self {
        Self { index, parts: None }
    }
}

impl From<Parts> for Condemned {
    fn from(parts: Parts) -> Self {
        Self {
            index: parts.index,
            parts: Some(parts),
        }
    }
}

/// Removes a slot: [`destroy_here`], from anywhere.
pub(crate) async fn destroy(
    config: Arc<PoolConfig>,
    host: Netns,
    condemned: Condemned,
) -> Result<()> {
    host.run("remove a network slot", move || {
        // Closing the tap removes it, for which the kernel takes its time: done in this thread.
        drop(condemned.parts);
        destroy_here(&config, condemned.index)
    })
    .await
}

/// Removes several slots at once: most of what one takes is the kernel's waiting for packets that
/// may still be on their way.
pub(crate) async fn destroy_all(
    config: &Arc<PoolConfig>,
    host: &Netns,
    condemned: impl IntoIterator<Item = Condemned>,
) -> Vec<(SlotIndex, Result<()>)> {
    /// Each has a thread.
    const AT_ONCE: usize = 16;
    let mut running = JoinSet::new();
    let mut done = Vec::new();
    for condemned in condemned {
        if running.len() >= AT_ONCE {
            done.extend(running.join_next().await);
        }
        let (config, host, index) = (Arc::clone(config), host.clone(), condemned.index);
        running.spawn(async move { (index, destroy(config, host, condemned).await) });
    }
    done.extend(running.join_all().await.into_iter().map(Ok));
    // What runs there neither panics nor is it aborted.
    done.into_iter().flatten().collect()
}

/// Takes over a slot that a VM of an earlier process uses.
pub(crate) async fn adopt(config: Arc<PoolConfig>, host: Netns, index: SlotIndex) -> Result<Parts> {
    let refused = move |why| Error::NotAdoptable { index, why };
    in_thread("adopt a network slot", move || {
        let link = address::link(config.subnet, index)?;
        host.enter()?;
        let mut route = links::open()?;
        let outside = present(&mut route, index, &config.name.interface(index))?;
        if !links::has_address(&mut route, outside, link.host)? {
            return Err(refused("it was made for another subnet"));
        }
        let namespace = Netns::open(&config.netns_path(index))?
            .ok_or_else(|| refused("its namespace is gone"))?;
        namespace.enter()?;
        let mut route = links::open()?;
        present(&mut route, index, UPLINK)?;
        if links::index_of(&mut route, TAP)?.is_none() {
            return Err(refused("no VM uses it any more"));
        }
        let netfilter = Arc::new(Mutex::new(open_netfilter()?));
        Ok(Parts {
            index,
            link,
            namespace,
            netfilter,
            tap: None,
        })
    })
    .await
}
