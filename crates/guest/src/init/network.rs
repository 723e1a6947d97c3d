//! The sandbox's one interface, the same in every sandbox. By `ioctl`, which takes IPv4 and little
//! else: as much as there is to set.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
};

use cubicle_protocol::{GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MTU, GUEST_PREFIX_LEN};
use libc::{c_char, c_short};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{Error, console::say};

/// Brings up the loopback interface and `interface`; says what could not be done.
pub(super) fn configure(interface: &str) {
    let result = Network::open().and_then(|network| {
        network.up("lo")?;
        if !network.has(interface) {
            say(&format!(
                "there is no {interface}: the sandbox is without a network"
            ));
            return Ok(());
        }
        without_ipv6(interface);
        network.set_mtu(interface, GUEST_MTU)?;
        network.set_address(interface, GUEST_ADDRESS, GUEST_PREFIX_LEN)?;
        network.up(interface)?;
        network.set_default_route(interface, GUEST_GATEWAY)
    });
    if let Err(error) = result {
        say(&error.to_string());
    }
}

/// Nothing of IPv6 leads out of a slot, and what a kernel does to find that out (probing for its
/// own address, soliciting routers, joining groups) would go on in every sandbox for seconds.
fn without_ipv6(interface: &str) {
    let setting = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match std::fs::write(&setting, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            say(&format!("cannot write {setting}: {error}"));
        }
        _ => {}
    }
}

struct Network {
    socket: OwnedFd,
}

impl Network {
    fn open() -> Result<Self, Error> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None);
        let socket = socket.map_err(|error| Error::Network {
            what: "open a socket to set up the network".to_owned(),
            source: error.into(),
        })?;
        Ok(Self { socket })
    }

    fn has(&self, interface: &str) -> bool {
        self.call(libc::SIOCGIFFLAGS, &mut request(interface))
            .is_ok()
    }

    fn up(&self, interface: &str) -> Result<(), Error> {
        let mut request = request(interface);
        let result = self.call(libc::SIOCGIFFLAGS, &mut request).and_then(|()| {
            // SAFETY: SIOCGIFFLAGS has set this member of the union.
            let flags = unsafe { request.ifr_ifru.ifru_flags };
            request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
            self.call(libc::SIOCSIFFLAGS, &mut request)
        });
        result.map_err(failed(|| format!("bring {interface} up")))
    }

    fn set_mtu(&self, interface: &str, mtu: u32) -> Result<(), Error> {
        let mut request = request(interface);
        request.ifr_ifru.ifru_mtu = mtu.cast_signed();
        self.call(libc::SIOCSIFMTU, &mut request)
            .map_err(failed(|| format!("set the MTU of {interface} to {mtu}")))
    }

    fn set_address(&self, interface: &str, address: Ipv4Addr, prefix_len: u8) -> Result<(), Error> {
        let mask = Ipv4Addr::from(u32::MAX.unbounded_shl(32 - u32::from(prefix_len)));
        let what = || format!("give {interface} the address {address}/{prefix_len}");
        let mut request = request(interface);
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.call(libc::SIOCSIFADDR, &mut request)
            .map_err(failed(what))?;
        request.ifr_ifru.ifru_netmask = socket_address(mask);
        self.call(libc::SIOCSIFNETMASK, &mut request)
            .map_err(failed(what))
    }

    fn set_default_route(&self, interface: &str, gateway: Ipv4Addr) -> Result<(), Error> {
        let mut name: Vec<c_char> = interface.bytes().map(u8::cast_signed).collect();
        name.push(0);
        // SAFETY: zeros are a valid value of every member: integers, addresses and a pointer.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        route.rt_dev = name.as_mut_ptr();
        // SAFETY: `route` is what SIOCADDRT takes, and the name that it points to lives.
        let result =
            unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) };
        match check(result) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result.map_err(failed(|| format!("route by {gateway}"))),
        }
    }

    fn call(&self, operation: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every operation used here takes an `ifreq` and writes nothing else.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), operation, request) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn failed(what: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Network {
        what: what(),
        source,
    }
}

/// A request about that interface; a name that is too long is cut, and then nobody's.
fn request(interface: &str) -> libc::ifreq {
    // SAFETY: zeros are a valid value: an empty name and no address.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // sockaddr_in: port, then address.
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// In a network namespace of its own, with a veth in the interface's place.
    #[test]
    fn the_interface_gets_its_address_and_route() {
        let output = std::thread::spawn(|| {
            // SAFETY: changes the namespace of this thread, which ends with the test.
            let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(unshared, 0, "needs root");
            let ip = |args: &str| {
                let output = Command::new("ip").args(args.split(' ')).output().unwrap();
                assert!(output.status.success(), "{args}: {output:?}");
                String::from_utf8(output.stdout).unwrap()
            };
            ip("link add eth0 type veth peer name peer0");
            configure("eth0");
            // A second time changes nothing and fails at nothing.
            configure("eth0");
            let show = ["-o -4 address show", "-4 route show", "-o link show"].map(ip);
            // And one that isn't there is no reason to fail.
            configure("eth9");
            show
        });
        let [addresses, routes, links] = output.join().unwrap();
        assert!(
            addresses.contains("127.0.0.1/8 scope host lo"),
            "{addresses}"
        );
        assert!(addresses.contains("169.254.0.21/30"), "{addresses}");
        assert!(
            routes.contains("default via 169.254.0.22 dev eth0"),
            "{routes}"
        );
        assert_eq!(
            links.matches(",UP").count() + links.matches("<UP").count(),
            2,
            "{links}"
        );
        assert!(links.contains("mtu 1500"), "{links}");
    }
}
