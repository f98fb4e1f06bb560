//! The defaults, twice: as values, and as the documented file. A test holds them together.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::{
    CgroupDriver, Config, Handler, HandlerKind, Hypervisor, Image, Limits, Log, LogFormat, Machine, Metrics,
    Network, NetworkMode, Nri, Rootfs, Runtime, ShareImages, Streaming, Trust, Vm, Writable,
};

/// Names of the handlers that exist when no file says anything.
pub(crate) const HANDLERS: [&str; 3] = ["crun", "runc", VM];

/// The one of them whose pods are virtual machines, and what RuntimeClasses on existing clusters call such a handler.
const VM: &str = "vm";
const VM_ALIASES: [&str; 5] = ["kata", "kata-clh", "kata-fc", "kata-qemu", "kata-runtime"];

impl Config {
    /// The documented default file, as `podvisor config default` prints it. Loading it gives
    /// `Config::default()`.
    pub fn default_toml() -> &'static str {
        include_str!("../data/config.toml")
    }
}

impl Default for Config {
    fn default() -> Self {
        let run = PathBuf::from("/run/podvisor");
        Self {
            root: "/var/lib/podvisor".into(),
            socket: socket(&run),
            log: Log::default(),
            metrics: Metrics::default(),
            streaming: Streaming::default(),
            runtime: Runtime::default(),
            handlers: HANDLERS.map(|name| (name.to_owned(), handler(name, &run))).into(),
            image: Image::default(),
            network: Network::default(),
            nri: Nri::default(),
            limits: Limits::default(),
            run,
        }
    }
}

/// The socket where `socket` is not set.
pub(crate) fn socket(run: &Path) -> PathBuf {
    run.join("podvisor.sock")
}

/// A handler of which only the name is known.
pub(crate) fn handler(name: &str, run: &Path) -> Handler {
    if name == VM {
        let aliases = VM_ALIASES.map(str::to_owned).into();
        return Handler { kind: HandlerKind::Vm(Vm::default()), annotations: Vec::new(), aliases };
    }
    Handler { kind: oci(name, run), annotations: Vec::new(), aliases: Vec::new() }
}

/// An OCI runtime of which only the handler's name is known.
pub(crate) fn oci(name: &str, run: &Path) -> HandlerKind {
    HandlerKind::Oci {
        path: name.into(),
        root: run.join(name),
        arguments: Vec::new(),
        sandbox_container: false,
    }
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            hypervisor: Hypervisor::Auto,
            allow_emulation: false,
            qemu: "qemu-system-x86_64".into(),
            machine: Machine::Auto,
            guest: String::new(),
            default_memory: 1024,
            guest_reserve: 128,
            max_memory: 0,
            default_cpus: 1,
            max_cpus: 32,
            rootfs: Rootfs::Auto,
            share_images: ShareImages::Node,
            writable: Writable::Fs,
            writable_size: 10240,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Text }
    }
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls_cert: None,
            tls_key: None,
            token_lifetime: 60,
            idle_timeout: 4 * 60 * 60,
        }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            cgroup_driver: CgroupDriver::Auto,
            trusted_handler: "runc".to_owned(),
            untrusted_handler: Some(VM.to_owned()),
            default_workload_trust: Trust::Trusted,
            monitor: None,
            monitor_cgroup: "podvisor.slice".to_owned(),
            seccomp_profile: None,
            seccomp_root: "/var/lib/kubelet/seccomp".into(),
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            monitor_pool: 2,
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self {
            pause_image: String::new(),
            registries_conf: "/etc/containers/registries.conf".into(),
            certs_dir: "/etc/containerd/certs.d".into(),
            auth_files: vec!["/var/lib/kubelet/config.json".into(), "/etc/containers/auth.json".into()],
            default_registries: vec!["docker.io".to_owned()],
            parallel_layers: 4,
            progress_timeout: 60,
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            mode: NetworkMode::Cni,
            cni_config_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cni_cache_dir: "/var/lib/cni".into(),
            cni_timeout: 60,
            bridge: "podvisor0".to_owned(),
            // The IPv6 range is from fd00::/8 (RFC 4193), "podv" as its global id.
            subnets: vec![
                (IpAddr::V4(Ipv4Addr::new(10, 88, 0, 0)), 16),
                (IpAddr::V6(Ipv6Addr::new(0xfd70, 0x6f64, 0x7600, 0, 0, 0, 0, 0)), 64),
            ],
        }
    }
}

/// What containerd and CRI-O have, so that plugins find podvisor where they look.
impl Default for Nri {
    fn default() -> Self {
        Self {
            enabled: true,
            socket: "/var/run/nri/nri.sock".into(),
            plugin_dir: "/opt/nri/plugins".into(),
            plugin_config_dir: "/etc/nri/conf.d".into(),
            registration_timeout: 5,
            request_timeout: 2,
            disable_connections: false,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            exec_sync_output: 16 << 20,
            log_line: 16384,
            pids: -1,
            drain_timeout: 30,
            runtime_timeout: 120,
            grpc_message: 16 << 20,
        }
    }
}
