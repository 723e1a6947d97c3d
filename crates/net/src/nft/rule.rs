//! Rules: a list of expressions that are tried in order until one does not match.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Lookup, Meta, MetaKey, Operator, Payload,
    Register, Verdict, VerdictAttribute,
};

use super::{batch::OBJECT_TYPE_COUNTER, be32, interface_key, text};

// Numbers from `linux/netfilter/nf_tables.h` that the message types do not name.
const PAYLOAD_LINK: u32 = 0;
const PAYLOAD_NETWORK: u32 = 1;
const PAYLOAD_TRANSPORT: u32 = 2;
const LOOKUP_INVERTED: u32 = 1;
const CT_STATE: u32 = 0;
const CT_DESTINATION_IPV4: u32 = 20;
const CT_DIRECTION_ORIGINAL: u8 = 0;
const ROUTE_TCP_MSS: u32 = 3;
const BYTEORDER_HTON: u32 = 1;
const EXTHDR_TCP_OPTION: u32 = 1;
const NAT_SOURCE: u32 = 0;
const REJECT_ICMPX: u32 = 2;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
// Numbers from elsewhere.
const NFPROTO_IPV4: u8 = 2;
const ARPHRD_ETHER: u16 = 1;
const TCP_OPTION_MAXSEG: u8 = 2;
const TCP_FLAGS_OFFSET: u32 = 13;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;

/// The register that all values pass through.
const REGISTER: Register = Register::Reg1;

/// An interface by its name.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Name<'a> {
    /// Exactly this one.
    Is(&'a str),
    /// All whose name begins like this.
    StartsWith(&'a str),
    /// All whose name does not begin like this.
    StartsNotWith(&'a str),
}

/// States of a connection, as `IP_CT_*` bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CtState(u32);

impl CtState {
    pub(crate) const INVALID: Self = Self(1);
    pub(crate) const RELATED: Self = Self(4);
    pub(crate) const ESTABLISHED_OR_RELATED: Self = Self(2 | 4);
}

/// What the sender of a rejected packet is told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Unreachable {
    /// "Administratively prohibited".
    Prohibited,
}

impl Unreachable {
    fn code(self) -> u8 {
        match self {
            Self::Prohibited => 3,
        }
    }
}

/// One rule. Methods append expressions, in the order in which they are tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rule(Vec<Expressions>);

impl Rule {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(super) fn into_expressions(self) -> Vec<Expressions> {
        self.0
    }

    /// `iifname`: the packet came in by this interface.
    pub(crate) fn input_interface(self, name: Name<'_>) -> Self {
        self.meta(MetaKey::Iifname).name(name)
    }

    /// `oifname`: the packet goes out by this interface.
    pub(crate) fn output_interface(self, name: Name<'_>) -> Self {
        self.meta(MetaKey::Oifname).name(name)
    }

    /// `iifname @set`.
    pub(crate) fn input_interface_in(self, set: &str) -> Self {
        self.meta(MetaKey::Iifname).lookup(set, false)
    }

    /// `oifname @set`.
    pub(crate) fn output_interface_in(self, set: &str) -> Self {
        self.meta(MetaKey::Oifname).lookup(set, false)
    }

    /// `meta nfproto ipv4`.
    pub(crate) fn ipv4(self) -> Self {
        self.meta(MetaKey::Nfproto)
            .compare(Operator::Equal, vec![NFPROTO_IPV4])
    }

    /// `meta nfproto != ipv4`.
    pub(crate) fn not_ipv4(self) -> Self {
        self.meta(MetaKey::Nfproto)
            .compare(Operator::NotEqual, vec![NFPROTO_IPV4])
    }

    /// `ether saddr != mac`.
    pub(crate) fn source_mac_is_not(self, mac: [u8; 6]) -> Self {
        self.meta(MetaKey::Iftype)
            .compare(Operator::Equal, ARPHRD_ETHER.to_ne_bytes().to_vec())
            .payload(PAYLOAD_LINK, 6, 6)
            .compare(Operator::NotEqual, mac.to_vec())
    }

    /// `ip saddr != address`.
    pub(crate) fn source_is_not(self, address: Ipv4Addr) -> Self {
        self.ipv4()
            .payload(PAYLOAD_NETWORK, 12, 4)
            .compare(Operator::NotEqual, address.octets().to_vec())
    }

    /// `ip saddr net`, or `!=`.
    pub(crate) fn source_in(self, net: Ipv4Net, inside: bool) -> Self {
        let operator = if inside {
            Operator::Equal
        } else {
            Operator::NotEqual
        };
        self.ipv4()
            .payload(PAYLOAD_NETWORK, 12, 4)
            .mask(net.netmask().octets().to_vec())
            .compare(operator, net.network().octets().to_vec())
    }

    /// `ip daddr @set`.
    pub(crate) fn destination_in(self, set: &str) -> Self {
        self.ipv4()
            .payload(PAYLOAD_NETWORK, 16, 4)
            .lookup(set, false)
    }

    /// `ct original ip daddr @set`, or `!=`: where the first packet of the connection went. Says
    /// the same of a connection's packets in both directions, and of errors that concern it.
    pub(crate) fn connection_to(self, set: &str, inside: bool) -> Self {
        let attributes = vec![
            DefaultNla::new(1, register()),
            DefaultNla::new(2, be32(CT_DESTINATION_IPV4)),
            DefaultNla::new(3, vec![CT_DIRECTION_ORIGINAL]),
        ];
        self.other("ct", attributes).lookup(set, !inside)
    }

    /// `ct state`: the connection is in one of these states.
    pub(crate) fn connection_state(self, states: CtState) -> Self {
        let attributes = vec![
            DefaultNla::new(1, register()),
            DefaultNla::new(2, be32(CT_STATE)),
        ];
        self.other("ct", attributes)
            .mask(states.0.to_ne_bytes().to_vec())
            .compare(Operator::NotEqual, vec![0; 4])
    }

    /// `meta l4proto`: a protocol by its number in IP.
    pub(crate) fn protocol(self, number: i32) -> Self {
        self.meta(MetaKey::L4Proto)
            .compare(Operator::Equal, vec![number as u8])
    }

    /// `th dport`, after [`Self::protocol`] of one that has ports.
    pub(crate) fn destination_port(self, port: u16) -> Self {
        self.payload(PAYLOAD_TRANSPORT, 2, 2)
            .compare(Operator::Equal, port.to_be_bytes().to_vec())
    }

    /// `tcp flags syn / syn,rst tcp option maxseg size set rt mtu`: both ends learn how much fits
    /// through this host's narrowest link, even where the networks swallow the errors that would
    /// tell them. Only ever lowers what a packet says.
    pub(crate) fn clamp_segment_size(self) -> Self {
        self.protocol(libc::IPPROTO_TCP)
            .payload(PAYLOAD_TRANSPORT, TCP_FLAGS_OFFSET, 1)
            .mask(vec![TCP_SYN | TCP_RST])
            .compare(Operator::Equal, vec![TCP_SYN])
            .other(
                "rt",
                vec![
                    DefaultNla::new(1, register()),
                    DefaultNla::new(2, be32(ROUTE_TCP_MSS)),
                ],
            )
            .other(
                "byteorder",
                vec![
                    DefaultNla::new(1, register()),
                    DefaultNla::new(2, register()),
                    DefaultNla::new(3, be32(BYTEORDER_HTON)),
                    DefaultNla::new(4, be32(2)),
                    DefaultNla::new(5, be32(2)),
                ],
            )
            .other(
                "exthdr",
                vec![
                    DefaultNla::new(7, register()),
                    DefaultNla::new(2, vec![TCP_OPTION_MAXSEG]),
                    DefaultNla::new(3, be32(2)),
                    DefaultNla::new(4, be32(2)),
                    DefaultNla::new(6, be32(EXTHDR_TCP_OPTION)),
                ],
            )
    }

    /// `counter name`: counts what came this far.
    pub(crate) fn count(self, counter: &str) -> Self {
        self.other(
            "objref",
            vec![
                DefaultNla::new(1, be32(OBJECT_TYPE_COUNTER)),
                DefaultNla::new(2, text(counter)),
            ],
        )
    }

    /// `accept`.
    pub(crate) fn accept(self) -> Self {
        self.verdict(Verdict::Other(ACCEPT), None)
    }

    /// `drop`.
    pub(crate) fn drop(self) -> Self {
        self.verdict(Verdict::Other(DROP), None)
    }

    /// `return`.
    pub(crate) fn back(self) -> Self {
        self.verdict(Verdict::Return, None)
    }

    /// `jump chain`.
    pub(crate) fn jump(self, chain: &str) -> Self {
        self.verdict(Verdict::Jump, Some(chain))
    }

    /// `goto chain`.
    pub(crate) fn goto(self, chain: &str) -> Self {
        self.verdict(Verdict::Goto, Some(chain))
    }

    /// `reject with icmpx`.
    pub(crate) fn reject(self, reason: Unreachable) -> Self {
        self.other(
            "reject",
            vec![
                DefaultNla::new(1, be32(REJECT_ICMPX)),
                DefaultNla::new(2, vec![reason.code()]),
            ],
        )
    }

    /// `masquerade`: the packet leaves with the address of its interface as its source.
    pub(crate) fn masquerade(self) -> Self {
        self.other("masq", Vec::new())
    }

    /// `snat ip to address`.
    pub(crate) fn source_nat(mut self, address: Ipv4Addr) -> Self {
        self.0.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(REGISTER),
            Immediate::Data(DataAttribute::Value(address.octets().to_vec())),
        ]));
        self.other(
            "nat",
            vec![
                DefaultNla::new(1, be32(NAT_SOURCE)),
                DefaultNla::new(2, be32(NFPROTO_IPV4.into())),
                DefaultNla::new(3, register()),
            ],
        )
    }

    fn verdict(mut self, verdict: Verdict, chain: Option<&str>) -> Self {
        let mut attributes = vec![VerdictAttribute::Code(verdict)];
        attributes.extend(chain.map(|chain| VerdictAttribute::Chain(chain.into())));
        self.0.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Verdict),
            Immediate::Data(DataAttribute::Verdict(attributes)),
        ]));
        self
    }

    fn name(self, name: Name<'_>) -> Self {
        match name {
            Name::Is(name) => self.compare(Operator::Equal, interface_key(name)),
            // Without an end mark only as many bytes are compared as are given.
            Name::StartsWith(start) => self.compare(Operator::Equal, start.into()),
            Name::StartsNotWith(start) => self.compare(Operator::NotEqual, start.into()),
        }
    }

    fn meta(mut self, key: MetaKey) -> Self {
        self.0.push(Expressions::Meta(vec![
            Meta::Key(key),
            Meta::DestinationRegister(REGISTER),
        ]));
        self
    }

    fn payload(mut self, base: u32, offset: u32, length: u32) -> Self {
        self.0.push(Expressions::Payload(vec![
            Payload::DestinationRegister(REGISTER),
            Payload::Base(base),
            Payload::Offset(offset),
            Payload::Len(length),
        ]));
        self
    }

    fn mask(mut self, mask: Vec<u8>) -> Self {
        self.0.push(Expressions::Bitwise(vec![
            Bitwise::SourceRegister(REGISTER),
            Bitwise::DestinationRegister(REGISTER),
            Bitwise::Length(mask.len() as u32),
            Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
            Bitwise::Mask(DataAttribute::Value(mask)),
        ]));
        self
    }

    fn compare(mut self, operator: Operator, value: Vec<u8>) -> Self {
        self.0.push(Expressions::Cmp(vec![
            Cmp::SourceRegister(REGISTER),
            Cmp::Op(operator),
            Cmp::Data(DataAttribute::Value(value)),
        ]));
        self
    }

    fn lookup(mut self, set: &str, inverted: bool) -> Self {
        self.0.push(Expressions::Lookup(vec![
            Lookup::Set(set.into()),
            Lookup::SourceRegister(REGISTER),
            Lookup::Flags(if inverted { LOOKUP_INVERTED } else { 0 }),
        ]));
        self
    }

    fn other(mut self, name: &str, attributes: Vec<DefaultNla>) -> Self {
        self.0.push(Expressions::Other {
            expression_type: name.into(),
            attributes,
        });
        self
    }
}

fn register() -> Vec<u8> {
    be32(REGISTER.into())
}
