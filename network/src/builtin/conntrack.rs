//! Connection tracking forgets where a UDP host port led.
//!
//! UDP has no end of a connection: a client that keeps sending from one port keeps its old translation alive, to a pod that
//! is gone, or past a pod that has just got the port. TCP and SCTP need nothing: their next packet is answered by a reset.
//!
//! Wire facts: the kernel's `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.

use std::net::IpAddr;

use super::element::nfgenmsg;
use super::port::Forward;
use crate::Protocol;
use crate::netlink::{Attributes, Batch, Client, HEADER, Refusal, attribute};

const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = NFNL_SUBSYS_CTNETLINK << 8;
const IPCTNL_MSG_CT_GET: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 1;
const IPCTNL_MSG_CT_DELETE: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Deletes the tracked UDP flows that a new or a bygone forward makes wrong.
pub(crate) fn forget(client: &Client, forwards: &[Forward]) -> Result<(), Refusal> {
    let udp: Vec<_> = forwards.iter().filter(|forward| forward.protocol == Protocol::Udp).collect();
    let mut doomed: Vec<(u8, Vec<u8>)> = Vec::new();
    for (family, ipv4) in [(AF_INET, true), (AF_INET6, false)] {
        if !udp.iter().any(|forward| forward.to.is_ipv4() == ipv4) {
            continue;
        }
        client.collect("listing tracked connections", &listing(family), |_, kind, payload| {
            if kind != IPCTNL_MSG_CT_NEW {
                return;
            }
            let Some(flow) = payload.get(4..).and_then(Flow::parse) else { return };
            // Sent to the node's port. A flow that leaves the node with its address (a pod asking a server elsewhere on
            // the same port) is not.
            let outward = flow.answered_by == flow.to && flow.answered_to != flow.from;
            let wrong = |forward: &Forward| {
                flow.destination_port == forward.host_port
                    && flow.protocol == forward.protocol.number()
                    && forward.host_ip.map_or(!outward, |host_ip| host_ip == flow.to)
            };
            if udp.iter().any(|forward| forward.to.is_ipv4() == ipv4 && wrong(forward)) {
                doomed.push((family, flow.identity()));
            }
        })?;
    }
    let mut batch = Batch::default();
    for (family, identity) in doomed {
        let payload = [&nfgenmsg(family, 0)[..], &identity].concat();
        batch.raw(Some("deleting a tracked connection".to_owned()), IPCTNL_MSG_CT_DELETE, 0, &payload);
    }
    // One that has ended by itself meanwhile is fine, and nothing else can be done about the others.
    client.outcomes(&batch).map(drop)
}

fn listing(family: u8) -> Vec<u8> {
    let mut request = Vec::with_capacity(HEADER + 4);
    request.extend_from_slice(&20_u32.to_ne_bytes());
    request.extend_from_slice(&IPCTNL_MSG_CT_GET.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&nfgenmsg(family, 0));
    request
}

/// What is needed of one tracked connection.
struct Flow<'a> {
    original: &'a [u8],
    id: Option<&'a [u8]>,
    zone: Option<&'a [u8]>,
    protocol: u8,
    /// The client, and where it sent to, before translation.
    from: IpAddr,
    to: IpAddr,
    destination_port: u16,
    /// Who answers, and to whom, after translation.
    answered_by: IpAddr,
    answered_to: IpAddr,
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attributes(attributes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Source and destination of a tuple.
fn ends(tuple: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let addresses = find(tuple, CTA_TUPLE_IP)?;
    let four = |kind| Some(IpAddr::from(<[u8; 4]>::try_from(find(addresses, kind)?).ok()?));
    let six = |kind| Some(IpAddr::from(<[u8; 16]>::try_from(find(addresses, kind)?).ok()?));
    Some((
        four(CTA_IP_V4_SRC).or_else(|| six(CTA_IP_V6_SRC))?,
        four(CTA_IP_V4_DST).or_else(|| six(CTA_IP_V6_DST))?,
    ))
}

impl<'a> Flow<'a> {
    fn parse(attributes: &'a [u8]) -> Option<Self> {
        let original = find(attributes, CTA_TUPLE_ORIG)?;
        let protocol = find(original, CTA_TUPLE_PROTO)?;
        let (from, to) = ends(original)?;
        let (answered_by, answered_to) = ends(find(attributes, CTA_TUPLE_REPLY)?)?;
        Some(Self {
            original,
            id: find(attributes, CTA_ID),
            zone: find(attributes, CTA_ZONE),
            protocol: *find(protocol, CTA_PROTO_NUM)?.first()?,
            from,
            to,
            destination_port: u16::from_be_bytes(find(protocol, CTA_PROTO_DST_PORT)?.try_into().ok()?),
            answered_by,
            answered_to,
        })
    }

    /// The attributes that name this connection and no later one with the same addresses.
    fn identity(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        attribute(CTA_TUPLE_ORIG | NLA_F_NESTED, self.original, &mut bytes);
        for (kind, value) in [(CTA_ID, self.id), (CTA_ZONE, self.zone)] {
            if let Some(value) = value {
                attribute(kind, value, &mut bytes);
            }
        }
        bytes
    }
}
