//! ContainerStats, PodSandboxStats and their lists. Files are read on threads of their own; monitors are asked for guests only, beforehand.

use std::sync::Arc;

use podvisor_cgroup::{Pressure, Stats};
use podvisor_proto::cri;
use tonic::Status;

use super::answers::{filesystem, selects};
use super::guest_usage::{self, GuestUsage};
use super::interfaces;
use crate::meters::Meters;
use crate::node::{Node, now};
use crate::pod::Pods;
use crate::pod::request::cgroup_parent;
use crate::pod::view::{ContainerView, PodView};

pub(super) async fn container_stats(
    pods: &Pods,
    node: &Arc<Node>,
    meters: &Arc<Meters>,
    request: &cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, Status> {
    let (pod, container) = pods.find_container(&request.container_id)?;
    let view = pod.view();
    let guests = guest_usage::ask([&view]).await;
    let read = move |node: &Node, meters: &Meters| {
        of_container(node, meters, &container, guests.get(&view.record.id))
    };
    let stats = reading(node, meters, read).await?;
    Ok(cri::ContainerStatsResponse { stats: Some(stats) })
}

pub(super) async fn list_container_stats(
    pods: &Pods,
    node: &Arc<Node>,
    meters: &Arc<Meters>,
    filter: Option<cri::ContainerStatsFilter>,
) -> Vec<cri::ContainerStats> {
    let filter = filter.unwrap_or_default();
    let views = pods.views().into_iter();
    let views: Vec<_> =
        views.filter(|view| view.record.id.as_str().starts_with(&filter.pod_sandbox_id)).collect();
    let guests = guest_usage::ask(&views).await;
    let (node, within) = (node.clone(), meters.clone());
    let read = move |view: &PodView| -> Vec<cri::ContainerStats> {
        view.visible_containers()
            // What has ended uses nothing; kubelet takes an entry without figures for a running container.
            .filter(|one| one.is_running() || one.cri_state() == cri::ContainerState::ContainerCreated)
            .filter(|one| one.record.id.as_str().starts_with(&filter.id))
            .filter(|one| selects(&filter.label_selector, &one.record.config.0.labels))
            .map(|one| of_container(&node, &within, one, guests.get(&view.record.id)))
            .collect()
    };
    meters.readings.of(views, read).await.into_iter().flatten().collect()
}

pub(super) async fn pod_sandbox_stats(
    pods: &Pods,
    node: &Arc<Node>,
    meters: &Arc<Meters>,
    request: &cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, Status> {
    let view = pods.find(&request.pod_sandbox_id)?.view();
    let guests = guest_usage::ask([&view]).await;
    let read = move |node: &Node, meters: &Meters| of_pod(node, meters, &view, guests.get(&view.record.id));
    let stats = reading(node, meters, read).await?;
    Ok(cri::PodSandboxStatsResponse { stats: Some(stats) })
}

pub(super) async fn list_pod_sandbox_stats(
    pods: &Pods,
    node: &Arc<Node>,
    meters: &Arc<Meters>,
    filter: Option<cri::PodSandboxStatsFilter>,
) -> Vec<cri::PodSandboxStats> {
    let filter = filter.unwrap_or_default();
    let views = pods.views().into_iter();
    let views: Vec<_> = views
        .filter(|view| view.is_ready() && view.record.id.as_str().starts_with(&filter.id))
        .filter(|view| selects(&filter.label_selector, &view.config().labels))
        .collect();
    let guests = guest_usage::ask(&views).await;
    let (node, within) = (node.clone(), meters.clone());
    let read = move |view: &PodView| of_pod(&node, &within, view, guests.get(&view.record.id));
    meters.readings.of(views, read).await
}

async fn reading<T: Send + 'static>(
    node: &Arc<Node>,
    meters: &Arc<Meters>,
    read: impl FnOnce(&Node, &Meters) -> T + Send + 'static,
) -> Result<T, Status> {
    let (node, meters) = (node.clone(), meters.clone());
    tokio::task::spawn_blocking(move || read(&node, &meters))
        .await
        .map_err(|_| Status::internal("reading statistics panicked"))
}

fn of_container(
    node: &Node,
    meters: &Meters,
    container: &ContainerView,
    guest: Option<&GuestUsage>,
) -> cri::ContainerStats {
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
    let in_guest = guest.and_then(|guest| guest.of_container(container.record.id.as_str()));
    let read = match in_guest {
        Some(stats) => Ok(stats.clone()),
        None => node.cgroups.cgroup(&container.record.cgroup).stats(),
    };
    if let Ok(read) = &read
        && container.state.may_run()
        && read.pids == Some(0)
    {
        // It runs elsewhere, in the pod's sandbox container: asked for, and not known.
        stats.cpu = Some(cri::CpuUsage { timestamp: time, ..cri::CpuUsage::default() });
        stats.memory = Some(cri::MemoryUsage { timestamp: time, ..cri::MemoryUsage::default() });
    } else if let Ok(read) = read
        && container.state.may_run()
    {
        stats.cpu = Some(cpu(&read, time, meters, container.record.id.as_str()));
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

fn of_pod(node: &Node, meters: &Meters, view: &PodView, guest: Option<&GuestUsage>) -> cri::PodSandboxStats {
    let config = view.config();
    let time = now();
    let attributes = cri::PodSandboxAttributes {
        id: view.record.id.to_string(),
        metadata: config.metadata.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
    };
    let containers: Vec<_> = view
        .visible_containers()
        .filter(|one| one.is_running())
        .map(|one| of_container(node, meters, one, guest))
        .collect();
    let parent = cgroup_parent(config);
    let read = if let Some(stats) = guest.and_then(|guest| guest.pod.as_ref()) {
        Some(stats.clone())
    } else if parent.is_empty() {
        None
    } else {
        node.cgroups.cgroup(&node.driver.parent_cgroup(&parent)).stats().ok()
    };
    let linux = cri::LinuxPodSandboxStats {
        cpu: read.as_ref().map(|read| cpu(read, time, meters, view.record.id.as_str())),
        memory: read.as_ref().map(|read| memory(read, time)),
        network: interfaces::of_pod(view).map(|interfaces| interfaces::usage(&interfaces, time)),
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

fn cpu(stats: &Stats, timestamp: i64, meters: &Meters, id: &str) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: stats.cpu.map(|cpu| number(cpu.usage_ns)),
        usage_nano_cores: stats
            .cpu
            .and_then(|cpu| meters.rates.take(id, timestamp, cpu.usage_ns))
            .map(number),
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
