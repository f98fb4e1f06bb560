//! A configuration as TOML with every key.

use std::fmt::{self, Display, Write};
use std::path::{Path, PathBuf};

use crate::{
    CgroupDriver, Config, Handler, HandlerKind, Hypervisor, Image, Limits, Log, LogFormat, Machine, Metrics,
    Network, NetworkMode, Nri, Rootfs, Runtime, ShareImages, Streaming, Trust, Vm, Writable, default,
};

impl Config {
    /// This configuration as TOML with every key, as `podvisor config show` prints it. Parsing it gives the same
    /// configuration.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a String takes everything");
        text
    }

    fn write(&self, f: &mut String) -> fmt::Result {
        let Self {
            root,
            run,
            socket,
            log,
            metrics,
            streaming,
            runtime,
            handlers,
            image,
            network,
            nri,
            limits,
        } = self;
        writeln!(f, "root = {}", path(root))?;
        writeln!(f, "run = {}", path(run))?;
        writeln!(f, "socket = {}", path(socket))?;

        let Log { level, format } = log;
        writeln!(f, "\n[log]")?;
        writeln!(f, "level = {}", quoted(level))?;
        writeln!(f, "format = {}", quoted(format))?;

        let Metrics { address } = metrics;
        writeln!(f, "\n[metrics]")?;
        let address = address.map(|address| address.to_string()).unwrap_or_default();
        writeln!(f, "address = {}", quoted(address))?;

        let Streaming { address, tls_cert, tls_key, token_lifetime, idle_timeout } = streaming;
        writeln!(f, "\n[streaming]")?;
        writeln!(f, "address = {}", quoted(address))?;
        writeln!(f, "tls_cert = {}", optional_path(tls_cert.as_ref()))?;
        writeln!(f, "tls_key = {}", optional_path(tls_key.as_ref()))?;
        writeln!(f, "token_lifetime = {token_lifetime}")?;
        writeln!(f, "idle_timeout = {idle_timeout}")?;

        let Runtime {
            cgroup_driver,
            trusted_handler,
            untrusted_handler,
            default_workload_trust,
            monitor,
            monitor_cgroup,
            seccomp_profile,
            seccomp_root,
            cdi_spec_dirs,
            monitor_pool,
        } = runtime;
        writeln!(f, "\n[runtime]")?;
        writeln!(f, "cgroup_driver = {}", quoted(cgroup_driver))?;
        writeln!(f, "trusted_handler = {}", quoted(trusted_handler))?;
        writeln!(f, "untrusted_handler = {}", quoted(untrusted_handler.as_deref().unwrap_or_default()))?;
        writeln!(f, "default_workload_trust = {}", quoted(default_workload_trust))?;
        writeln!(f, "monitor = {}", optional_path(monitor.as_ref()))?;
        writeln!(f, "monitor_cgroup = {}", quoted(monitor_cgroup))?;
        writeln!(f, "seccomp_profile = {}", optional_path(seccomp_profile.as_ref()))?;
        writeln!(f, "seccomp_root = {}", path(seccomp_root))?;
        writeln!(f, "cdi_spec_dirs = {}", paths(cdi_spec_dirs))?;
        writeln!(f, "monitor_pool = {monitor_pool}")?;

        let removed: Vec<_> =
            default::HANDLERS.into_iter().filter(|name| !handlers.contains_key(*name)).collect();
        if !removed.is_empty() {
            writeln!(f, "\n[runtime.handlers]")?;
        }
        for name in removed {
            writeln!(f, "{name} = false")?;
        }
        for (name, handler) in handlers {
            let Handler { kind, annotations, aliases } = handler;
            writeln!(f, "\n[runtime.handlers.{}]", quoted(name))?;
            match kind {
                HandlerKind::Oci { path: program, root, arguments, sandbox_container } => {
                    writeln!(f, "type = \"oci\"")?;
                    writeln!(f, "path = {}", path(program))?;
                    writeln!(f, "root = {}", path(root))?;
                    writeln!(f, "arguments = {}", array(arguments))?;
                    writeln!(f, "sandbox_container = {sandbox_container}")?;
                    writeln!(f, "annotations = {}", array(annotations))?;
                }
                HandlerKind::Vm(vm) => write_vm(f, vm)?,
            }
            writeln!(f, "aliases = {}", array(aliases))?;
        }

        let Image {
            pause_image,
            registries_conf,
            certs_dir,
            auth_files,
            default_registries,
            parallel_layers,
            progress_timeout,
        } = image;
        writeln!(f, "\n[image]")?;
        writeln!(f, "pause_image = {}", quoted(pause_image))?;
        writeln!(f, "registries_conf = {}", path(registries_conf))?;
        writeln!(f, "certs_dir = {}", path(certs_dir))?;
        writeln!(f, "auth_files = {}", paths(auth_files))?;
        writeln!(f, "default_registries = {}", array(default_registries))?;
        writeln!(f, "parallel_layers = {parallel_layers}")?;
        writeln!(f, "progress_timeout = {progress_timeout}")?;

        let Network { mode, cni_config_dir, cni_bin_dirs, cni_cache_dir, cni_timeout, bridge, subnets } =
            network;
        writeln!(f, "\n[network]")?;
        writeln!(f, "mode = {}", quoted(mode))?;
        writeln!(f, "cni_config_dir = {}", path(cni_config_dir))?;
        writeln!(f, "cni_bin_dirs = {}", paths(cni_bin_dirs))?;
        writeln!(f, "cni_cache_dir = {}", path(cni_cache_dir))?;
        writeln!(f, "cni_timeout = {cni_timeout}")?;
        writeln!(f, "bridge = {}", quoted(bridge))?;
        let ranges: Vec<_> = subnets.iter().map(|(address, prefix)| format!("{address}/{prefix}")).collect();
        writeln!(f, "subnets = {}", array(&ranges))?;

        let Nri {
            enabled,
            socket,
            plugin_dir,
            plugin_config_dir,
            registration_timeout,
            request_timeout,
            disable_connections,
        } = nri;
        writeln!(f, "\n[nri]")?;
        writeln!(f, "enabled = {enabled}")?;
        writeln!(f, "socket = {}", path(socket))?;
        writeln!(f, "plugin_dir = {}", path(plugin_dir))?;
        writeln!(f, "plugin_config_dir = {}", path(plugin_config_dir))?;
        writeln!(f, "registration_timeout = {registration_timeout}")?;
        writeln!(f, "request_timeout = {request_timeout}")?;
        writeln!(f, "disable_connections = {disable_connections}")?;

        let Limits { exec_sync_output, log_line, pids, drain_timeout, runtime_timeout, grpc_message } =
            limits;
        writeln!(f, "\n[limits]")?;
        writeln!(f, "exec_sync_output = {exec_sync_output}")?;
        writeln!(f, "log_line = {log_line}")?;
        writeln!(f, "pids = {pids}")?;
        writeln!(f, "drain_timeout = {drain_timeout}")?;
        writeln!(f, "runtime_timeout = {runtime_timeout}")?;
        writeln!(f, "grpc_message = {grpc_message}")
    }
}

fn write_vm(f: &mut String, vm: &Vm) -> fmt::Result {
    let Vm {
        hypervisor,
        allow_emulation,
        qemu,
        machine,
        guest,
        default_memory,
        guest_reserve,
        max_memory,
        default_cpus,
        max_cpus,
        rootfs,
        share_images,
        writable,
        writable_size,
    } = vm;
    writeln!(f, "type = \"vm\"")?;
    writeln!(f, "hypervisor = {}", quoted(hypervisor))?;
    writeln!(f, "allow_emulation = {allow_emulation}")?;
    writeln!(f, "qemu = {}", path(qemu))?;
    writeln!(f, "machine = {}", quoted(machine))?;
    writeln!(f, "guest = {}", quoted(guest))?;
    writeln!(f, "default_memory = {default_memory}")?;
    writeln!(f, "guest_reserve = {guest_reserve}")?;
    writeln!(f, "max_memory = {max_memory}")?;
    writeln!(f, "default_cpus = {default_cpus}")?;
    writeln!(f, "max_cpus = {max_cpus}")?;
    writeln!(f, "rootfs = {}", quoted(rootfs))?;
    writeln!(f, "share_images = {}", quoted(share_images))?;
    writeln!(f, "writable = {}", quoted(writable))?;
    writeln!(f, "writable_size = {writable_size}")
}

impl Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        })
    }
}

impl Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
        })
    }
}

impl Display for Rootfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Pmem => "pmem",
            Self::Block => "block",
            Self::Fs => "fs",
        })
    }
}

impl Display for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fs => "fs",
            Self::Disk => "disk",
        })
    }
}

impl Display for ShareImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "node",
            Self::Namespace => "namespace",
            Self::Pod => "pod",
        })
    }
}

impl Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl Display for CgroupDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cgroupfs => "cgroupfs",
            Self::Systemd => "systemd",
        })
    }
}

impl Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trusted => "trusted",
            Self::Untrusted => "untrusted",
        })
    }
}

impl Display for NetworkMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cni => "cni",
            Self::Builtin => "builtin",
        })
    }
}

/// A TOML basic string (TOML 1.0, "String"): what it forbids is escaped.
fn quoted(value: impl Display) -> String {
    let mut text = String::from('"');
    for c in value.to_string().chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(text, "\\u{:04X}", u32::from(c));
            }
            c => text.push(c),
        }
    }
    text.push('"');
    text
}

fn path(path: &Path) -> String {
    quoted(path.display())
}

fn optional_path(value: Option<&PathBuf>) -> String {
    value.map_or_else(|| quoted(""), |value| path(value))
}

fn array(values: &[String]) -> String {
    let values: Vec<_> = values.iter().map(quoted).collect();
    format!("[{}]", values.join(", "))
}

fn paths(values: &[PathBuf]) -> String {
    let values: Vec<_> = values.iter().map(|value| path(value)).collect();
    format!("[{}]", values.join(", "))
}
