//! Links, their addresses, routes and neighbours.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};

use rustix::net::netdevice::name_to_index;

use crate::{
    Error, Result,
    address::MTU,
    netlink::{Route, errno},
};

/// What a listing tells of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
}

/// All interfaces of the socket's namespace.
pub(crate) fn list(route: &mut Route) -> Result<Vec<Interface>> {
    let links = route
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), 0)
        .map_err(Error::kernel("list interfaces"))?;
    Ok(links
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(interface(link)),
            _ => None,
        })
        .collect())
}

fn interface(link: LinkMessage) -> Interface {
    let mut found = Interface {
        index: link.header.index,
        name: String::new(),
        alias: None,
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name = name,
            LinkAttribute::IfAlias(alias) => found.alias = Some(alias),
            _ => {}
        }
    }
    found
}

/// The number of the interface `name`, if there is one.
pub(crate) fn index_of(route: &mut Route, name: &str) -> Result<Option<u32>> {
    match name_to_index(route.as_fd(), name) {
        Ok(index) => Ok(Some(index)),
        Err(rustix::io::Errno::NODEV) => Ok(None),
        Err(error) => Err(Error::system(format!("look up the interface {name}"))(
            error,
        )),
    }
}

/// One end of a pair of connected interfaces.
pub(crate) struct End<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: [u8; 6],
}

impl End<'_> {
    fn attributes(&self) -> Vec<LinkAttribute> {
        vec![
            LinkAttribute::IfName(self.name.to_owned()),
            LinkAttribute::Address(self.mac.to_vec()),
            LinkAttribute::Mtu(MTU),
        ]
    }
}

/// Makes a pair of connected interfaces: `here` in the socket's namespace, `there` in another.
pub(crate) fn create_veth(
    route: &mut Route,
    here: &End<'_>,
    there: &End<'_>,
    namespace: BorrowedFd<'_>,
) -> Result<()> {
    let mut peer = LinkMessage::default();
    peer.attributes = there.attributes();
    peer.attributes
        .push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    let mut link = LinkMessage::default();
    link.attributes = here.attributes();
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    route
        .request(
            RouteNetlinkMessage::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(Error::kernel(format!(
            "create the interfaces {} and {}",
            here.name, there.name
        )))
}

/// What [`configure`] changes about an interface.
#[derive(Default)]
pub(crate) struct Settings<'a> {
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) mtu: Option<u32>,
    pub(crate) alias: Option<&'a str>,
}

/// Sets what is given and switches the interface on.
pub(crate) fn configure(route: &mut Route, index: u32, settings: &Settings<'_>) -> Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes
        .extend(settings.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    link.attributes.extend(settings.mtu.map(LinkAttribute::Mtu));
    link.attributes.extend(
        settings
            .alias
            .map(|alias| LinkAttribute::IfAlias(alias.to_owned())),
    );
    route
        .request(RouteNetlinkMessage::SetLink(link), 0)
        .map_err(Error::kernel(format!("configure interface number {index}")))
}

/// Waits for the kernel to put an interface that is switched on and connected to use. After the
/// other end of a pair was switched on it does so in the background, at its leisure, and drops
/// what is sent until then; asking for the state of the link makes it do so at once.
pub(crate) fn settle(route: &Route, name: &str) -> Result<()> {
    /// `struct ethtool_value` of `linux/ethtool.h`.
    #[repr(C)]
    struct Question {
        command: u32,
        answer: u32,
    }
    /// `ETHTOOL_GLINK`.
    const LINK_STATE: u32 = 0x0a;
    let mut question = Question {
        command: LINK_STATE,
        answer: 0,
    };
    // SAFETY: all zeroes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut question).cast();
    // SAFETY: the descriptor is open; request and question live until the call returns, and this
    // question's answer is four bytes.
    let result = unsafe {
        libc::ioctl(
            route.as_fd().as_raw_fd(),
            libc::SIOCETHTOOL as _,
            &raw mut request,
        )
    };
    if result != 0 {
        let action = format!("look up the state of the interface {name}");
        return Err(Error::system(action)(io::Error::last_os_error()));
    }
    if question.answer == 0 {
        let action = format!("connect the interface {name}");
        return Err(Error::system(action)(io::Error::from(
            io::ErrorKind::NotConnected,
        )));
    }
    Ok(())
}

/// Removes the interface `name` and with it, if it is one of a pair, the other. `false`: there is
/// none.
pub(crate) fn delete(route: &mut Route, name: &str) -> Result<bool> {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match route.request(RouteNetlinkMessage::DelLink(link), 0) {
        Ok(()) => Ok(true),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(Error::kernel(format!("delete the interface {name}"))(error)),
    }
}

/// Gives an interface an address.
pub(crate) fn add_address(
    route: &mut Route,
    index: u32,
    address: Ipv4Addr,
    prefix_len: u8,
) -> Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = prefix_len;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.into()),
        AddressAttribute::Address(address.into()),
    ];
    route
        .request(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(Error::kernel(format!(
            "add the address {address}/{prefix_len}"
        )))
}

/// Whether an interface has an address.
pub(crate) fn has_address(route: &mut Route, index: u32, address: Ipv4Addr) -> Result<bool> {
    let mut filter = AddressMessage::default();
    filter.header.family = AddressFamily::Inet;
    let addresses = route
        .dump(RouteNetlinkMessage::GetAddress(filter), 0)
        .map_err(Error::kernel("list addresses"))?;
    let wanted = AddressAttribute::Local(address.into());
    Ok(addresses.iter().any(|message| match message {
        RouteNetlinkMessage::NewAddress(found) => {
            found.header.index == index && found.attributes.contains(&wanted)
        }
        _ => false,
    }))
}

/// Sends everything that has no better route to `gateway`.
pub(crate) fn add_default_route(route: &mut Route, index: u32, gateway: Ipv4Addr) -> Result<()> {
    let mut message = ipv4_route();
    message.attributes = vec![
        RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
        RouteAttribute::Oif(index),
    ];
    route
        .request(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(Error::kernel(format!(
            "add the default route over {gateway}"
        )))
}

fn ipv4_route() -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message
}

/// Writes down the hardware address of a neighbour for good, so that it is never asked for and
/// cannot be claimed.
pub(crate) fn add_neighbour(
    route: &mut Route,
    index: u32,
    address: Ipv4Addr,
    mac: [u8; 6],
) -> Result<()> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    route
        .request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(Error::kernel(format!("add the neighbour {address}")))
}

/// Where packets for a range of addresses go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Destination {
    pub(crate) net: Ipv4Net,
    /// Numbers of the interfaces by which they leave.
    pub(crate) interfaces: Vec<u32>,
}

impl Destination {
    pub(crate) fn is_default(&self) -> bool {
        self.net.prefix_len() == 0
    }
}

/// The host's routes for IPv4 to other machines.
pub(crate) fn routes(route: &mut Route) -> Result<Vec<Destination>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet;
    let routes = route
        .dump(RouteNetlinkMessage::GetRoute(filter), 0)
        .map_err(Error::kernel("list routes"))?;
    Ok(routes
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => destination(route),
            _ => None,
        })
        .collect())
}

fn destination(route: RouteMessage) -> Option<Destination> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let address = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        });
    let prefix_len = route.header.destination_prefix_length;
    let net = Ipv4Net::new(address.unwrap_or(Ipv4Addr::UNSPECIFIED), prefix_len).ok()?;
    let interfaces = route.attributes.into_iter().flat_map(outputs).collect();
    Some(Destination { net, interfaces })
}

fn outputs(attribute: RouteAttribute) -> Vec<u32> {
    match attribute {
        RouteAttribute::Oif(index) => vec![index],
        RouteAttribute::MultiPath(hops) => {
            hops.into_iter().map(|hop| hop.interface_index).collect()
        }
        _ => Vec::new(),
    }
}

/// Opens a socket for the calling thread's namespace.
pub(crate) fn open() -> Result<Route> {
    Route::open().map_err(|source: io::Error| Error::System {
        action: "open a netlink socket for routes".into(),
        source,
    })
}
