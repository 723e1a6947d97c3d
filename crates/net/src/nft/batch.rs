//! Transactions: what a batch holds takes effect at once and as a whole, or not at all.

use std::{io, ops::RangeInclusive};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, Hook as HookAttribute, HookNumber,
        InetHookNumber, ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute,
        SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage, SetFlags,
        SetMessage, TableAttribute, TableMessage,
    },
    none::ControlMessage,
};

use super::{Rule, be32, interface_key, text};
use crate::netlink::Netfilter;

/// Elements in one message. An attribute's length is a 16-bit number, and an element takes up to
/// 56 bytes.
const ELEMENTS_PER_MESSAGE: usize = 512;
/// `NFTA_OBJ_*` and `NFT_OBJECT_COUNTER` of `linux/netfilter/nf_tables.h`.
const OBJECT_TABLE: u16 = 1;
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;
pub(super) const OBJECT_TYPE_COUNTER: u32 = 1;

/// Where the kernel hands packets to a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hook {
    /// Packets for this namespace itself; type `filter`.
    Input,
    /// Packets from this namespace itself; type `filter`.
    Output,
    /// Packets that pass through; type `filter`.
    Forward,
    /// Packets that leave, for translation of their source; type `nat`.
    SourceNat,
}

impl Hook {
    fn number(self) -> InetHookNumber {
        match self {
            Self::Input => InetHookNumber::LocalIn,
            Self::Output => InetHookNumber::LocalOut,
            Self::Forward => InetHookNumber::Forward,
            Self::SourceNat => InetHookNumber::PostRouting,
        }
    }

    fn chain_type(self) -> &'static str {
        match self {
            Self::SourceNat => "nat",
            _ => "filter",
        }
    }

    /// The priorities that `nft` calls `filter` and `srcnat`.
    fn priority(self) -> i32 {
        match self {
            Self::SourceNat => 100,
            _ => 0,
        }
    }
}

/// What happens to a packet that no rule of a hooked chain decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// It goes on.
    Accept,
    /// It is dropped.
    Drop,
}

impl Policy {
    /// `NF_DROP` and `NF_ACCEPT` of `linux/netfilter.h`.
    pub(super) fn code(self) -> u32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
        }
    }
}

/// What a set holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SetKind {
    /// Ranges of IPv4 addresses.
    AddressRanges,
    /// Names of interfaces.
    Interfaces,
}

impl SetKind {
    /// The number of the type in `nft`, which only `nft` looks at, and the length of a key.
    fn key(self) -> (u32, u32) {
        match self {
            Self::AddressRanges => (7, 4),
            Self::Interfaces => (41, libc::IFNAMSIZ as u32),
        }
    }

    /// A note of the keys' byte order (host's: 1, network's: 2), without which `nft` cannot print
    /// them: type 0, length 4, value.
    fn note(self) -> Vec<u8> {
        let order: u32 = match self {
            Self::AddressRanges => 2,
            Self::Interfaces => 1,
        };
        [vec![0, 4], order.to_ne_bytes().to_vec()].concat()
    }

    fn flags(self) -> SetFlags {
        match self {
            Self::AddressRanges => SetFlags::Interval,
            Self::Interfaces => SetFlags::empty(),
        }
    }
}

/// Changes that are made together.
#[derive(Default)]
pub(crate) struct Batch {
    changes: Vec<(NfTablesMessage, u16)>,
    sets: u32,
}

impl Batch {
    /// An empty table in place of whatever is there under that name.
    pub(crate) fn replace_table(&mut self, table: &str) {
        // Deleting needs something to delete.
        self.add_table(table);
        self.delete_table(table);
        self.add_table(table);
    }

    pub(crate) fn add_table(&mut self, table: &str) {
        let message = TableMessage {
            attributes: vec![TableAttribute::Name(table.into())],
        };
        self.push(NfTablesMessage::NewTable(message), NLM_F_CREATE);
    }

    pub(crate) fn delete_table(&mut self, table: &str) {
        let message = TableMessage {
            attributes: vec![TableAttribute::Name(table.into())],
        };
        self.push(NfTablesMessage::DeleteTable(message), 0);
    }

    /// A chain that other chains jump to.
    pub(crate) fn add_chain(&mut self, table: &str, chain: &str) {
        let attributes = vec![
            ChainAttribute::Table(table.into()),
            ChainAttribute::Name(chain.into()),
        ];
        self.push(
            NfTablesMessage::NewChain(ChainMessage { attributes }),
            NLM_F_CREATE,
        );
    }

    /// A chain that the kernel hands packets to.
    pub(crate) fn add_base_chain(&mut self, table: &str, chain: &str, hook: Hook, policy: Policy) {
        let attributes = vec![
            ChainAttribute::Table(table.into()),
            ChainAttribute::Name(chain.into()),
            ChainAttribute::Type(hook.chain_type().into()),
            ChainAttribute::Hook(vec![
                HookAttribute::Number(HookNumber::Inet(hook.number())),
                HookAttribute::Priority(hook.priority().cast_unsigned()),
            ]),
            ChainAttribute::Policy(policy.code()),
        ];
        self.push(
            NfTablesMessage::NewChain(ChainMessage { attributes }),
            NLM_F_CREATE,
        );
    }

    /// Appends a rule to a chain.
    pub(crate) fn add_rule(&mut self, table: &str, chain: &str, rule: Rule) {
        let attributes = vec![
            RuleAttribute::Table(table.into()),
            RuleAttribute::Chain(chain.into()),
            RuleAttribute::Expressions(
                rule.into_expressions()
                    .into_iter()
                    .map(ListAttribute::from)
                    .collect(),
            ),
        ];
        self.push(
            NfTablesMessage::NewRule(RuleMessage { attributes }),
            NLM_F_CREATE | NLM_F_APPEND,
        );
    }

    /// A counter that rules refer to by name.
    pub(crate) fn add_counter(&mut self, table: &str, counter: &str) {
        let attributes = vec![
            DefaultNla::new(OBJECT_TABLE, text(table)),
            DefaultNla::new(OBJECT_NAME, text(counter)),
            DefaultNla::new(OBJECT_TYPE, be32(OBJECT_TYPE_COUNTER)),
            DefaultNla::new(OBJECT_DATA | NLA_F_NESTED, Vec::new()),
        ];
        self.push(NfTablesMessage::NewObject(attributes), NLM_F_CREATE);
    }

    /// An empty set.
    pub(crate) fn add_set(&mut self, table: &str, set: &str, kind: SetKind) {
        self.sets += 1;
        let (key_type, key_len) = kind.key();
        let attributes = vec![
            SetAttribute::Table(table.into()),
            SetAttribute::Name(set.into()),
            SetAttribute::Flags(kind.flags()),
            SetAttribute::KeyType(key_type),
            SetAttribute::KeyLen(key_len),
            SetAttribute::Id(self.sets),
            SetAttribute::UserData(kind.note()),
        ];
        self.push(
            NfTablesMessage::NewSet(SetMessage { attributes }),
            NLM_F_CREATE,
        );
    }

    /// Takes everything out of a set.
    pub(crate) fn flush_set(&mut self, table: &str, set: &str) {
        let attributes = vec![
            SetElementList::Table(table.into()),
            SetElementList::Set(set.into()),
        ];
        self.push(
            NfTablesMessage::DeleteSetElement(SetElementMessage { attributes }),
            0,
        );
    }

    /// Puts ranges that do not overlap into a set of [`SetKind::AddressRanges`].
    pub(crate) fn add_ranges(&mut self, table: &str, set: &str, ranges: &[RangeInclusive<u32>]) {
        let elements = ranges.iter().flat_map(|range| {
            // The kernel wants the first address, and the first one that is no longer part of
            // the range; a range up to the last address of all has no end.
            let end = range.end().checked_add(1).map(|end| {
                vec![
                    SetElementAttribute::Key(DataAttribute::Value(be32(end))),
                    SetElementAttribute::Flags(SetElementFlags::IntervalEnd),
                ]
            });
            let start = vec![SetElementAttribute::Key(DataAttribute::Value(be32(
                *range.start(),
            )))];
            std::iter::once(start).chain(end)
        });
        self.add_elements(table, set, elements.collect());
    }

    /// Puts names into a set of [`SetKind::Interfaces`].
    pub(crate) fn add_interfaces(&mut self, table: &str, set: &str, names: &[String]) {
        let elements = names.iter().map(|name| {
            vec![SetElementAttribute::Key(DataAttribute::Value(
                interface_key(name),
            ))]
        });
        self.add_elements(table, set, elements.collect());
    }

    fn add_elements(&mut self, table: &str, set: &str, elements: Vec<Vec<SetElementAttribute>>) {
        for some in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let attributes = vec![
                SetElementList::Table(table.into()),
                SetElementList::Set(set.into()),
                SetElementList::Elements(
                    some.iter().cloned().map(ListAttribute::Element).collect(),
                ),
            ];
            self.push(
                NfTablesMessage::NewSetElement(SetElementMessage { attributes }),
                NLM_F_CREATE,
            );
        }
    }

    fn push(&mut self, message: NfTablesMessage, flags: u16) {
        self.changes.push((message, flags));
    }

    /// Makes the changes.
    ///
    /// # Errors
    /// The kernel's first refusal; nothing has changed then.
    pub(crate) fn commit(self, netfilter: &mut Netfilter) -> io::Result<()> {
        let mut messages = Vec::with_capacity(self.changes.len() + 2);
        messages.push((control(ControlMessage::BatchBegin), 0));
        messages.extend(
            self.changes
                .into_iter()
                .map(|(message, flags)| (inet(message), flags)),
        );
        if let Some((_, flags)) = messages
            .last_mut()
            .filter(|(_, flags)| flags & NLM_F_ACK == 0)
        {
            *flags |= NLM_F_ACK;
        }
        messages.push((control(ControlMessage::BatchEnd), 0));
        netfilter.requests(messages)
    }
}

fn control(message: ControlMessage) -> NetfilterMessage {
    // The header names the subsystem that the batch is for.
    let header = NetfilterHeader::new(
        NetfilterProtoFamily::Unspec,
        0,
        libc::NFNL_SUBSYS_NFTABLES as u16,
    );
    NetfilterMessage::new(header, message)
}

pub(super) fn inet(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0),
        message,
    )
}
