//! The typed configuration of podvisor: one TOML file plus drop-ins, strict, with a documented default.
//!
//! [`Config::load`] reads `/etc/podvisor/config.toml` and `config.toml.d/*.toml` beside it in lexical order, a
//! later file overriding key by key. [`trust`] decides from it which handler a pod gets. How the crate is laid
//! out and why stands in its README.md.

mod check;
mod default;
mod document;
mod error;
pub mod import;
mod load;
mod nearest;
mod print;
mod read;
mod reload;
pub mod trust;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

pub use error::{ConfigError, Problem, ProblemKind};

impl Config {
    /// The handlers by every name that a pod can ask for.
    pub fn named_handlers(&self) -> BTreeMap<String, Handler> {
        let mut named = self.handlers.clone();
        for handler in self.handlers.values() {
            for alias in &handler.aliases {
                named.entry(alias.clone()).or_insert_with(|| handler.clone());
            }
        }
        named
    }
}

/// Everything an operator can set. Every field has a default, so an empty file is valid.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Persistent state: images, layers, pod records.
    pub root: PathBuf,
    /// Volatile state, on tmpfs: sockets, bundles, mounts.
    pub run: PathBuf,
    /// Unix socket for kubelet and crictl.
    pub socket: PathBuf,
    /// `[log]`
    pub log: Log,
    /// `[metrics]`
    pub metrics: Metrics,
    /// `[streaming]`
    pub streaming: Streaming,
    /// `[runtime]`
    pub runtime: Runtime,
    /// `[runtime.handlers.NAME]`
    pub handlers: BTreeMap<String, Handler>,
    /// `[image]`
    pub image: Image,
    /// `[network]`
    pub network: Network,
    /// `[nri]`
    pub nri: Nri,
    /// `[limits]`
    pub limits: Limits,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    /// A tracing filter, e.g. `info` or `info,podvisor::pod=debug`. Reloadable.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// `[metrics]`: podvisor's own, for Prometheus.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// Where `/metrics` is served over HTTP, without any authentication; `None`: nowhere.
    pub address: Option<SocketAddr>,
}

/// `[streaming]`: where exec, attach and port-forward connect to.
#[derive(Debug, Clone, PartialEq)]
pub struct Streaming {
    /// Default `127.0.0.1:0`: loopback, a free port. Anything but loopback needs `tls_cert` and `tls_key`.
    pub address: SocketAddr,
    /// PEM file.
    pub tls_cert: Option<PathBuf>,
    /// PEM file.
    pub tls_key: Option<PathBuf>,
    /// How long a URL is valid, seconds.
    pub token_lifetime: u32,
    /// A stream on which nothing moves is closed after this many seconds (kubelet's default: 4 hours).
    pub idle_timeout: u32,
}

/// `[runtime]`
#[derive(Debug, Clone, PartialEq)]
pub struct Runtime {
    /// `auto`, `cgroupfs` or `systemd`.
    pub cgroup_driver: CgroupDriver,
    /// Name of the handler (type `oci`) of pods that are trusted and name no handler.
    pub trusted_handler: String,
    /// Name of the handler (type `vm`) of untrusted pods; `None` while there is none.
    pub untrusted_handler: Option<String>,
    /// `trusted` or `untrusted`: pods that say nothing themselves. Reloadable.
    pub default_workload_trust: Trust,
    /// Program of the per-pod monitor; default: `podvisor-monitor` beside the daemon's own executable.
    pub monitor: Option<PathBuf>,
    /// Cgroup (cgroupfs driver) or slice (systemd driver) of the monitors.
    pub monitor_cgroup: String,
    /// Seccomp profile for RuntimeDefault; `None`: the built-in one.
    pub seccomp_profile: Option<PathBuf>,
    /// Directory under which localhost seccomp profiles with relative names are looked up.
    pub seccomp_root: PathBuf,
    /// Where CDI's specs are, later ones before earlier. Empty: no CDI devices. Reloadable.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// How many idle monitors are kept ready.
    pub monitor_pool: u32,
}

/// Who makes the cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    /// `systemd` where PID 1 is systemd, else `cgroupfs`.
    Auto,
    /// podvisor and the OCI runtime write the cgroup file system themselves.
    Cgroupfs,
    /// systemd over D-Bus.
    Systemd,
}

/// How far a workload is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Shares the host's kernel.
    Trusted,
    /// Gets a kernel of its own.
    Untrusted,
}

/// `[runtime.handlers.NAME]`: one way of running a pod.
#[derive(Debug, Clone, PartialEq)]
pub struct Handler {
    /// What it is.
    pub kind: HandlerKind,
    /// Annotations (exact names, or prefixes ending in `*`) that are passed on to the OCI runtime.
    pub annotations: Vec<String>,
    /// Further names that it can be asked for by, where no handler has that name itself.
    pub aliases: Vec<String>,
}

impl Handler {
    /// Whether its pods have a kernel of their own in a virtual machine.
    pub fn is_vm(&self) -> bool {
        matches!(self.kind, HandlerKind::Vm(_))
    }
}

/// The `type` key of a handler.
#[derive(Debug, Clone, PartialEq)]
pub enum HandlerKind {
    /// `type = "oci"`: any program that speaks the OCI command line.
    Oci {
        /// Program; a bare name is looked up in PATH.
        path: PathBuf,
        /// The runtime's own state directory (`--root`).
        root: PathBuf,
        /// Extra global arguments.
        arguments: Vec<String>,
        /// It keeps all containers of a pod in one process, the pod's sandbox container, which has to come first (gVisor).
        sandbox_container: bool,
    },
    /// `type = "vm"`: one virtual machine per pod.
    Vm(Vm),
}

/// The keys of a handler of type `vm`.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// `auto`, `kvm` or `qemu`.
    pub hypervisor: Hypervisor,
    /// QEMU may translate the processor where KVM cannot be used: slow, and no isolation boundary.
    pub allow_emulation: bool,
    /// QEMU's program; a bare name is looked up in PATH.
    pub qemu: PathBuf,
    /// Which of QEMU's machines.
    pub machine: Machine,
    /// Id of the guest that new pods get; empty: the current one.
    pub guest: String,
    /// Memory for the containers of a pod without a limit, MiB.
    pub default_memory: u32,
    /// Memory for the guest's kernel and agent, on top, MiB.
    pub guest_reserve: u32,
    /// What the containers' memory can grow to while a pod runs, MiB; 0: the node's.
    pub max_memory: u32,
    /// Virtual CPUs of a pod without a limit.
    pub default_cpus: u32,
    /// The most virtual CPUs that a pod gets.
    pub max_cpus: u32,
    /// How guests get the images of containers.
    pub rootfs: Rootfs,
    /// Which pods' guests read the same pages of the host's memory.
    pub share_images: ShareImages,
    /// Where containers write.
    pub writable: Writable,
    /// What each may write to a disk, MiB.
    pub writable_size: u32,
}

/// Where a container in a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writable {
    /// Through the file server.
    Fs,
    /// To a disk of its own.
    Disk,
}

/// How a guest gets a container's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rootfs {
    /// The best that the pod's machine can do.
    Auto,
    /// As persistent memory: it reads the host's page cache.
    Pmem,
    /// As a disk that cannot be written.
    Block,
    /// Through the file server.
    Fs,
}

/// Who shares pages of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareImages {
    /// All pods of the node.
    Node,
    /// Those of a namespace.
    Namespace,
    /// Nobody: the containers of a pod alone.
    Pod,
}

/// Which program is a pod's virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hypervisor {
    /// The best that works on this machine.
    Auto,
    /// A monitor on KVM; refused where KVM cannot run a distribution's kernel.
    Kvm,
    /// QEMU, with KVM where that works.
    Qemu,
}

/// Which machine QEMU makes of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// One that can do whatever kubelet asks of a running pod.
    Auto,
    /// Nothing can be plugged into it, and its memory is what it is; starts sooner.
    Microvm,
    /// Disks and memory can be added while it runs.
    Q35,
}

/// `[image]`
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Empty: the built-in pause, which needs no image at all. Reloadable.
    pub pause_image: String,
    /// registries.conf v2; drop-ins in `<file>.d/`. Watched: a change counts for the next pull.
    pub registries_conf: PathBuf,
    /// containerd's `certs.d` directory with `<host>/hosts.toml`.
    pub certs_dir: PathBuf,
    /// Credentials: docker `config.json` / `auth.json` files, first match wins.
    pub auth_files: Vec<PathBuf>,
    /// Registries for names without one, in order, when registries.conf names none. Default `docker.io`.
    pub default_registries: Vec<String>,
    /// Layers fetched at once per image.
    pub parallel_layers: u32,
    /// A pull on which no byte arrives for this many seconds fails.
    pub progress_timeout: u32,
}

/// `[network]`
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// `cni` (default) or `builtin`.
    pub mode: NetworkMode,
    /// Where conflists are.
    pub cni_config_dir: PathBuf,
    /// Where plugins are.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Where libcni-style cached results are kept.
    pub cni_cache_dir: PathBuf,
    /// Time limit of one plugin call, seconds.
    pub cni_timeout: u32,
    /// Bridge of the built-in network.
    pub bridge: String,
    /// Ranges of the built-in network, at most one IPv4 and one IPv6, e.g. `10.88.0.0/16`; kubelet's PodCIDR replaces them.
    pub subnets: Vec<(IpAddr, u8)>,
}

/// Which code connects pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// CNI plugins.
    Cni,
    /// podvisor's own bridge.
    Builtin,
}

/// `[nri]`: plugins that see, and may change, every pod and container (Node Resource Interface).
#[derive(Debug, Clone, PartialEq)]
pub struct Nri {
    /// Plugins take part at all.
    pub enabled: bool,
    /// Where plugins connect to.
    pub socket: PathBuf,
    /// Plugins that are started with the daemon: executable files named INDEX-NAME.
    pub plugin_dir: PathBuf,
    /// Their configuration: INDEX-NAME.conf, else NAME.conf.
    pub plugin_config_dir: PathBuf,
    /// From a plugin's start or connection until it has registered, seconds.
    pub registration_timeout: u32,
    /// Each call of a plugin, seconds.
    pub request_timeout: u32,
    /// Only plugins in `plugin_dir`, none that connect.
    pub disable_connections: bool,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Cap on each of ExecSync's outputs, bytes. Default 16 MiB, as containerd and CRI-O have it.
    pub exec_sync_output: u64,
    /// Longest log line before it is written in parts, bytes. Default 16384.
    pub log_line: u32,
    /// `pids.max` for containers that ask for none; -1: none.
    pub pids: i64,
    /// How long SIGTERM waits for ExecSync calls in flight, seconds.
    pub drain_timeout: u32,
    /// Time limit of one call of an OCI runtime, seconds.
    pub runtime_timeout: u32,
    /// Largest gRPC message accepted, bytes. Default 16 MiB.
    pub grpc_message: u32,
}
