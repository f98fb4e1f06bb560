//! The rules of the built-in network: one table of our own, `inet podvisor`, written whole when the daemon starts.
//!
//! `nft` replaces the table in one transaction, host ports of running pods included, so no packet meets a node without
//! them. Later changes are elements of its maps ([`super::element`]) and start no process. Other tables are not touched;
//! which also means that a policy of theirs that drops forwarded packets cannot be overruled here (a packet must be
//! accepted by every table).

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use super::port::Forward;
use super::range::Range;

/// Name of the table.
pub(crate) const TABLE: &str = "podvisor";

/// The nftables script.
fn script(bridge: &str, ranges: &[Range], forwards: &[&Forward]) -> String {
    let elements = |list: Vec<String>| match list.as_slice() {
        [] => String::new(),
        list => format!("elements = {{ {} }};", list.join(", ")),
    };
    let mut text = format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    for (family, kind, ipv4) in [("4", "ipv4_addr", true), ("6", "ipv6_addr", false)] {
        let inside = ranges.iter().filter(|range| range.is_ipv4() == ipv4).map(ToString::to_string).collect();
        let here = forwards.iter().filter(|forward| forward.to.is_ipv4() == ipv4);
        let mut own: Vec<_> = here.clone().map(|forward| format!("{0} . {0}", forward.to.ip())).collect();
        own.sort();
        own.dedup();
        let map = |with_host: bool| {
            here.clone()
                .filter(|forward| forward.host_ip.is_some() == with_host)
                .map(|forward| {
                    let host = forward.host_ip.map(|ip| format!("{ip} . ")).unwrap_or_default();
                    let Forward { protocol, host_port, to, .. } = forward;
                    format!("{host}{} . {host_port} : {} . {}", protocol.number(), to.ip(), to.port())
                })
                .collect()
        };
        let _ = write!(
            text,
            "set ranges{family} {{ type {kind}; flags interval; auto-merge; {ranges} }}
             set self{family} {{ type {kind} . {kind}; {own} }}
             map ports{family} {{ type inet_proto . inet_service : {kind} . inet_service; {any} }}
             map ports{family}_at {{ type {kind} . inet_proto . inet_service : {kind} . inet_service; {at} }}\n",
            ranges = elements(inside),
            own = elements(own),
            any = elements(map(false)),
            at = elements(map(true)),
        );
    }
    // `guard`: with route_localnet the node would take packets for 127.0.0.1 from a pod (CVE-2020-8558). What a pod
    // sends through the node carries an address of the pods, nobody else's; of IPv6 also what neighbour discovery uses.
    // `postrouting`: the node's own connections from loopback to a host port cannot keep their source; a pod that reaches
    // itself through a host port would drop its own source address as martian; what leaves the node takes its address.
    // Between pods the source is kept.
    // `output`: the kernel lets nothing from ::1 out (IPv6 has no route_localnet), so that is refused at once, and who asks
    // for "localhost" goes on to 127.0.0.1.
    // `redirects`: a pod that was told of the direct way to a neighbour would send answers past the translation.
    let _ = write!(
        text,
        "chain guard {{ type filter hook prerouting priority raw; policy accept;
           iifname \"{bridge}\" ip daddr 127.0.0.0/8 drop
           iifname \"{bridge}\" ip saddr != @ranges4 ip saddr != 0.0.0.0 drop
           iifname \"{bridge}\" ip6 saddr != @ranges6 ip6 saddr != {{ ::, fe80::/10 }} drop
         }}
         chain redirects {{ type filter hook output priority filter; policy accept;
           oifname \"{bridge}\" icmp type redirect drop
           oifname \"{bridge}\" icmpv6 type nd-redirect drop
         }}
         chain hostports {{
           dnat ip to ip daddr . meta l4proto . th dport map @ports4_at
           dnat ip to meta l4proto . th dport map @ports4
           dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports6_at
           dnat ip6 to meta l4proto . th dport map @ports6
         }}
         chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;
           fib daddr type local jump hostports
         }}
         chain output {{ type nat hook output priority -100; policy accept;
           ip6 daddr ::1 return
           fib daddr type local jump hostports
         }}
         chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;
           oifname \"{bridge}\" ip saddr 127.0.0.0/8 masquerade
           oifname \"{bridge}\" ip saddr . ip daddr @self4 masquerade
           oifname \"{bridge}\" ip6 saddr . ip6 daddr @self6 masquerade
           oifname != \"{bridge}\" ip saddr @ranges4 ip daddr != 224.0.0.0/4 masquerade
           oifname != \"{bridge}\" ip6 saddr @ranges6 ip6 daddr != ff00::/8 masquerade
         }}
         }}\n"
    );
    text
}

/// Replaces the table.
pub(crate) fn write(bridge: &str, ranges: &[Range], forwards: &[&Forward]) -> io::Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    // When nft ends without reading everything, its own words below tell more than a broken pipe.
    let written = nft
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(script(bridge, ranges, forwards).as_bytes()));
    let output = nft.wait_with_output()?;
    if !output.status.success() {
        let words: String = String::from_utf8_lossy(&output.stderr).chars().take(500).collect();
        return Err(io::Error::other(format!("{}: {}", output.status, words.trim())));
    }
    written
}

/// The set whose elements make a pod's connections to itself keep working: see `postrouting`.
pub(crate) fn self_set(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "self4" } else { "self6" }
}

/// The map that a forward belongs in.
pub(crate) fn map_of(forward: &Forward) -> &'static str {
    match (forward.to.is_ipv4(), forward.host_ip.is_some()) {
        (true, false) => "ports4",
        (true, true) => "ports4_at",
        (false, false) => "ports6",
        (false, true) => "ports6_at",
    }
}
