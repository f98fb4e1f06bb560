//! Configurations of CRI-O and containerd, as they are found on nodes, become podvisor's.

use std::fs;
use std::path::Path;

use podvisor_config::import::{Fate, From, ImportError, Imported, import};
use podvisor_config::{CgroupDriver, Config, HandlerKind, Trust};
use tempfile::TempDir;

/// Imports files, the first of which is the main one.
fn files(from: From, files: &[(&str, &str)]) -> Result<Imported, ImportError> {
    let directory = TempDir::new().unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    import(from, &directory.path().join(files[0].0))
}

fn crio(text: &str) -> (Config, Imported) {
    imported(files(From::Crio, &[("crio.conf", text)]).unwrap())
}

fn containerd(text: &str) -> (Config, Imported) {
    imported(files(From::Containerd, &[("config.toml", text)]).unwrap())
}

fn imported(imported: Imported) -> (Config, Imported) {
    let config = imported.config().unwrap_or_else(|error| panic!("{error}\n{}", imported.toml));
    (config, imported)
}

fn fates<'i>(imported: &'i Imported, key: &str) -> Vec<&'i Fate> {
    imported.notes.iter().filter(|note| note.key == key).map(|note| &note.fate).collect()
}

#[track_caller]
fn assert_fate(imported: &Imported, key: &str, expected: &str) {
    let fates = fates(imported, key);
    assert!(fates.iter().any(|fate| format!("{fate:?}").contains(expected)), "{key}: {fates:?}");
}

fn path(config: &Config, handler: &str) -> String {
    match &config.handlers[handler].kind {
        HandlerKind::Oci { path, .. } => path.display().to_string(),
        HandlerKind::Vm(_) => "vm".to_owned(),
    }
}

/// CRI-O with Kata: settings that did not help where the registry of the pause image could not be reached.
const KATA_BY_CRIO: &str = r#"
[crio]
root = "/var/lib/containers/storage"
storage_driver = "overlay"

[crio.api]
listen = "/var/run/crio/crio.sock"
stream_address = "127.0.0.1"
stream_port = "0"

[crio.runtime]
manage_ns_lifecycle = true
default_workload_trust = "untrusted"
runtime = "/usr/bin/runc"
runtime_untrusted_workload = "/usr/bin/kata-runtime"
cgroup_manager = "systemd"
conmon = "/usr/bin/conmon"
pids_limit = 1024
log_level = "warning"
default_runtime = "runc"
default_ulimits = ["nofile=1024:2048"]

[crio.runtime.runtimes.runc]
runtime_path = "/usr/bin/runc"
runtime_type = "oci"
runtime_root = "/run/runc"

[crio.runtime.runtimes.kata-runtime]
runtime_path = "/usr/bin/kata-runtime"

[crio.runtime.runtimes.kata-qemu]
runtime_path = "/usr/bin/containerd-shim-kata-v2"
runtime_type = "vm"
privileged_without_host_devices = true

[crio.runtime.runtimes.sealed]
runtime_path = "/usr/bin/containerd-shim-kata-v2"
runtime_type = "vm"

[crio.runtime.runtimes.gvisor]
runtime_path = "/usr/local/bin/runsc"
allowed_annotations = ["dev.gvisor.", "io.kubernetes.cri-o.Devices"]

[crio.image]
pause_image = "mirror.example:5000/google_containers/pause:3.2"
global_auth_file = "/etc/crio/auth.json"
insecure_registries = ["mirror.example:5000"]
registries = ["docker.io", "quay.io"]

[crio.network]
network_dir = "/etc/cni/net.d/"
plugin_dirs = ["/opt/cni/bin/", "/usr/libexec/cni/"]
"#;

#[test]
fn crio_with_kata() {
    let (config, imported) = crio(KATA_BY_CRIO);
    assert_eq!(config.runtime.default_workload_trust, Trust::Untrusted);
    assert_eq!(config.runtime.untrusted_handler.as_deref(), Some("vm"));
    assert_eq!(config.runtime.trusted_handler, "runc");
    assert_eq!(config.runtime.cgroup_driver, CgroupDriver::Systemd);
    assert_eq!(path(&config, "runc"), "/usr/bin/runc");
    assert_eq!(path(&config, "gvisor"), "/usr/local/bin/runsc");
    assert!(matches!(config.handlers["gvisor"].kind, HandlerKind::Oci { sandbox_container: true, .. }));
    assert_eq!(config.handlers["gvisor"].annotations, ["dev.gvisor.*"]);
    let named = config.named_handlers();
    for name in ["vm", "kata", "kata-runtime", "kata-qemu", "kata-fc", "sealed"] {
        assert!(named[name].is_vm(), "{name}");
    }
    assert_eq!(config.image.pause_image, "mirror.example:5000/google_containers/pause:3.2");
    assert_eq!(config.image.auth_files[0], Path::new("/etc/crio/auth.json"));
    assert_eq!(config.image.auth_files.len(), Config::default().image.auth_files.len() + 1);
    assert_eq!(config.image.default_registries, ["docker.io", "quay.io"]);
    assert_eq!(config.network.cni_config_dir, Path::new("/etc/cni/net.d"));
    assert_eq!(config.network.cni_bin_dirs, [Path::new("/opt/cni/bin"), Path::new("/usr/libexec/cni")]);
    assert_eq!(config.limits.pids, 1024);
    assert_eq!(config.log.level, "warn");
    assert_eq!(config.socket, Config::default().socket);

    assert_fate(&imported, "crio.runtime.manage_ns_lifecycle", "Needless");
    assert_fate(&imported, "crio.runtime.conmon", "Needless");
    assert_fate(&imported, "crio.api.listen", "unix:///run/podvisor/podvisor.sock");
    assert_fate(&imported, "crio.image.insecure_registries", "location = \\\"mirror.example:5000\\\"");
    assert_fate(&imported, "crio.runtime.default_ulimits", "Lost");
    assert_fate(&imported, "crio.runtime.runtimes.kata-qemu.privileged_without_host_devices", "Lost");
    assert_fate(&imported, "crio.runtime.runtimes.gvisor.allowed_annotations", "Lost");
    assert_fate(&imported, "crio.runtime.cgroup_manager", "Taken(\"runtime.cgroup_driver\")");
    for paragraph in ["Taken over:", "To be done by hand:", "Without equivalent:", "Not needed:"] {
        assert!(imported.report().contains(paragraph), "{}", imported.report());
    }
}

#[test]
fn drop_ins_of_crio_go_before_its_file() {
    let drop_ins = [
        ("crio.conf", "[crio.runtime]\nlog_level = \"info\"\npids_limit = 10"),
        (
            "crio.conf.d/00-default.conf",
            "[crio.runtime]\nlog_level = \"debug\"\n[crio.runtime.runtimes.crun]",
        ),
        ("crio.conf.d/10-more", "[crio.runtime]\nlog_level = \"error\"\ndefault_runtime = \"crun\""),
    ];
    let (config, imported) = imported(files(From::Crio, &drop_ins).unwrap());
    assert_eq!((config.log.level.as_str(), config.limits.pids), ("error", 10));
    assert_eq!(config.runtime.trusted_handler, "crun");
    let note = imported.notes.iter().find(|note| note.key == "crio.runtime.log_level").unwrap();
    assert_eq!(note.file.file_name().unwrap(), "10-more");
}

#[test]
fn a_virtual_machine_by_default() {
    let (config, _) = crio(
        "[crio.runtime]\ndefault_runtime = \"kata\"\n[crio.runtime.runtimes.kata]\nruntime_type = \"vm\"\n",
    );
    assert_eq!(config.runtime.default_workload_trust, Trust::Untrusted);
    assert_eq!(config.runtime.trusted_handler, "runc");
}

/// containerd 1.x with Kata and a mirror.
const VERSION_2: &str = r#"
version = 2
root = "/var/lib/containerd"
imports = ["conf.d/*.toml"]

[debug]
  level = "debug"

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.6"
  max_container_log_line_size = 32768
  stream_idle_timeout = "1h30m"
  enable_selinux = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.untrusted]
      runtime_type = "io.containerd.kata.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.youki]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["run.oci.*"]
      base_runtime_spec = "/etc/containerd/base.json"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.youki.options]
        BinaryName = "/usr/bin/youki"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.wasm]
      runtime_type = "io.containerd.wasmtime.v1"
  [plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
    endpoint = ["https://mirror.example"]
  [plugins."io.containerd.grpc.v1.cri".registry.configs."mirror.example".auth]
    username = "me"
    password = "secret"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni/"
    max_conf_num = 1

[plugins."io.containerd.snapshotter.v1.devmapper"]
  pool_name = "pool"
"#;

#[test]
fn containerd_of_version_2() {
    let more =
        "[plugins.'io.containerd.grpc.v1.cri']\nstream_server_address = '::1'\nstream_server_port = '10010'";
    let both = [("config.toml", VERSION_2), ("conf.d/more.toml", more), ("conf.d/other.conf", "not toml")];
    let (config, imported) = imported(files(From::Containerd, &both).unwrap());
    assert_eq!(config.log.level, "debug");
    assert_eq!(config.image.pause_image, "", "nobody has chosen the one that it comes with");
    assert_eq!(config.limits.log_line, 32768);
    assert_eq!(config.streaming.idle_timeout, 5400);
    assert_eq!(config.streaming.address, "[::1]:10010".parse().unwrap());
    assert_eq!(config.runtime.cgroup_driver, CgroupDriver::Systemd);
    assert_eq!(path(&config, "youki"), "/usr/bin/youki");
    assert_eq!(config.handlers["youki"].annotations, ["run.oci.*"]);
    assert!(config.named_handlers()["untrusted"].is_vm());
    assert_eq!(config.runtime.untrusted_handler.as_deref(), Some("vm"));
    assert_eq!(config.network.cni_bin_dirs, [Path::new("/usr/lib/cni")]);

    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let mirror = format!("{cri}.registry.mirrors.\"docker.io\".endpoint");
    assert_fate(&imported, &mirror, "docker.io/hosts.toml");
    assert_fate(&imported, &mirror, "[host.\\\"https://mirror.example\\\"]");
    let password = format!("{cri}.registry.configs.\"mirror.example\".auth.password");
    assert_fate(&imported, &password, "ToDo");
    assert_fate(&imported, &format!("{cri}.containerd.runtimes.wasm.runtime_type"), "WebAssembly");
    assert_fate(&imported, &format!("{cri}.containerd.runtimes.youki.base_runtime_spec"), "Lost");
    assert_fate(&imported, "plugins.\"io.containerd.snapshotter.v1.devmapper\".pool_name", "Needless");
    assert!(!imported.report().contains("secret") && !imported.toml.contains("secret"));
}

#[test]
fn containerd_of_versions_1_and_3() {
    let (config, _) = containerd(
        "[plugins.cri]\nsystemd_cgroup = true\nsandbox_image = \"mirror.example/pause:3.1\"\n\
         [plugins.cri.containerd.untrusted_workload_runtime]\nruntime_type = \"io.containerd.runtime.v1.linux\"\n\
         runtime_engine = \"/usr/bin/kata-runtime\"\n",
    );
    assert_eq!(config.runtime.cgroup_driver, CgroupDriver::Systemd);
    assert_eq!(config.image.pause_image, "mirror.example/pause:3.1");
    assert_eq!(config.runtime.untrusted_handler.as_deref(), Some("vm"));

    let (config, imported) = containerd(
        r"
        version = 3
        [plugins.'io.containerd.cri.v1.images']
        max_concurrent_downloads = 8
        image_pull_progress_timeout = '5m0s'
        [plugins.'io.containerd.cri.v1.images'.pinned_images]
        sandbox = 'registry.k8s.io/pause:3.10.1'
        [plugins.'io.containerd.cri.v1.images'.registry]
        config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'
        [plugins.'io.containerd.cri.v1.runtime']
        enable_cdi = false
        cdi_spec_dirs = ['/etc/cdi']
        enable_unprivileged_ports = true
        [plugins.'io.containerd.cri.v1.runtime'.containerd]
        default_runtime_name = 'kata'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
        runtime_type = 'io.containerd.kata.v2'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata.options]
        ConfigPath = '/etc/kata/configuration.toml'
        [plugins.'io.containerd.cri.v1.runtime'.cni]
        bin_dirs = ['/opt/cni/bin']
        [plugins.'io.containerd.grpc.v1.cri']
        enable_tls_streaming = true
        [plugins.'io.containerd.nri.v1.nri']
        disable = true
        plugin_request_timeout = '2s'
        ",
    );
    assert_eq!((config.image.parallel_layers, config.image.progress_timeout), (8, 300));
    assert_eq!(config.runtime.default_workload_trust, Trust::Untrusted);
    assert!(config.runtime.cdi_spec_dirs.is_empty() && !config.nri.enabled);
    assert_eq!(config.nri.request_timeout, 2);
    assert_eq!(config.image.certs_dir, Path::new("/etc/containerd/certs.d"));
    assert_fate(
        &imported,
        "plugins.\"io.containerd.cri.v1.images\".registry.config_path",
        "/etc/docker/certs.d",
    );
    assert_fate(&imported, "plugins.\"io.containerd.grpc.v1.cri\".enable_tls_streaming", "ToDo");
    let unprivileged = "plugins.\"io.containerd.cri.v1.runtime\".enable_unprivileged_ports";
    assert_fate(&imported, unprivileged, "ip_unprivileged_port_start");
}

#[test]
fn what_podvisor_refuses_is_reported_and_left_out() {
    let (config, imported) = crio(
        "[crio.api]\nstream_address = \"192.0.2.1\"\nstream_port = \"10010\"\n[crio.runtime]\n\
         seccomp_profile = \"relative.json\"\ncgroup_manager = \"none\"\npids_limit = 99999999\n\
         [crio.runtime.runtimes.\"Upper Case\"]\nruntime_path = \"/usr/bin/runc\"\n",
    );
    assert_eq!(config, Config::default());
    assert_fate(&imported, "crio.runtime.seccomp_profile", "an absolute path");
    assert_fate(&imported, "crio.runtime.cgroup_manager", "allowed is");
    assert_fate(&imported, "crio.runtime.pids_limit", "4194304");
    assert_fate(&imported, "crio.api.stream_address", "loopback");
    assert_fate(&imported, "crio.runtime.runtimes.\"Upper Case\".runtime_path", "cannot be a handler's name");
}

#[test]
fn what_is_no_configuration() {
    let directory = TempDir::new().unwrap();
    for from in [From::Crio, From::Containerd] {
        let missing = directory.path().join("missing.toml");
        assert!(matches!(import(from, &missing), Err(ImportError::Nothing { path }) if path == missing));
    }
    let error = files(From::Crio, &[("crio.conf", "[crio]\nroot = \n")]).unwrap_err();
    assert!(error.to_string().contains("crio.conf:2: "), "{error}");
    let error = files(From::Containerd, &[("config.toml", "version = 2\n\nversion = 3")]).unwrap_err();
    assert!(error.to_string().contains("config.toml:3: "), "{error}");
    // Files that import each other are read once.
    let circle = [
        ("config.toml", "imports = ['b.toml']"),
        ("b.toml", "imports = ['config.toml', 'b.toml']\n[debug]\nlevel = 'info'"),
    ];
    let (config, _) = imported(files(From::Containerd, &circle).unwrap());
    assert_eq!(config, Config::default());
    let error = files(From::Containerd, &[("config.toml", "imports = ['none.toml']")]).unwrap_err();
    assert!(error.to_string().contains("none.toml"), "{error}");
}
