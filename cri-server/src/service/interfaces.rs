//! Counters of a pod's network interfaces, read in its network namespace.

use std::path::PathBuf;

use podvisor_proto::cri;

use crate::pod::acquired::Acquisition;
use crate::pod::view::PodView;

/// One interface, as the pod sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) received: Direction,
    pub(super) sent: Direction,
}

/// Since the interface was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Direction {
    pub(super) bytes: u64,
    pub(super) packets: u64,
    pub(super) errors: u64,
    pub(super) dropped: u64,
}

/// All but the loopback; `None`: the pod has no network of its own, or it is gone.
pub(super) fn of_pod(view: &PodView) -> Option<Vec<Interface>> {
    let netns: PathBuf = view.record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Namespaces(namespaces) => namespaces.net.clone(),
        _ => None,
    })?;
    // /proc/net belongs to the process, /proc/thread-self/net to the thread that has entered the namespace.
    let table = podvisor_network::namespace::enter(&netns, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default()
    })
    .ok()?;
    Some(table.lines().skip(2).filter_map(parse).collect())
}

/// A line of proc_pid_net(5)'s `dev`.
fn parse(line: &str) -> Option<Interface> {
    let (name, counters) = line.split_once(':')?;
    let name = name.trim();
    let counters: Vec<u64> = counters.split_whitespace().filter_map(|text| text.parse().ok()).collect();
    if name == "lo" || counters.len() < 12 {
        return None;
    }
    let direction = |at: usize| Direction {
        bytes: counters[at],
        packets: counters[at + 1],
        errors: counters[at + 2],
        dropped: counters[at + 3],
    };
    Some(Interface { name: name.to_owned(), received: direction(0), sent: direction(8) })
}

/// For statistics: the one with the default route apart from the others.
pub(super) fn usage(interfaces: &[Interface], timestamp: i64) -> cri::NetworkUsage {
    let number = |value| Some(cri::UInt64Value { value });
    let mut all: Vec<_> = interfaces
        .iter()
        .map(|interface| cri::NetworkInterfaceUsage {
            name: interface.name.clone(),
            rx_bytes: number(interface.received.bytes),
            rx_errors: number(interface.received.errors),
            tx_bytes: number(interface.sent.bytes),
            tx_errors: number(interface.sent.errors),
        })
        .collect();
    let default = all.iter().position(|interface| interface.name == "eth0");
    let default = default.or(if all.is_empty() { None } else { Some(0) });
    let default_interface = default.map(|index| all.remove(index));
    cri::NetworkUsage { timestamp, default_interface, interfaces: all }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_an_interface() {
        let line = "  eth0: 1500 10 1 3 0 0 0 0 900 8 2 4 0 0 0 0";
        let read = parse(line).unwrap();
        assert_eq!(read.name, "eth0");
        assert_eq!(read.received, Direction { bytes: 1500, packets: 10, errors: 1, dropped: 3 });
        assert_eq!(read.sent, Direction { bytes: 900, packets: 8, errors: 2, dropped: 4 });
        assert!(parse("lo: 1 2 3 4 5 6 7 8 9 10 11 12").is_none());
        assert!(parse("eth0: 1 2").is_none());
    }

    #[test]
    fn the_default_interface_stands_apart() {
        let named =
            |name: &str| Interface { name: name.into(), ..parse("x: 1 2 3 4 5 6 7 8 9 10 11 12").unwrap() };
        let answer = usage(&[named("net1"), named("eth0")], 5);
        assert_eq!(answer.default_interface.unwrap().name, "eth0");
        assert_eq!(answer.interfaces[0].name, "net1");
        assert_eq!(usage(&[named("net1")], 5).default_interface.unwrap().name, "net1");
        assert!(usage(&[], 5).default_interface.is_none());
    }
}
