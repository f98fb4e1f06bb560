//! What a guest has to be told, so that its interface becomes the one that the network made.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::TapError;
use crate::netlink::{Client, Refusal};

/// linux/rtnetlink.h.
const RT_TABLE_MAIN: u32 = 254;
const RT_TABLE_LOCAL: u32 = 255;

/// One interface of a pod, as its guest is to have it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GuestInterface {
    /// The tap that is joined with it, in the pod's network namespace.
    pub tap: String,
    /// As the containers see it, e.g. eth0.
    pub name: String,
    /// Of the interface in the namespace, which the guest's takes over: `aa:bb:cc:dd:ee:ff`.
    pub hardware_address: String,
    /// Bytes.
    pub mtu: u32,
    /// Without IPv6's link-local ones and those that came by router advertisements: the guest makes these itself.
    pub addresses: Vec<Prefix>,
    /// All of them, also those that come with an address (which are to be added *without* routes), in an order in which they can be added.
    pub routes: Vec<GuestRoute>,
    /// The permanent ones.
    pub neighbours: Vec<GuestNeighbour>,
    /// Whether IPv6 router advertisements configure it.
    pub accepts_router_advertisements: bool,
    /// With the last interface: the namespace's rules of policy routing but those that every namespace has, in their order. Each is the body
    /// of an RTM_NEWRULE (linux/fib_rules.h), which any kernel of this architecture takes.
    pub rules: Vec<Vec<u8>>,
}

/// An address with the length of its network, or a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub struct Prefix {
    pub address: IpAddr,
    pub length: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GuestRoute {
    /// Where it leads.
    pub destination: Prefix,
    /// `None`: directly. Of IPv6 also for a destination of IPv4.
    pub gateway: Option<IpAddr>,
    /// Preferred address of what is sent.
    pub source: Option<IpAddr>,
    /// rtnetlink(7), `RT_SCOPE_…`.
    pub scope: u8,
    /// The lower one counts; 0: the kernel's default.
    pub metric: u32,
    /// Bytes; 0: the interface's.
    pub mtu: u32,
    /// TCP's advertised segment size, bytes; 0: from the MTU.
    pub advertised_mss: u32,
    /// 0: the main one.
    pub table: u32,
}

/// A neighbour that is not to be asked for.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub struct GuestNeighbour {
    pub address: IpAddr,
    pub hardware_address: String,
}

/// An interface with its index in the namespace.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) index: u32,
    pub(super) interface: GuestInterface,
}

/// The interfaces of the calling thread's network namespace that a guest is given.
pub(super) fn interfaces(client: &Client) -> Result<Vec<Found>, TapError> {
    let mut found = Vec::new();
    for answer in client.query("listing links", RouteNetlinkMessage::GetLink(LinkMessage::default()), true)? {
        if let RouteNetlinkMessage::NewLink(link) = answer {
            found.extend(interface(&link)?);
        }
    }
    // A tap of ours bears the index of the interface that it is joined with.
    let taps: Vec<String> = found.iter().map(|found: &Found| found.interface.tap.clone()).collect();
    found.retain(|found| !taps.contains(&found.interface.name));
    for Found { index, interface } in &mut found {
        interface.addresses = addresses(client, *index)?;
        interface.neighbours = neighbours(client, *index)?;
    }
    for route in routes(client)? {
        if let Some(found) = found.iter_mut().find(|found| found.index == route.0) {
            found.interface.routes.push(route.1);
        }
    }
    for found in &mut found {
        // A gateway has to be reachable when its route is added. The order is the kernel's own otherwise.
        found.interface.routes.sort_by_key(|route| route.gateway.is_some());
    }
    if let Some(last) = found.last_mut() {
        last.interface.rules = rules(client)?;
    }
    Ok(found)
}

fn interface(link: &LinkMessage) -> Result<Option<Found>, TapError> {
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let index = link.header.index;
    let (mut name, mut address, mut mtu) = (String::new(), Vec::new(), 1500);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Address(value) => address.clone_from(value),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    if link.header.link_layer_type != LinkLayerType::Ether || address.len() != 6 {
        return Err(TapError::NotEthernet { name });
    }
    let interface = GuestInterface {
        tap: format!("tap{index}"),
        accepts_router_advertisements: accepts_router_advertisements(&name),
        name,
        hardware_address: hardware_address(&address),
        mtu,
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
        rules: Vec::new(),
    };
    Ok(Some(Found { index, interface }))
}

/// Documentation/networking/ip-sysctl.rst: 1 does so unless the namespace forwards, 2 always.
fn accepts_router_advertisements(name: &str) -> bool {
    let read = |what: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/{what}"));
        text.ok().and_then(|text| text.trim().parse::<u8>().ok()).unwrap_or(0)
    };
    match read("accept_ra") {
        0 => false,
        1 => read("forwarding") == 0,
        _ => true,
    }
}

fn hardware_address(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

fn addresses(client: &Client, index: u32) -> Result<Vec<Prefix>, Refusal> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut found = Vec::new();
    for answer in client.query("listing addresses", request, true)? {
        let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
        let (mut local, mut remote) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(address) => local = Some(*address),
                AddressAttribute::Address(address) => remote = Some(*address),
                _ => {}
            }
        }
        let Some(address) = local.or(remote).filter(|_| message.header.index == index) else { continue };
        let made_by_kernel = match address {
            IpAddr::V4(_) => false,
            IpAddr::V6(address) => {
                address.is_unicast_link_local()
                    || !message.header.flags.contains(AddressHeaderFlags::Permanent)
            }
        };
        if !made_by_kernel {
            // With a peer the length is that of the peer's network.
            let length = match (local, remote, address) {
                (Some(local), Some(remote), IpAddr::V4(_)) if local != remote => 32,
                (Some(local), Some(remote), IpAddr::V6(_)) if local != remote => 128,
                _ => message.header.prefix_len,
            };
            found.push(Prefix { address, length });
        }
    }
    Ok(found)
}

fn neighbours(client: &Client, index: u32) -> Result<Vec<GuestNeighbour>, Refusal> {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let mut found = Vec::new();
    for answer in client.query("listing neighbours", request, true)? {
        let RouteNetlinkMessage::NewNeighbour(message) = answer else { continue };
        if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
            continue;
        }
        let (mut address, mut hardware) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    address = Some(IpAddr::V4(*ip));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    address = Some(IpAddr::V6(*ip));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) if bytes.len() == 6 => {
                    hardware = Some(hardware_address(bytes));
                }
                _ => {}
            }
        }
        if let (Some(address), Some(hardware_address)) = (address, hardware) {
            found.push(GuestNeighbour { address, hardware_address });
        }
    }
    Ok(found)
}

/// What was added to the rules that every namespace has, in the order in which they are looked through.
fn rules(client: &Client) -> Result<Vec<Vec<u8>>, Refusal> {
    // Priority and table (linux/rtnetlink.h) of the others.
    const EVERYWHERE: [(u32, u8); 3] = [(0, 255), (32_766, 254), (32_767, 253)];
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        for answer in client.query("listing rules", RouteNetlinkMessage::GetRule(request), true)? {
            let RouteNetlinkMessage::NewRule(mut rule) = answer else { continue };
            let priority = rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            });
            let priority = priority.unwrap_or(0);
            if EVERYWHERE.contains(&(priority, rule.header.table)) {
                continue;
            }
            // The others say how things are.
            rule.header.flags &= RuleFlags::Invert;
            let mut body = vec![0; rule.buffer_len()];
            rule.emit(&mut body);
            found.push((priority, body));
        }
    }
    found.sort_by_key(|(priority, _)| *priority);
    Ok(found.into_iter().map(|(_, body)| body).collect())
}

/// The unicast routes of every table but the local one, each with the interface that it leads through.
fn routes(client: &Client) -> Result<Vec<(u32, GuestRoute)>, Refusal> {
    let requests =
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
    let mut found = Vec::new();
    for request in requests {
        for answer in client.query("listing routes", RouteNetlinkMessage::GetRoute(request), true)? {
            if let RouteNetlinkMessage::NewRoute(message) = answer {
                found.extend(route(&message));
            }
        }
    }
    Ok(found)
}

fn route(message: &RouteMessage) -> Vec<(u32, GuestRoute)> {
    let RouteHeader { table, kind, protocol, destination_prefix_length, scope, .. } = message.header;
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    if kind != RouteType::Unicast || protocol == RouteProtocol::Ra {
        return Vec::new();
    }
    // In the header there is room for 255.
    let table = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(table.into());
    if table == RT_TABLE_LOCAL {
        return Vec::new();
    }
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    let destination = Prefix { address: destination.unwrap_or(any), length: destination_prefix_length };
    if let IpAddr::V6(address) = destination.address
        && protocol == RouteProtocol::Kernel
        && (address.is_unicast_link_local() || address.is_multicast())
    {
        // Every interface has these.
        return Vec::new();
    }
    let mut route = GuestRoute {
        destination,
        gateway: None,
        source: None,
        scope: scope.into(),
        metric: 0,
        mtu: 0,
        advertised_mss: 0,
        table: if table == RT_TABLE_MAIN { 0 } else { table },
    };
    let (index, gateway) = next_hop(&message.attributes);
    route.gateway = gateway;
    let mut through: Vec<(u32, Option<IpAddr>)> = index.map(|index| (index, gateway)).into_iter().collect();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(bytes) => route.mtu = *bytes,
                        RouteMetric::Advmss(bytes) => route.advertised_mss = *bytes,
                        _ => {}
                    }
                }
            }
            RouteAttribute::MultiPath(hops) => {
                through.extend(hops.iter().map(|hop| (hop.interface_index, next_hop(&hop.attributes).1)));
            }
            _ => {}
        }
    }
    through.into_iter().map(|(index, gateway)| (index, GuestRoute { gateway, ..route.clone() })).collect()
}

/// Interface and gateway.
fn next_hop(attributes: &[RouteAttribute]) -> (Option<u32>, Option<IpAddr>) {
    let (mut index, mut gateway) = (None, None);
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(value) => index = Some(*value),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            _ => {}
        }
    }
    (index, gateway)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
