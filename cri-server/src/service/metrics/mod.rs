//! ListMetricDescriptors and ListPodSandboxMetrics: cAdvisor's metrics for kubelet's `/metrics/cadvisor`, which kubelet serves with its
//! feature gate `PodAndContainerStatsFromCRI`.
//!
//! | file | idea |
//! |---|---|
//! | `families.rs` | which metrics there are |
//! | `samples.rs` | what was measured, as samples of them; pure |
//! | `processes.rs` | processes and what they hold open |
//!
//! Labels are cAdvisor's, so that queries go on working: `id` is the cgroup, `name` the container's id, `container` its name. Of a pod as a
//! whole there are two kinds of samples: of its cgroup, with neither `name` nor `image` nor `container` (queries that sum up containers ask for
//! one of them not to be empty), and of its network, whose `name` is the sandbox's id, as of a pause container.
//!
//! Of a virtual machine there is a third: what it costs the node, the guest's memory included, as `container="POD"`. What the pod and its
//! containers use is what the guest says.
//!
//! Per cgroup some thirty small files are read, whatever runs in it, on threads of their own (`crate::readings`).

mod families;
mod processes;
mod samples;

use std::path::Path;
use std::sync::Arc;

use podvisor_proto::cri;

use super::guest_usage::{self, GuestUsage};
use super::{answers, interfaces};
use crate::meters::Meters;
use crate::node::{Node, now};
use crate::pod::Pods;
use crate::pod::request::cgroup_parent;
use crate::pod::view::{ContainerView, PodView};
use crate::pod::vm;
use samples::{Filesystem, Samples};

/// What cAdvisor calls the part of a pod that is none of its containers, and what queries leave out therefore.
const MACHINE: &str = "POD";

pub(super) fn descriptors() -> Vec<cri::MetricDescriptor> {
    families::ALL.iter().map(|family| family.descriptor()).collect()
}

pub(super) async fn list(pods: &Pods, node: &Arc<Node>, meters: &Arc<Meters>) -> Vec<cri::PodSandboxMetrics> {
    let views: Vec<_> = pods.views().into_iter().filter(|view| view.is_ready()).collect();
    let guests = guest_usage::ask(&views).await;
    let (node, meters_there) = (node.clone(), meters.clone());
    let read = move |view: &PodView| of_pod(&node, &meters_there, view, guests.get(&view.record.id));
    meters.readings.of(views, read).await
}

fn of_pod(
    node: &Node,
    meters: &Meters,
    view: &PodView,
    guest: Option<&GuestUsage>,
) -> cri::PodSandboxMetrics {
    let metadata = view.metadata();
    let labels = |id: &str, name: &str, image: &str, container: &str| {
        [id, name, image, &metadata.namespace, &metadata.name, container].map(str::to_owned)
    };
    let parent = cgroup_parent(view.config());
    let mut metrics = Vec::new();
    let path = if parent.is_empty() { String::new() } else { node.driver.parent_cgroup(&parent) };
    if !parent.is_empty() {
        let mut samples = Samples::new(labels(&path, "", "", ""));
        samples.times(now(), view.record.created_at, view.record.created_at);
        let cgroup = node.cgroups.cgroup(&path);
        if let Some(stats) = guest.and_then(|guest| guest.pod.as_ref()) {
            samples.usage(stats, device_name);
        } else if let Ok(stats) = cgroup.stats() {
            samples.usage(&stats, device_name);
        }
        if let Ok(details) = cgroup.details(&meters.page_sizes) {
            samples.details(&details);
        }
        if let Some(resources) = answers::sandbox_resources(view) {
            samples.spec(&resources);
        }
        metrics.append(&mut samples.done());
    }
    if let Some(path) = vm::cgroup(node, &view.record) {
        let mut samples = Samples::new(labels(&path, view.record.id.as_str(), "", MACHINE));
        samples.times(now(), view.record.created_at, view.record.created_at);
        if let Ok(stats) = node.cgroups.cgroup(&path).stats() {
            samples.usage(&stats, device_name);
        }
        metrics.append(&mut samples.done());
    }
    if let Some(interfaces) = interfaces::of_pod(view) {
        let mut samples = Samples::new(labels(&path, view.record.id.as_str(), "", ""));
        samples.network(&interfaces);
        metrics.append(&mut samples.done());
    }
    let containers = view.visible_containers().filter(|container| container.is_running());
    let container_metrics = containers.map(|container| {
        let config = &container.record.config.0;
        let image = config.image.as_ref().map_or("", |image| {
            if image.user_specified_image.is_empty() { &image.image } else { &image.user_specified_image }
        });
        let name = config.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
        let id = container.record.id.as_str();
        let samples = Samples::new(labels(&container.record.cgroup, id, image, name));
        cri::ContainerMetrics {
            container_id: id.to_owned(),
            metrics: of_container(node, meters, container, guest, samples),
        }
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: view.record.id.to_string(),
        container_metrics: container_metrics.collect(),
        metrics,
    }
}

fn of_container(
    node: &Node,
    meters: &Meters,
    container: &ContainerView,
    guest: Option<&GuestUsage>,
    mut samples: Samples,
) -> Vec<cri::Metric> {
    let record = &container.record;
    samples.times(now(), record.created_at, record.started_at);
    let cgroup = node.cgroups.cgroup(&record.cgroup);
    if let Some(stats) = guest.and_then(|guest| guest.of_container(record.id.as_str())) {
        samples.usage(stats, device_name);
    } else if let Ok(stats) = cgroup.stats() {
        samples.usage(&stats, device_name);
    }
    if let Ok(details) = cgroup.details(&meters.page_sizes) {
        samples.details(&details);
    }
    samples.processes(&processes::of(&cgroup, record.process.map(|process| process.pid)));
    if let Some(resources) = answers::container_resources(record) {
        samples.spec(&resources);
    }
    let layer = node.images.writable_usage(record.id.as_str());
    let (root, usage) = match layer {
        Some(layer) => (layer.mountpoint, Some(layer.used_bytes)),
        None => (node.config().root.clone(), None),
    };
    if let Ok(size) = rustix::fs::statvfs(root) {
        samples.filesystem(&Filesystem {
            device: meters.device.clone(),
            usage,
            limit: size.f_blocks.saturating_mul(size.f_frsize),
            inodes: size.f_files,
            inodes_free: size.f_ffree,
        });
    }
    samples.done()
}

/// cAdvisor's name of a block device; its number where there is none any more. A slash in a name is an exclamation mark in sysfs.
fn device_name(major: u32, minor: u32) -> String {
    let number = format!("{major}:{minor}");
    let target = std::fs::read_link(Path::new("/sys/dev/block").join(&number)).ok();
    let name = target.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    name.map_or(number, |name| format!("/dev/{}", name.replace('!', "/")))
}
