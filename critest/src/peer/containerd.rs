//! containerd's configuration.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::Setup;
use crate::tools_dir;

pub(super) fn setup(directory: &Path, mirrored: &[&str], mirror: SocketAddr, pause: &str) -> Result<Setup> {
    for host in mirrored {
        let folder = directory.join("certs.d").join(host);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let hosts = format!(
            "server = \"http://{mirror}\"\n[host.\"http://{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
        fs::write(folder.join("hosts.toml"), hosts).context("writing hosts.toml")?;
    }
    let configuration_file = directory.join("config.toml");
    fs::write(&configuration_file, configuration(directory, pause))?;
    let mut command = Command::new(tools_dir().join("containerd"));
    // The shim is looked for in PATH.
    let search = std::env::var("PATH").unwrap_or_default();
    command
        .arg("--config")
        .arg(configuration_file)
        .env("PATH", format!("{}:{search}", tools_dir().display()));
    Ok(Setup {
        command,
        socket: directory.join("containerd.sock"),
        outside: &["/run/containerd", "/run/netns", "/run/runc"],
        cgroups: &["k8s.io"],
    })
}

fn configuration(directory: &Path, pause: &str) -> String {
    let [root, state, socket, certs, cni, opt] =
        ["root", "state", "containerd.sock", "certs.d", "net.d", "opt"]
            .map(|name| directory.join(name).display().to_string());
    let runc = tools_dir().join("runc").display().to_string();
    // Without CAP_SYS_RESOURCE no score can be lowered, and a machine may lack it.
    format!(
        "version = 3\nroot = {root:?}\nstate = {state:?}\ntemp = \"\"\n\
         [grpc]\naddress = {socket:?}\n\
         [ttrpc]\naddress = \"{socket}.ttrpc\"\n\
         [plugins.'io.containerd.internal.v1.opt']\npath = {opt:?}\n\
         [plugins.'io.containerd.nri.v1.nri']\ndisable = true\n\
         [plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = {pause:?}\n\
         [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = {certs:?}\n\
         [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/usr/lib/cni', '/opt/cni/bin']\nconf_dir = {cni:?}\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'runc'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nBinaryName = {runc:?}\nSystemdCgroup = false\n"
    )
}
