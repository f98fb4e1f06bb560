//! Pod networks: namespaces, CNI plugins, the built-in bridge, host ports.

pub mod namespace;
pub mod tap;

mod builtin;
mod cni;
mod netlink;
mod unshare;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::builtin::Builtin;
pub use self::builtin::{BuiltinError, PortError, RangeError};
use self::cni::Cni;
pub use self::cni::{CniError, PluginError};

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

impl Protocol {
    /// In lower case, as CNI and nftables write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// IANA's protocol number.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
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

/// Why a pod could not be connected or disconnected.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum NetworkError {
    #[error(transparent)]
    Builtin(#[from] BuiltinError),
    #[error(transparent)]
    Cni(#[from] CniError),
    #[error(transparent)]
    Tap(#[from] tap::TapError),
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// The pod network.
#[derive(Debug)]
pub struct Network {
    mode: Kind,
    builtin: Arc<Builtin>,
    cni: Arc<Cni>,
    runtime: tokio::runtime::Handle,
}

impl Network {
    /// Prepares what all pods share (bridge and rules of the built-in network; the plugins' first STATUS). Call it in a tokio
    /// runtime.
    pub async fn open(options: Options) -> Result<Self, NetworkError> {
        let Options { mode, cni, builtin } = options;
        let builtin = blocking(move || {
            let network = Builtin::load(&builtin)?;
            if mode == Kind::Builtin {
                network.prepare()?;
            }
            Ok::<_, NetworkError>(network)
        })
        .await??;
        let cni = Cni::new(cni);
        if mode == Kind::Cni {
            cni.ask_status().await;
        }
        let runtime = tokio::runtime::Handle::current();
        Ok(Self { mode, builtin: Arc::new(builtin), cni: Arc::new(cni), runtime })
    }

    /// `Err` with the reason while no pod can be connected (NetworkReady of the CRI's Status). Looks at a few files; what
    /// takes longer (STATUS of CNI 1.1, rules of ours that somebody flushed) it starts in the background.
    pub fn ready(&self) -> Result<(), String> {
        match self.mode {
            Kind::Builtin => {
                self.builtin.ready().map_err(|error| error.to_string())?;
                if !self.builtin.is_intact() {
                    let builtin = Arc::clone(&self.builtin);
                    self.runtime.spawn_blocking(move || {
                        tracing::warn!("bridge or rules have vanished and are made again");
                        if let Err(error) = builtin.prepare() {
                            let error = &error as &dyn std::error::Error;
                            tracing::error!(error, "bridge or rules could not be made again");
                        }
                    });
                }
                Ok(())
            }
            Kind::Cni => {
                let (outcome, ask) = self.cni.ready();
                if ask {
                    let cni = Arc::clone(&self.cni);
                    self.runtime.spawn(async move { cni.ask_status().await });
                }
                outcome
            }
        }
    }

    /// Which kind a sandbox set up now would be torn down by; recorded *before* [`Network::setup`].
    pub fn kind(&self) -> Kind {
        self.mode
    }

    /// Connects a sandbox. On error nothing of it is left.
    pub async fn setup(&self, sandbox: &Sandbox) -> Result<Attachment, NetworkError> {
        match self.mode {
            Kind::Cni => Ok(self.cni.add(sandbox).await?),
            Kind::Builtin => {
                if sandbox.ingress_bandwidth.or(sandbox.egress_bandwidth).is_some() {
                    tracing::warn!(sandbox = sandbox.id, "the built-in network does not limit bandwidth");
                }
                let (builtin, sandbox) = (Arc::clone(&self.builtin), sandbox.clone());
                let addresses = blocking(move || builtin.connect(&sandbox)).await??;
                Ok(Attachment { addresses, cni_result: serde_json::Value::Null })
            }
        }
    }

    /// Disconnects a sandbox, also one that was set up by an earlier process, half or not at all, or whose namespace is
    /// gone. Idempotent. The built-in network's interface is off the network then, and is deleted in the background.
    pub async fn teardown(&self, kind: Kind, sandbox: &Sandbox) -> Result<(), NetworkError> {
        match kind {
            Kind::Cni => Ok(self.cni.delete(sandbox).await?),
            Kind::Builtin => {
                let (builtin, id) = (Arc::clone(&self.builtin), sandbox.id.clone());
                blocking(move || builtin.disconnect(&id)).await??;
                let id = sandbox.id.clone();
                self.runtime.spawn_blocking(move || {
                    if let Err(error) = Builtin::sweep(&id) {
                        // The next `retain` finds it.
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(sandbox = id, error, "interface of a stopped sandbox was not deleted");
                    }
                });
                Ok(())
            }
        }
    }

    /// Whether a connected sandbox is still as it was set up: CNI's CHECK (nothing when the network does not know it), or the
    /// built-in network's interface and addresses.
    pub async fn check(&self, kind: Kind, sandbox: &Sandbox) -> Result<(), NetworkError> {
        match kind {
            Kind::Cni => Ok(self.cni.check(sandbox).await?),
            Kind::Builtin => {
                let (builtin, id) = (Arc::clone(&self.builtin), sandbox.id.clone());
                Ok(blocking(move || builtin.check(&id)).await??)
            }
        }
    }

    /// After a restart: forget (GC) whatever belongs to none of these sandboxes, in both networks. Both are tried; the first
    /// failure is reported.
    pub async fn retain(&self, sandboxes: &[Sandbox]) -> Result<(), NetworkError> {
        let ids: HashSet<String> = sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
        let known: HashSet<&str> = ids.iter().map(String::as_str).collect();
        let cni = self.cni.retain(&known).await;
        let builtin = Arc::clone(&self.builtin);
        let ids = ids.clone();
        blocking(move || builtin.retain(&ids.iter().map(String::as_str).collect())).await??;
        Ok(cni?)
    }

    /// kubelet's PodCIDR (UpdateRuntimeConfig), at most one IPv4 and one IPv6 range, comma-separated: replaces the built-in
    /// network's ranges for new pods, also after a restart of the daemon. CNI ignores it.
    pub async fn set_pod_cidr(&self, cidr: &str) -> Result<(), NetworkError> {
        if self.mode == Kind::Cni {
            return Ok(());
        }
        let (builtin, cidr) = (Arc::clone(&self.builtin), cidr.to_owned());
        Ok(blocking(move || builtin.set_pod_cidr(&cidr)).await??)
    }
}

/// Runs what blocks for a moment where that disturbs nobody.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, NetworkError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Ok(value),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(NetworkError::ShuttingDown),
        },
    }
}

/// Which network made a sandbox's attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub enum Kind {
    Cni,
    Builtin,
}
