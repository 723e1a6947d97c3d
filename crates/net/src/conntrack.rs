//! Forgetting connections, so that a recycled slot knows nothing of its last sandbox.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
};

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    NetfilterSubsystem,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, Tuple},
};

use crate::netlink::{Netfilter, errno};

// Numbers of `linux/netfilter/nfnetlink_conntrack.h`.
const GET: u8 = 1;
const TUPLE_ORIGINAL: u16 = 1;
const FILTER: u16 = 25;
const FILTER_ORIGINAL: u16 = 1;
/// The bit that says "compare the source address". Kernels before 5.8 ignore the filter.
const FILTER_SOURCE_ADDRESS: u32 = 1;

/// Forgets all connections of the socket's namespace.
pub(crate) fn flush(netfilter: &mut Netfilter) -> io::Result<()> {
    netfilter.request(ipv4(ConntrackMessage::Delete(Vec::new())), 0)
}

/// Forgets the connections that `source` opened, and says how many there were.
pub(crate) fn forget_from(netfilter: &mut Netfilter, source: Ipv4Addr) -> io::Result<usize> {
    let filter = filter(source);
    let mut forgotten = 0;
    for message in netfilter.dump(filter, 0)? {
        let Some(tuple) = original(message) else {
            continue;
        };
        if !opened_by(&tuple, source) {
            continue;
        }
        let tuple = ConntrackAttribute::CtaTupleOrig(tuple);
        match netfilter.request(ipv4(ConntrackMessage::Delete(vec![tuple])), 0) {
            Ok(()) => forgotten += 1,
            // It ended by itself meanwhile.
            Err(error) if errno(&error) == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// The request for a list of connections that `source` opened. Spelt out in plain attributes: the
/// message type would send the filter without the mark of a nested attribute.
fn filter(source: Ipv4Addr) -> NetfilterMessage {
    let address = Tuple::Ip(vec![IPTuple::SourceAddress(source.into())]);
    let flags = DefaultNla::new(
        FILTER_ORIGINAL,
        FILTER_SOURCE_ADDRESS.to_ne_bytes().to_vec(),
    );
    let inner = NetfilterMessageInner::Other {
        subsys: NetfilterSubsystem::Conntrack,
        message_type: GET,
        attributes: vec![
            DefaultNla::new(TUPLE_ORIGINAL | NLA_F_NESTED, bytes(&address)),
            DefaultNla::new(FILTER | NLA_F_NESTED, bytes(&flags)),
        ],
    };
    ipv4(inner)
}

fn bytes(attribute: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

fn original(message: NetfilterMessage) -> Option<Vec<Tuple>> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner else {
        return None;
    };
    attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple),
            _ => None,
        })
}

fn opened_by(tuple: &[Tuple], source: Ipv4Addr) -> bool {
    tuple.iter().any(|part| match part {
        Tuple::Ip(addresses) => addresses.contains(&IPTuple::SourceAddress(IpAddr::V4(source))),
        _ => false,
    })
}

fn ipv4(message: impl Into<NetfilterMessageInner>) -> NetfilterMessage {
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0),
        message,
    )
}
