//! Elements of the maps of [`super::ruleset`], added and removed over nfnetlink.
//!
//! Wire facts: the kernel's `include/uapi/linux/netfilter/nfnetlink.h` and `nf_tables.h`. Requests between BATCH_BEGIN and
//! BATCH_END are one transaction. Numbers are in network byte order, each part of a concatenation is padded to four bytes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use rustix::io::Errno;

use super::port::Forward;
use super::ruleset::{TABLE, map_of, self_set};
use crate::netlink::{Batch, Client, NLA_F_NESTED, Refusal, attribute, nested};

const NLM_F_CREATE: u16 = 0x400;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWSETELEM: u16 = NFNL_SUBSYS_NFTABLES << 8 | 0xc;
const NFT_MSG_DELSETELEM: u16 = NFNL_SUBSYS_NFTABLES << 8 | 0xe;
const NFT_MSG_GETTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFPROTO_INET: u8 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

/// An element of a set or map.
#[derive(Debug, Clone)]
struct Element {
    set: &'static str,
    key: Vec<u8>,
    data: Option<Vec<u8>>,
    what: String,
}

fn part(bytes: &[u8], to: &mut Vec<u8>) {
    to.extend_from_slice(bytes);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn address(address: IpAddr, to: &mut Vec<u8>) {
    match address {
        IpAddr::V4(address) => part(&address.octets(), to),
        IpAddr::V6(address) => part(&address.octets(), to),
    }
}

impl Element {
    fn of_forward(forward: &Forward) -> Self {
        let (mut key, mut data) = (Vec::new(), Vec::new());
        if let Some(host_ip) = forward.host_ip {
            address(host_ip, &mut key);
        }
        part(&[forward.protocol.number()], &mut key);
        part(&forward.host_port.to_be_bytes(), &mut key);
        address(forward.to.ip(), &mut data);
        part(&forward.to.port().to_be_bytes(), &mut data);
        let what = format!("host port {} {}", forward.host_port, forward.protocol.name());
        Self { set: map_of(forward), key, data: Some(data), what }
    }

    fn of_self(ip: IpAddr) -> Self {
        let mut key = Vec::new();
        address(ip, &mut key);
        address(ip, &mut key);
        Self { set: self_set(ip), key, data: None, what: format!("loop of {ip}") }
    }

    fn message(&self) -> Vec<u8> {
        let mut element = Vec::new();
        nested(NFTA_SET_ELEM_KEY, &mut element, |to| attribute(NFTA_DATA_VALUE, &self.key, to));
        if let Some(data) = &self.data {
            nested(NFTA_SET_ELEM_DATA, &mut element, |to| attribute(NFTA_DATA_VALUE, data, to));
        }
        let mut message = nfgenmsg(NFPROTO_INET, 0).to_vec();
        attribute(NFTA_SET_ELEM_LIST_TABLE, format!("{TABLE}\0").as_bytes(), &mut message);
        attribute(NFTA_SET_ELEM_LIST_SET, format!("{}\0", self.set).as_bytes(), &mut message);
        nested(NFTA_SET_ELEM_LIST_ELEMENTS, &mut message, |to| {
            attribute(NFTA_LIST_ELEM | NLA_F_NESTED, &element, to);
        });
        message
    }
}

/// `struct nfgenmsg`.
pub(super) fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Everything the maps hold for one sandbox's forwards.
fn elements(forwards: &[Forward]) -> Vec<Element> {
    let addresses: BTreeSet<IpAddr> = forwards.iter().map(|forward| forward.to.ip()).collect();
    let own = addresses.into_iter().map(Element::of_self);
    forwards.iter().map(Element::of_forward).chain(own).collect()
}

fn transaction(verb: &str, kind: u16, flags: u16, elements: &[Element]) -> Batch {
    let mut batch = Batch::default();
    batch.raw(None, NFNL_MSG_BATCH_BEGIN, 0, &nfgenmsg(0, NFNL_SUBSYS_NFTABLES));
    for element in elements {
        batch.raw(Some(format!("{verb} {}", element.what)), kind, flags, &element.message());
    }
    batch.raw(None, NFNL_MSG_BATCH_END, 0, &nfgenmsg(0, NFNL_SUBSYS_NFTABLES));
    batch
}

/// Makes the forwards work, all or none.
pub(crate) fn add(client: &Client, forwards: &[Forward]) -> Result<(), Refusal> {
    client.run(&transaction("adding", NFT_MSG_NEWSETELEM, NLM_F_CREATE, &elements(forwards)))
}

/// Ends the forwards. What is not there (or no table at all) is fine.
pub(crate) fn remove(client: &Client, forwards: &[Forward]) -> Result<(), Refusal> {
    let elements = elements(forwards);
    match client.run(&transaction("removing", NFT_MSG_DELSETELEM, 0, &elements)) {
        // One that is missing undoes the transaction: one by one, then.
        Err(refusal) if refusal.is(Errno::NOENT) => {}
        outcome => return outcome,
    }
    for element in elements {
        match client.run(&transaction("removing", NFT_MSG_DELSETELEM, 0, &[element])) {
            Err(refusal) if !refusal.is(Errno::NOENT) => return Err(refusal),
            _ => {}
        }
    }
    Ok(())
}

/// Whether the table is there.
pub(crate) fn has_table(client: &Client) -> Result<bool, Refusal> {
    let mut message = nfgenmsg(NFPROTO_INET, 0).to_vec();
    attribute(NFTA_TABLE_NAME, format!("{TABLE}\0").as_bytes(), &mut message);
    let mut batch = Batch::default();
    batch.raw(Some("looking for the table".to_owned()), NFT_MSG_GETTABLE, 0, &message);
    match client.run(&batch) {
        Err(refusal) if refusal.is(Errno::NOENT) => Ok(false),
        outcome => outcome.map(|()| true),
    }
}
