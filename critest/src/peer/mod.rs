//! The daemons that podvisor's results and times are compared with, containerd and CRI-O, on directories of their own.
//!
//! For use inside a [sandbox](crate::sandbox), like [`crate::node`]. They get what a node would give them: the registries
//! behind the same mirror, a bridge by CNI's reference plugins, and the runc of this project's tools.

mod containerd;
mod crio;

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

const PATIENCE: Duration = Duration::from_secs(60);

/// The bridge of [`network`].
const BRIDGE: &str = "peer0";

/// Which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// containerd with its shim and the runc of this project's tools (`critest/tools/build containerd`).
    Containerd,
    /// CRI-O with the distribution's conmon and the same runc (`critest/tools/build crio`). Specifications as new as it writes are refused by
    /// crun 1.8 of Debian 12.
    Crio,
}

/// What a daemon is started with.
#[derive(Debug)]
struct Setup {
    command: Command,
    socket: PathBuf,
    /// Directories outside of its own, none of which can be configured away.
    outside: &'static [&'static str],
    /// Where it puts pods that name no cgroup, in every hierarchy.
    cgroups: &'static [&'static str],
}

/// A running daemon; it ends when this is dropped.
#[derive(Debug)]
pub struct Peer {
    kind: Kind,
    command: Command,
    process: Option<Child>,
    directory: TempDir,
    socket: PathBuf,
    outside: &'static [&'static str],
    cgroups: &'static [&'static str],
}

impl Peer {
    /// Starts it and returns when it listens. `mirrored` registries are reached through `mirror`; `pause` is the image of its sandboxes.
    pub fn start(kind: Kind, mirrored: &[&str], mirror: SocketAddr, pause: &str) -> Result<Self> {
        if std::env::var_os(crate::sandbox::MARK).is_none() {
            bail!(
                "{kind:?} changes interfaces, mounts and cgroups: run this in `podvisor-critest sandbox -- …`"
            );
        }
        let directory = tempfile::Builder::new().prefix("peer.").tempdir().context("making a directory")?;
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("net.d")).context("making the directory of the CNI configuration")?;
        fs::write(path("net.d/10-peer.conflist"), network())?;
        let Setup { mut command, socket, outside, cgroups } = match kind {
            Kind::Containerd => containerd::setup(directory.path(), mirrored, mirror, pause)?,
            Kind::Crio => crio::setup(directory.path(), mirrored, mirror, pause)?,
        };
        let log = File::create(path("log")).context("making the log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut peer = Self { kind, command, process: None, directory, socket, outside, cgroups };
        peer.resume()?;
        Ok(peer)
    }

    /// Starts it again after [`Peer::stop`] and returns when it listens.
    pub fn resume(&mut self) -> Result<()> {
        let kind = self.kind;
        if self.socket.exists() {
            fs::remove_file(&self.socket).context("removing the last socket")?;
        }
        let process = self.command.spawn().with_context(|| {
            format!("starting {kind:?} (`critest/tools/build containerd crio` makes them)")
        })?;
        let process = self.process.insert(process);
        let deadline = Instant::now() + PATIENCE;
        // Both listen only when all their parts are there.
        while UnixStream::connect(&self.socket).is_err() {
            if let Some(status) = process.try_wait().context("looking after the peer")? {
                bail!("{kind:?} ended at its start: {status}\n{}", self.log());
            }
            if Instant::now() > deadline {
                bail!("{kind:?} did not listen within {PATIENCE:?}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// SIGTERM, and waits for its end. What it has started stays.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        kill_process(Pid::from_child(&process), Signal::TERM).context("stopping the peer")?;
        process.wait().context("waiting for the peer")?;
        Ok(())
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process, if it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Pid::from_child)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.stop();
        remove_network();
        for directory in self.outside.iter().map(Path::new) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let _ = unmount(entry.path(), UnmountFlags::DETACH);
            }
            let _ = unmount(directory, UnmountFlags::DETACH);
            let _ = fs::remove_dir_all(directory);
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            for cgroup in self.cgroups {
                remove_cgroup(&hierarchy.path().join(cgroup));
            }
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

/// What the plugins of [`network`] make once for all pods, and leave.
pub fn remove_network() {
    for command in [vec!["ip", "link", "delete", BRIDGE], vec!["nft", "flush", "ruleset"]] {
        // Without pods there may be none.
        let _ = Command::new(command[0]).args(&command[1..]).stderr(Stdio::null()).status();
    }
    let _ = fs::remove_dir_all("/var/lib/cni");
}

/// A CNI configuration list: a bridge, addresses for 65,000 pods, host ports.
pub fn network() -> String {
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
