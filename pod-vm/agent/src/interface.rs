//! Network interfaces: what the monitor asks for, checked, and what the kernel is told.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use podvisor_proto::agent::AddInterface;

use crate::failure::Failure;
use crate::netlink::{Attributes, Message, Netlink, append, flag, request, u32_at};

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NET_NS_FD: u16 = 28;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const RT_TABLE_COMPAT: u8 = 252;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `struct ifinfomsg`, `struct ifaddrmsg`.
const LINK_HEADER: usize = 16;
/// `struct fib_rule_hdr`, and as much as a rule can sensibly have.
const RULE_HEADER: usize = 12;
const RULE_LONGEST: usize = 4096;

/// Of an Ethernet.
pub(crate) type HardwareAddress = [u8; 6];

/// An address with the length of its network, or a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    length: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    destination: Prefix,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    scope: u8,
    metric: u32,
    mtu: u32,
    advertised_mss: u32,
    /// 0: the main one.
    table: u32,
}

/// An interface as it is to be.
#[derive(Debug, Clone)]
pub(crate) struct Interface {
    pub(crate) hardware_address: HardwareAddress,
    pub(crate) name: String,
    mtu: u32,
    addresses: Vec<Prefix>,
    routes: Vec<Route>,
    neighbours: Vec<(IpAddr, HardwareAddress)>,
    accepts_router_advertisements: bool,
    /// As the kernel takes them.
    rules: Vec<Vec<u8>>,
}

/// `aa:bb:cc:dd:ee:ff`.
pub(crate) fn hardware_address(text: &str) -> Result<HardwareAddress, Failure> {
    let parts = text.split(':').map(|part| {
        let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(part, 16).ok())?
    });
    let bytes: Option<Vec<u8>> = parts.collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Failure::invalid(format!("{text:?} is no hardware address")))
}

fn address(text: &str) -> Result<IpAddr, Failure> {
    text.parse().map_err(|_| Failure::invalid(format!("{text:?} is no address")))
}

fn optional(text: &str) -> Result<Option<IpAddr>, Failure> {
    if text.is_empty() { Ok(None) } else { address(text).map(Some) }
}

fn prefix(text: &str) -> Result<Prefix, Failure> {
    let wrong = || Failure::invalid(format!("{text:?} is no address with the length of its network"));
    let (ip, length) = text.split_once('/').ok_or_else(wrong)?;
    let (address, length) = (address(ip)?, length.parse().map_err(|_| wrong())?);
    if length > bits(address) { Err(wrong()) } else { Ok(Prefix { address, length }) }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

impl Interface {
    pub(crate) fn parse(wanted: &AddInterface) -> Result<Self, Failure> {
        let name = &wanted.name;
        // IFNAMSIZ, `dev_valid_name`; a colon would be an alias, and `lo` is there already.
        let plain = name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
        if name.is_empty()
            || name.len() > 15
            || !plain
            || ["lo", ".", "..", "all", "default"].contains(&&**name)
        {
            return Err(Failure::invalid(format!("{name:?} is no name of an interface")));
        }
        let routes = wanted.routes.iter().map(|route| {
            let gateway = optional(&route.gateway)?;
            let destination = match (route.destination.as_str(), gateway) {
                ("", Some(gateway)) if gateway.is_ipv4() => prefix("0.0.0.0/0")?,
                ("", Some(_)) => prefix("::/0")?,
                ("", None) => return Err(Failure::invalid("a route has no destination and no gateway")),
                (text, _) => prefix(text)?,
            };
            let scope = u8::try_from(route.scope)
                .map_err(|_| Failure::invalid(format!("{} is no scope", route.scope)))?;
            Ok(Route {
                destination,
                gateway,
                source: optional(&route.source)?,
                scope,
                metric: route.metric,
                mtu: route.mtu,
                advertised_mss: route.advertised_mss,
                table: route.table,
            })
        });
        if wanted.rules.iter().any(|rule| !(RULE_HEADER..=RULE_LONGEST).contains(&rule.len())) {
            return Err(Failure::invalid(format!("a rule has {RULE_HEADER} to {RULE_LONGEST} bytes")));
        }
        let neighbours = wanted.neighbours.iter().map(|neighbour| {
            Ok((address(&neighbour.address)?, hardware_address(&neighbour.hardware_address)?))
        });
        Ok(Self {
            hardware_address: hardware_address(&wanted.hardware_address)?,
            name: name.clone(),
            mtu: wanted.mtu,
            addresses: wanted.addresses.iter().map(|text| prefix(text)).collect::<Result<_, _>>()?,
            routes: routes.collect::<Result<_, Failure>>()?,
            neighbours: neighbours.collect::<Result<_, Failure>>()?,
            accepts_router_advertisements: wanted.accepts_router_advertisements,
            rules: wanted.rules.clone(),
        })
    }
}

/// A link as the kernel lists it.
#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    hardware_address: Vec<u8>,
}

fn links(netlink: &Netlink) -> Result<Vec<Link>, Failure> {
    let mut found = Vec::new();
    let message = Message::new(request::GET_LINK, 0, &[0; LINK_HEADER]);
    let listed = netlink.list(&message, |answer| {
        let mut link =
            Link { index: u32_at(answer, 4).unwrap_or(0), name: String::new(), hardware_address: Vec::new() };
        for (kind, value) in Attributes(answer.get(LINK_HEADER..).unwrap_or_default()) {
            match kind {
                IFLA_ADDRESS => link.hardware_address = value.to_vec(),
                IFLA_IFNAME => {
                    String::from_utf8_lossy(value).trim_end_matches('\0').clone_into(&mut link.name);
                }
                _ => {}
            }
        }
        found.push(link);
    });
    listed.map_err(|error| Failure::system("list interfaces", error))?;
    Ok(found)
}

/// A change of a link; `up`: whether it is to be up, if that is to change.
fn link_message(index: u32, up: Option<bool>) -> Message {
    let (flags, change) = match up {
        Some(up) => (if up { IFF_UP } else { 0 }, IFF_UP),
        None => (0, 0),
    };
    let words = [0, index, flags, change];
    Message::new(request::SET_LINK, 0, &words.map(u32::to_ne_bytes).concat())
}

fn run(netlink: &Netlink, what: impl FnOnce() -> String, message: &Message) -> Result<(), Failure> {
    netlink.run(message).map_err(|error| Failure::system(&what(), error))
}

/// The loopback has its addresses by itself.
pub(crate) fn bring_loopback_up() -> Result<(), Failure> {
    const LOOPBACK: u32 = 1; // the first of every network namespace
    let netlink = open()?;
    run(&netlink, || "bring the loopback up".into(), &link_message(LOOPBACK, Some(true)))
}

fn open() -> Result<Netlink, Failure> {
    Netlink::open().map_err(|error| Failure::system("open a netlink socket", error))
}

/// Moves the interface, if it is here, into another network namespace.
pub(crate) fn hand_over(wanted: &Interface, net: BorrowedFd<'_>) -> Result<(), Failure> {
    let netlink = open()?;
    let links = links(&netlink)?;
    let Some(link) = links.iter().find(|link| link.hardware_address == wanted.hardware_address) else {
        return Ok(());
    };
    let message = link_message(link.index, None)
        .with_number(IFLA_NET_NS_FD, net.as_raw_fd().cast_unsigned())
        // One of its name may be there.
        .with(IFLA_IFNAME, format!("free{}\0", link.index).as_bytes());
    run(&netlink, || format!("give interface {} to the pod", link.name), &message)
}

/// Makes the interface what it is to be. `false`: there is no interface of that hardware address yet. `taken` are names that must not be
/// taken away from others.
pub(crate) fn add(wanted: &Interface, taken: &[String]) -> Result<bool, Failure> {
    bring_loopback_up()?;
    let netlink = open()?;
    let links = links(&netlink)?;
    let Some(link) = links.iter().find(|link| link.hardware_address == wanted.hardware_address) else {
        return Ok(false);
    };
    let index = link.index;
    if let Some(other) = links.iter().find(|other| other.name == wanted.name && other.index != index) {
        if taken.contains(&other.name) {
            return Err(Failure::exists(format!("there is an interface {:?} already", other.name)));
        }
        // The kernel numbers them as they come.
        rename(&netlink, other, &format!("free{}", other.index))?;
    }
    if link.name != wanted.name {
        rename(&netlink, link, &wanted.name)?;
    }
    let configured = configure(&netlink, index, wanted);
    if configured.is_err() {
        clear(&netlink, index, &wanted.addresses);
    }
    configured.map(|()| true)
}

/// Only while it is down.
fn rename(netlink: &Netlink, link: &Link, name: &str) -> Result<(), Failure> {
    let text = [name.as_bytes(), &[0]].concat();
    let message = link_message(link.index, Some(false)).with(IFLA_IFNAME, &text);
    run(netlink, || format!("rename interface {} to {name}", link.name), &message)
}

fn configure(netlink: &Netlink, index: u32, wanted: &Interface) -> Result<(), Failure> {
    let name = &wanted.name;
    // Before it is up: that is when link-local addresses are made and routers are asked. Without IPv6 there is nothing to set.
    let accept = if wanted.accepts_router_advertisements { "1" } else { "0" };
    for (file, value) in [("accept_ra", accept), ("accept_dad", "0")] {
        match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{file}"), value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::system(&format!("set {file} of {name}"), error));
            }
            _ => {}
        }
    }
    let mut message = link_message(index, Some(true));
    if wanted.mtu != 0 {
        message = message.with_number(IFLA_MTU, wanted.mtu);
    }
    run(netlink, || format!("bring {name} up with an MTU of {}", wanted.mtu), &message)?;
    for prefix in &wanted.addresses {
        let what = || format!("add address {}/{} to {name}", prefix.address, prefix.length);
        run(netlink, what, &address_message(request::NEW_ADDRESS, index, *prefix))?;
    }
    for route in &wanted.routes {
        add_route(netlink, index, route).map_err(|error| {
            let gateway = route.gateway.map(|gateway| format!(" through {gateway}")).unwrap_or_default();
            let Prefix { address, length } = route.destination;
            Failure::system(&format!("add the route to {address}/{length}{gateway} on {name}"), error)
        })?;
    }
    for (address, hardware) in &wanted.neighbours {
        let what = || format!("add neighbour {address} on {name}");
        run(netlink, what, &neighbour_message(index, *address, *hardware))?;
    }
    for (number, rule) in wanted.rules.iter().enumerate() {
        match netlink.run(&Message::new(request::NEW_RULE, flag::CREATE | flag::EXCLUDE, rule)) {
            Ok(()) => {}
            // It came with another interface.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => {
                return Err(Failure::system(
                    &format!("add the {}. rule of policy routing", number + 1),
                    error,
                ));
            }
        }
    }
    Ok(())
}

/// Down, and without what `configure` has given it.
fn clear(netlink: &Netlink, index: u32, addresses: &[Prefix]) {
    // What is not there need not go.
    for prefix in addresses {
        let _ = netlink.run(&address_message(request::DELETE_ADDRESS, index, *prefix));
    }
    let _ = netlink.run(&link_message(index, Some(false)));
}

/// Takes an interface out of use; fine when it is gone.
pub(crate) fn remove(interface: &Interface) -> Result<(), Failure> {
    let netlink = open()?;
    let links = links(&netlink)?;
    if let Some(link) = links.iter().find(|link| link.hardware_address == interface.hardware_address) {
        clear(&netlink, link.index, &interface.addresses);
        rename(&netlink, link, &format!("free{}", link.index))?;
    }
    Ok(())
}

fn address_message(kind: u16, index: u32, Prefix { address, length }: Prefix) -> Message {
    let mut header = vec![family(address), length, 0, 0];
    header.extend(index.to_ne_bytes());
    let bytes = octets(address);
    // Its routes are among those that are asked for, so that one which a plugin has taken away does not come back.
    let flags = IFA_F_NOPREFIXROUTE | if address.is_ipv4() { 0 } else { IFA_F_NODAD };
    let message = Message::new(kind, flag::CREATE | flag::REPLACE, &header)
        .with(IFA_LOCAL, &bytes)
        .with(IFA_ADDRESS, &bytes)
        .with_number(IFA_FLAGS, flags);
    match address {
        IpAddr::V4(address) if length < 31 => {
            let broadcast = u32::from(address) | u32::MAX.checked_shr(length.into()).unwrap_or(0);
            message.with(IFA_BROADCAST, &broadcast.to_be_bytes())
        }
        _ => message,
    }
}

/// Adds a route. A gateway that no other route leads to is taken to be on the link, as plugins that give every pod the same one (calico:
/// 169.254.1.1) mean it.
fn add_route(netlink: &Netlink, index: u32, route: &Route) -> io::Result<()> {
    match netlink.run(&route_message(index, route, 0)) {
        Err(error)
            if route.gateway.is_some()
                && matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) =>
        {
            netlink.run(&route_message(index, route, RTNH_F_ONLINK))
        }
        // A hop more of a route with several.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        outcome => outcome,
    }
}

fn route_message(index: u32, route: &Route, flags: u32) -> Message {
    let Prefix { address, length } = route.destination;
    let table = match route.table {
        0 => RT_TABLE_MAIN,
        table => u8::try_from(table).unwrap_or(RT_TABLE_COMPAT),
    };
    let mut header = vec![family(address), length, 0, 0, table, RTPROT_BOOT, route.scope, RTN_UNICAST];
    header.extend(flags.to_ne_bytes());
    let mut message = Message::new(request::NEW_ROUTE, flag::CREATE | flag::APPEND, &header)
        .with(RTA_DST, &octets(address))
        .with_number(RTA_OIF, index);
    match route.gateway {
        Some(gateway) if gateway.is_ipv4() == address.is_ipv4() => {
            message = message.with(RTA_GATEWAY, &octets(gateway));
        }
        Some(gateway) => {
            // `struct rtvia`: a family, then the address.
            let via = [u16::from(family(gateway)).to_ne_bytes().to_vec(), octets(gateway)].concat();
            message = message.with(RTA_VIA, &via);
        }
        None => {}
    }
    if let Some(source) = route.source {
        message = message.with(RTA_PREFSRC, &octets(source));
    }
    if route.table != 0 {
        message = message.with_number(RTA_TABLE, route.table);
    }
    if route.metric != 0 {
        message = message.with_number(RTA_PRIORITY, route.metric);
    }
    let mut metrics = Vec::new();
    for (kind, value) in [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advertised_mss)] {
        if value != 0 {
            append(kind, &value.to_ne_bytes(), &mut metrics);
        }
    }
    if metrics.is_empty() { message } else { message.with(RTA_METRICS, &metrics) }
}

fn neighbour_message(index: u32, address: IpAddr, hardware: HardwareAddress) -> Message {
    let mut header = vec![family(address), 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(NUD_PERMANENT.to_ne_bytes());
    header.extend([0, 0]);
    Message::new(request::NEW_NEIGHBOUR, flag::CREATE | flag::REPLACE, &header)
        .with(NDA_DST, &octets(address))
        .with(NDA_LLADDR, &hardware)
}

#[cfg(test)]
mod tests {
    use podvisor_proto::agent::{Neighbour, Route};

    use super::*;

    #[test]
    fn nonsense_is_refused_by_its_name() {
        let good = || AddInterface {
            hardware_address: "02:00:00:00:00:01".into(),
            name: "eth0".into(),
            addresses: vec!["10.0.0.2/24".into()],
            ..Default::default()
        };
        assert!(Interface::parse(&good()).is_ok());
        let refused = |change: &dyn Fn(&mut AddInterface)| {
            let mut wanted = good();
            change(&mut wanted);
            Interface::parse(&wanted).map(drop).unwrap_err().into_message().detail
        };
        for name in ["", "lo", "a/b", "..", "sixteen-letters-", "a b", "eth%d"] {
            assert!(
                refused(&|wanted| wanted.name = name.into()).ends_with("no name of an interface"),
                "{name}"
            );
        }
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "02:0:00:00:00:001", "+2:00:00:00:00:01"] {
            let said = refused(&|wanted| wanted.hardware_address = text.into());
            assert!(said.ends_with("is no hardware address"), "{text}: {said}");
        }
        for text in ["", "10.0.0.2", "10.0.0.2/33", "10.0.0.2/-1", "::1/129", "a/24"] {
            assert!(
                refused(&|wanted| wanted.addresses = vec![text.into()]).contains("is no address"),
                "{text}"
            );
        }
        let route = |route: Route| refused(&|wanted| wanted.routes = vec![route.clone()]);
        assert_eq!(route(Route::default()), "a route has no destination and no gateway");
        assert_eq!(route(Route { gateway: "x".into(), ..Default::default() }), "\"x\" is no address");
        let far = Route { destination: "::/0".into(), scope: 256, ..Default::default() };
        assert_eq!(route(far), "256 is no scope");
        let neighbour = Neighbour { address: "10.0.0.1".into(), hardware_address: "x".into() };
        let said = refused(&|wanted| wanted.neighbours = vec![neighbour.clone()]);
        assert_eq!(said, "\"x\" is no hardware address");
    }
}
