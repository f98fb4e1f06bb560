//! Pods and containers as kubelet would ask for them, to be changed by a test where it wants something else.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use podvisor_proto::cri::{
    ContainerConfig, ContainerMetadata, IdMapping, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, UserNamespace,
};

use crate::cri::spec;
use crate::images::BUSYBOX;

/// The cgroup below which kubelet would keep its pods.
pub const CGROUPS: &str = "/kubepods";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A pod of its own name, with logs below `logs`.
pub fn pod(name: &str, logs: &Path) -> PodSandboxConfig {
    let uid = format!("{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.clone(),
            namespace: "tests".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: logs.join(&uid).display().to_string(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        annotations: [("example.invalid/kept".to_owned(), "as it is".to_owned())].into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("{CGROUPS}/pod{uid}"),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// What kubelet asks for unless the pod says otherwise: the pod's network and IPC, a pid namespace per container.
pub fn namespaces() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() }
}

/// A container of busybox that runs `command`; its log is `NAME.log` in the pod's log directory.
pub fn container(name: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(spec(BUSYBOX)),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        labels: [("container".to_owned(), name.to_owned())].into(),
        annotations: [("example.invalid/restarts".to_owned(), "0".to_owned())].into(),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// A container that runs a shell script.
pub fn script(name: &str, text: &str) -> ContainerConfig {
    container(name, &["sh", "-c", text])
}

/// A container that runs until it is stopped, and then ends at once.
pub fn waiting(name: &str) -> ContainerConfig {
    script(name, "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done")
}

/// A mount of an image, as kubelet asks for it: by what PullImage answered.
pub fn image_mount(image: &str, sub_path: &str, container_path: &str) -> Mount {
    Mount {
        container_path: container_path.to_owned(),
        readonly: true,
        image: Some(spec(image)),
        image_sub_path: sub_path.to_owned(),
        ..Mount::default()
    }
}

/// A pod's security context, to be changed.
pub fn pod_context(config: &mut PodSandboxConfig) -> &mut LinuxSandboxSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// A pod's namespaces, to be changed.
pub fn pod_namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    pod_context(config).namespace_options.get_or_insert_default()
}

/// First id on the node of what [`with_user_namespace`] asks for.
pub const FIRST_ID: u32 = 6_553_600;

/// Namespaces in a user namespace of the pod's own, as kubelet asks for it.
pub fn with_user_namespace(namespaces: &mut NamespaceOption) {
    let range = vec![IdMapping { host_id: FIRST_ID, container_id: 0, length: 65_536 }];
    let user = UserNamespace { mode: NamespaceMode::Pod.into(), uids: range.clone(), gids: range };
    namespaces.userns_options = Some(user);
}

/// A container's security context, to be changed.
pub fn context(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// A container's namespaces, to be changed.
pub fn container_namespaces(config: &mut ContainerConfig) -> &mut NamespaceOption {
    context(config).namespace_options.get_or_insert_default()
}

/// A container's resources, to be changed.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}
