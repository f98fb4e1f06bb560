//! The bridge and the pods' interfaces.
//!
//! A pod's `eth0` is one end of a veth pair whose other end is a port of the bridge. The pod's address is a host address
//! (/32, /128) with a route to the gateway and a default route through it: what a pod sends passes the node's routing,
//! also to its neighbours. So services and host ports are translated back on the way between pods of one node, with or
//! without br_netfilter, and the client's address is kept. (With a route to the whole range, as the CNI plugin `bridge`
//! makes it, answers to a neighbour would go past the translation.) Ports are hairpin ports because br_netfilter sends
//! a translated packet from port to port, perhaps the same one; for this reason they cannot be isolated from each other.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage, State,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{
    AddressMessageBuilder, LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth, RouteMessageBuilder,
};
use rustix::io::Errno;

use super::range::Range;
use crate::netlink::{Batch, Client, Refusal};

/// The interface in the pod.
pub(crate) const POD_INTERFACE: &str = "eth0";
/// Host ends of pods start with this.
const PREFIX: &str = "pv";
/// Link group of host ends ("pv", then 1): says that one that is off the bridge is ours.
const GROUP: u32 = 0x7076_0001;
/// IFNAMSIZ without its zero byte.
const NAME_LIMIT: usize = 15;
/// Of an Ethernet without any tunnel.
const DEFAULT_MTU: u32 = 1500;
/// Longest wait for a new link to pass packets; a pod does not fail for it.
const SETTLE_LIMIT: Duration = Duration::from_millis(100);

/// Name of the host's end for a sandbox.
pub(crate) fn host_end(id: &str) -> String {
    PREFIX.chars().chain(id.chars()).take(NAME_LIMIT).collect()
}

/// Whether the node speaks IPv6 (in the calling thread's network namespace).
pub(crate) fn has_ipv6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|text| text.trim() == "0")
}

/// Writes a sysctl of the calling thread's network namespace. `interface` may contain dots, so no dotted names here.
fn sysctl(path: &str, value: &str) -> Result<(), Refusal> {
    let path = format!("/proc/sys/net/{path}");
    if fs::read_to_string(&path).is_ok_and(|text| text.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|error| Refusal::new(format!("writing {value} to {path}"), error))
}

/// Makes the bridge with the gateways of `ranges`, or completes the one there is, and lets the node route.
/// Gateways of other ranges are removed unless `keep` says that pods still use them. Returns the ranges in effect.
pub(crate) fn prepare(
    bridge: &str,
    ranges: &[Range],
    keep: impl Fn(Range) -> bool,
) -> Result<Vec<Range>, Refusal> {
    let client = Client::route()?;
    make_bridge(&client, bridge)?;
    let index = client.index(bridge)?;
    let ipv6 = ranges.iter().any(|range| !range.is_ipv4());
    if ipv6 {
        sysctl(&format!("ipv6/conf/{bridge}/disable_ipv6"), "0")?;
        sysctl(&format!("ipv6/conf/{bridge}/accept_dad"), "0")?;
        sysctl(&format!("ipv6/conf/{bridge}/accept_ra"), "0")?;
    }
    let mut batch = Batch::default();
    let up = LinkUnspec::new_with_index(index).up().build();
    batch.route(format!("bringing bridge {bridge} up"), RouteNetlinkMessage::SetLink(up), 0);
    client.run(&batch)?;

    let mut in_effect = ranges.to_vec();
    for old in gateways(&client, index)? {
        if ranges.contains(&old) {
            continue;
        }
        // A wider range with the same gateway takes over. IPv6 has one length for an address, so then the old one must go.
        let covered =
            ranges.iter().any(|range| range.gateway() == old.gateway() && range.length() < old.length());
        if keep(old) && !covered {
            in_effect.push(old);
        } else {
            let mut batch = Batch::default();
            let message = gateway_message(index, old);
            batch.route(format!("removing gateway of {old}"), RouteNetlinkMessage::DelAddress(message), 0);
            client.run(&batch)?;
        }
    }
    for range in &in_effect {
        let mut batch = Batch::default();
        batch.route(
            format!("adding the gateway of {range} to bridge {bridge}"),
            RouteNetlinkMessage::NewAddress(gateway_message(index, *range)),
            NLM_F_CREATE | NLM_F_EXCL,
        );
        match client.run(&batch) {
            Err(refusal) if !refusal.is(Errno::EXIST) => return Err(refusal),
            _ => {}
        }
    }

    sysctl("ipv4/ip_forward", "1")?;
    // Connections of the node from 127.0.0.1 to a host port leave through the bridge; the rules see to the rest.
    sysctl(&format!("ipv4/conf/{bridge}/route_localnet"), "1")?;
    if ipv6 {
        keep_advertised_routes();
        sysctl("ipv6/conf/all/forwarding", "1")?;
    }
    Ok(in_effect)
}

fn make_bridge(client: &Client, bridge: &str) -> Result<(), Refusal> {
    let mut mac = [0; 6];
    // Without an address of its own the bridge takes the lowest of its ports', and every pod's neighbour entry for the
    // gateway goes stale when that pod ends.
    rustix::rand::getrandom(&mut mac[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Refusal::new("drawing a hardware address", errno))?;
    mac[0] = mac[0] & 0xfc | 0x02;
    let message = LinkBridge::new(bridge).address(mac.to_vec()).build();
    let mut batch = Batch::default();
    batch.route(
        format!("creating bridge {bridge}"),
        RouteNetlinkMessage::NewLink(message),
        NLM_F_CREATE | NLM_F_EXCL,
    );
    match client.run(&batch) {
        Err(refusal) if refusal.is(Errno::EXIST) => {}
        outcome => return outcome,
    }
    let request = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(bridge).build());
    let is_bridge = client.query(&format!("looking at link {bridge}"), request, false)?.iter().any(|answer| {
        let RouteNetlinkMessage::NewLink(link) = answer else { return false };
        link.attributes.iter().any(|attribute| {
            matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Bridge)))
        })
    });
    if is_bridge {
        Ok(())
    } else {
        let error =
            io::Error::new(io::ErrorKind::AlreadyExists, "a link of this name exists and is no bridge");
        Err(Refusal::new(format!("creating bridge {bridge}"), error))
    }
}

/// Forwarding turns router advertisements off on interfaces that accept them with value 1 (kernel,
/// `ip-sysctl.rst`): the node would lose its own default route. Value 2 means "also when forwarding".
fn keep_advertised_routes() {
    let root = Path::new("/proc/sys/net/ipv6/conf");
    if fs::read_to_string(root.join("all/forwarding")).is_ok_and(|text| text.trim() != "0") {
        return;
    }
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path().join("accept_ra");
        if fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1") {
            let _ = fs::write(path, "2");
        }
    }
}

fn address_message(index: u32, address: IpAddr, length: u8) -> AddressMessage {
    match address {
        IpAddr::V4(address) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, length).build()
        }
        IpAddr::V6(address) => {
            let mut message =
                AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, length).build();
            // Duplicate address detection would keep it unusable for a second; leases exclude duplicates.
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            message
        }
    }
}

fn gateway_message(index: u32, range: Range) -> AddressMessage {
    address_message(index, range.gateway(), range.length())
}

/// The ranges whose gateways the link has.
fn gateways(client: &Client, index: u32) -> Result<Vec<Range>, Refusal> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut found = Vec::new();
    for answer in client.query("listing addresses", request, true)? {
        if let RouteNetlinkMessage::NewAddress(message) = answer
            && message.header.index == index
        {
            found.extend(message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Range::of_gateway(*address, message.header.prefix_len),
                _ => None,
            }));
        }
    }
    Ok(found)
}

/// The host ends on the bridge, and those that were taken off and not deleted yet.
pub(crate) fn host_ends(bridge: &str) -> Result<Vec<String>, Refusal> {
    let client = Client::route()?;
    let bridge = client.index(bridge).ok();
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut found = Vec::new();
    for answer in client.query("listing links", request, true)? {
        let RouteNetlinkMessage::NewLink(link) = answer else { continue };
        let ours = match controller(&link) {
            None => link.attributes.contains(&LinkAttribute::Group(GROUP)),
            some => some == bridge,
        };
        for attribute in link.attributes.iter().filter(|_| ours) {
            if let LinkAttribute::IfName(name) = attribute
                && name.starts_with(PREFIX)
            {
                found.push(name.clone());
            }
        }
    }
    Ok(found)
}

fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) if *index != 0 => Some(*index),
        _ => None,
    })
}

/// Takes a host end off the bridge: its pod reaches nothing any more, its address may be another's. Takes a fraction of a
/// millisecond, where deleting waits tens of them for RCU. `Ok` when there is none.
pub(crate) fn detach(name: &str) -> Result<(), Refusal> {
    let mut batch = Batch::default();
    let message = LinkUnspec::new_with_name(name).nocontroller().down().build();
    batch.route(format!("taking {name} off the bridge"), RouteNetlinkMessage::SetLink(message), 0);
    match Client::route()?.run(&batch) {
        Err(refusal) if refusal.is(Errno::NODEV) => Ok(()),
        outcome => outcome,
    }
}

/// Deletes a host end that [`detach`] has left, if it is still there. By index: one of the same name that has been made meanwhile is
/// another one.
fn delete_detached(client: &Client, name: &str) -> Result<(), Refusal> {
    let request = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build());
    let answers = client.query(&format!("looking at link {name}"), request, false).unwrap_or_default();
    let detached = answers.iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link)
            if controller(link).is_none() && link.attributes.contains(&LinkAttribute::Group(GROUP)) =>
        {
            Some(link.header.index)
        }
        _ => None,
    });
    let Some(index) = detached else { return Ok(()) };
    delete_link(client, name, LinkUnspec::new_with_index(index).build())
}

/// [`delete_detached`] on a connection of its own.
pub(crate) fn sweep(name: &str) -> Result<(), Refusal> {
    delete_detached(&Client::route()?, name)
}

/// Removes a host end, and with it the pod's. `Ok` when there is none.
pub(crate) fn delete(name: &str) -> Result<(), Refusal> {
    delete_link(&Client::route()?, name, LinkUnspec::new_with_name(name).build())
}

fn delete_link(client: &Client, name: &str, message: LinkMessage) -> Result<(), Refusal> {
    let mut batch = Batch::default();
    batch.route(format!("deleting link {name}"), RouteNetlinkMessage::DelLink(message), 0);
    match client.run(&batch) {
        Err(refusal) if refusal.is(Errno::NODEV) => Ok(()),
        outcome => outcome,
    }
}

/// What a pod's interface is made from.
#[derive(Debug)]
pub(crate) struct Interface<'a> {
    pub(crate) bridge: &'a str,
    pub(crate) host_end: &'a str,
    pub(crate) netns: &'a Path,
    /// Addresses with the range each is from.
    pub(crate) addresses: &'a [(IpAddr, Range)],
}

impl Interface<'_> {
    /// Makes the pair with one end in the pod: `Err` leaves nothing.
    pub(crate) fn connect(&self, client: &Client) -> Result<(), Refusal> {
        let bridge = client.index(self.bridge)?;
        let netns = fs::File::open(self.netns).map_err(|error| {
            Refusal::new(format!("opening network namespace {}", self.netns.display()), error)
        })?;
        let mtu = node_mtu(client, self.addresses.first().is_none_or(|(address, _)| address.is_ipv4()));
        let mut peer =
            LinkUnspec::new_with_name(POD_INTERFACE).mtu(mtu).setns_by_fd(netns.as_fd().as_raw_fd());
        if let Some((address, _)) = self.addresses.first() {
            peer = peer.address(hardware_address(*address));
        }
        let pair = LinkVeth::new(self.host_end, POD_INTERFACE)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
            .mtu(mtu)
            .controller(bridge)
            .link_group(GROUP)
            .up()
            .build();
        let mut batch = Batch::default();
        let name = self.host_end;
        batch.route(
            format!("creating interface {name} on bridge {}", self.bridge),
            RouteNetlinkMessage::NewLink(pair),
            NLM_F_CREATE | NLM_F_EXCL,
        );
        match client.run(&batch) {
            Err(refusal) if refusal.is(Errno::EXIST) => {
                delete_detached(client, name)?;
                client.run(&batch)?;
            }
            outcome => outcome?,
        }
        let port = LinkBridgePort::new(0).name(name).hairpin(true).build();
        let mut batch = Batch::default();
        batch.route(format!("making {name} a hairpin port"), RouteNetlinkMessage::NewLink(port), 0);
        client.run(&batch).inspect_err(|_| drop(delete(name)))
    }

    /// Configures the pod's end; the calling thread is in the pod's namespace. Returns the addresses that were set: without
    /// those of IPv6 when a sysctl of the pod's turned that off.
    pub(crate) fn configure(&self) -> Result<Vec<IpAddr>, Refusal> {
        let client = Client::route()?;
        let index = client.index(POD_INTERFACE)?;
        let ipv6 = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{POD_INTERFACE}/disable_ipv6"))
            .is_ok_and(|text| text.trim() == "0");
        let addresses = || self.addresses.iter().filter(|(address, _)| ipv6 || address.is_ipv4());
        if ipv6 {
            // Link-local addresses are made when the link comes up; these must stand before.
            sysctl(&format!("ipv6/conf/{POD_INTERFACE}/accept_dad"), "0")?;
            sysctl(&format!("ipv6/conf/{POD_INTERFACE}/accept_ra"), "0")?;
        }
        let mut batch = Batch::default();
        let up = LinkUnspec::new_with_index(index).up().build();
        batch.route(format!("bringing {POD_INTERFACE} up"), RouteNetlinkMessage::SetLink(up), 0);
        for (address, range) in addresses() {
            let length = if address.is_ipv4() { 32 } else { 128 };
            let message = address_message(index, *address, length);
            batch.route(
                format!("adding address {address} to {POD_INTERFACE}"),
                RouteNetlinkMessage::NewAddress(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            );
            for (what, message) in [
                ("the gateway", to_gateway(index, range.gateway())),
                ("everywhere", default_route(index, range.gateway())),
            ] {
                batch.route(
                    format!("adding the route to {what} through {}", range.gateway()),
                    RouteNetlinkMessage::NewRoute(message),
                    NLM_F_CREATE | NLM_F_REPLACE,
                );
            }
        }
        client.run(&batch)?;
        settle(&client, POD_INTERFACE);
        Ok(addresses().map(|(address, _)| *address).collect())
    }
}

/// Waits until a link that is up and connected also passes packets. The kernel switches the queue and the bridge port on in
/// a work item (`net/core/link_watch.c`); a packet sent before is lost, and TCP repeats it after a second. Since 6.8
/// asking for the link does that work first, so there is nothing to wait for; before, it takes about a millisecond.
pub(crate) fn settle(client: &Client, name: &str) {
    let deadline = Instant::now() + SETTLE_LIMIT;
    while Instant::now() < deadline {
        let request = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build());
        let Ok(answers) = client.query("looking at a new link", request, false) else { return };
        let up = |answer: &RouteNetlinkMessage| {
            matches!(answer, RouteNetlinkMessage::NewLink(link)
                if link.attributes.contains(&LinkAttribute::OperState(State::Up)))
        };
        if answers.iter().any(up) {
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn to_gateway(index: u32, gateway: IpAddr) -> RouteMessage {
    match gateway {
        IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(gateway, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .build(),
        IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(gateway, 128)
            .output_interface(index)
            .build(),
    }
}

fn default_route(index: u32, gateway: IpAddr) -> RouteMessage {
    match gateway {
        IpAddr::V4(gateway) => {
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build()
        }
        IpAddr::V6(gateway) => {
            RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(index).build()
        }
    }
}

/// Derived from the pod's address, so that the node's neighbour entry for an address that comes round is right.
fn hardware_address(address: IpAddr) -> Vec<u8> {
    let tail: [u8; 4] = match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
    };
    [&[0x02, 0x70][..], &tail].concat()
}

/// What fits through the link of the node's default route: pods behind a tunnel must not send more.
fn node_mtu(client: &Client, ipv4: bool) -> u32 {
    // RFC 5737 and RFC 3849: addresses for documentation, which only the default route covers.
    let request = if ipv4 {
        RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::new(192, 0, 2, 1), 32).build()
    } else {
        RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 128)
            .build()
    };
    let link = || {
        let answers = client
            .query("looking up the default route", RouteNetlinkMessage::GetRoute(request), false)
            .ok()?;
        let index = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => {
                route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                })
            }
            _ => None,
        })?;
        let request = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_index(index).build());
        let answers = client.query("looking at the link of the default route", request, false).ok()?;
        answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => {
                link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::Mtu(mtu) => Some(*mtu),
                    _ => None,
                })
            }
            _ => None,
        })
    };
    link().filter(|mtu| (1280..=65535).contains(mtu)).unwrap_or(DEFAULT_MTU)
}
