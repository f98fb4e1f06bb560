//! ContainerStats, PodSandboxStats and their lists. Files are read on a thread of their own; nothing is asked of a monitor.

use std::path::PathBuf;
use std::sync::Arc;

use podvisor_cgroup::{Pressure, Stats};
use podvisor_proto::cri;
use tonic::Status;

use super::answers::{filesystem, selects};
use crate::node::{Node, now};
use crate::pod::Pods;
use crate::pod::acquired::Acquisition;
use crate::pod::request::cgroup_parent;
use crate::pod::view::{ContainerView, PodView};

pub(super) async fn container_stats(
    pods: &Pods,
    node: &Arc<Node>,
    request: &cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, Status> {
    let (_, container) = pods.find_container(&request.container_id)?;
    let stats = reading(node, move |node| of_container(node, &container)).await?;
    Ok(cri::ContainerStatsResponse { stats: Some(stats) })
}

pub(super) async fn list_container_stats(
    pods: &Pods,
    node: &Arc<Node>,
    filter: Option<cri::ContainerStatsFilter>,
) -> Result<Vec<cri::ContainerStats>, Status> {
    let filter = filter.unwrap_or_default();
    let views = pods.views();
    reading(node, move |node| {
        let mut all = Vec::new();
        for view in &views {
            if !view.record.id.as_str().starts_with(&filter.pod_sandbox_id) {
                continue;
            }
            all.extend(
                view.visible_containers()
                    // What has ended uses nothing; kubelet takes an entry without figures for a running container.
                    .filter(|one| {
                        one.is_running() || one.cri_state() == cri::ContainerState::ContainerCreated
                    })
                    .filter(|one| one.record.id.as_str().starts_with(&filter.id))
                    .filter(|one| selects(&filter.label_selector, &one.record.config.0.labels))
                    .map(|one| of_container(node, one)),
            );
        }
        all
    })
    .await
}

pub(super) async fn pod_sandbox_stats(
    pods: &Pods,
    node: &Arc<Node>,
    request: &cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, Status> {
    let view = pods.find(&request.pod_sandbox_id)?.view();
    let stats = reading(node, move |node| of_pod(node, &view)).await?;
    Ok(cri::PodSandboxStatsResponse { stats: Some(stats) })
}

pub(super) async fn list_pod_sandbox_stats(
    pods: &Pods,
    node: &Arc<Node>,
    filter: Option<cri::PodSandboxStatsFilter>,
) -> Result<Vec<cri::PodSandboxStats>, Status> {
    let filter = filter.unwrap_or_default();
    let views = pods.views();
    reading(node, move |node| {
        views
            .iter()
            .filter(|view| view.is_ready() && view.record.id.as_str().starts_with(&filter.id))
            .filter(|view| selects(&filter.label_selector, &view.config().labels))
            .map(|view| of_pod(node, view))
            .collect()
    })
    .await
}

async fn reading<T: Send + 'static>(
    node: &Arc<Node>,
    read: impl FnOnce(&Node) -> T + Send + 'static,
) -> Result<T, Status> {
    let node = node.clone();
    tokio::task::spawn_blocking(move || read(&node))
        .await
        .map_err(|_| Status::internal("reading statistics panicked"))
}

fn of_container(node: &Node, container: &ContainerView) -> cri::ContainerStats {
    let config = &container.record.config.0;
    let time = now();
    let attributes = cri::ContainerAttributes {
        id: container.record.id.to_string(),
        metadata: config.metadata.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
    };
    let used = node.images.writable_usage(container.record.id.as_str());
    let mut stats = cri::ContainerStats {
        attributes: Some(attributes),
        writable_layer: used.map(|used| filesystem(&used, time)),
        ..Default::default()
    };
    let read = node.cgroups.cgroup(&container.record.cgroup).stats();
    if let Ok(read) = read
        && container.state.may_run()
    {
        stats.cpu = Some(cpu(&read, time));
        stats.memory = Some(memory(&read, time));
        stats.swap = read.swap.map(|swap| cri::SwapUsage {
            timestamp: time,
            swap_available_bytes: swap.available.map(number),
            swap_usage_bytes: Some(number(swap.usage)),
        });
        stats.io = io(&read, time);
    }
    stats
}

fn of_pod(node: &Node, view: &PodView) -> cri::PodSandboxStats {
    let config = view.config();
    let time = now();
    let attributes = cri::PodSandboxAttributes {
        id: view.record.id.to_string(),
        metadata: config.metadata.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
    };
    let containers: Vec<_> =
        view.visible_containers().filter(|one| one.is_running()).map(|one| of_container(node, one)).collect();
    let parent = cgroup_parent(config);
    let read = if parent.is_empty() {
        None
    } else {
        node.cgroups.cgroup(&node.driver.parent_cgroup(&parent)).stats().ok()
    };
    let linux = cri::LinuxPodSandboxStats {
        cpu: read.as_ref().map(|read| cpu(read, time)),
        memory: read.as_ref().map(|read| memory(read, time)),
        network: network(view, time),
        process: read
            .as_ref()
            .and_then(|read| read.pids)
            .map(|pids| cri::ProcessUsage { timestamp: time, process_count: Some(number(pids)) }),
        io: read.as_ref().and_then(|read| io(read, time)),
        containers,
    };
    cri::PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None }
}

fn number(value: u64) -> cri::UInt64Value {
    cri::UInt64Value { value }
}

fn cpu(stats: &Stats, timestamp: i64) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: stats.cpu.map(|cpu| number(cpu.usage_ns)),
        // A rate over no stated time: kubelet computes it itself from two readings.
        usage_nano_cores: None,
        psi: stats.cpu.and_then(|cpu| cpu.pressure).map(psi),
    }
}

fn memory(stats: &Stats, timestamp: i64) -> cri::MemoryUsage {
    let Some(memory) = stats.memory else { return cri::MemoryUsage { timestamp, ..Default::default() } };
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: Some(number(memory.working_set)),
        available_bytes: memory.available.map(number),
        usage_bytes: Some(number(memory.usage)),
        rss_bytes: Some(number(memory.rss)),
        page_faults: Some(number(memory.page_faults)),
        major_page_faults: Some(number(memory.major_page_faults)),
        psi: memory.pressure.map(psi),
    }
}

fn io(stats: &Stats, timestamp: i64) -> Option<cri::IoUsage> {
    let pressure = stats.io.as_ref()?.pressure?;
    Some(cri::IoUsage { timestamp, psi: Some(psi(pressure)) })
}

fn psi(pressure: Pressure) -> cri::PsiStats {
    // The kernel counts in µs, the CRI in ns; averages come in hundredths of a percent.
    let data = |line: podvisor_cgroup::PressureLine| cri::PsiData {
        total: line.total_us.saturating_mul(1000),
        avg10: f64::from(line.avg10) / 100.0,
        avg60: f64::from(line.avg60) / 100.0,
        avg300: f64::from(line.avg300) / 100.0,
    };
    cri::PsiStats { full: Some(data(pressure.full)), some: Some(data(pressure.some)) }
}

/// Counters of the pod's interfaces, read in its network namespace.
fn network(view: &PodView, timestamp: i64) -> Option<cri::NetworkUsage> {
    let netns: PathBuf = view.record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Namespaces(namespaces) => namespaces.net.clone(),
        _ => None,
    })?;
    // /proc/net belongs to the process, /proc/thread-self/net to the thread that has entered the namespace.
    let table = podvisor_network::namespace::enter(&netns, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default()
    })
    .ok()?;
    let mut interfaces: Vec<_> = table.lines().skip(2).filter_map(interface).collect();
    let default = interfaces
        .iter()
        .position(|interface| interface.name == "eth0")
        .or(if interfaces.is_empty() { None } else { Some(0) });
    let default_interface = default.map(|index| interfaces.remove(index));
    Some(cri::NetworkUsage { timestamp, default_interface, interfaces })
}

/// A line of proc_pid_net(5)'s `dev`.
fn interface(line: &str) -> Option<cri::NetworkInterfaceUsage> {
    let (name, counters) = line.split_once(':')?;
    let name = name.trim();
    let counters: Vec<u64> = counters.split_whitespace().filter_map(|text| text.parse().ok()).collect();
    if name == "lo" || counters.len() < 11 {
        return None;
    }
    Some(cri::NetworkInterfaceUsage {
        name: name.to_owned(),
        rx_bytes: Some(number(counters[0])),
        rx_errors: Some(number(counters[2])),
        tx_bytes: Some(number(counters[8])),
        tx_errors: Some(number(counters[10])),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_an_interface() {
        let line = "  eth0: 1500 10 1 0 0 0 0 0 900 8 2 0 0 0 0 0";
        let read = interface(line).unwrap();
        assert_eq!(read.name, "eth0");
        assert_eq!(read.rx_bytes.unwrap().value, 1500);
        assert_eq!(read.tx_errors.unwrap().value, 2);
        assert!(interface("lo: 1 2 3 4 5 6 7 8 9 10 11 12").is_none());
        assert!(interface("eth0: 1 2").is_none());
    }
}
