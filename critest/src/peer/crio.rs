//! CRI-O's configuration, and that of the libraries it reads registries, storage and signatures with.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Setup;
use crate::tools_dir;

pub(super) fn setup(directory: &Path, mirrored: &[&str], mirror: SocketAddr, pause: &str) -> Result<Setup> {
    let path = |name: &str| directory.join(name);
    let mut registries = String::new();
    for host in mirrored {
        // Writing to a string cannot fail.
        let _ = write!(
            registries,
            "[[registry]]\nprefix = \"{host}\"\nlocation = \"{host}\"\n\
             [[registry.mirror]]\nlocation = \"{mirror}\"\ninsecure = true\n\n"
        );
    }
    fs::write(path("registries.conf"), registries)?;
    fs::write(path("policy.json"), r#"{"default": [{"type": "insecureAcceptAnything"}]}"#)?;
    let [root, run] = ["root", "run"].map(|name| path(name).display().to_string());
    fs::write(
        path("storage.conf"),
        format!("[storage]\ndriver = \"overlay\"\ngraphroot = {root:?}\nrunroot = {run:?}\n"),
    )?;
    fs::write(path("crio.conf"), configuration(directory, pause))?;
    let mut command = Command::new(tools_dir().join("crio"));
    command
        .arg("--config")
        .arg(path("crio.conf"))
        // Otherwise it reads the machine's own pieces of configuration too.
        .args(["--config-dir", ""])
        .arg("--registries-conf")
        .arg(path("registries.conf"))
        .env("CONTAINERS_STORAGE_CONF", path("storage.conf"));
    Ok(Setup {
        command,
        socket: path("crio.sock"),
        outside: &["/run/crio", "/run/netns", "/run/runc", "/var/lib/crio", "/etc/crio"],
        cgroups: &["crio", "system.slice"],
    })
}

fn configuration(directory: &Path, pause: &str) -> String {
    let [root, run, socket, log, cni, policy, attach, exits, namespaces, runtime, version, clean] = [
        "root",
        "run",
        "crio.sock",
        "logs",
        "net.d",
        "policy.json",
        "attach",
        "exits",
        "namespaces",
        "runc",
        "version",
        "clean",
    ]
    .map(|name| directory.join(name).display().to_string());
    let [pinns, runc] = ["pinns", "runc"].map(|name| tools_dir().join(name).display().to_string());
    format!(
        "[crio]\nroot = {root:?}\nrunroot = {run:?}\nstorage_driver = \"overlay\"\nlog_dir = {log:?}\n\
         version_file = {version:?}\nversion_file_persist = \"\"\nclean_shutdown_file = {clean:?}\n\
         [crio.api]\nlisten = {socket:?}\n\
         [crio.runtime]\ndefault_runtime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nconmon_cgroup = \"pod\"\n\
         pinns_path = {pinns:?}\nnamespaces_dir = {namespaces:?}\ncontainer_exits_dir = {exits:?}\n\
         container_attach_socket_dir = {attach:?}\n\
         [crio.runtime.runtimes.runc]\nruntime_path = {runc:?}\nruntime_type = \"oci\"\nruntime_root = {runtime:?}\n\
         monitor_path = \"/usr/bin/conmon\"\nmonitor_cgroup = \"pod\"\n\
         [crio.image]\npause_image = {pause:?}\npause_command = \"/pause\"\nsignature_policy = {policy:?}\n\
         [crio.network]\nnetwork_dir = {cni:?}\nplugin_dirs = [\"/usr/lib/cni\", \"/opt/cni/bin\"]\n\
         [crio.nri]\nenable_nri = false\n\
         [crio.metrics]\nenable_metrics = false\n"
    )
}
