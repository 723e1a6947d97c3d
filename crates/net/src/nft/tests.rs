//! What we send to the kernel, compared with what the `nft` tool sends for the same rules.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    thread,
};

use ipnet::Ipv4Net;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;

use super::*;
use crate::{
    EgressPolicy, PoolConfig,
    firewall::{host, slot},
    netlink::Netfilter,
    policy::ranges,
};

/// Runs `work` in a namespace of its own and returns the rules that are there afterwards.
fn rules_after(work: impl FnOnce() + Send) -> Value {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: this thread does nothing else.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
                work();
                listing()
            })
            .join()
            .unwrap()
    })
}

fn listing() -> Value {
    let listed = Command::new("nft")
        .args(["-j", "list", "ruleset"])
        .output()
        .unwrap();
    assert!(
        listed.status.success(),
        "{}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let mut rules: Value = serde_json::from_slice(&listed.stdout).unwrap();
    strip(&mut rules);
    // nft lists a table's sets and counters by kind, so only chains' order says something.
    rules
}

/// Takes out what differs between two equal sets of rules.
fn strip(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("handle");
            fields.remove("metainfo");
            fields.values_mut().for_each(strip);
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

fn load(text: &str) {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    nft.stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    assert!(nft.wait().unwrap().success(), "{text}");
}

/// Items of a listing in an order of their own: nft lists counters and sets as the kernel's hash
/// tables happen to hold them. Rules stay in the order of their chain.
fn canonical(listing: Value) -> Vec<String> {
    let items = listing["nftables"].as_array().unwrap().clone();
    let (rules, mut others): (Vec<Value>, Vec<Value>) = items
        .into_iter()
        .partition(|item| item.get("rule").is_some());
    others.sort_by_key(Value::to_string);
    let mut chains: Vec<Value> = rules;
    chains.sort_by_key(|rule| rule["rule"]["chain"].to_string());
    others.iter().chain(&chains).map(Value::to_string).collect()
}

fn assert_same(ours: impl FnOnce() + Send, text: &str) {
    let ours = canonical(rules_after(ours));
    let theirs = canonical(rules_after(|| load(text)));
    assert!(theirs.len() > 2, "{theirs:?}");
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
}

fn slot_rules() -> slot::Rules {
    slot::Rules {
        address: "10.233.0.5".parse().unwrap(),
        never: PoolConfig::default().always_denied(),
        resolvers: vec!["10.0.0.53".parse().unwrap()],
    }
}

const SLOT: &str = r#"
table inet slot {
    counter sent { }
    counter received { }
    counter denied { }
    counter spoofed { }
    set never {
        type ipv4_addr; flags interval
        elements = { 0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16,
                     172.16.0.0/12, 192.168.0.0/16, 224.0.0.0-255.255.255.255 }
    }
    set resolvers { type ipv4_addr; flags interval; elements = { 10.0.0.53 } }
    set allow { type ipv4_addr; flags interval; ALLOW }
    set deny { type ipv4_addr; flags interval; DENY }
    chain verdict {
        ct original ip daddr @never ct original ip daddr != @resolvers counter name denied reject with icmpx admin-prohibited
        ct original ip daddr @allow return
        ct original ip daddr @deny counter name denied reject with icmpx admin-prohibited
    }
    chain outbound {
        meta nfproto != ipv4 counter name spoofed drop
        ether saddr != 02:cb:1c:1e:00:21 counter name spoofed drop
        ip saddr != 169.254.0.21 counter name spoofed drop
        ct state invalid drop
        jump verdict
        counter name sent accept
    }
    chain inbound {
        jump verdict
        counter name received accept
    }
    chain input { type filter hook input priority filter; policy drop; }
    chain output {
        type filter hook output priority filter; policy drop;
        oifname "tap0" ct state related accept
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        iifname "tap0" oifname "uplink0" goto outbound
        iifname "uplink0" oifname "tap0" ct state established,related goto inbound
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        oifname "uplink0" snat ip to 10.233.0.5
    }
}
"#;

fn slot_text(allow: &str, deny: &str) -> String {
    SLOT.replace("ALLOW", allow).replace("DENY", deny)
}

#[test]
fn a_slots_rules_are_what_nft_makes_of_their_text() {
    let ours = || slot::install(&mut Netfilter::open().unwrap(), &slot_rules()).unwrap();
    assert_same(ours, &slot_text("", ""));
}

#[test]
fn installing_rules_again_leaves_nothing_of_the_old_ones() {
    let ours = || {
        let mut netfilter = Netfilter::open().unwrap();
        slot::install(&mut netfilter, &slot_rules()).unwrap();
        slot::set_policy(&mut netfilter, &EgressPolicy::deny_all()).unwrap();
        slot::install(&mut netfilter, &slot_rules()).unwrap();
    };
    assert_same(ours, &slot_text("", ""));
}

#[test]
fn a_policy_is_a_pair_of_sets_without_overlaps() {
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let policies: [(EgressPolicy, String); 4] = [
        (
            EgressPolicy::deny_all(),
            slot_text("", "elements = { 0.0.0.0-255.255.255.255 }"),
        ),
        (
            EgressPolicy {
                allow_out: nets(&[
                    "8.8.8.8/32",
                    "1.1.0.0/16",
                    "1.1.1.0/24",
                    "255.255.255.255/32",
                ]),
                deny_out: nets(&["0.0.0.0/1", "128.0.0.0/2"]),
            },
            slot_text(
                "elements = { 1.1.0.0/16, 8.8.8.8, 255.255.255.255 }",
                "elements = { 0.0.0.0-191.255.255.255 }",
            ),
        ),
        (
            EgressPolicy {
                allow_out: Vec::new(),
                deny_out: nets(&["203.0.113.0/25"]),
            },
            slot_text("", "elements = { 203.0.113.0/25 }"),
        ),
        (EgressPolicy::allow_all(), slot_text("", "")),
    ];
    // One after the other in one namespace: each replaces the one before.
    let mut done: Vec<EgressPolicy> = Vec::new();
    for (policy, text) in policies {
        done.push(policy);
        let ours = || {
            let mut netfilter = Netfilter::open().unwrap();
            slot::install(&mut netfilter, &slot_rules()).unwrap();
            for policy in &done {
                slot::set_policy(&mut netfilter, policy).unwrap();
            }
        };
        assert_same(ours, &text);
    }
}

#[test]
fn the_hosts_rules_are_what_nft_makes_of_their_text() {
    let rules = host::Rules {
        name: "cubicle".parse().unwrap(),
        subnet: "10.233.0.0/16".parse().unwrap(),
        deny: vec![
            "10.0.0.0/8".parse().unwrap(),
            "10.233.0.0/16".parse().unwrap(),
        ],
        resolvers: vec!["10.0.0.53".parse().unwrap(), "10.0.0.54".parse().unwrap()],
        fenced_uplinks: vec!["eth0".into()],
        fenced_off: vec!["eth0".into(), "eth1".into()],
    };
    let text = r#"
table inet cubicle {
    counter dropped_input { }
    counter dropped_forward { }
    set deny { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 } }
    set resolvers { type ipv4_addr; flags interval; elements = { 10.0.0.53-10.0.0.54 } }
    set fenced_uplinks { type ifname; elements = { "eth0" } }
    set fenced_off { type ifname; elements = { "eth0", "eth1" } }
    chain slot_to_host {
        ip daddr @resolvers udp dport 53 accept
        ip daddr @resolvers tcp dport 53 accept
        counter name dropped_input drop
    }
    chain from_slot {
        meta nfproto != ipv4 counter name dropped_forward drop
        oifname "cubicle-*" counter name dropped_forward drop
        ip saddr != 10.233.0.0/16 counter name dropped_forward drop
        ct state invalid counter name dropped_forward drop
        tcp flags syn / syn,rst tcp option maxseg size set rt mtu
        ip daddr @resolvers udp dport 53 accept
        ip daddr @resolvers tcp dport 53 accept
        ip daddr @deny counter name dropped_forward drop
        accept
    }
    chain to_slot {
        tcp flags syn / syn,rst tcp option maxseg size set rt mtu
        ct state established,related accept
        counter name dropped_forward drop
    }
    chain input {
        type filter hook input priority filter; policy accept;
        iifname "cubicle-*" goto slot_to_host
    }
    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname "cubicle-*" goto from_slot
        oifname "cubicle-*" goto to_slot
        iifname @fenced_uplinks oifname @fenced_off counter name dropped_forward drop
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.233.0.0/16 oifname != "cubicle-*" masquerade
    }
}
"#;
    let ours = || {
        let mut netfilter = Netfilter::open().unwrap();
        host::install(&mut netfilter, &rules).unwrap();
        assert_eq!(
            host::fenced_uplinks(&mut netfilter, None).unwrap(),
            ["eth0"]
        );
        let others = host::fenced_uplinks(&mut netfilter, Some(&rules.name)).unwrap();
        assert!(others.is_empty());
    };
    assert_same(ours, text);
    let gone = rules_after(|| {
        let mut netfilter = Netfilter::open().unwrap();
        host::remove(&mut netfilter, &rules.name).unwrap();
        host::install(&mut netfilter, &rules).unwrap();
        host::remove(&mut netfilter, &rules.name).unwrap();
        assert!(
            host::fenced_uplinks(&mut netfilter, None)
                .unwrap()
                .is_empty()
        );
    });
    let left = gone["nftables"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|item| item.get("table").is_some());
    assert_eq!(left.count(), 0, "{gone}");
}

#[test]
fn a_large_policy_fits_in_one_transaction() {
    // Every other /24 of 203.0.0.0/8 and on: 20,000 ranges that do not touch.
    let nets: Vec<Ipv4Net> = (0..20_000_u32)
        .map(|n| Ipv4Net::new((0xCB00_0000 + n * 512).into(), 24).unwrap())
        .collect();
    let policy = EgressPolicy {
        allow_out: Vec::new(),
        deny_out: nets,
    };
    let listed = rules_after(|| {
        let mut netfilter = Netfilter::open().unwrap();
        slot::install(&mut netfilter, &slot_rules()).unwrap();
        slot::set_policy(&mut netfilter, &policy).unwrap();
    });
    let sets = listed["nftables"].as_array().unwrap();
    let deny = sets
        .iter()
        .find(|item| item["set"]["name"] == "deny")
        .unwrap();
    assert_eq!(
        deny["set"]["elem"].as_array().unwrap().len(),
        ranges(&policy.deny_out).len()
    );
}

#[test]
fn a_refused_batch_changes_nothing_and_says_why() {
    let listed = rules_after(|| {
        let mut netfilter = Netfilter::open().unwrap();
        let mut batch = Batch::default();
        batch.replace_table("t");
        batch.add_chain("t", "c");
        batch.add_rule("t", "c", Rule::new().jump("nowhere"));
        let error = batch.commit(&mut netfilter).unwrap_err();
        assert_eq!(crate::netlink::errno(&error), Some(libc::ENOENT), "{error}");
        // The socket is as good as before.
        let mut batch = Batch::default();
        batch.replace_table("fine");
        batch.commit(&mut netfilter).unwrap();
    });
    let tables: Vec<&Value> = listed["nftables"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|item| item.get("table"))
        .collect();
    assert_eq!(tables.len(), 1, "{tables:?}");
    assert_eq!(tables[0]["name"], "fine");
}

#[test]
fn chains_that_drop_forwarded_packets_are_found() {
    rules_after(|| {
        load(
            "add table ip filter
             add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }
             add table inet mild
             add chain inet mild f { type filter hook forward priority 0; policy accept; }
             add chain inet mild i { type filter hook input priority 0; policy drop; }
             add table ip6 six
             add chain ip6 six f { type filter hook forward priority 0; policy drop; }
             ",
        );
        let found = read::chains_that_drop_forwarded(&mut Netfilter::open().unwrap()).unwrap();
        let expected = read::DroppingChain {
            table: "filter".into(),
            chain: "FORWARD".into(),
        };
        assert_eq!(found, [expected]);
    });
}
