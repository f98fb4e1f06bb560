//! Records as plugins see them.

use podvisor_nri::api::{
    self, CdiDevice, ContainerState, HugepageLimit, LinuxCpu, LinuxMemory, LinuxNamespace, LinuxPodSandbox,
    LinuxResources, OptionalInt64, OptionalUInt64, PodSandbox, SecurityProfile,
};
use podvisor_nri::{describe, describe_resources};
use podvisor_proto::cri;
use serde_json::Value;

use crate::node::Node;
use crate::pod::acquired::Acquisition;
use crate::pod::record::PodRecord;
use crate::pod::request::cgroup_parent;
use crate::pod::state::State;
use crate::pod::view::ContainerView;

/// A pod.
pub(super) fn pod(record: &PodRecord) -> PodSandbox {
    let config = &record.config.0;
    let metadata = config.metadata.clone().unwrap_or_default();
    let linux = config.linux.clone().unwrap_or_default();
    let pinned = record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Namespaces(namespaces) => Some(namespaces.clone()),
        _ => None,
    });
    let pinned = pinned.unwrap_or_default();
    let namespaces = [("network", pinned.net), ("ipc", pinned.ipc), ("uts", pinned.uts)];
    PodSandbox {
        id: record.id.to_string(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        runtime_handler: record.requested_handler.clone(),
        linux: Some(LinuxPodSandbox {
            // As kubelet said last.
            pod_overhead: record
                .sizes
                .overhead
                .as_ref()
                .map(|size| &size.0)
                .or(linux.overhead.as_ref())
                .map(resources),
            pod_resources: record
                .sizes
                .resources
                .as_ref()
                .map(|size| &size.0)
                .or(linux.resources.as_ref())
                .map(resources),
            cgroup_parent: cgroup_parent(config),
            namespaces: namespaces
                .into_iter()
                .filter_map(|(kind, path)| {
                    let path = path?.display().to_string();
                    Some(LinuxNamespace { r#type: kind.into(), path })
                })
                .collect(),
            ..LinuxPodSandbox::default()
        }),
        pid: record.init.map(|init| init.pid.cast_unsigned()).unwrap_or_default(),
        ips: record.addresses.clone(),
    }
}

/// A container; `spec` is its OCI spec, null where there is none any more. Resources are those in force.
pub(super) fn container(pod: &PodRecord, view: &ContainerView, spec: &Value) -> api::Container {
    let record = &view.record;
    let config = &record.config.0;
    let mut described = describe(spec);
    let linux = described.linux.get_or_insert_default();
    if record.resources.is_object() {
        linux.resources = Some(describe_resources(&record.resources));
    }
    linux.seccomp_profile = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.seccomp.as_ref())
        .map(|profile| SecurityProfile {
            // The numbers are the same.
            profile_type: profile.profile_type,
            localhost_ref: profile.localhost_ref.clone(),
        });
    let mut annotations: std::collections::BTreeMap<_, _> = config.annotations.clone().into_iter().collect();
    annotations.append(&mut described.annotations);
    let (state, exit) = match &view.state {
        State::Creating | State::Created | State::Starting { .. } => (ContainerState::ContainerCreated, None),
        State::Running | State::Stopping { .. } => (ContainerState::ContainerRunning, None),
        State::Exited(exit) => (ContainerState::ContainerStopped, Some(exit.clone())),
        State::Removing { exit } => (ContainerState::ContainerStopped, exit.clone()),
        State::Removed => (ContainerState::ContainerStopped, None),
        State::Unknown { .. } => (ContainerState::ContainerUnknown, None),
    };
    api::Container {
        id: record.id.to_string(),
        pod_sandbox_id: pod.id.to_string(),
        name: config.metadata.clone().unwrap_or_default().name,
        state: state.into(),
        labels: config.labels.clone().into_iter().collect(),
        annotations,
        pid: record.process.map(|process| process.pid.cast_unsigned()).unwrap_or_default(),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: exit.as_ref().map(|exit| exit.at).unwrap_or_default(),
        exit_code: exit.as_ref().map(|exit| exit.code).unwrap_or_default(),
        status_reason: exit.as_ref().map(|exit| exit.reason.clone()).unwrap_or_default(),
        status_message: exit.map(|exit| exit.message).unwrap_or_default(),
        cdi_devices: config
            .cdi_devices
            .iter()
            .map(|device| CdiDevice { name: device.name.clone() })
            .collect(),
        ..described
    }
}

/// The spec that a container was made from. Null when it is gone, e.g. after a restart of the machine. Blocking.
pub(super) fn spec(node: &Node, view: &ContainerView) -> Value {
    let path = node.bundle(&view.record.id).join("config.json");
    std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// Resources as kubelet asks for them: zero is nothing asked.
pub(super) fn resources(asked: &cri::LinuxContainerResources) -> LinuxResources {
    let signed = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let unsigned = |value: i64| {
        let value = u64::try_from(value).unwrap_or_default();
        (value != 0).then_some(OptionalUInt64 { value })
    };
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(asked.memory_limit_in_bytes),
            swap: signed(asked.memory_swap_limit_in_bytes),
            ..LinuxMemory::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(asked.cpu_shares),
            quota: signed(asked.cpu_quota),
            period: unsigned(asked.cpu_period),
            cpus: asked.cpuset_cpus.clone(),
            mems: asked.cpuset_mems.clone(),
            ..LinuxCpu::default()
        }),
        hugepage_limits: asked
            .hugepage_limits
            .iter()
            .map(|limit| HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: asked.unified.clone().into_iter().collect(),
        ..LinuxResources::default()
    }
}
