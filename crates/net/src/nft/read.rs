//! Reading rules back.

use std::{collections::HashMap, io};

use netlink_packet_core::{DefaultNla, Nla, NlasIterator, Parseable};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, Hook, HookNumber, InetHookNumber,
        ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage,
        TableAttribute, TableMessage,
    },
};

use super::{
    Policy,
    batch::{OBJECT_TYPE_COUNTER, inet},
    be32, text,
};
use crate::netlink::{Netfilter, errno};

/// What a counter has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

/// All counters of a table by name.
pub(crate) fn counters(
    netfilter: &mut Netfilter,
    table: &str,
) -> io::Result<HashMap<String, Count>> {
    // NFTA_OBJ_TABLE, NFTA_OBJ_TYPE
    let filter = vec![
        DefaultNla::new(1, text(table)),
        DefaultNla::new(3, be32(OBJECT_TYPE_COUNTER)),
    ];
    let objects = netfilter.dump(inet(NfTablesMessage::GetObject(filter)), 0)?;
    Ok(objects
        .into_iter()
        .filter_map(|message| match message.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewObject(object)) => counter(&object),
            _ => None,
        })
        .collect())
}

fn counter(object: &[DefaultNla]) -> Option<(String, Count)> {
    // NFTA_OBJ_NAME, NFTA_OBJ_DATA
    let name = object
        .iter()
        .find(|attribute| kind(attribute) == 2)
        .map(value)?;
    let data = object
        .iter()
        .find(|attribute| kind(attribute) == 4)
        .map(value)?;
    let mut count = Count::default();
    for attribute in NlasIterator::new(&data[..]) {
        let attribute = DefaultNla::parse(&attribute.ok()?).ok()?;
        let number = || value(&attribute).try_into().ok().map(u64::from_be_bytes);
        match kind(&attribute) {
            1 => count.bytes = number()?,
            2 => count.packets = number()?,
            _ => {}
        }
    }
    Some((
        String::from_utf8_lossy(&name)
            .trim_end_matches('\0')
            .to_owned(),
        count,
    ))
}

fn kind(attribute: &DefaultNla) -> u16 {
    attribute.kind() & !netlink_packet_core::NLA_F_NESTED
}

fn value(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

/// The interface names in a set; none if there is no such set.
pub(crate) fn interfaces(
    netfilter: &mut Netfilter,
    table: &str,
    set: &str,
) -> io::Result<Vec<String>> {
    let attributes = vec![
        SetElementList::Table(table.into()),
        SetElementList::Set(set.into()),
    ];
    let request = inet(NfTablesMessage::GetSetElement(SetElementMessage {
        attributes,
    }));
    let lists = match netfilter.dump(request, 0) {
        Err(error) if errno(&error) == Some(libc::ENOENT) => return Ok(Vec::new()),
        lists => lists?,
    };
    let keys = lists
        .into_iter()
        .filter_map(|message| match message.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(list)) => Some(list),
            _ => None,
        })
        .flat_map(|list| list.attributes)
        .filter_map(|attribute| match attribute {
            SetElementList::Elements(elements) => Some(elements),
            _ => None,
        })
        .flatten()
        .filter_map(|element| match element {
            ListAttribute::Element(attributes) => Some(attributes),
            _ => None,
        })
        .flatten()
        .filter_map(|attribute| match attribute {
            SetElementAttribute::Key(DataAttribute::Value(key)) => Some(key),
            _ => None,
        });
    Ok(keys
        .map(|key| {
            String::from_utf8_lossy(&key)
                .trim_end_matches('\0')
                .to_owned()
        })
        .collect())
}

/// A table of any family that has a chain which drops forwarded packets unless a rule says
/// otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DroppingChain {
    pub(crate) table: String,
    pub(crate) chain: String,
}

/// All chains that drop forwarded IPv4 packets by default.
pub(crate) fn chains_that_drop_forwarded(
    netfilter: &mut Netfilter,
) -> io::Result<Vec<DroppingChain>> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let request = NfTablesMessage::GetChain(ChainMessage {
        attributes: Vec::new(),
    });
    let chains = netfilter.dump(NetfilterMessage::new(header, request), 0)?;
    let ipv4 = [NetfilterProtoFamily::Inet, NetfilterProtoFamily::IPv4];
    Ok(chains
        .into_iter()
        .filter(|message| ipv4.contains(&message.header.family))
        .filter_map(|message| match message.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) => dropping(chain),
            _ => None,
        })
        .collect())
}

fn dropping(message: ChainMessage) -> Option<DroppingChain> {
    let mut found = DroppingChain {
        table: String::new(),
        chain: String::new(),
    };
    let (mut forwards, mut drops) = (false, false);
    for attribute in message.attributes {
        match attribute {
            ChainAttribute::Table(table) => found.table = table,
            ChainAttribute::Name(chain) => found.chain = chain,
            ChainAttribute::Hook(hook) => {
                let forward = HookNumber::Inet(InetHookNumber::Forward);
                forwards = hook.contains(&Hook::Number(forward));
            }
            ChainAttribute::Policy(policy) => drops = policy == Policy::Drop.code(),
            _ => {}
        }
    }
    (forwards && drops).then_some(found)
}

/// Names of all tables of the family `inet`.
pub(crate) fn tables(netfilter: &mut Netfilter) -> io::Result<Vec<String>> {
    let request = TableMessage {
        attributes: Vec::new(),
    };
    let tables = netfilter.dump(inet(NfTablesMessage::GetTable(request)), 0)?;
    Ok(tables
        .into_iter()
        .filter_map(|message| match message.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) => Some(table),
            _ => None,
        })
        .flat_map(|table| table.attributes)
        .filter_map(|attribute| match attribute {
            TableAttribute::Name(name) => Some(name),
            _ => None,
        })
        .collect())
}
