//! Can this host have slots? Tried out, not inferred: everything a slot consists of is made once
//! in a namespace that is thrown away, so the host is not changed.

use std::{
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use ipnet::Ipv4Net;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde::Serialize;

use crate::{
    EgressPolicy, Error, PoolName, Result, SlotIndex,
    address::{TAP, UPLINK},
    conntrack, firewall,
    links::{self, End},
    netlink::Netfilter,
    netns::{self, Netns},
    nft::{Batch, CtState, Hook, Policy, Rule, SetKind, Unreachable, read},
    provision::open_netfilter,
    sysctl, tap,
};

/// Whether the host can do something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum State {
    /// It can.
    Available,
    /// It cannot, and slots do not work without.
    Missing {
        /// What happened when it was tried.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// Slots can be made, but guests may reach less than they should.
    Doubtful {
        /// What was seen.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
}

/// One thing that slots need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// What it is, in a few words.
    pub name: &'static str,
    /// What slots need it for.
    pub purpose: &'static str,
    /// Whether the host has it.
    #[serde(flatten)]
    pub state: State,
}

/// What a host can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Everything that was tried.
    pub capabilities: Vec<Capability>,
}

impl Report {
    /// Whether slots can be made.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !self
            .capabilities
            .iter()
            .any(|it| matches!(it.state, State::Missing { .. }))
    }

    fn add(&mut self, name: &'static str, purpose: &'static str, remedy: &str, tried: Result<()>) {
        let state = match tried {
            Ok(()) => State::Available,
            Err(error) => State::Missing {
                reason: error.to_string(),
                remedy: remedy.to_owned(),
            },
        };
        self.capabilities.push(Capability {
            name,
            purpose,
            state,
        });
    }
}

/// Finds out what this host can do for slots. Takes some milliseconds; changes nothing.
#[must_use]
pub fn probe() -> Report {
    // A thread of its own, because it never leaves the namespace that it tries things in.
    thread::scope(|scope| {
        scope.spawn(run).join().unwrap_or_else(|_| {
            let mut report = Report::default();
            let purpose = "to know what the host can do";
            report.add(
                "the probe itself",
                purpose,
                "report this as a bug",
                Err(died()),
            );
            report
        })
    })
}

fn died() -> Error {
    Error::WorkerDied {
        action: "try out what the host can do".into(),
    }
}

fn run() -> Report {
    let mut report = Report::default();
    let forward = forward_policy();
    let mount = mount_at_temporary();
    // SAFETY: unsharing the network namespace touches neither memory nor the file table, and this
    // thread ends with the probe.
    let inside = unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(Error::system("make a network namespace"));
    let isolated = inside.is_ok();
    report.add(
        "network namespaces",
        "isolation of sandboxes",
        "run as root (CAP_SYS_ADMIN and CAP_NET_ADMIN), on a kernel with CONFIG_NET_NS",
        inside,
    );
    if !isolated {
        return report;
    }
    report.add(
        "namespace files",
        "slots that outlive a restart of the server",
        "run as root, and not in a container that may not mount",
        mount,
    );
    report.add(
        "tap devices",
        "the guest's end of a slot",
        "load the module: `modprobe tun` (CONFIG_TUN), and make /dev/net/tun available",
        tap::create(SlotIndex(0)).map(drop),
    );
    report.add(
        "veth pairs",
        "the link between a slot and the host",
        "load the module: `modprobe veth` (CONFIG_VETH)",
        try_veth(),
    );
    report.add(
        "kernel settings",
        "forwarding inside a slot",
        "make /proc/sys/net writable (in a container: run it privileged)",
        sysctl::set("ipv4/ip_forward", "1"),
    );
    match open_netfilter() {
        Ok(mut netfilter) => try_rules(&mut report, &mut netfilter),
        Err(error) => {
            let remedy = "load the module: `modprobe nfnetlink` (CONFIG_NETFILTER_NETLINK)";
            report.add("nftables", "rules", remedy, Err(error));
        }
    }
    report.capabilities.extend(forward);
    report
}

fn mount_at_temporary() -> Result<()> {
    static TRIES: AtomicU32 = AtomicU32::new(0);
    let number = TRIES.fetch_add(1, Ordering::Relaxed);
    let path = Path::new("/run").join(format!("cubicle-probe-{}-{number}", std::process::id()));
    let tried = thread::scope(|scope| scope.spawn(|| Netns::create(&path).map(drop)).join());
    let forgotten = netns::forget(&path);
    tried.unwrap_or_else(|_| Err(died()))?;
    forgotten
}

fn try_veth() -> Result<()> {
    // Both ends stay with the probe: the host's namespace is not to be touched.
    let own = Netns::current()?;
    let here = End {
        name: UPLINK,
        mac: [0x02, 0, 0, 0, 0, 1],
    };
    let there = End {
        name: TAP,
        mac: [0x02, 0, 0, 0, 0, 2],
    };
    links::create_veth(&mut links::open()?, &here, &there, own.as_fd())
}

const TABLE: &str = "probe";

fn try_rules(report: &mut Report, netfilter: &mut Netfilter) {
    let purpose = "rules that confine sandboxes";
    let mut tables = Batch::default();
    tables.replace_table(TABLE);
    let remedy = "load the module: `modprobe nf_tables` (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)";
    let usable = commit(tables, netfilter);
    let failed = usable.is_err();
    report.add("nftables", purpose, remedy, usable);
    if failed {
        return;
    }
    let address = Ipv4Addr::new(192, 0, 2, 1);
    let rules: [(&'static str, Hook, Rule, &str); 7] = [
        (
            "connection tracking",
            Hook::Forward,
            Rule::new().connection_state(CtState::INVALID).drop(),
            "`modprobe nf_conntrack nft_ct` (CONFIG_NF_CONNTRACK, CONFIG_NFT_CT)",
        ),
        (
            "connection destinations",
            Hook::Forward,
            Rule::new().connection_to("ranges", true).drop(),
            "a kernel of at least 4.17",
        ),
        (
            "address translation",
            Hook::SourceNat,
            Rule::new().source_nat(address),
            "`modprobe nft_chain_nat nft_nat` (CONFIG_NF_NAT, CONFIG_NFT_NAT)",
        ),
        (
            "masquerading",
            Hook::SourceNat,
            Rule::new().masquerade(),
            "`modprobe nft_masq` (CONFIG_NFT_MASQ)",
        ),
        (
            "rejection",
            Hook::Forward,
            Rule::new().reject(Unreachable::Prohibited),
            "`modprobe nft_reject_inet` (CONFIG_NFT_REJECT, CONFIG_NFT_REJECT_INET)",
        ),
        (
            "segment size clamping",
            Hook::Forward,
            Rule::new().clamp_segment_size(),
            "a kernel of at least 4.14",
        ),
        (
            "hardware addresses",
            Hook::Forward,
            Rule::new().source_mac_is_not([2, 0, 0, 0, 0, 1]).drop(),
            "a kernel of at least 4.10",
        ),
    ];
    for (name, hook, rule, remedy) in rules {
        let mut batch = Batch::default();
        batch.replace_table(TABLE);
        batch.add_set(TABLE, "ranges", SetKind::AddressRanges);
        batch.add_base_chain(TABLE, "chain", hook, Policy::Accept);
        batch.add_rule(TABLE, "chain", rule);
        report.add(name, purpose, remedy, commit(batch, netfilter));
    }
    let whole = firewall::slot::Rules {
        address,
        never: vec![Ipv4Net::from(address)],
        resolvers: vec![address],
    };
    let slot = firewall::slot::install(netfilter, &whole)
        .and_then(|()| firewall::slot::set_policy(netfilter, &EgressPolicy::deny_all()))
        .and_then(|()| firewall::slot::traffic(netfilter).map(drop));
    let remedy = "report this as a bug, with the kernel's version";
    report.add(
        "a slot's rules",
        purpose,
        remedy,
        slot.map_err(Error::kernel("install them")),
    );
    let host = firewall::host::Rules {
        name: PoolName::default(),
        subnet: Ipv4Net::from(address),
        deny: whole.never,
        resolvers: whole.resolvers,
        fenced_uplinks: vec!["eth0".into()],
        fenced_off: vec!["eth0".into()],
    };
    let host = firewall::host::install(netfilter, &host);
    report.add(
        "the host's rules",
        purpose,
        remedy,
        host.map_err(Error::kernel("install them")),
    );
    let forgotten = conntrack::flush(netfilter)
        .and_then(|()| conntrack::forget_from(netfilter, address).map(drop));
    report.add(
        "forgetting connections",
        "slots that are used again",
        "load the module: `modprobe nf_conntrack_netlink` (CONFIG_NF_CT_NETLINK)",
        forgotten.map_err(Error::kernel("forget connections")),
    );
}

fn commit(batch: Batch, netfilter: &mut Netfilter) -> Result<()> {
    batch
        .commit(netfilter)
        .map_err(Error::kernel("install a rule"))
}

/// Other rules of the host that drop what slots send. Only those of nftables can be seen.
fn forward_policy() -> Option<Capability> {
    let chains = open_netfilter()
        .and_then(|mut netfilter| {
            read::chains_that_drop_forwarded(&mut netfilter).map_err(Error::kernel("list chains"))
        })
        .unwrap_or_else(|error: Error| {
            tracing::debug!(%error, "the host's rules cannot be listed");
            Vec::new()
        });
    let chain = chains.first()?;
    Some(Capability {
        name: "the host's own firewall",
        purpose: "sandboxes that reach the internet",
        state: State::Doubtful {
            reason: format!(
                "the chain {} of the table {} drops forwarded packets unless a rule of its own \
                 accepts them",
                chain.chain, chain.table
            ),
            remedy: format!(
                "accept what comes from and goes to the interfaces {}* there (with Docker: \
                 `iptables -I DOCKER-USER -i {}+ -j ACCEPT`, and the same with -o)",
                PoolName::default().prefix(),
                PoolName::default().prefix()
            ),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_missing_capability_makes_a_host_unusable_and_a_doubtful_one_does_not() {
        let mut report = Report::default();
        report.add("a", "x", "", Ok(()));
        let doubt = State::Doubtful {
            reason: "r".into(),
            remedy: "m".into(),
        };
        report.capabilities.push(Capability {
            name: "b",
            purpose: "x",
            state: doubt,
        });
        assert!(report.is_usable());
        let error = Error::kernel("try it")(io::Error::from_raw_os_error(libc::EPERM));
        report.add("c", "x", "do this", Err(error));
        assert!(!report.is_usable());
        let json = serde_json::to_value(&report.capabilities[2]).unwrap();
        assert_eq!(json["state"], "missing");
        assert_eq!(json["remedy"], "do this");
        assert!(
            json["reason"]
                .as_str()
                .unwrap()
                .starts_with("the kernel refused to try it: ")
        );
    }
}
