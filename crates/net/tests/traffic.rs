//! What guests reach and what they do not, with real packets.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsFd as _,
    time::Instant,
};

use cubicle_net::{EgressPolicy, GATEWAY_ADDRESS, GUEST_ADDRESS, PoolConfig, SlotPool};
use etherparse::PacketBuilder;
use support::*;

const GUEST_MAC: [u8; 6] = cubicle_net::GUEST_MAC;
const GATEWAY_MAC: [u8; 6] = cubicle_net::GATEWAY_MAC;

#[test]
fn a_guest_reaches_the_internet_with_the_hosts_address() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        let (pool, slot, guest) = world.guest(world.config()).await;

        let (mut stream, me) = guest.connect(SERVER, 80).unwrap();
        assert_eq!(me, HOST);
        let echoed = guest.space.run(move || {
            // More than any buffer on the way holds.
            let sent: Vec<u8> = (0..4_000_000_u32).map(|n| (n % 251) as u8).collect();
            let copy = sent.clone();
            let mut writer = stream.try_clone().unwrap();
            let writing = std::thread::spawn(move || writer.write_all(&copy));
            let mut received = vec![0; sent.len()];
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.read_exact(&mut received).unwrap();
            writing.join().unwrap().unwrap();
            received == sent
        });
        assert!(echoed);
        assert_eq!(guest.ask(SERVER, 80, "hello").unwrap(), "hello");
        guest.pings(SERVER).unwrap();

        let traffic = slot.traffic().await.unwrap();
        assert!(traffic.bytes_sent > 4_000_000 && traffic.bytes_received > 4_000_000);
        assert_eq!((traffic.packets_denied, traffic.packets_spoofed), (0, 0));
        drop(guest);
        pool.release(slot).await.unwrap();
        assert_eq!(pool.close().await.unwrap().left, []);
    });
}

fn udp(source_mac: [u8; 6], source: [u8; 4], to: Ipv4Addr) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(source_mac, GATEWAY_MAC)
        .ipv4(source, to.octets(), 64)
        .udp(5000, 9);
    let mut frame = Vec::with_capacity(builder.size(4));
    builder.write(&mut frame, b"spam").unwrap();
    frame
}

#[test]
fn a_guest_sends_as_itself_or_not_at_all() {
    in_world(async |world| {
        let heard = || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9)).unwrap();
            move |patience| {
                socket.set_read_timeout(Some(patience)).unwrap();
                let mut datagram = [0; 64];
                socket.recv_from(&mut datagram).map(|(_, from)| from.ip())
            }
        };
        let (_pool, slot, guest) = world.guest(world.config()).await;
        let me = GUEST_ADDRESS.octets();

        let listening = world.internet.run(heard);
        guest.inject(&udp(GUEST_MAC, me, SERVER));
        let listening = world.internet.run(move || {
            assert_eq!(listening(PATIENCE).unwrap(), HOST);
            listening
        });
        assert_eq!(slot.traffic().await.unwrap().packets_spoofed, 0);

        let other_mac = [2, 0, 0, 0, 0, 9];
        guest.inject(&udp(other_mac, me, SERVER));
        guest.inject(&udp(GUEST_MAC, [169, 254, 0, 20], SERVER));
        guest.inject(&udp(GUEST_MAC, slot.address().octets(), SERVER));
        guest.inject(&udp(GUEST_MAC, [203, 0, 113, 77], SERVER));
        world
            .internet
            .run(move || assert_silence(&listening(SILENCE)));
        // The kernel's check of reverse paths already stops what could not be answered.
        assert!(slot.traffic().await.unwrap().packets_spoofed >= 2);
        assert_eq!(slot.traffic().await.unwrap().packets_sent, 1);
    });
}

#[test]
fn forbidden_ranges_are_refused_at_once_whatever_the_policy_says() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        let open = PoolConfig {
            deny: Vec::new(),
            ..world.config()
        };
        let (pool, slot, guest) = world.guest(open).await;
        for address in FORBIDDEN.into_iter().filter(|a| !a.is_link_local()) {
            // All would be reachable, were they not denied.
            guest.reaches(address, 80).unwrap();
        }
        drop(guest);
        pool.release(slot).await.unwrap();
        pool.close().await.unwrap();

        let (_pool, slot, guest) = world.guest(world.config()).await;
        let allow_out = FORBIDDEN.iter().map(|&address| address.into()).collect();
        for policy in [
            EgressPolicy::allow_all(),
            EgressPolicy {
                allow_out,
                deny_out: Vec::new(),
            },
            EgressPolicy::deny_all(),
        ] {
            slot.set_policy(&policy).await.unwrap();
            for address in FORBIDDEN {
                let started = Instant::now();
                assert_refused(&guest.reaches(address, 80));
                assert!(started.elapsed() < PATIENCE / 10);
                assert_refused(&guest.ask(address, 80, "x"));
            }
        }
        slot.set_policy(&EgressPolicy::allow_all()).await.unwrap();
        guest.reaches(SERVER, 80).unwrap();
        assert!(slot.traffic().await.unwrap().packets_denied >= 30);
    });
}

#[test]
fn slots_do_not_reach_each_other_nor_the_host() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        serve(Ipv4Addr::UNSPECIFIED, 81);
        let config = PoolConfig {
            deny: Vec::new(),
            ..world.config()
        };
        let (pool, one, guest) = world.guest(config).await;
        let mut two = pool.acquire().await.unwrap();
        let neighbour = Guest::attach(&mut two);
        neighbour.space.run(|| serve(Ipv4Addr::UNSPECIFIED, 82));

        // The servers are there.
        world
            .internet
            .run(|| connect(HOST, 81, PATIENCE).map(drop))
            .unwrap();
        neighbour
            .space
            .run(|| connect(GUEST_ADDRESS, 82, PATIENCE).map(drop))
            .unwrap();
        guest.reaches(SERVER, 80).unwrap();

        let gateway = Ipv4Addr::from(u32::from(one.address()) - 1);
        assert_refused(&guest.reaches(two.address(), 82));
        assert_refused(&guest.reaches(gateway, 81));
        for address in [HOST, GATEWAY_ADDRESS, one.address()] {
            guest.hears_nothing_from(address, 81);
            guest.hears_no_echo_from(address);
        }
        // Nor does the world behind the uplink reach into a slot.
        world.internet.run(|| {
            ip(&format!("route add 10.233.0.0/16 via {HOST}"));
        });
        let address = two.address();
        world.internet.run(move || hears_nothing_from(address, 82));
    });
}

#[test]
fn the_hosts_rules_hold_when_a_slots_rules_are_gone() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        serve(Ipv4Addr::UNSPECIFIED, 81);
        let (pool, slot, _guest) = world.guest(world.config()).await;
        let mut two = pool.acquire().await.unwrap();
        let neighbour = Guest::attach(&mut two);
        neighbour.space.run(|| serve(Ipv4Addr::UNSPECIFIED, 82));

        // Somebody has taken over the slot's namespace, entirely.
        let taken = Space::of(slot.netns_fd().unwrap());
        taken.run(|| sh("nft", "flush ruleset"));
        taken.run(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap());
        taken
            .run(|| connect(SERVER, 80, PATIENCE).map(drop))
            .unwrap();

        let gateway = Ipv4Addr::from(u32::from(slot.address()) - 1);
        let other = two.address();
        for (address, port) in FORBIDDEN
            .into_iter()
            .map(|address| (address, 80))
            .chain([(other, 82)])
        {
            taken.run(move || hears_nothing_from(address, port));
        }
        for address in [gateway, HOST] {
            taken.run(move || hears_nothing_from(address, 81));
            taken.run(move || assert_silence(&ping(address, SILENCE)));
        }
        // It cannot send as somebody else either: not as its neighbour, not as a stranger.
        let heard = world.internet.run(|| {
            let socket = UdpSocket::bind((SERVER, 9)).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            socket
        });
        for source in [other, Ipv4Addr::new(198, 51, 100, 200)] {
            taken.run(move || {
                ip(&format!("addr add {source}/32 dev uplink0"));
                let socket = UdpSocket::bind((source, 0)).unwrap();
                socket.send_to(b"x", (SERVER, 9)).unwrap();
            });
        }
        world
            .internet
            .run(move || assert_silence(&heard.recv(&mut [0; 16])));
    });
}

#[test]
fn a_configured_name_server_answers_and_offers_nothing_else() {
    in_world(async |world| {
        let inner = FORBIDDEN[0];
        for port in [53, 54] {
            world.internet.run(move || serve(inner, port));
            serve(HOST, port);
        }
        let config = PoolConfig {
            allow_hosts: vec![HOST, inner],
            ..world.config()
        };
        let (_pool, slot, guest) = world.guest(config).await;
        for server in [HOST, inner] {
            assert_eq!(guest.ask(server, 53, "name?").unwrap(), "name?");
            guest.reaches(server, 53).unwrap();
            guest.hears_nothing_from(server, 54);
        }
        assert_refused(&guest.reaches(FORBIDDEN[1], 53));
        slot.set_policy(&EgressPolicy::deny_all()).await.unwrap();
        for server in [HOST, inner] {
            assert_refused(&guest.ask(server, 53, "name?"));
        }
    });
}

#[test]
fn a_process_in_the_slots_namespace_has_no_way_but_the_tap() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        let (_pool, slot, guest) = world.guest(world.config()).await;
        guest.space.run(|| serve(Ipv4Addr::UNSPECIFIED, 82));
        guest.reaches(SERVER, 80).unwrap();

        let inside = Space::of(slot.netns_fd().unwrap());
        inside.run(|| {
            for address in [SERVER, HOST, GUEST_ADDRESS] {
                for port in [80, 82] {
                    let refused = ask(address, port, "x", PATIENCE).unwrap_err();
                    assert_eq!(
                        refused.kind(),
                        std::io::ErrorKind::PermissionDenied,
                        "{refused}"
                    );
                    assert!(connect(address, port, SILENCE).is_err());
                }
            }
            // Nor can it listen: nothing gets in.
            serve(Ipv4Addr::UNSPECIFIED, 83);
        });
        guest.hears_nothing_from(GATEWAY_ADDRESS, 83);
        let address = slot.address();
        assert!(connect(address, 83, SILENCE).is_err());
    });
}

#[test]
fn a_policy_holds_at_once_also_for_connections_under_way() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        let (pool, slot, guest) = world.guest(world.config()).await;
        let (mut stream, _) = guest.connect(SERVER, 80).unwrap();
        let (mut other, _) = guest.connect(OTHER_SERVER, 80).unwrap();

        slot.set_policy(&EgressPolicy::deny_all()).await.unwrap();
        assert_refused(&guest.reaches(SERVER, 80));
        assert_refused(&guest.ask(SERVER, 80, "x"));
        assert_refused(&guest.pings(SERVER));
        let stream = guest.space.run(move || {
            stream.set_read_timeout(Some(SILENCE)).unwrap();
            stream.write_all(b"are you there?").unwrap();
            assert!(stream.read(&mut [0; 64]).is_err());
            stream
        });

        // Allowing wins over denying; the connection that is allowed again goes on.
        let allow_out = vec!["203.0.113.0/24".parse().unwrap()];
        let some = EgressPolicy {
            allow_out,
            ..EgressPolicy::deny_all()
        };
        slot.set_policy(&some).await.unwrap();
        guest.reaches(SERVER, 80).unwrap();
        assert_refused(&guest.reaches(OTHER_SERVER, 80));
        guest.space.run(move || {
            let mut stream = stream;
            // What was sent meanwhile is sent again by TCP, after a while.
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut answer = [0; 14];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"are you there?");
            other.set_read_timeout(Some(SILENCE)).unwrap();
            other.write_all(b"x").unwrap();
            assert!(other.read(&mut [0; 1]).is_err());
        });

        let deny_out = vec!["203.0.113.10/32".parse().unwrap()];
        slot.set_policy(&EgressPolicy {
            deny_out,
            ..EgressPolicy::default()
        })
        .await
        .unwrap();
        assert_refused(&guest.reaches(SERVER, 80));
        guest.reaches(OTHER_SERVER, 80).unwrap();

        // The next user of the slot knows nothing of it.
        let index = slot.index();
        drop(guest);
        pool.release(slot).await.unwrap();
        let mut slot = loop {
            let slot = pool.acquire().await.unwrap();
            if slot.index() == index {
                break slot;
            }
            std::mem::forget(slot);
        };
        assert_eq!(
            slot.traffic().await.unwrap(),
            cubicle_net::Traffic::default()
        );
        Guest::attach(&mut slot).reaches(SERVER, 80).unwrap();
    });
}

#[test]
fn data_that_is_pushed_at_a_guest_stops_with_the_policy() {
    in_world(async |world| {
        let (_pool, slot, guest) = world.guest(world.config()).await;
        let server = world.internet.run(|| UdpSocket::bind((SERVER, 9)).unwrap());
        let client = guest.space.run(|| {
            let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            client.connect((SERVER, 9)).unwrap();
            client.send(b"subscribe").unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client
        });
        let (_, subscriber) = server.recv_from(&mut [0; 16]).unwrap();
        server.send_to(b"1", subscriber).unwrap();
        assert_eq!(client.recv(&mut [0; 16]).unwrap(), 1);
        slot.set_policy(&EgressPolicy::deny_all()).await.unwrap();
        server.send_to(b"2", subscriber).unwrap();
        client.set_read_timeout(Some(SILENCE)).unwrap();
        assert_silence(&client.recv(&mut [0; 16]));
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        slot.set_policy(&EgressPolicy::allow_all()).await.unwrap();
        server.send_to(b"3", subscriber).unwrap();
        assert_eq!(client.recv(&mut [0; 16]).unwrap(), 1);
    });
}

#[test]
fn a_released_slot_remembers_no_connection_on_either_side() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        let (pool, slot, guest) = world.guest(world.config()).await;
        let mut two = pool.acquire().await.unwrap();
        let neighbour = Guest::attach(&mut two);
        let _kept = neighbour.connect(SERVER, 80).unwrap();
        let _gone = guest.connect(SERVER, 80).unwrap();
        guest.ask(SERVER, 80, "x").unwrap();
        guest.pings(SERVER).unwrap();

        let of = |address: Ipv4Addr| {
            let entries = sh("conntrack", "-L");
            entries
                .lines()
                .filter(|line| line.contains(&format!("src={address} ")))
                .count()
        };
        let (one, other, index) = (slot.address(), two.address(), slot.index());
        let inside = Space::of(slot.netns_fd().unwrap());
        let count = || {
            let path = "/proc/sys/net/netfilter/nf_conntrack_count";
            std::fs::read_to_string(path)
                .unwrap()
                .trim()
                .parse::<u32>()
                .unwrap()
        };
        assert_eq!((of(one), of(other)), (3, 1));
        assert_eq!(inside.run(count), 3);

        drop(guest);
        pool.release(slot).await.unwrap();
        assert_eq!((of(one), of(other)), (0, 1));
        assert_eq!(inside.run(count), 0);
        assert!(neighbour.reaches(SERVER, 80).is_ok());
        assert_eq!(index.0, 0);
    });
}

#[test]
fn a_narrow_uplink_is_told_to_both_ends() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        ip("link set wan mtu 1280");
        world.internet.run(|| {
            ip("link set eth0 mtu 1280");
            // The internet swallows the errors that say so.
            sh("nft", "add table inet quiet");
            sh(
                "nft",
                "add chain inet quiet in { type filter hook input priority 0 ; }",
            );
            sh(
                "nft",
                "add rule inet quiet in icmp type destination-unreachable drop",
            );
        });
        let (_pool, _slot, guest) = world.guest(world.config()).await;
        let (stream, _) = guest.connect(SERVER, 80).unwrap();
        let mss = rustix_mss(&stream);
        assert!(mss <= 1240, "{mss}");
    });
}

/// The segment size that a connection uses, in bytes.
fn rustix_mss(stream: &std::net::TcpStream) -> i32 {
    let mut size: libc::c_int = 0;
    let mut length = size_of_val(&size) as libc::socklen_t;
    // SAFETY: the descriptor is open, and both pointers are to locals of the lengths given.
    let done = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&stream.as_fd()),
            libc::IPPROTO_TCP,
            libc::TCP_MAXSEG,
            (&raw mut size).cast(),
            &raw mut length,
        )
    };
    assert_eq!(done, 0);
    size
}

#[test]
fn the_host_forwards_for_its_slots_and_for_nobody_else() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        // Another network of the host, to which the internet has a route.
        let lan = Space::new();
        let path = lan.path.display();
        ip(&format!(
            "link add lan type veth peer name eth0 netns {path}"
        ));
        ip("addr add 198.18.0.1/24 dev lan");
        ip("link set lan up");
        lan.run(|| {
            ip("addr add 198.18.0.2/24 dev eth0");
            ip("link set eth0 up");
            ip("route add default via 198.18.0.1");
            serve(Ipv4Addr::UNSPECIFIED, 80);
        });
        world
            .internet
            .run(|| ip(&format!("route add 198.18.0.0/24 via {HOST}")));
        let inner = Ipv4Addr::new(198, 18, 0, 2);
        let forwarding = |interface: &str| {
            let path = format!("/proc/sys/net/ipv4/conf/{interface}/forwarding");
            std::fs::read_to_string(path).unwrap().trim() == "1"
        };
        let crosses =
            |world: &World, patience| world.internet.run(move || ping(inner, patience).is_ok());

        assert!(!crosses(&world, SILENCE));
        let (pool, slot, guest) = world.guest(world.config()).await;
        guest.reaches(SERVER, 80).unwrap();
        assert!(forwarding("wan") && !forwarding("lan") && !forwarding("all"));
        assert!(!crosses(&world, SILENCE));
        // As if this process had died: the next one knows what is its own to take back.
        drop(guest);
        drop((pool, slot));
        tokio::task::yield_now().await;
        let (pool, report) = SlotPool::open(world.config()).await.unwrap();
        assert!(report.adoptable.is_empty());
        assert!(!crosses(&world, SILENCE));
        assert!(pool.close().await.unwrap().left.is_empty());
        assert!(!forwarding("wan"));

        // The owner of the host has made a router of it: nothing is fenced then.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let (pool, _) = SlotPool::open(world.config()).await.unwrap();
        assert!(crosses(&world, PATIENCE));
        pool.close().await.unwrap();
        assert!(crosses(&world, PATIENCE) && forwarding("wan"));
    });
}

#[test]
fn two_pools_on_one_host_do_not_disturb_each_other() {
    in_world(async |world| {
        world.internet.run(|| serve(Ipv4Addr::UNSPECIFIED, 80));
        let elsewhere = tempfile::tempdir_in(world.dir.path()).unwrap();
        let other = PoolConfig {
            run_dir: elsewhere.path().to_owned(),
            ..PoolConfig::named("other".parse().unwrap())
        };
        let forwarding = || {
            let path = "/proc/sys/net/ipv4/conf/wan/forwarding";
            std::fs::read_to_string(path).unwrap().trim() == "1"
        };
        let (one, mut slot_one, guest_one) = world.guest(world.config()).await;
        let (two, slot_two, guest_two) = world.guest(other.clone()).await;
        // The first opens again, with the interfaces of the second there already.
        drop(guest_one);
        one.release(slot_one).await.unwrap();
        one.close().await.unwrap();
        assert!(forwarding());
        guest_two.reaches(SERVER, 80).unwrap();
        let (one, _) = SlotPool::open(world.config()).await.unwrap();
        slot_one = one.acquire().await.unwrap();
        let guest_one = Guest::attach(&mut slot_one);
        guest_one.reaches(SERVER, 80).unwrap();
        guest_two.reaches(SERVER, 80).unwrap();
        guest_two.space.run(|| serve(Ipv4Addr::UNSPECIFIED, 82));
        assert_refused(&guest_one.reaches(slot_two.address(), 82));

        drop(guest_two);
        two.release(slot_two).await.unwrap();
        two.close().await.unwrap();
        assert!(forwarding());
        guest_one.reaches(SERVER, 80).unwrap();
        drop(guest_one);
        one.release(slot_one).await.unwrap();
        one.close().await.unwrap();
        assert!(!forwarding());
    });
}
