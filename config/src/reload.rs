//! What a running daemon takes over on SIGHUP.
//!
//! Taken over: `log.level`, the choice of handlers (`trusted_handler`, `untrusted_handler`,
//! `default_workload_trust`), new handlers and everything of a handler but its `root`, `pause_image`, and the
//! limits but `grpc_message`. All else is built into something that lives as long as the process (sockets, the
//! store, the network), so a change of it needs a restart, which no pod notices.

use std::collections::BTreeMap;

use crate::{Config, Handler, HandlerKind, Image, Limits, Log, Metrics, Network, Nri, Runtime, Streaming};

/// Puts the present value back where the new one differs, and names the key.
struct Kept {
    keys: Vec<String>,
}

impl Kept {
    fn keep<T: Clone + PartialEq>(&mut self, key: &str, present: &T, new: T) -> T {
        if new == *present {
            return new;
        }
        self.keys.push(key.to_owned());
        present.clone()
    }
}

impl Config {
    /// What of `new` can be taken over while running; the rest keeps its present value and is named by its
    /// dotted keys.
    pub fn reload(&self, new: Config) -> (Config, Vec<String>) {
        // Taken apart completely, here and below: who adds a key has to decide.
        let Config {
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
        } = new;
        let kept = &mut Kept { keys: Vec::new() };
        let config = Config {
            root: kept.keep("root", &self.root, root),
            run: kept.keep("run", &self.run, run),
            socket: kept.keep("socket", &self.socket, socket),
            log: reload_log(kept, &self.log, log),
            metrics: reload_metrics(kept, &self.metrics, &metrics),
            streaming: reload_streaming(kept, &self.streaming, streaming),
            runtime: reload_runtime(kept, &self.runtime, runtime),
            handlers: reload_handlers(kept, &self.handlers, handlers),
            image: reload_image(kept, &self.image, image),
            network: reload_network(kept, &self.network, network),
            nri: reload_nri(kept, &self.nri, nri),
            limits: reload_limits(kept, &self.limits, &limits),
        };
        (config, std::mem::take(&mut kept.keys))
    }
}

fn reload_log(kept: &mut Kept, present: &Log, new: Log) -> Log {
    let Log { level, format } = new;
    Log { level, format: kept.keep("log.format", &present.format, format) }
}

fn reload_metrics(kept: &mut Kept, present: &Metrics, new: &Metrics) -> Metrics {
    let &Metrics { address } = new;
    Metrics { address: kept.keep("metrics.address", &present.address, address) }
}

fn reload_streaming(kept: &mut Kept, present: &Streaming, new: Streaming) -> Streaming {
    let Streaming { address, tls_cert, tls_key, token_lifetime, idle_timeout } = new;
    Streaming {
        address: kept.keep("streaming.address", &present.address, address),
        tls_cert: kept.keep("streaming.tls_cert", &present.tls_cert, tls_cert),
        tls_key: kept.keep("streaming.tls_key", &present.tls_key, tls_key),
        token_lifetime: kept.keep("streaming.token_lifetime", &present.token_lifetime, token_lifetime),
        idle_timeout: kept.keep("streaming.idle_timeout", &present.idle_timeout, idle_timeout),
    }
}

fn reload_runtime(kept: &mut Kept, present: &Runtime, new: Runtime) -> Runtime {
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
    } = new;
    Runtime {
        cgroup_driver: kept.keep("runtime.cgroup_driver", &present.cgroup_driver, cgroup_driver),
        trusted_handler,
        untrusted_handler,
        default_workload_trust,
        monitor: kept.keep("runtime.monitor", &present.monitor, monitor),
        monitor_cgroup: kept.keep("runtime.monitor_cgroup", &present.monitor_cgroup, monitor_cgroup),
        seccomp_profile: kept.keep("runtime.seccomp_profile", &present.seccomp_profile, seccomp_profile),
        seccomp_root: kept.keep("runtime.seccomp_root", &present.seccomp_root, seccomp_root),
        cdi_spec_dirs,
        monitor_pool: kept.keep("runtime.monitor_pool", &present.monitor_pool, monitor_pool),
    }
}

/// A handler may be the one of running pods, whose containers are found under its `root`: so that stays, and
/// so does a handler that the new configuration no longer has.
fn reload_handlers(
    kept: &mut Kept,
    present: &BTreeMap<String, Handler>,
    new: BTreeMap<String, Handler>,
) -> BTreeMap<String, Handler> {
    let mut handlers = BTreeMap::new();
    for (name, old) in present {
        if !new.contains_key(name) {
            kept.keys.push(format!("runtime.handlers.{name}"));
            handlers.insert(name.clone(), old.clone());
        }
    }
    for (name, mut handler) in new {
        if let Some(old) = present.get(&name)
            && let HandlerKind::Oci { root: old_root, .. } = &old.kind
            && let HandlerKind::Oci { root, .. } = &mut handler.kind
        {
            *root = kept.keep(&format!("runtime.handlers.{name}.root"), old_root, std::mem::take(root));
        }
        handlers.insert(name, handler);
    }
    handlers
}

fn reload_image(kept: &mut Kept, present: &Image, new: Image) -> Image {
    let Image {
        pause_image,
        registries_conf,
        certs_dir,
        auth_files,
        default_registries,
        parallel_layers,
        progress_timeout,
    } = new;
    Image {
        pause_image,
        registries_conf: kept.keep("image.registries_conf", &present.registries_conf, registries_conf),
        certs_dir: kept.keep("image.certs_dir", &present.certs_dir, certs_dir),
        auth_files: kept.keep("image.auth_files", &present.auth_files, auth_files),
        default_registries: kept.keep(
            "image.default_registries",
            &present.default_registries,
            default_registries,
        ),
        parallel_layers: kept.keep("image.parallel_layers", &present.parallel_layers, parallel_layers),
        progress_timeout: kept.keep("image.progress_timeout", &present.progress_timeout, progress_timeout),
    }
}

fn reload_network(kept: &mut Kept, present: &Network, new: Network) -> Network {
    let Network { mode, cni_config_dir, cni_bin_dirs, cni_cache_dir, cni_timeout, bridge, subnets } = new;
    Network {
        mode: kept.keep("network.mode", &present.mode, mode),
        cni_config_dir: kept.keep("network.cni_config_dir", &present.cni_config_dir, cni_config_dir),
        cni_bin_dirs: kept.keep("network.cni_bin_dirs", &present.cni_bin_dirs, cni_bin_dirs),
        cni_cache_dir: kept.keep("network.cni_cache_dir", &present.cni_cache_dir, cni_cache_dir),
        cni_timeout: kept.keep("network.cni_timeout", &present.cni_timeout, cni_timeout),
        bridge: kept.keep("network.bridge", &present.bridge, bridge),
        subnets: kept.keep("network.subnets", &present.subnets, subnets),
    }
}

fn reload_nri(kept: &mut Kept, present: &Nri, new: Nri) -> Nri {
    let Nri {
        enabled,
        socket,
        plugin_dir,
        plugin_config_dir,
        registration_timeout,
        request_timeout,
        disable_connections,
    } = new;
    Nri {
        enabled: kept.keep("nri.enabled", &present.enabled, enabled),
        socket: kept.keep("nri.socket", &present.socket, socket),
        plugin_dir: kept.keep("nri.plugin_dir", &present.plugin_dir, plugin_dir),
        plugin_config_dir: kept.keep("nri.plugin_config_dir", &present.plugin_config_dir, plugin_config_dir),
        registration_timeout: kept.keep(
            "nri.registration_timeout",
            &present.registration_timeout,
            registration_timeout,
        ),
        request_timeout: kept.keep("nri.request_timeout", &present.request_timeout, request_timeout),
        disable_connections: kept.keep(
            "nri.disable_connections",
            &present.disable_connections,
            disable_connections,
        ),
    }
}

fn reload_limits(kept: &mut Kept, present: &Limits, new: &Limits) -> Limits {
    let &Limits { exec_sync_output, log_line, pids, drain_timeout, runtime_timeout, grpc_message } = new;
    Limits {
        exec_sync_output,
        log_line,
        pids,
        drain_timeout,
        runtime_timeout,
        grpc_message: kept.keep("limits.grpc_message", &present.grpc_message, grpc_message),
    }
}
