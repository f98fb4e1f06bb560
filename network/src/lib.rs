//! Pod networks: namespaces, CNI plugins, the built-in bridge, host ports.

pub mod namespace;

mod netlink;
mod unshare;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How pods are connected. Both networks are described whichever is used, so that pods which the other one connected, before
/// the setting was changed, can still be torn down.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which network connects new pods.
    pub mode: Kind,
    /// CNI plugins.
    pub cni: CniOptions,
    /// podvisor's own bridge.
    pub builtin: BuiltinOptions,
}

/// Where CNI finds what it needs.
#[derive(Debug, Clone)]
pub struct CniOptions {
    /// Conflists; the lexically first valid one counts. Watched.
    pub config_dir: PathBuf,
    /// Plugins.
    pub bin_dirs: Vec<PathBuf>,
    /// Cached results in libcni's format (below it, in `results`).
    pub cache_dir: PathBuf,
    /// For one plugin call.
    pub timeout: Duration,
}

/// The built-in network.
#[derive(Debug, Clone)]
pub struct BuiltinOptions {
    /// Name of the bridge, at most 15 bytes.
    pub bridge: String,
    /// At most one IPv4 and one IPv6 range.
    pub subnets: Vec<(IpAddr, u8)>,
    /// Leases survive the daemon here (`<root>/network`).
    pub state_dir: PathBuf,
}

/// A port of the host that leads into a pod.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PortMapping {
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Inside.
    pub container_port: u16,
    /// Outside; never 0.
    pub host_port: u16,
    /// Address it listens on; `None`: all.
    pub host_ip: Option<IpAddr>,
}

/// Transport protocol of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// What is to be connected. Kept in the pod's record, so that tear-down works after a crash.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sandbox {
    /// The sandbox id.
    pub id: String,
    /// Pod name, namespace and uid: CNI_ARGS.
    pub name: String,
    /// See `name`.
    pub namespace: String,
    /// See `name`.
    pub uid: String,
    /// Pinned network namespace.
    pub netns: PathBuf,
    /// Cgroup parent (CNI capability `cgroupPath`).
    pub cgroup_parent: String,
    /// Host ports.
    pub ports: Vec<PortMapping>,
    /// `kubernetes.io/ingress-bandwidth` and `egress-bandwidth`, bits per second.
    pub ingress_bandwidth: Option<u64>,
    /// See `ingress_bandwidth`.
    pub egress_bandwidth: Option<u64>,
    /// DNS from the pod's configuration (CNI capability `dns`).
    pub dns_servers: Vec<String>,
    /// See `dns_servers`.
    pub dns_searches: Vec<String>,
    /// See `dns_servers`.
    pub dns_options: Vec<String>,
}

/// Which network connected a sandbox and how: what [`Network::teardown`] needs, as data.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attachment {
    /// Addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// The CNI result as JSON, for `inspectp`; `null` for the built-in network.
    pub cni_result: serde_json::Value,
}

/// Why a pod could not be connected.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct NetworkError;

/// The pod network.
#[derive(Debug)]
pub struct Network {}

impl Network {
    /// Prepares what all pods share (bridge and rules of the built-in network).
    pub async fn open(_options: Options) -> Result<Self, NetworkError> {
        todo!()
    }

    /// `Err` with the reason while no pod can be connected (NetworkReady of the CRI's Status).
    pub fn ready(&self) -> Result<(), String> {
        todo!()
    }

    /// Which kind a sandbox set up now would be torn down by; recorded *before* [`Network::setup`].
    pub fn kind(&self) -> Kind {
        todo!()
    }

    /// Connects a sandbox. On error nothing of it is left.
    pub async fn setup(&self, _sandbox: &Sandbox) -> Result<Attachment, NetworkError> {
        todo!()
    }

    /// Disconnects a sandbox, also one that was set up by an earlier process, half or not at all, or whose namespace is gone. Idempotent.
    pub async fn teardown(&self, _kind: Kind, _sandbox: &Sandbox) -> Result<(), NetworkError> {
        todo!()
    }

    /// After a restart: forget (GC) whatever belongs to none of these sandboxes.
    pub async fn retain(&self, _sandboxes: &[Sandbox]) -> Result<(), NetworkError> {
        todo!()
    }

    /// kubelet's PodCIDR (UpdateRuntimeConfig): replaces the built-in network's ranges; CNI ignores it.
    pub async fn set_pod_cidr(&self, _cidr: &str) -> Result<(), NetworkError> {
        todo!()
    }
}

/// Which network made a sandbox's attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub enum Kind {
    Cni,
    Builtin,
}
