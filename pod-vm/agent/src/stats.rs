//! What containers, the pod and the guest use.

use std::fs;
use std::time::UNIX_EPOCH;

use podvisor_cgroup::Stats as Read;
use podvisor_proto::agent::{
    ContainerStats, GuestStats, InterfaceStats, Pressure, PressureLine, Stats, StatsReply, Usage,
};

use crate::agent::Agent;
use crate::container::PARENT;
use crate::storage;

impl Agent {
    /// A container that ends meanwhile is left out.
    pub(crate) fn stats(&self, wanted: &Stats) -> StatsReply {
        let all = wanted.container_ids.is_empty();
        let containers = self.containers.iter().filter(|(id, _)| all || wanted.container_ids.contains(id));
        let containers = containers.filter_map(|(id, container)| {
            let usage = usage(&container.cgroup.place().stats().ok()?);
            let root = rustix::fs::statvfs(storage::root_of(id)).ok();
            let blocks = root.map_or((0, 0), |root| {
                let used = root.f_blocks.saturating_sub(root.f_bfree).saturating_mul(root.f_frsize);
                (used, root.f_files.saturating_sub(root.f_ffree))
            });
            Some(ContainerStats {
                container_id: id.clone(),
                usage: Some(usage),
                root_bytes: blocks.0,
                root_inodes: blocks.1,
            })
        });
        StatsReply {
            containers: containers.collect(),
            pod: self.cgroups.cgroup(PARENT).stats().ok().as_ref().map(usage),
            interfaces: interfaces(&self.pod.inside(devices).unwrap_or_default()),
            guest: Some(guest()),
        }
    }
}

fn usage(read: &Read) -> Usage {
    let (cpu, memory) = (read.cpu.as_ref(), read.memory.as_ref());
    let since = read.timestamp.duration_since(UNIX_EPOCH).unwrap_or_default();
    Usage {
        time_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        cpu_ns: cpu.map_or(0, |cpu| cpu.usage_ns),
        cpu_user_ns: cpu.and_then(|cpu| cpu.user_ns).unwrap_or(0),
        cpu_system_ns: cpu.and_then(|cpu| cpu.system_ns).unwrap_or(0),
        memory_usage: memory.map_or(0, |memory| memory.usage),
        memory_working_set: memory.map_or(0, |memory| memory.working_set),
        memory_rss: memory.map_or(0, |memory| memory.rss),
        page_faults: memory.map_or(0, |memory| memory.page_faults),
        major_page_faults: memory.map_or(0, |memory| memory.major_page_faults),
        memory_limit: memory.and_then(|memory| memory.limit).unwrap_or(0),
        swap_usage: read.swap.as_ref().map_or(0, |swap| swap.usage),
        pids: read.pids.unwrap_or(0),
        oom_kills: 0,
        cpu_pressure: cpu.and_then(|cpu| cpu.pressure.as_ref()).map(pressure),
        memory_pressure: memory.and_then(|memory| memory.pressure.as_ref()).map(pressure),
        io_pressure: read.io.as_ref().and_then(|io| io.pressure.as_ref()).map(pressure),
    }
}

fn pressure(read: &podvisor_cgroup::Pressure) -> Pressure {
    let line = |line: &podvisor_cgroup::PressureLine| PressureLine {
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
        total_us: line.total_us,
    };
    Pressure { some: Some(line(&read.some)), full: Some(line(&read.full)) }
}

fn devices() -> String {
    fs::read_to_string("/proc/net/dev").unwrap_or_default()
}

/// proc_pid_net(5), `dev`: the loopback is nobody's traffic.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .map(|(name, counters)| (name.trim(), counters))
        .filter(|(name, _)| *name != "lo")
        .map(|(name, counters)| {
            let numbers: Vec<u64> =
                counters.split_whitespace().map(|number| number.parse().unwrap_or(0)).collect();
            let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
            InterfaceStats {
                name: name.to_owned(),
                rx_bytes: at(0),
                rx_packets: at(1),
                rx_errors: at(2),
                rx_dropped: at(3),
                tx_bytes: at(8),
                tx_packets: at(9),
                tx_errors: at(10),
                tx_dropped: at(11),
            }
        })
        .collect()
}

fn guest() -> GuestStats {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    GuestStats {
        memory_total: kilobytes(&meminfo, "MemTotal:"),
        memory_available: kilobytes(&meminfo, "MemAvailable:"),
        agent_rss: kilobytes(&status, "VmRSS:"),
    }
}

/// Bytes of a line like `MemTotal:  123 kB`.
fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_without_the_loopback() {
        let text = "Inter-|   Receive | Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes\n\
                    \x20   lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n  eth0: 100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0\n";
        let read = interfaces(text);
        assert_eq!(read.len(), 1);
        assert_eq!(
            (read[0].rx_bytes, read[0].rx_dropped, read[0].tx_bytes, read[0].tx_dropped),
            (100, 4, 200, 7)
        );
    }
}
