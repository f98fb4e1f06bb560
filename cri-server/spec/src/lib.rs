//! From the CRI's configuration to an OCI runtime spec. Pure but for the host facts it is given: no file is read here. (The one thing asked
//! of the kernel is uname(2), for HOSTNAME in pods on the node's network, to which kubelet gives no name.)
//!
//! | file | what |
//! |---|---|
//! | `container.rs` | the spec, put together |
//! | `process.rs` | arguments, environment, working directory; exec |
//! | `user.rs` | user and groups |
//! | `capabilities.rs` | capability sets |
//! | `namespaces.rs` | joined, new and the node's namespaces |
//! | `user_namespace.rs` | ids of a pod with a user namespace |
//! | `mounts.rs` | default mounts, the pod's files, volumes |
//! | `devices.rs` | nodes and device rules |
//! | `resources.rs` | limits: creation, update, status |
//! | `profile.rs` | which seccomp and AppArmor profiles are asked for |
//! | `seccomp.rs` | profile files; `seccomp/default.json` is the built-in one |
//! | `selinux.rs` | labels of pods and containers |
//! | `cdi/` | devices that vendors describe in files |
//! | `annotations.rs` | what other runtimes read about the pod |
//!
//! Invariants: every field that is not used as it came is refused with its name, never repaired silently; a mode that asks for isolation
//! never ends in a namespace of the node; a privileged container needs a privileged pod; no input makes this crate panic.
//!
//! Decisions, each with what was rejected:
//! - Sysctls are not in the spec: the pod's namespaces have them already, and a container with its own mount of /proc could not set them.
//! - A new sysfs also on the host's network, not a bind of /sys, which would bring writable debugfs and tracefs along.
//! - An environment value that is not UTF-8 is an error. Go's JSON replaces such bytes silently, which breaks the container instead.
//! - OCI version 1.0.2 in the spec, because crun before 1.9 refuses anything else.

// Tests are tables of whole requests.
#![cfg_attr(test, allow(clippy::large_stack_arrays, clippy::type_complexity, clippy::unnecessary_wraps))]

mod annotations;
mod capabilities;
pub mod cdi;
mod container;
mod devices;
mod error;
mod mounts;
mod namespaces;
mod process;
mod profile;
mod resources;
mod seccomp;
pub mod selinux;
mod user;
mod user_namespace;

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;
use podvisor_proto::cri;

pub use capabilities::{capabilities, capability_names};
pub use container::container;
pub use error::{ErrorKind, SpecError};
pub use mounts::check_image_mount;
pub use process::exec;
pub use profile::{SecurityProfile, apparmor_request, seccomp_request};
pub use resources::{oom_score_adj, reported_resources, resources, taken_back};
pub use seccomp::{default_seccomp, seccomp_profile};
pub use user::User;
pub use user_namespace::{Ids, UserNamespace, user_namespace};

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
    /// Name of the AppArmor profile to run under, which is loaded; `None`: unconfined.
    pub apparmor: Option<String>,
    /// SELinux labels of its process and its files.
    pub selinux: selinux::Confinement,
    /// Annotations that the handler passes on.
    pub annotations: BTreeMap<String, String>,
    /// `pids.max` when the configuration has none; `None`: unlimited.
    pub default_pids: Option<i64>,
}

/// Namespaces by path; `None`: a new one (mount, and pid for CONTAINER mode) or the host's, as the modes say. The user namespace owns
/// the others.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct NamespacePaths {
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    pub pid: Option<PathBuf>,
    pub user: Option<PathBuf>,
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
    /// Sizes of huge pages that the kernel has, as its cgroup files name them: `2MB`, `1GB`.
    pub hugepage_sizes: Vec<String>,
    /// Highest number of a CPU that the kernel can have; `None` where that is not known.
    pub last_cpu: Option<u32>,
    /// The same of a memory node.
    pub last_memory_node: Option<u32>,
}

fn security(config: &cri::ContainerConfig) -> Option<&cri::LinuxContainerSecurityContext> {
    config.linux.as_ref()?.security_context.as_ref()
}

#[cfg(test)]
mod testing;
