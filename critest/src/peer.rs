//! containerd on directories of its own, as the peer that podvisor's results and times are compared with.
//!
//! For use inside a [sandbox](crate::sandbox), like [`crate::node`]. It gets what a node would give it: the registries
//! behind the same mirror, a bridge by CNI's reference plugins, and the same runc.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::tools_dir;

const PATIENCE: Duration = Duration::from_secs(60);

const BRIDGE: &str = "peer0";

/// Where it puts pods that name no cgroup.
const CGROUP: &str = "k8s.io";

/// What it makes outside its own directories, none of which can be configured away.
const OUTSIDE: [&str; 4] = ["/run/containerd", "/run/netns", "/run/runc", "/var/lib/cni"];

/// A running containerd; it ends when this is dropped.
#[derive(Debug)]
pub struct Peer {
    process: Child,
    directory: TempDir,
}

impl Peer {
    /// Starts it and returns when it listens. `mirrored` registries are reached through `mirror`.
    pub fn start(mirrored: &[&str], mirror: SocketAddr) -> Result<Self> {
        if std::env::var_os(crate::sandbox::MARK).is_none() {
            bail!(
                "containerd changes interfaces, mounts and cgroups: run this in `podvisor-critest sandbox -- …`"
            );
        }
        let directory = tempfile::Builder::new().prefix("peer.").tempdir().context("making a directory")?;
        let path = |name: &str| directory.path().join(name);
        for host in mirrored {
            let folder = path("certs.d").join(host);
            fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
            let hosts = format!(
                "server = \"http://{mirror}\"\n[host.\"http://{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
            );
            fs::write(folder.join("hosts.toml"), hosts).context("writing hosts.toml")?;
        }
        fs::create_dir(path("net.d")).context("making the directory of the CNI configuration")?;
        fs::write(path("net.d/10-peer.conflist"), network())?;
        fs::write(path("config.toml"), configuration(directory.path()))?;
        let log = File::create(path("log")).context("making the log")?;
        // The shim is looked for in PATH.
        let search = std::env::var("PATH").unwrap_or_default();
        let process = Command::new(tools_dir().join("containerd"))
            .arg("--config")
            .arg(path("config.toml"))
            .env("PATH", format!("{}:{search}", tools_dir().display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd (`critest/tools/build containerd` makes it)")?;
        let mut peer = Self { process, directory };
        let deadline = Instant::now() + PATIENCE;
        // It listens only when all its plugins are there.
        while UnixStream::connect(peer.socket()).is_err() {
            if let Some(status) = peer.process.try_wait().context("looking after containerd")? {
                bail!("containerd ended at its start: {status}\n{}", peer.log());
            }
            if Instant::now() > deadline {
                bail!("containerd did not listen within {PATIENCE:?}\n{}", peer.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(peer)
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("containerd.sock")
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = kill_process(self.pid(), Signal::TERM);
        let _ = self.process.wait();
        for command in [vec!["ip", "link", "delete", BRIDGE], vec!["nft", "flush", "ruleset"]] {
            // Without pods there may be none.
            let _ = Command::new(command[0]).args(&command[1..]).stderr(Stdio::null()).status();
        }
        for directory in OUTSIDE.map(Path::new) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let _ = unmount(entry.path(), UnmountFlags::DETACH);
            }
            let _ = unmount(directory, UnmountFlags::DETACH);
            let _ = fs::remove_dir_all(directory);
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            remove_cgroup(&hierarchy.path().join(CGROUP));
        }
    }
}

fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // What is not empty stays, and the sandbox reports it.
    let _ = fs::remove_dir(path);
}

fn configuration(directory: &Path) -> String {
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
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = 'registry.k8s.io/pause:3.9'\n\
         [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = {certs:?}\n\
         [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/usr/lib/cni', '/opt/cni/bin']\nconf_dir = {cni:?}\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'runc'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nBinaryName = {runc:?}\nSystemdCgroup = false\n"
    )
}

fn network() -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "peer",
        "plugins": [
            {
                "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.77.0.0/16"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}
