// Messages with as many fields filled in as both crates know, no two values alike. Included once per crate, with
// `v1` meaning that crate. Maps have one entry: their order on the wire is not defined.

use std::collections::HashMap;

fn entry(key: &str, value: &str) -> HashMap<String, String> {
    HashMap::from([(key.to_owned(), value.to_owned())])
}

fn strings(values: &[&str]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

#[allow(clippy::unnecessary_wraps)]
fn some(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

#[allow(clippy::unnecessary_wraps)]
fn count(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn mapping(host_id: u32, container_id: u32, length: u32) -> v1::IdMapping {
    v1::IdMapping { host_id, container_id, length }
}

fn namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Node.into(),
        pid: v1::NamespaceMode::Target.into(),
        ipc: v1::NamespaceMode::Container.into(),
        target_id: "target".to_owned(),
        userns_options: Some(v1::UserNamespace {
            mode: v1::NamespaceMode::Pod.into(),
            uids: vec![mapping(65536, 0, 65537)],
            gids: vec![mapping(131_072, 1, 65538)],
        }),
    }
}

fn selinux() -> v1::SeLinuxOption {
    v1::SeLinuxOption {
        user: "system_u".to_owned(),
        role: "system_r".to_owned(),
        r#type: "container_t".to_owned(),
        level: "s0:c1,c2".to_owned(),
    }
}

fn profile(name: &str) -> v1::SecurityProfile {
    v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::Localhost.into(),
        localhost_ref: name.to_owned(),
    }
}

fn resources(base: i64) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: base + 1,
        cpu_quota: -base - 2,
        cpu_shares: base + 3,
        memory_limit_in_bytes: base + (4 << 40),
        oom_score_adj: -997,
        cpuset_cpus: "0-3".to_owned(),
        cpuset_mems: "1".to_owned(),
        hugepage_limits: vec![v1::HugepageLimit { page_size: "2MB".to_owned(), limit: 1 << 63 }],
        unified: entry("memory.high", "1000"),
        memory_swap_limit_in_bytes: base + 5,
    }
}

fn windows_resources() -> v1::WindowsContainerResources {
    #[allow(clippy::needless_update)] // one of the crates has a further field
    v1::WindowsContainerResources {
        cpu_shares: 1,
        cpu_count: 2,
        cpu_maximum: 3,
        memory_limit_in_bytes: 4,
        rootfs_size_in_bytes: 5,
        ..Default::default()
    }
}

fn sandbox_metadata() -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: "pod".to_owned(),
        uid: "uid".to_owned(),
        namespace: "namespace".to_owned(),
        attempt: 7,
    }
}

#[allow(deprecated)]
fn sandbox_config() -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(sandbox_metadata()),
        hostname: "host".to_owned(),
        log_directory: "/var/log/pods/x".to_owned(),
        dns_config: Some(v1::DnsConfig {
            servers: strings(&["10.0.0.10", "10.0.0.11"]),
            searches: strings(&["cluster.local"]),
            options: strings(&["ndots:5"]),
        }),
        port_mappings: vec![v1::PortMapping {
            protocol: v1::Protocol::Sctp.into(),
            container_port: 80,
            host_port: 8080,
            host_ip: "127.0.0.1".to_owned(),
        }],
        labels: entry("label", "l"),
        annotations: entry("annotation", "a"),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod".to_owned(),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                selinux_options: Some(selinux()),
                run_as_user: some(0),
                run_as_group: some(-1),
                readonly_rootfs: true,
                supplemental_groups: vec![1, 300, i64::MAX],
                supplemental_groups_policy: v1::SupplementalGroupsPolicy::Strict.into(),
                privileged: true,
                seccomp: Some(profile("/seccomp")),
                apparmor: Some(profile("armor")),
                seccomp_profile_path: "unconfined".to_owned(),
            }),
            sysctls: entry("net.ipv4.ip_forward", "1"),
            overhead: Some(resources(100)),
            resources: Some(resources(200)),
        }),
        windows: Some(v1::WindowsPodSandboxConfig {
            security_context: Some(v1::WindowsSandboxSecurityContext {
                run_as_username: "user".to_owned(),
                credential_spec: "spec".to_owned(),
                host_process: true,
                namespace_options: Some(v1::WindowsNamespaceOption {
                    network: v1::NamespaceMode::Node.into(),
                }),
            }),
        }),
    }
}

fn image_spec(name: &str) -> v1::ImageSpec {
    #[allow(clippy::needless_update)] // one of the crates has a further field
    v1::ImageSpec {
        image: name.to_owned(),
        annotations: entry("of", name),
        user_specified_image: format!("{name}:latest"),
        runtime_handler: "kata".to_owned(),
        ..Default::default()
    }
}

fn mount() -> v1::Mount {
    #[allow(clippy::needless_update)] // one of the crates has further fields
    v1::Mount {
        container_path: "/in".to_owned(),
        host_path: "/out".to_owned(),
        readonly: true,
        selinux_relabel: true,
        propagation: v1::MountPropagation::PropagationBidirectional.into(),
        uid_mappings: vec![mapping(1, 2, 3)],
        gid_mappings: vec![mapping(4, 5, 6)],
        recursive_read_only: true,
        image: Some(image_spec("volume")),
        ..Default::default()
    }
}

#[allow(deprecated)]
fn container_config() -> v1::ContainerConfig {
    #[allow(clippy::needless_update)] // one of the crates has a further field
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "container".to_owned(), attempt: 3 }),
        image: Some(image_spec("busybox")),
        command: strings(&["/bin/sh", "-c"]),
        args: strings(&["true"]),
        working_dir: "/work".to_owned(),
        envs: vec![v1::KeyValue { key: "PATH".to_owned(), value: "/bin".into() }],
        mounts: vec![mount()],
        devices: vec![v1::Device {
            container_path: "/dev/a".to_owned(),
            host_path: "/dev/b".to_owned(),
            permissions: "rwm".to_owned(),
        }],
        labels: entry("label", "c"),
        annotations: entry("annotation", "d"),
        log_path: "container/3.log".to_owned(),
        stdin: true,
        stdin_once: true,
        tty: true,
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources(300)),
            security_context: Some(v1::LinuxContainerSecurityContext {
                capabilities: Some(v1::Capability {
                    add_capabilities: strings(&["NET_ADMIN"]),
                    drop_capabilities: strings(&["ALL"]),
                    add_ambient_capabilities: strings(&["NET_RAW"]),
                }),
                privileged: true,
                namespace_options: Some(namespaces()),
                selinux_options: Some(selinux()),
                run_as_user: some(1000),
                run_as_group: some(1001),
                run_as_username: "nobody".to_owned(),
                readonly_rootfs: true,
                supplemental_groups: vec![5, 6],
                supplemental_groups_policy: v1::SupplementalGroupsPolicy::Strict.into(),
                no_new_privs: true,
                masked_paths: strings(&["/proc/kcore"]),
                readonly_paths: strings(&["/proc/sys"]),
                seccomp: Some(profile("/seccomp-of-container")),
                apparmor: Some(profile("armor-of-container")),
                apparmor_profile: "localhost/x".to_owned(),
                seccomp_profile_path: "localhost//y".to_owned(),
            }),
        }),
        windows: Some(v1::WindowsContainerConfig {
            resources: Some(windows_resources()),
            security_context: Some(v1::WindowsContainerSecurityContext {
                run_as_username: "w".to_owned(),
                credential_spec: "s".to_owned(),
                host_process: true,
            }),
        }),
        cdi_devices: vec![v1::CdiDevice { name: "vendor.com/gpu=0".to_owned() }],
        ..Default::default()
    }
}

fn sandbox_status() -> v1::PodSandboxStatus {
    v1::PodSandboxStatus {
        id: "sandbox".to_owned(),
        metadata: Some(sandbox_metadata()),
        state: v1::PodSandboxState::SandboxNotready.into(),
        created_at: 1_700_000_000_000_000_001,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: "10.88.0.2".to_owned(),
            additional_ips: vec![v1::PodIp { ip: "fd00::2".to_owned() }],
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(namespaces()) }),
        }),
        labels: entry("label", "s"),
        annotations: entry("annotation", "t"),
        runtime_handler: "runc".to_owned(),
    }
}

fn status_of_container() -> v1::ContainerStatus {
    #[allow(clippy::needless_update)] // one of the crates has a further field
    v1::ContainerStatus {
        id: "container".to_owned(),
        metadata: Some(v1::ContainerMetadata { name: "c".to_owned(), attempt: 2 }),
        state: v1::ContainerState::ContainerExited.into(),
        created_at: 11,
        started_at: 12,
        finished_at: 13,
        exit_code: -1,
        image: Some(image_spec("image")),
        image_ref: "image@sha256:x".to_owned(),
        reason: "OOMKilled".to_owned(),
        message: "out of memory".to_owned(),
        labels: entry("label", "v"),
        annotations: entry("annotation", "w"),
        mounts: vec![mount()],
        log_path: "/var/log/c".to_owned(),
        resources: Some(v1::ContainerResources {
            linux: Some(resources(400)),
            windows: Some(windows_resources()),
        }),
        image_id: "sha256:y".to_owned(),
        user: Some(v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser { uid: 1, gid: 2, supplemental_groups: vec![3, 4] }),
        }),
        ..Default::default()
    }
}

pub(crate) fn run_pod_sandbox() -> v1::RunPodSandboxRequest {
    v1::RunPodSandboxRequest { config: Some(sandbox_config()), runtime_handler: "kata".to_owned() }
}

pub(crate) fn create_container() -> v1::CreateContainerRequest {
    v1::CreateContainerRequest {
        pod_sandbox_id: "sandbox".to_owned(),
        config: Some(container_config()),
        sandbox_config: Some(sandbox_config()),
    }
}

pub(crate) fn pod_sandbox_status() -> v1::PodSandboxStatusResponse {
    v1::PodSandboxStatusResponse {
        status: Some(sandbox_status()),
        info: entry("info", "{}"),
        containers_statuses: vec![status_of_container(), status_of_container()],
        timestamp: 99,
    }
}

pub(crate) fn container_status() -> v1::ContainerStatusResponse {
    v1::ContainerStatusResponse { status: Some(status_of_container()), info: entry("info", "{\"pid\":1}") }
}

pub(crate) fn list_containers() -> v1::ListContainersRequest {
    v1::ListContainersRequest {
        filter: Some(v1::ContainerFilter {
            id: "i".to_owned(),
            state: Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerUnknown.into() }),
            pod_sandbox_id: "p".to_owned(),
            label_selector: entry("label", "x"),
        }),
    }
}

pub(crate) fn list_pod_sandboxes() -> v1::ListPodSandboxResponse {
    v1::ListPodSandboxResponse {
        items: vec![v1::PodSandbox {
            id: "sandbox".to_owned(),
            metadata: Some(sandbox_metadata()),
            state: v1::PodSandboxState::SandboxNotready.into(),
            created_at: 21,
            labels: entry("label", "y"),
            annotations: entry("annotation", "z"),
            runtime_handler: "crun".to_owned(),
        }],
    }
}

pub(crate) fn update_container_resources() -> v1::UpdateContainerResourcesRequest {
    v1::UpdateContainerResourcesRequest {
        container_id: "c".to_owned(),
        linux: Some(resources(500)),
        windows: Some(windows_resources()),
        annotations: entry("annotation", "u"),
    }
}

pub(crate) fn exec_sync() -> v1::ExecSyncResponse {
    v1::ExecSyncResponse { stdout: vec![0, 255], stderr: vec![1, 254], exit_code: 137 }
}

pub(crate) fn exec() -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: "c".to_owned(),
        cmd: strings(&["ls", "-l"]),
        tty: true,
        stdin: true,
        stdout: false,
        stderr: true,
    }
}

pub(crate) fn attach() -> v1::AttachRequest {
    v1::AttachRequest { container_id: "c".to_owned(), stdin: false, tty: true, stdout: true, stderr: false }
}

pub(crate) fn port_forward() -> v1::PortForwardRequest {
    v1::PortForwardRequest { pod_sandbox_id: "p".to_owned(), port: vec![80, 443, 65535] }
}

pub(crate) fn pull_image() -> v1::PullImageRequest {
    v1::PullImageRequest {
        image: Some(image_spec("registry.example/app")),
        auth: Some(v1::AuthConfig {
            username: "somebody".to_owned(),
            password: "a-password".to_owned(),
            auth: "an-auth".to_owned(),
            server_address: "registry.example".to_owned(),
            identity_token: "an-identity".to_owned(),
            registry_token: "a-bearer".to_owned(),
        }),
        sandbox_config: Some(sandbox_config()),
    }
}

pub(crate) fn images() -> v1::ListImagesResponse {
    v1::ListImagesResponse {
        images: vec![v1::Image {
            id: "sha256:z".to_owned(),
            repo_tags: strings(&["a:1", "b:2"]),
            repo_digests: strings(&["a@sha256:q"]),
            size: u64::MAX,
            uid: some(65534),
            username: "nobody".to_owned(),
            spec: Some(image_spec("a")),
            pinned: true,
        }],
    }
}

fn filesystem(base: u64) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: 31,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: "/var/lib/podvisor".to_owned() }),
        used_bytes: count(base),
        inodes_used: count(base + 1),
    }
}

pub(crate) fn image_fs_info() -> v1::ImageFsInfoResponse {
    v1::ImageFsInfoResponse {
        image_filesystems: vec![filesystem(1)],
        container_filesystems: vec![filesystem(3)],
    }
}

fn cpu() -> v1::CpuUsage {
    #[allow(clippy::needless_update)] // one of the crates has a further field
    v1::CpuUsage {
        timestamp: 41,
        usage_core_nano_seconds: count(42),
        usage_nano_cores: count(43),
        ..Default::default()
    }
}

fn memory() -> v1::MemoryUsage {
    #[allow(clippy::needless_update)] // one of the crates has a further field
    v1::MemoryUsage {
        timestamp: 51,
        working_set_bytes: count(52),
        available_bytes: count(53),
        usage_bytes: count(54),
        rss_bytes: count(55),
        page_faults: count(56),
        major_page_faults: count(57),
        ..Default::default()
    }
}

fn interface(name: &str) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: name.to_owned(),
        rx_bytes: count(61),
        rx_errors: count(62),
        tx_bytes: count(63),
        tx_errors: count(64),
    }
}

pub(crate) fn pod_sandbox_stats() -> v1::ListPodSandboxStatsResponse {
    #[allow(clippy::needless_update)] // one of the crates has further fields
    let container = v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: "c".to_owned(),
            metadata: Some(v1::ContainerMetadata { name: "n".to_owned(), attempt: 1 }),
            labels: entry("label", "b"),
            annotations: entry("annotation", "e"),
        }),
        cpu: Some(cpu()),
        memory: Some(memory()),
        writable_layer: Some(filesystem(5)),
        swap: Some(v1::SwapUsage {
            timestamp: 71,
            swap_available_bytes: count(72),
            swap_usage_bytes: count(73),
        }),
        ..Default::default()
    };
    #[allow(clippy::needless_update)] // one of the crates has a further field
    let linux = v1::LinuxPodSandboxStats {
        cpu: Some(cpu()),
        memory: Some(memory()),
        network: Some(v1::NetworkUsage {
            timestamp: 81,
            default_interface: Some(interface("eth0")),
            interfaces: vec![interface("net1")],
        }),
        process: Some(v1::ProcessUsage { timestamp: 82, process_count: count(83) }),
        containers: vec![container],
        ..Default::default()
    };
    v1::ListPodSandboxStatsResponse {
        stats: vec![v1::PodSandboxStats {
            attributes: Some(v1::PodSandboxAttributes {
                id: "p".to_owned(),
                metadata: Some(sandbox_metadata()),
                labels: entry("label", "f"),
                annotations: entry("annotation", "g"),
            }),
            linux: Some(linux),
            windows: None,
        }],
    }
}

pub(crate) fn metrics() -> v1::ListPodSandboxMetricsResponse {
    let metric = |name: &str| v1::Metric {
        name: name.to_owned(),
        timestamp: 91,
        metric_type: v1::MetricType::Gauge.into(),
        label_values: strings(&["a", "b"]),
        value: count(92),
    };
    v1::ListPodSandboxMetricsResponse {
        pod_metrics: vec![v1::PodSandboxMetrics {
            pod_sandbox_id: "p".to_owned(),
            metrics: vec![metric("m")],
            container_metrics: vec![v1::ContainerMetrics {
                container_id: "c".to_owned(),
                metrics: vec![metric("n")],
            }],
        }],
    }
}

pub(crate) fn status() -> v1::StatusResponse {
    #[allow(clippy::needless_update)] // one of the crates has further fields
    let features = v1::RuntimeFeatures { supplemental_groups_policy: true, ..Default::default() };
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus {
            conditions: vec![v1::RuntimeCondition {
                r#type: "NetworkReady".to_owned(),
                status: true,
                reason: "Why".to_owned(),
                message: "because".to_owned(),
            }],
        }),
        info: entry("config", "{}"),
        runtime_handlers: vec![v1::RuntimeHandler {
            name: "runc".to_owned(),
            features: Some(v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: false,
                user_namespaces: true,
            }),
        }],
        features: Some(features),
    }
}

pub(crate) fn runtime_config() -> v1::RuntimeConfigResponse {
    v1::RuntimeConfigResponse {
        linux: Some(v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Cgroupfs.into() }),
    }
}

pub(crate) fn event() -> v1::ContainerEventResponse {
    v1::ContainerEventResponse {
        container_id: "c".to_owned(),
        container_event_type: v1::ContainerEventType::ContainerDeletedEvent.into(),
        created_at: 101,
        pod_sandbox_status: Some(sandbox_status()),
        containers_statuses: vec![status_of_container()],
    }
}
