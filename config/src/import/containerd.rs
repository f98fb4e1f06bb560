//! containerd: `config.toml` of version 1, 2 or 3 with the files that its `imports` name; keys of containerd 1.2 to 2.3.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};

use toml::Value;

use super::crio::{found, log_level, stream_address, without_slash};
use super::draft::Draft;
use super::runtimes::{self, Handlers, Program, Role, program};
use super::source::{self, Leaf, Source};
use super::{ImportError, registries};
use crate::load;

/// Keys without which podvisor behaves so, or whose subject it does not have. What concerns the CRI is below `cri.` in all versions.
pub(super) const NEEDLESS: &[(&str, &str)] = &[
    ("version", "podvisor's file has one version"),
    ("imports", "the files were read"),
    ("root", "podvisor keeps images in a store of its own; they are pulled once more"),
    ("state", "podvisor has a directory of its own for what does not outlive a reboot"),
    ("oom_score", "the systemd unit sets it"),
    ("grpc.", "podvisor has a socket of its own: give kubelet unix:///run/podvisor/podvisor.sock"),
    ("ttrpc.", "there are no shims that connect to the daemon"),
    ("debug.", "only the level is podvisor's"),
    ("metrics.grpc_histogram", "the times of requests are always counted"),
    ("cri.disable_tcp_service", "podvisor listens on its socket alone"),
    ("cri.disable_cgroup", "podvisor needs cgroups"),
    ("cri.disable_apparmor", "profiles are applied where the host has AppArmor"),
    ("cri.disable_proc_mount", "pods may ask for an unmasked /proc"),
    ("cri.enable_selinux", "labels are applied where the host has SELinux"),
    ("cri.tolerate_missing_hugetlb_controller", "limits of huge pages are set where the controller exists"),
    ("cri.restrict_oom_score_adj", "podvisor runs as root"),
    ("cri.netns_mounts_under_state_dir", "network namespaces are pinned where other tools look for them"),
    ("cri.stats_collect_period", "figures are taken when they are asked for"),
    ("cri.snapshotter", "podvisor's store is overlayfs on plain directories"),
    ("cri.containerd.snapshotter", "podvisor's store is overlayfs on plain directories"),
    ("cri.disable_snapshot_annotations", "there are no snapshotters"),
    ("cri.containerd.disable_snapshot_annotations", "there are no snapshotters"),
    ("cri.discard_unpacked_layers", "packed layers are not kept"),
    ("cri.containerd.discard_unpacked_layers", "packed layers are not kept"),
    ("cri.image_pull_with_sync_fs", "an image is on the disk before it is in the list"),
    ("cri.use_local_image_pull", "the daemon pulls images itself"),
    ("cri.cni.setup_serially", "interfaces of a pod are made one after the other"),
    ("cri.cni.use_internal_loopback", "the loopback interface is brought up without a plugin"),
    ("cri.containerd.ignore_blockio_not_enabled_errors", "there are no classes of block I/O"),
    ("cri.containerd.ignore_rdt_not_enabled_errors", "there are no RDT classes"),
    ("cri.ignore_deprecation_warnings", "nothing is deprecated"),
    ("cri.enable_criu", "containers can be checkpointed where criu is installed"),
    ("timeouts.", "there are no shims"),
    ("stream_processors.", "layers are decompressed in the daemon"),
];

/// The most files that imports may bring.
const FILES: usize = 256;

/// The plugins of versions 1, 2 and 3 that the CRI is configured by.
const CRI: [&str; 4] =
    ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"];

const NRI: &str = "io.containerd.nri.v1.nri";

pub(super) fn read(file: &Path) -> Result<Source, ImportError> {
    let mut source = Source::default();
    let mut waiting = VecDeque::from([file.to_owned()]);
    let mut seen = Vec::new();
    while let Some(path) = waiting.pop_front() {
        if seen.contains(&path) {
            continue;
        }
        if seen.len() == FILES {
            return Err(ImportError::TooMany { path: file.to_owned(), limit: FILES });
        }
        if seen.is_empty() && !path.exists() {
            return Err(ImportError::Nothing { path });
        }
        let table = source::parse(&path, &load::read_file(&path)?)?;
        let imports = table.get("imports").and_then(Value::as_array).cloned().unwrap_or_default();
        for pattern in imports.iter().filter_map(Value::as_str) {
            waiting.extend(matching(&path, pattern));
        }
        source.add(&path, table, in_one_place);
        seen.push(path);
    }
    Ok(source)
}

/// Files that an import names, in the order of their names: relative to the importing file's directory; `*` and `?` in the last component,
/// as Go's filepath.Glob has them.
fn matching(importing: &Path, pattern: &str) -> Vec<PathBuf> {
    let pattern = importing.parent().unwrap_or(Path::new("/")).join(pattern);
    let (Some(directory), Some(name)) =
        (pattern.parent(), pattern.file_name().and_then(|name| name.to_str()))
    else {
        return Vec::new();
    };
    if !name.contains(['*', '?']) {
        return vec![pattern];
    }
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter(|entry| {
            entry.file_name().to_str().is_some_and(|entry| matches(name.as_bytes(), entry.as_bytes()))
        })
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// Whether a name is what a pattern with `*` and `?` means.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => matches(rest, name) || !name.is_empty() && matches(pattern, &name[1..]),
        (Some((b'?', pattern)), Some((_, name))) => matches(pattern, name),
        (Some((wanted, pattern)), Some((byte, name))) => wanted == byte && matches(pattern, name),
        _ => false,
    }
}

/// What concerns the CRI or NRI lies in another plugin in each version; here it is below `cri` and `nri`.
fn in_one_place(mut path: Vec<String>) -> Vec<String> {
    if path.len() > 2 && path[0] == "plugins" {
        let place = match path[1].as_str() {
            plugin if CRI.contains(&plugin) => "cri",
            NRI => "nri",
            _ => return path,
        };
        path.splice(..2, [place.to_owned()]);
    }
    path
}

pub(super) fn translate(source: &mut Source, draft: &mut Draft) {
    all_handlers(source, draft);
    if let Some(leaf) = source.take(&["debug", "level"]) {
        log_level(draft, &leaf);
    }
    draft.copy("metrics", "address", source.take(&["metrics", "address"]));
    streaming(source, draft);
    images(source, draft);
    network(source, draft);
    containers(source, draft);
    nri(source, draft);
    other_plugins(source, draft);
}

/// The runtime of containerd's own name for untrusted pods, before there were RuntimeClasses.
const UNTRUSTED: &str = "untrusted";

fn all_handlers(source: &mut Source, draft: &mut Draft) {
    let mut handlers = Handlers::default();
    let mut roles: Vec<(String, Role)> = Vec::new();
    for name in source.names(&["cri", "containerd", "runtimes"]) {
        let table = ["cri", "containerd", "runtimes", &name];
        if let Some(role) = runtime(source, draft, &mut handlers, &name, &table) {
            if name == UNTRUSTED {
                let leaf = remark_of(&table);
                runtimes::untrusted(draft, &role, &leaf);
            }
            roles.push((name, role));
        }
    }
    // containerd up to 1.2 had two runtimes of fixed names.
    for (table, name, is_untrusted) in
        [("default_runtime", "runc", false), ("untrusted_workload_runtime", UNTRUSTED, true)]
    {
        let table = ["cri", "containerd", table];
        if source.names(&table).is_empty() {
            continue;
        }
        if let Some(role) = runtime(source, draft, &mut handlers, name, &table) {
            let leaf = remark_of(&table);
            if is_untrusted {
                runtimes::untrusted(draft, &role, &leaf);
            } else {
                runtimes::trusted(draft, &role, &leaf);
            }
        }
    }
    if let Some(leaf) = source.take(&["cri", "containerd", "default_runtime_name"]) {
        let name = leaf.text().unwrap_or_default();
        let role = roles.iter().find(|(declared, _)| declared == name).map(|(_, role)| role.clone());
        let role = role.or_else(|| (name == "runc").then(|| Role::Oci(name.to_owned())));
        match role {
            Some(role) => runtimes::trusted(draft, &role, &leaf),
            None => draft.lost(&leaf, "no runtime of this name is declared"),
        }
    }
    if let Some(leaf) = source.take(&["cri", "systemd_cgroup"]) {
        cgroup_driver(draft, &leaf);
    }
}

/// A table that says something by being there.
fn remark_of(table: &[&str]) -> Leaf {
    Leaf { key: table.join("."), file: PathBuf::new(), value: Value::Boolean(true) }
}

fn runtime(
    source: &mut Source,
    draft: &mut Draft,
    handlers: &mut Handlers,
    name: &str,
    table: &[&str],
) -> Option<Role> {
    let mut take = |key: &[&str]| source.take(&[table, key].concat());
    let (kind, path) = (take(&["runtime_type"]), take(&["runtime_path"]));
    // Before 1.3 the program was beside the type.
    let binary = take(&["options", "BinaryName"]).or_else(|| take(&["runtime_engine"]));
    let type_name = found(kind.as_ref()).unwrap_or("io.containerd.runc.v2");
    let declared = match type_name {
        "io.containerd.runc.v1" | "io.containerd.runc.v2" | "io.containerd.runtime.v1.linux" => {
            program(found(binary.as_ref()).unwrap_or("runc"))
        }
        "io.containerd.runsc.v1" => Program::Oci("runsc".to_owned()),
        other if other.contains("kata") => Program::Vm,
        other if other.contains("wasm") || other.contains("spin") || other.contains("slight") => {
            Program::Other("a shim for WebAssembly")
        }
        _ => Program::Other("a shim of containerd's"),
    };
    let is_oci = matches!(declared, Program::Oci(_));
    let leaf = match (binary, kind) {
        (Some(leaf), kind) => {
            if let Some(kind) = kind {
                draft.needless(&kind, "follows from the program");
            }
            leaf
        }
        (None, Some(leaf)) => leaf,
        (None, None) => take(&[]).unwrap_or_else(|| remark_of(table)),
    };
    let role = handlers.add(draft, name, declared, &leaf);
    if let Some(path) = path.filter(|path| !path.is_zero()) {
        draft.needless(&path, "there are no shims");
    }
    if let Some(leaf) = take(&["options", "SystemdCgroup"]) {
        cgroup_driver(draft, &leaf);
    }
    if let Some(leaf) = take(&["options", "Root"]).or_else(|| take(&["runtime_root"])) {
        draft.needless(&leaf, "podvisor keeps the runtime's state apart from containerd's");
    }
    for (key, why) in [
        ("sandboxer", "the handler's type says it"),
        ("io_type", "podvisor-monitor does the I/O"),
        ("snapshotter", "podvisor's store is overlayfs on plain directories"),
    ] {
        if let Some(leaf) = take(&[key]) {
            draft.needless(&leaf, why);
        }
    }
    if let Some(leaf) = take(&["options", "ConfigPath"]).filter(|leaf| !leaf.is_zero()) {
        let why = "podvisor's virtual machines are set up in [runtime.handlers.vm]; of an OCI runtime its arguments are";
        draft.lost(&leaf, why);
    }
    let annotations = [take(&["pod_annotations"]), take(&["container_annotations"])];
    let annotations: Vec<_> = annotations.into_iter().flatten().filter(|leaf| !leaf.is_zero()).collect();
    let names: Vec<_> = annotations.iter().flat_map(Leaf::texts).collect();
    for leaf in &annotations {
        if is_oci && role.is_some() {
            draft.set(&format!("runtime.handlers.{name}"), "annotations", names.clone(), leaf);
        } else {
            draft.lost(leaf, "a virtual machine is what the handler's keys say; a pod cannot change it");
        }
    }
    role
}

fn cgroup_driver(draft: &mut Draft, leaf: &Leaf) {
    let driver = if leaf.is_zero() { "cgroupfs" } else { "systemd" };
    draft.set("runtime", "cgroup_driver", driver, leaf);
}

fn streaming(source: &mut Source, draft: &mut Draft) {
    let mut take = |path: &[&str]| source.take(&[&["cri"], path].concat());
    let (address, port) = (take(&["stream_server_address"]), take(&["stream_server_port"]));
    stream_address(draft, address, port);
    draft.seconds("streaming", "idle_timeout", take(&["stream_idle_timeout"]));
    let tls = take(&["enable_tls_streaming"]);
    let on = tls.as_ref().is_some_and(|leaf| !leaf.is_zero());
    let certificate = take(&["x509_key_pair_streaming", "tls_cert_file"]);
    let key = take(&["x509_key_pair_streaming", "tls_key_file"]);
    let complete = found(certificate.as_ref()).is_some() && found(key.as_ref()).is_some();
    for (leaf, target) in [(certificate, "tls_cert"), (key, "tls_key")] {
        match leaf {
            Some(leaf) if !on => draft.needless(&leaf, "TLS is off"),
            leaf => draft.copy("streaming", target, leaf),
        }
    }
    if let Some(leaf) = tls {
        if on && !complete {
            draft.by_hand(
                &leaf,
                "podvisor makes no certificate: set streaming.tls_cert and streaming.tls_key",
            );
        } else {
            draft.needless(&leaf, "follows from the certificate");
        }
    }
}

fn images(source: &mut Source, draft: &mut Draft) {
    registries::pause_image(draft, source.take(&["cri", "sandbox_image"]));
    registries::pause_image(draft, source.take(&["cri", "pinned_images", "sandbox"]));
    let mut certs_dir = crate::Config::default().image.certs_dir.display().to_string();
    if let Some(leaf) = source.take(&["cri", "registry", "config_path"]) {
        // A list with colons; containerd takes the first directory that knows a host.
        let paths: Vec<_> =
            leaf.text().unwrap_or_default().split(':').filter(|path| !path.is_empty()).collect();
        match paths[..] {
            [] => draft.needless(&leaf, "says nothing"),
            [first, ref others @ ..] => {
                first.trim_end_matches('/').clone_into(&mut certs_dir);
                draft.set("image", "certs_dir", certs_dir.clone(), &leaf);
                if !others.is_empty() {
                    draft.by_hand(
                        &leaf,
                        format!("podvisor reads one directory: move there what is in {}", others.join(", ")),
                    );
                }
            }
        }
    }
    for host in source.names(&["cri", "registry", "mirrors"]) {
        if let Some(leaf) = source.take(&["cri", "registry", "mirrors", &host, "endpoint"]) {
            registries::mirrors(draft, &host, &leaf, &certs_dir);
        }
    }
    credentials(source, draft, &certs_dir);
    draft.copy("image", "parallel_layers", source.take(&["cri", "max_concurrent_downloads"]));
    let timeout = source.take(&["cri", "image_pull_progress_timeout"]);
    match timeout {
        Some(leaf) if leaf.seconds() == Some(0) => {
            draft.lost(&leaf, "a transfer that stands still is always broken off");
        }
        leaf => draft.seconds("image", "progress_timeout", leaf),
    }
}

/// Secrets are named, never shown.
fn credentials(source: &mut Source, draft: &mut Draft, certs_dir: &str) {
    for table in ["configs", "auths"] {
        for host in source.names(&["cri", "registry", table]) {
            for key in ["username", "password", "auth", "identitytoken"] {
                let below: &[&str] = if table == "configs" { &["auth", key] } else { &[key] };
                let path = [&["cri", "registry", table, &host], below].concat();
                if let Some(leaf) = source.take(&path) {
                    let file = "/etc/containers/auth.json";
                    draft.by_hand(
                        &leaf,
                        format!("put the credentials of {host} into {file} (docker's config.json format)"),
                    );
                }
            }
            for key in ["ca_file", "cert_file", "key_file", "insecure_skip_verify"] {
                if let Some(leaf) = source.take(&["cri", "registry", table, &host, "tls", key]) {
                    let name = match key {
                        "ca_file" => "ca",
                        "insecure_skip_verify" => "skip_verify",
                        _ => "client",
                    };
                    draft.by_hand(&leaf, format!("say it in {certs_dir}/{host}/hosts.toml, key {name}"));
                }
            }
        }
    }
}

fn network(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["cri", "cni", key]);
    draft.copy("network", "cni_config_dir", take("conf_dir").map(without_slash));
    if let Some(leaf) = take("bin_dir").filter(|leaf| !leaf.is_zero()) {
        let leaf = without_slash(leaf);
        draft.set("network", "cni_bin_dirs", vec![leaf.text().unwrap_or_default().to_owned()], &leaf);
    }
    draft.copy("network", "cni_bin_dirs", take("bin_dirs").map(without_slash).filter(|leaf| !leaf.is_zero()));
    if let Some(leaf) = take("max_conf_num") {
        match leaf.value.as_integer() {
            Some(1) => draft.needless(&leaf, "the first configuration counts"),
            _ => {
                draft.lost(&leaf, "the first configuration counts: put the plugins of all into one conflist");
            }
        }
    }
    if let Some(leaf) = take("conf_template").filter(|leaf| !leaf.is_zero()) {
        draft.lost(
            &leaf,
            "network.mode = \"builtin\" takes the pod CIDR that kubelet sends, without a template",
        );
    }
}

fn containers(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["cri", key]);
    if let Some(leaf) = take("max_container_log_line_size") {
        match leaf.value.as_integer() {
            Some(size) if size <= 0 => {
                draft
                    .lost(&leaf, "a line is written in parts from limits.log_line bytes on, 1048576 at most");
            }
            _ => draft.copy("limits", "log_line", Some(leaf)),
        }
    }
    let (enabled, dirs) = (take("enable_cdi"), take("cdi_spec_dirs"));
    let is_off = enabled.as_ref().is_some_and(Leaf::is_zero);
    if let Some(leaf) = enabled {
        if is_off {
            draft.set("runtime", "cdi_spec_dirs", Vec::<String>::new(), &leaf);
        } else {
            draft.needless(&leaf, "CDI devices are on by default");
        }
    }
    match dirs {
        Some(leaf) if is_off => draft.needless(&leaf, "CDI is off"),
        leaf => draft.copy("runtime", "cdi_spec_dirs", leaf),
    }
    for key in ["enable_unprivileged_ports", "enable_unprivileged_icmp"] {
        if let Some(leaf) = take(key) {
            if leaf.is_zero() {
                draft.needless(&leaf, "off unless a pod asks for it");
            } else {
                let sysctl = if key.ends_with("ports") {
                    "net.ipv4.ip_unprivileged_port_start: \"0\""
                } else {
                    "net.ipv4.ping_group_range: \"0 2147483647\""
                };
                draft.lost(&leaf, format!("a pod asks for it itself, with the safe sysctl {sysctl}"));
            }
        }
    }
    if let Some(leaf) = take("unset_seccomp_profile").filter(|leaf| !leaf.is_zero()) {
        draft.lost(&leaf, "kubelet says the profile of every container (seccompDefault)");
    }
}

fn nri(source: &mut Source, draft: &mut Draft) {
    let mut take = |key: &str| source.take(&["nri", key]);
    if let Some(leaf) = take("disable") {
        draft.set("nri", "enabled", leaf.is_zero(), &leaf);
    }
    draft.copy("nri", "socket", take("socket_path"));
    draft.copy("nri", "plugin_dir", take("plugin_path"));
    draft.copy("nri", "plugin_config_dir", take("plugin_config_path"));
    draft.seconds("nri", "registration_timeout", take("plugin_registration_timeout"));
    draft.seconds("nri", "request_timeout", take("plugin_request_timeout"));
    draft.copy("nri", "disable_connections", take("disable_connections"));
}

/// What other plugins are told is nothing to a runtime for kubelet, but for those who read the report.
fn other_plugins(source: &mut Source, draft: &mut Draft) {
    for plugin in source.names(&["plugins"]) {
        for leaf in source.take_below(&["plugins", &plugin]) {
            draft.needless(&leaf, "concerns another part of containerd");
        }
    }
}
