//! Views of pods, containers and images as the CRI's messages. Every RPC answers through these, so that one fact looks the same everywhere.

use std::collections::HashMap;
use std::sync::Arc;

use podvisor_proto::cri;

use crate::machine_usage;
use crate::pod::image_volumes;
use crate::pod::record::{ContainerRecord, Engine};
use crate::pod::state::State;
use crate::pod::view::{ContainerView, PodView};
use crate::pod::{request, resize};

pub(super) fn sandbox_state(view: &PodView) -> cri::PodSandboxState {
    if view.is_ready() { cri::PodSandboxState::SandboxReady } else { cri::PodSandboxState::SandboxNotready }
}

pub(super) fn sandbox(view: &PodView) -> cri::PodSandbox {
    let config = view.config();
    cri::PodSandbox {
        id: view.record.id.to_string(),
        metadata: config.metadata.clone(),
        state: sandbox_state(view).into(),
        created_at: view.record.created_at,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: view.record.requested_handler.clone(),
    }
}

pub(super) fn sandbox_status(view: &PodView) -> cri::PodSandboxStatus {
    let config = view.config();
    let mut addresses = view.record.addresses.iter();
    let network = cri::PodSandboxNetworkStatus {
        ip: addresses.next().cloned().unwrap_or_default(),
        additional_ips: addresses.map(|ip| cri::PodIp { ip: ip.clone() }).collect(),
    };
    let namespaces = cri::Namespace { options: Some(view.namespace_options()) };
    cri::PodSandboxStatus {
        id: view.record.id.to_string(),
        metadata: config.metadata.clone(),
        state: sandbox_state(view).into(),
        created_at: view.record.created_at,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(namespaces) }),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: view.record.requested_handler.clone(),
    }
}

/// The program that runs the pod's containers.
fn runtime(view: &PodView) -> &std::path::Path {
    match &view.record.runtime {
        Engine::Oci(runtime) => &runtime.path,
        Engine::Vm(vm) => &vm.hypervisor,
    }
}

fn virtual_machine(view: &PodView) -> Option<serde_json::Value> {
    let vm = view.record.runtime.vm()?;
    let mut shown = serde_json::json!({ "guest": vm.guest, "guestKernel": vm.kernel_release });
    if let Some(machine) = &view.record.machine {
        shown["hypervisor"] = machine.hypervisor.as_str().into();
        shown["kernelRelease"] = machine.kernel_release.as_str().into();
        shown["agent"] = machine.agent.as_str().into();
        shown["memoryBytes"] = machine.memory.into();
        shown["cpus"] = machine.cpus.into();
        shown["hypervisorPid"] = machine.hypervisor_pid.into();
        shown["fileServerPid"] = machine.file_server.pid.into();
        let processes = machine_usage::of(view).into_iter().map(|process| {
            let shown = serde_json::json!({
                "pid": process.pid,
                "cpuSeconds": process.cpu.as_secs_f64(),
                "anonymousBytes": process.memory.anonymous,
                "fileBytes": process.memory.file,
                "sharedBytes": process.memory.shared,
            });
            (process.role.to_owned(), shown)
        });
        shown["processes"] = processes.collect::<serde_json::Map<_, _>>().into();
    }
    if vm.emulate {
        shown["warning"] = "emulated, not an isolation boundary".into();
    }
    Some(shown)
}

/// What `crictl inspectp` shows beside the status.
/// `network`: what its network answers to CHECK.
pub(super) fn sandbox_info(view: &PodView, network: Option<&str>) -> HashMap<String, String> {
    let sizes = resize::of(&view.record);
    let init = view.record.init.map(|process| process.pid);
    let info = serde_json::json!({
        "pid": init.or(view.record.monitor.map(|process| process.pid)),
        "monitorPid": view.record.monitor.map(|process| process.pid),
        "handler": view.record.handler,
        "runtime": runtime(view),
        "runtimeRoot": view.record.runtime.oci().map(|runtime| &runtime.root),
        "virtualMachine": virtual_machine(view),
        "why": view.why(),
        "hostname": request::hostname(view.config()),
        "cniResult": view.record.cni_result,
        "networkCheck": network,
        "overhead": sizes.overhead.map(|overhead| limits(&overhead.0)),
        "resources": sizes.resources.map(|resources| limits(&resources.0)),
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

/// With the names of the CRI's JSON form; what is not given is left out.
fn limits(resources: &cri::LinuxContainerResources) -> serde_json::Value {
    let mut shown = serde_json::Map::new();
    for (name, value) in [
        ("cpuPeriod", resources.cpu_period),
        ("cpuQuota", resources.cpu_quota),
        ("cpuShares", resources.cpu_shares),
        ("memoryLimitInBytes", resources.memory_limit_in_bytes),
        ("memorySwapLimitInBytes", resources.memory_swap_limit_in_bytes),
        ("oomScoreAdj", resources.oom_score_adj),
    ] {
        if value != 0 {
            shown.insert(name.to_owned(), value.into());
        }
    }
    for (name, value) in [("cpusetCpus", &resources.cpuset_cpus), ("cpusetMems", &resources.cpuset_mems)] {
        if !value.is_empty() {
            shown.insert(name.to_owned(), value.as_str().into());
        }
    }
    if !resources.unified.is_empty() {
        shown.insert("unified".to_owned(), serde_json::json!(resources.unified));
    }
    shown.into()
}

pub(super) fn container(view: &PodView, container: &ContainerView) -> cri::Container {
    let config = &container.record.config.0;
    cri::Container {
        id: container.record.id.to_string(),
        pod_sandbox_id: view.record.id.to_string(),
        metadata: config.metadata.clone(),
        image: config.image.clone(),
        image_ref: container.record.image_id.clone(),
        state: container.cri_state().into(),
        created_at: container.record.created_at,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        image_id: container.record.image_id.clone(),
    }
}

pub(super) fn container_status(container: &ContainerView) -> cri::ContainerStatus {
    let record = &container.record;
    let config = &record.config.0;
    let (mut finished_at, mut exit_code, mut reason, mut message) = (0, 0, String::new(), String::new());
    match &container.state {
        State::Exited(exit) | State::Removing { exit: Some(exit) } => {
            (finished_at, exit_code) = (exit.at, exit.code);
            (reason, message) = (exit.reason.clone(), exit.message.clone());
        }
        State::Unknown { why } => message.clone_from(why),
        _ => {}
    }
    let user = record.user.as_ref().map(|(uid, gid, groups)| cri::ContainerUser {
        linux: Some(cri::LinuxContainerUser {
            uid: i64::from(*uid),
            gid: i64::from(*gid),
            supplemental_groups: groups.iter().map(|group| i64::from(*group)).collect(),
        }),
    });
    let resources = container_resources(record)
        .map(|linux| cri::ContainerResources { linux: Some(linux), ..Default::default() });
    cri::ContainerStatus {
        id: record.id.to_string(),
        metadata: config.metadata.clone(),
        state: container.cri_state().into(),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at,
        exit_code,
        image: config.image.clone(),
        image_ref: record.image_ref.clone(),
        reason,
        message,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: image_volumes::shown(&config.mounts, &record.image_volumes),
        log_path: record.log_path.clone(),
        resources,
        image_id: record.image_id.clone(),
        user,
        stop_signal: stop_signal(record.stop_signal),
    }
}

/// What was asked for and accepted: at its creation, then by UpdateContainerResources.
pub(super) fn container_resources(record: &ContainerRecord) -> Option<cri::LinuxContainerResources> {
    let resources = serde_json::from_value(record.resources.clone()).ok()?;
    let requested = record.config.0.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let oom_score_adj = requested.and_then(|resources| i32::try_from(resources.oom_score_adj).ok());
    Some(podvisor_spec::reported_resources(&resources, oom_score_adj))
}

/// What kubelet said that the pod's containers may use together.
pub(super) fn sandbox_resources(view: &PodView) -> Option<cri::LinuxContainerResources> {
    resize::of(&view.record).resources.map(|resources| resources.0)
}

/// The CRI's number of a signal of the kernel.
fn stop_signal(number: i32) -> i32 {
    (1..80)
        .filter_map(|value| cri::Signal::try_from(value).ok())
        .find(|signal| crate::pod::signal::signal_number(signal.as_str_name()) == Some(number))
        .map_or(0, Into::into)
}

/// What `crictl inspect` shows beside the status.
pub(super) fn container_info(
    view: &PodView,
    container: &ContainerView,
    spec: Option<serde_json::Value>,
) -> HashMap<String, String> {
    let info = serde_json::json!({
        "sandboxID": view.record.id,
        "pid": container.record.process.map(|process| process.pid),
        "handler": view.record.handler,
        "runtime": runtime(view),
        "cgroup": container.record.cgroup,
        "runtimeSpec": spec,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

pub(super) fn image(image: &podvisor_image_store::Image) -> cri::Image {
    let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    // The group behind a colon is no business of this message.
    let user = user.split(':').next().unwrap_or_default();
    let uid = user.parse::<i64>().ok();
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| cri::Int64Value { value }),
        username: if uid.is_none() { user.to_owned() } else { String::new() },
        spec: Some(cri::ImageSpec { image: image.id.clone(), ..Default::default() }),
        pinned: image.pinned,
    }
}

pub(super) fn filesystem(usage: &podvisor_image_store::FsUsage, timestamp: i64) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: usage.mountpoint.display().to_string() }),
        used_bytes: Some(cri::UInt64Value { value: usage.used_bytes }),
        inodes_used: Some(cri::UInt64Value { value: usage.inodes_used }),
    }
}

/// One event for GetContainerEvents.
pub(crate) fn event(
    view: &Arc<PodView>,
    id: String,
    kind: cri::ContainerEventType,
    created_at: i64,
) -> cri::ContainerEventResponse {
    cri::ContainerEventResponse {
        container_id: id,
        container_event_type: kind.into(),
        created_at,
        pod_sandbox_status: Some(sandbox_status(view)),
        containers_statuses: view.visible_containers().map(|container| container_status(container)).collect(),
    }
}

/// Whether `labels` has everything that `selector` asks for.
pub(super) fn selects(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}
