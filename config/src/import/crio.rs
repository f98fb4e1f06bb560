//! CRI-O: `crio.conf` and every file below `crio.conf.d`, in the order of their names (crio.conf.d(5)); keys of CRI-O 1.9 to 1.36.

use std::path::Path;

use toml::Value;

use super::draft::Draft;
use super::runtimes::{self, Handlers, Program, Role, program};
use super::source::{self, Leaf, Source};
use super::{Fate, ImportError, registries};
use crate::load;

/// Keys without which podvisor behaves so, or whose subject it does not have.
pub(super) const NEEDLESS: &[(&str, &str)] = &[
    ("crio.root", "podvisor keeps images in a store of its own; they are pulled once more"),
    ("crio.runroot", "podvisor keeps images in a store of its own; they are pulled once more"),
    ("crio.imagestore", "podvisor keeps images in a store of its own; they are pulled once more"),
    ("crio.storage_driver", "podvisor's store is overlayfs on plain directories"),
    ("crio.storage_option", "podvisor's store is overlayfs on plain directories"),
    ("crio.log_dir", "kubelet names the directory of each pod's logs"),
    ("crio.version_file", "nothing is wiped after an upgrade or a reboot"),
    ("crio.version_file_persist", "nothing is wiped after an upgrade or a reboot"),
    ("crio.clean_shutdown_file", "an image is in the store whole or not at all"),
    ("crio.internal_wipe", "nothing is wiped after an upgrade or a reboot"),
    ("crio.internal_repair", "an image is in the store whole or not at all"),
    ("crio.api.listen", "podvisor has a socket of its own: give kubelet unix:///run/podvisor/podvisor.sock"),
    ("crio.api.grpc_max_send_msg_size", "lists are streamed"),
    ("crio.api.grpc_max_recv_msg_size", "16 MiB are accepted, as much as kubelet accepts itself"),
    ("crio.runtime.conmon", "podvisor-monitor does what conmon does"),
    ("crio.runtime.conmon_cgroup", "monitors have a slice of their own"),
    ("crio.runtime.conmon_env", "podvisor-monitor does what conmon does"),
    ("crio.runtime.container_exits_dir", "exits are in the pods' records"),
    ("crio.runtime.container_attach_socket_dir", "attach goes through the pod's monitor"),
    ("crio.runtime.namespaces_dir", "namespaces are pinned where other tools look for them"),
    ("crio.runtime.pinns_path", "podvisor pins namespaces itself"),
    ("crio.runtime.manage_ns_lifecycle", "podvisor always manages the namespaces"),
    ("crio.runtime.manage_network_ns_lifecycle", "podvisor always manages the namespaces"),
    ("crio.runtime.drop_infra_ctr", "there is no infra container"),
    ("crio.runtime.infra_ctr_cpuset", "there is no infra container"),
    ("crio.runtime.enable_pod_events", "container events are always on"),
    ("crio.runtime.enable_criu_support", "containers can be checkpointed where criu is installed"),
    ("crio.runtime.selinux", "labels are applied where the host has SELinux"),
    ("crio.runtime.ctr_stop_timeout", "a pod's own grace period counts"),
    ("crio.image.default_transport", "images come from registries"),
    ("crio.image.pause_command", "an image's own entrypoint is used"),
    ("crio.image.oci_artifact_mount_support", "OCI artifacts can be mounted"),
    ("crio.image.auto_reload_registries", "a changed registries.conf counts for the next pull"),
    ("crio.image.big_files_temporary_dir", "layers are unpacked as they arrive"),
    ("crio.stats.", "figures are taken when they are asked for"),
    ("crio.metrics.metrics_collectors", "all metrics are served"),
];

/// What of CRI-O's runtimes has a meaning.
const RUNTIMES: [&str; 3] = ["crio", "runtime", "runtimes"];

pub(super) fn read(file: &Path) -> Result<Source, ImportError> {
    let mut source = Source::default();
    let mut found = false;
    for (path, text) in load::with_drop_ins(file, false, |name| !name.starts_with(b"."))? {
        source.add(&path, source::parse(&path, &text)?, |path| path);
        found = true;
    }
    if found { Ok(source) } else { Err(ImportError::Nothing { path: file.to_owned() }) }
}

pub(super) fn translate(source: &mut Source, draft: &mut Draft) {
    handlers(source, draft);
    runtime(source, draft);
    streaming(source, draft);
    image(source, draft);
    network(source, draft);
    metrics(source, draft);
    nri(source, draft);
}

fn handlers(source: &mut Source, draft: &mut Draft) {
    let mut handlers = Handlers::default();
    let mut roles: Vec<(String, Role)> = Vec::new();
    for name in source.names(&RUNTIMES) {
        let key = |key: &'static str| [RUNTIMES[0], RUNTIMES[1], RUNTIMES[2], &name, key];
        let kind = source.take(&key("runtime_type"));
        let path = source.take(&key("runtime_path"));
        let is_vm = kind.as_ref().and_then(Leaf::text) == Some("vm");
        let declared = if is_vm { Program::Vm } else { program(found(path.as_ref()).unwrap_or(&name)) };
        let table = source.take(&[RUNTIMES[0], RUNTIMES[1], RUNTIMES[2], &name]);
        let leaf = match (path, kind) {
            (Some(leaf), _) | (None, Some(leaf)) => leaf,
            (None, None) => table.unwrap_or_else(|| Leaf {
                key: format!("{}.{name}", RUNTIMES.join(".")),
                file: Default::default(),
                value: Value::Boolean(true),
            }),
        };
        let is_oci = matches!(declared, Program::Oci(_));
        if let Some(role) = handlers.add(draft, &name, declared, &leaf) {
            roles.push((name.clone(), role));
        }
        if let Some(root) = source.take(&key("runtime_root")) {
            draft.needless(&root, "podvisor keeps the runtime's state apart from CRI-O's");
        }
        for monitor in ["monitor_path", "monitor_cgroup", "monitor_env", "monitor_exec_cgroup"] {
            if let Some(monitor) = source.take(&key(monitor)) {
                draft.needless(&monitor, "podvisor-monitor does what conmon does");
            }
        }
        if is_oci && let Some(annotations) = source.take(&key("allowed_annotations")) {
            self::annotations(draft, &name, &annotations);
        }
    }
    let default = source.take(&["crio", "runtime", "default_runtime"]);
    match &default {
        Some(leaf) => {
            let name = leaf.text().unwrap_or_default();
            let role = roles.iter().find(|(declared, _)| declared == name).map(|(_, role)| role.clone());
            let role = role.or_else(|| ["runc", "crun"].contains(&name).then(|| Role::Oci(name.to_owned())));
            match role {
                Some(role) => runtimes::trusted(draft, &role, leaf),
                None => draft.lost(leaf, "no runtime of this name is declared"),
            }
        }
        None => draft.remark(
            "crio.runtime.default_runtime",
            Fate::ToDo(
                "is not set: crun in CRI-O 1.31 and later, runc before. podvisor takes runc; \
                 for crun set runtime.trusted_handler = \"crun\""
                    .to_owned(),
            ),
        ),
    }
    before_handlers(source, draft, &mut handlers);
}

/// CRI-O up to 1.13 knew two runtimes by their paths, and the trust of a node.
fn before_handlers(source: &mut Source, draft: &mut Draft, handlers: &mut Handlers) {
    let mut add = |source: &mut Source, draft: &mut Draft, key: &str| {
        let leaf = source.take(&["crio", "runtime", key])?;
        let path = found(Some(&leaf))?;
        let name = Path::new(path).file_name()?.to_str()?;
        let role = handlers.add(draft, name, program(path), &leaf)?;
        Some((role, leaf))
    };
    let trusted = add(source, draft, "runtime");
    let untrusted = add(source, draft, "runtime_untrusted_workload");
    if let Some((role, leaf)) = trusted {
        runtimes::trusted(draft, &role, &leaf);
    }
    if let Some((role, leaf)) = untrusted {
        runtimes::untrusted(draft, &role, &leaf);
    }
    let trust = source.take(&["crio", "runtime", "default_workload_trust"]);
    draft.copy("runtime", "default_workload_trust", trust);
}

fn annotations(draft: &mut Draft, handler: &str, leaf: &Leaf) {
    let (own, passed): (Vec<_>, Vec<_>) = leaf
        .texts()
        .into_iter()
        .partition(|name| name.contains("kubernetes.cri-o") || name.contains(".crio.io"));
    if !own.is_empty() {
        draft.lost(leaf, format!("these are CRI-O's own: {}", own.join(", ")));
    }
    if !passed.is_empty() {
        // CRI-O's are prefixes.
        let passed: Vec<_> =
            passed.into_iter().map(|name| format!("{}*", name.trim_end_matches('*'))).collect();
        draft.set(&format!("runtime.handlers.{handler}"), "annotations", passed, leaf);
    }
}

fn runtime(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["crio", "runtime", key]);
    draft.copy("runtime", "cgroup_driver", take("cgroup_manager"));
    draft.copy("runtime", "seccomp_profile", take("seccomp_profile"));
    draft.copy("runtime", "cdi_spec_dirs", take("cdi_spec_dirs"));
    if let Some(leaf) = take("pids_limit") {
        match leaf.value.as_integer() {
            Some(limit) if limit > 0 => draft.set("limits", "pids", limit, &leaf),
            _ => draft.needless(&leaf, "no limit but kubelet's is the default"),
        }
    }
    if let Some(leaf) = take("log_level") {
        log_level(draft, &leaf);
    }
    if let Some(leaf) = take("log_filter").filter(|leaf| !leaf.is_zero()) {
        draft.lost(&leaf, "log.level can be set for parts of the daemon instead");
    }
}

/// The levels of Go's logrus, in which both daemons name them.
pub(super) fn log_level(draft: &mut Draft, leaf: &Leaf) {
    let level = match leaf.text().unwrap_or_default() {
        "" => return draft.needless(leaf, "says nothing"),
        "panic" | "fatal" => "error",
        "warning" => "warn",
        level => level,
    };
    draft.set("log", "level", level, leaf);
}

fn streaming(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["crio", "api", key]);
    let (address, port) = (take("stream_address"), take("stream_port"));
    stream_address(draft, address, port);
    let tls = take("stream_enable_tls");
    let on = tls.as_ref().is_some_and(|leaf| !leaf.is_zero());
    for (key, target) in [("stream_tls_cert", "tls_cert"), ("stream_tls_key", "tls_key")] {
        match take(key) {
            Some(leaf) if !on => draft.needless(&leaf, "TLS is off"),
            leaf => draft.copy("streaming", target, leaf),
        }
    }
    if let Some(leaf) = tls {
        draft.needless(&leaf, "follows from the certificate");
    }
    draft.seconds("streaming", "idle_timeout", take("stream_idle_timeout"));
}

/// Address and port of the streaming server, which both daemons keep apart.
pub(super) fn stream_address(draft: &mut Draft, address: Option<Leaf>, port: Option<Leaf>) {
    let host = found(address.as_ref()).unwrap_or("127.0.0.1").to_owned();
    let number = match port.as_ref().map(|leaf| &leaf.value) {
        Some(Value::Integer(port)) => port.to_string(),
        Some(Value::String(port)) if !port.is_empty() => port.clone(),
        _ => "0".to_owned(),
    };
    let joined = if host.contains(':') { format!("[{host}]:{number}") } else { format!("{host}:{number}") };
    for leaf in [address, port].into_iter().flatten() {
        if joined == "127.0.0.1:0" {
            draft.needless(&leaf, "loopback and a free port is the default");
        } else {
            draft.set("streaming", "address", joined.clone(), &leaf);
        }
    }
}

fn image(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["crio", "image", key]);
    registries::pause_image(draft, take("pause_image"));
    registries::insecure(draft, take("insecure_registries"));
    draft.copy("image", "default_registries", take("registries"));
    draft.seconds(
        "image",
        "progress_timeout",
        take("pull_progress_timeout").filter(|leaf| leaf.seconds() != Some(0)),
    );
    let files = [take("pause_image_auth_file"), take("global_auth_file")];
    let files: Vec<_> = files.into_iter().flatten().filter(|leaf| !leaf.is_zero()).collect();
    let defaults = crate::Config::default().image.auth_files;
    let paths: Vec<_> = files.iter().filter_map(Leaf::text).map(str::to_owned).collect();
    let all = paths.iter().cloned().chain(defaults.iter().map(|path| path.display().to_string()));
    let all: Vec<_> = all.collect();
    for leaf in &files {
        draft.set("image", "auth_files", all.clone(), leaf);
    }
    if let Some(leaf) = take("signature_policy").filter(|leaf| !leaf.is_zero()) {
        draft.lost(&leaf, "podvisor verifies digests, not signatures: refuse unsigned images at admission");
    }
    if let Some(leaf) = take("signature_policy_dir").filter(|leaf| !leaf.is_zero()) {
        draft.lost(&leaf, "podvisor verifies digests, not signatures: refuse unsigned images at admission");
    }
    if let Some(leaf) = take("pinned_images").filter(|leaf| !leaf.is_zero()) {
        draft.lost(&leaf, "only the configured pause image is pinned");
    }
    if let Some(leaf) = take("image_volumes").filter(|leaf| leaf.text() != Some("mkdir")) {
        draft.lost(&leaf, "volumes of an image are directories in the container");
    }
}

fn network(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["crio", "network", key]);
    draft.copy("network", "cni_config_dir", take("network_dir").map(without_slash));
    if let Some(leaf) = take("plugin_dir").filter(|leaf| !leaf.is_zero()) {
        let leaf = without_slash(leaf);
        draft.set("network", "cni_bin_dirs", vec![leaf.text().unwrap_or_default().to_owned()], &leaf);
    }
    draft.copy("network", "cni_bin_dirs", take("plugin_dirs").map(without_slash));
    if let Some(leaf) = take("cni_default_network").filter(|leaf| !leaf.is_zero()) {
        draft.by_hand(&leaf, "podvisor takes the first configuration in the order of the files' names: see that it is this one");
    }
}

/// Directories are compared as text; `/opt/cni/bin/` is `/opt/cni/bin`.
pub(super) fn without_slash(mut leaf: Leaf) -> Leaf {
    let trimmed =
        |text: &str| if text == "/" { text.to_owned() } else { text.trim_end_matches('/').to_owned() };
    leaf.value = match leaf.value {
        Value::String(text) => Value::String(trimmed(&text)),
        Value::Array(array) => array
            .into_iter()
            .map(|value| value.as_str().map(trimmed).map_or(value.clone(), Value::String))
            .collect::<Vec<_>>()
            .into(),
        other => other,
    };
    leaf
}

fn metrics(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["crio", "metrics", key]);
    let (enabled, host, port) = (take("enable_metrics"), take("metrics_host"), take("metrics_port"));
    let is_on = enabled.as_ref().is_some_and(|leaf| !leaf.is_zero());
    let name = found(host.as_ref()).unwrap_or("127.0.0.1").to_owned();
    let number = port.as_ref().and_then(|leaf| leaf.value.as_integer()).unwrap_or(9090);
    let address = if name.contains(':') { format!("[{name}]:{number}") } else { format!("{name}:{number}") };
    for leaf in [enabled, host, port].into_iter().flatten() {
        if is_on {
            draft.set("metrics", "address", address.clone(), &leaf);
        } else {
            draft.needless(&leaf, "metrics are off");
        }
    }
}

fn nri(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["crio", "nri", key]);
    if let Some(leaf) = take("enable_nri") {
        draft.set("nri", "enabled", leaf.value.clone(), &leaf);
    }
    draft.copy("nri", "socket", take("nri_listen"));
    draft.copy("nri", "plugin_dir", take("nri_plugin_dir"));
    draft.copy("nri", "plugin_config_dir", take("nri_plugin_config_dir"));
    draft.seconds("nri", "registration_timeout", take("nri_plugin_registration_timeout"));
    draft.seconds("nri", "request_timeout", take("nri_plugin_request_timeout"));
    draft.copy("nri", "disable_connections", take("nri_disable_connections"));
}

/// A text that says something.
pub(super) fn found(leaf: Option<&Leaf>) -> Option<&str> {
    leaf.and_then(Leaf::text).filter(|text| !text.is_empty())
}
