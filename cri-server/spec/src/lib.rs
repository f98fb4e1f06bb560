//! From the CRI's configuration to an OCI runtime spec. Pure but for the host facts it is given: no file is read here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use podvisor_proto::cri;

/// Everything the spec of a container is made from.
#[derive(Debug)]
pub struct Input<'a> {
    /// 64 hex digits.
    pub container_id: &'a str,
    /// 64 hex digits.
    pub sandbox_id: &'a str,
    /// From CreateContainer.
    pub config: &'a cri::ContainerConfig,
    /// From RunPodSandbox.
    pub sandbox: &'a cri::PodSandboxConfig,
    /// The image's configuration.
    pub image: &'a ImageConfiguration,
    /// Reference of the image, for annotations.
    pub image_name: &'a str,
    /// Mounted root file system.
    pub rootfs: PathBuf,
    /// Namespaces to join by path; `pid` also for the target container or the pod's init.
    pub namespaces: NamespacePaths,
    /// Files that podvisor made for the pod: mounted where the configuration mounts nothing.
    pub pod_files: PodFiles,
    /// Mounts from the configuration, after the daemon has made missing host directories and resolved links: same order as
    /// `config.mounts`.
    pub mounts: Vec<ResolvedMount>,
    /// Devices from the configuration, expanded: a directory becomes the devices in it. In the spec they get the container path given here.
    pub devices: Vec<ResolvedDevice>,
    /// `/etc/passwd` and `/etc/group` of the image, for user and group names.
    pub passwd: &'a str,
    /// See `passwd`.
    pub group: &'a str,
    /// What the node can do.
    pub host: &'a HostFacts,
    /// `linux.cgroupsPath`, already in the driver's syntax.
    pub cgroups_path: String,
    /// Seccomp profile to use, already read; `None`: unconfined.
    pub seccomp: Option<&'a oci_spec::runtime::LinuxSeccomp>,
    /// Annotations that the handler passes on.
    pub annotations: BTreeMap<String, String>,
    /// `pids.max` when the configuration has none; `None`: unlimited.
    pub default_pids: Option<i64>,
}

/// Namespaces by path; `None`: a new one (mount, and pid for CONTAINER mode) or the host's, as the modes say.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct NamespacePaths {
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    pub pid: Option<PathBuf>,
}

/// Files of the pod that its containers share.
#[derive(Debug, Clone)]
pub struct PodFiles {
    /// → `/etc/hostname`
    pub hostname: Option<PathBuf>,
    /// → `/etc/hosts`
    pub hosts: Option<PathBuf>,
    /// → `/etc/resolv.conf`
    pub resolv_conf: Option<PathBuf>,
    /// → `/dev/shm` (the pod's tmpfs, or the host's for host IPC)
    pub shm: Option<PathBuf>,
}

/// A mount whose source exists.
#[derive(Debug, Clone)]
pub struct ResolvedMount {
    /// Absolute, links resolved.
    pub source: PathBuf,
}

/// A device node of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ResolvedDevice {
    pub container_path: PathBuf,
    pub kind: DeviceKind,
    pub major: i64,
    pub minor: i64,
    /// Permission bits, e.g. `0o660`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Letters of `rwm`.
    pub access: String,
}

/// Block or character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DeviceKind {
    Block,
    Character,
}

/// What the node can do.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Capability names (`CAP_…`) in the daemon's bounding set: a privileged container gets these.
    pub capabilities: Vec<String>,
    /// Unified hierarchy.
    pub cgroup_v2: bool,
    /// The daemon's own `oom_score_adj`: without CAP_SYS_RESOURCE nothing lower can be set.
    pub oom_score_adj_floor: Option<i32>,
    /// Device nodes of the host, for privileged containers.
    pub devices: Vec<ResolvedDevice>,
    /// Swap limits can be set.
    pub swap: bool,
    /// `hugetlb` controller is there.
    pub hugetlb: bool,
}

/// A configuration that cannot become a container; names the CRI field.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct SpecError;

/// Who a container's processes run as, for ContainerStatus.user.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub supplemental_groups: Vec<u32>,
}

/// The container's spec.
pub fn container(_input: &Input<'_>) -> Result<Spec, SpecError> {
    todo!()
}

/// A process for exec in a container with spec `spec`.
pub fn exec(_spec: &Spec, _command: &[String], _terminal: bool) -> Result<Process, SpecError> {
    todo!()
}

/// Resources for UpdateContainerResources, merged over what the container has now; also what ContainerStatus returns.
pub fn resources(_current: &LinuxResources, _update: &cri::LinuxContainerResources, _host: &HostFacts) -> Result<LinuxResources, SpecError> {
    todo!()
}

/// The built-in profile for RuntimeDefault, for a container with these capabilities.
pub fn default_seccomp(_capabilities: &[String]) -> oci_spec::runtime::LinuxSeccomp {
    todo!()
}
