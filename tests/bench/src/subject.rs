//! Who is measured: a daemon in this sandbox, with its client.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Daemon, Node, Options, VM};
use podvisor_critest::peer::{self, Kind, Peer};
use podvisor_proto::cri::VersionRequest;
use podvisor_tests::cri::Cri;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::images::{HOST, PAUSE};
use crate::process;

/// Who.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Name {
    /// podvisor with the runc of this project's tools.
    Podvisor,
    /// podvisor with the distribution's crun.
    PodvisorCrun,
    /// The same with podvisor's own network in place of the CNI plugins.
    PodvisorBuiltin,
    /// podvisor with a virtual machine per pod, by QEMU's translator where there is no KVM.
    PodvisorVm,
    /// containerd with the same runc.
    Containerd,
    /// CRI-O with the same runc.
    Crio,
    /// runc, and a program that unpacks layers, without a daemon: what nobody can be faster than.
    Runc,
    /// The same of crun.
    Crun,
    /// QEMU that boots the same guest kernel, without a daemon.
    Qemu,
}

impl Name {
    pub(crate) const ALL: [Self; 9] = [
        Self::Podvisor,
        Self::PodvisorCrun,
        Self::PodvisorBuiltin,
        Self::Containerd,
        Self::Crio,
        Self::Runc,
        Self::Crun,
        Self::PodvisorVm,
        Self::Qemu,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Podvisor => "podvisor",
            Self::PodvisorCrun => "podvisor-crun",
            Self::PodvisorBuiltin => "podvisor-builtin",
            Self::PodvisorVm => "podvisor-vm",
            Self::Containerd => "containerd",
            Self::Crio => "crio",
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Qemu => "qemu",
        }
    }

    /// What the project is compared with.
    pub(crate) fn is_peer(self) -> bool {
        matches!(self, Self::Containerd | Self::Crio)
    }

    /// This project in one of its forms.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Podvisor | Self::PodvisorCrun | Self::PodvisorBuiltin | Self::PodvisorVm)
    }
}

/// A daemon that runs; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) cri: Cri,
    own: Own,
    logs: TempDir,
}

/// A configuration that is to come back.
#[derive(Debug)]
#[must_use]
pub(crate) struct Configuration(String);

impl Configuration {
    /// Starts the daemon again as it was before.
    pub(crate) fn restore(self, subject: &mut Subject) -> Result<()> {
        subject.configure(&self.0)
    }
}

#[derive(Debug)]
enum Own {
    Podvisor { daemon: Option<Daemon>, node: Node },
    Peer(Peer),
}

impl Subject {
    /// Starts it, with images from the mirror.
    pub(crate) fn start(name: Name, mirror: SocketAddr) -> Result<Self> {
        let logs =
            tempfile::Builder::new().prefix("logs.").tempdir().context("making a directory for logs")?;
        let (own, socket) = match name {
            Name::Podvisor => podvisor("runc", Network::Cni, mirror)?,
            Name::PodvisorCrun => podvisor("crun", Network::Cni, mirror)?,
            Name::PodvisorBuiltin => podvisor("crun", Network::Builtin, mirror)?,
            Name::PodvisorVm => podvisor(VM, Network::Cni, mirror)?,
            Name::Containerd => of_peer(Kind::Containerd, mirror)?,
            Name::Crio => of_peer(Kind::Crio, mirror)?,
            Name::Runc | Name::Crun | Name::Qemu => anyhow::bail!("{name:?} is no daemon"),
        };
        Ok(Self { cri: Cri::new(&socket)?, own, logs })
    }

    /// Ends the daemon as an upgrade does: its pods go on.
    pub(crate) fn stop(&mut self) -> Result<()> {
        match &mut self.own {
            Own::Podvisor { daemon, node } => {
                let Some(daemon) = daemon.take() else { return Ok(()) };
                let status = daemon.stop()?;
                ensure!(status.success(), "the daemon ended with {status}\n{}", node.log_tail(20));
                Ok(())
            }
            Own::Peer(peer) => peer.stop(),
        }
    }

    /// Starts the daemon again, and returns when it listens.
    pub(crate) fn resume(&mut self) -> Result<()> {
        match &mut self.own {
            Own::Podvisor { daemon, node } => {
                *daemon = Some(node.start()?);
                Ok(())
            }
            Own::Peer(peer) => peer.resume(),
        }
    }

    pub(crate) async fn version(&self) -> Result<String> {
        let request = VersionRequest { version: "v1".to_owned() };
        let answer = self.cri.runtime.clone().version(request).await?.into_inner();
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// Where pods have their logs.
    pub(crate) fn logs(&self) -> &Path {
        self.logs.path()
    }

    /// Starts podvisor's daemon again with another log filter and format.
    pub(crate) fn log_from_now_on(&mut self, filter: &str, format: &str) -> Result<Configuration> {
        let Own::Podvisor { node, .. } = &self.own else { anyhow::bail!("a peer's log is not ours") };
        let file = node.configuration_file();
        let before = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let (head, rest) =
            before.split_once("\n[log]\n").context("the configuration has no table for the log")?;
        let (_, tail) = rest.split_once('\n').context("the table for the log is not one line")?;
        let other = format!("{head}\n[log]\nlevel = {filter:?}\nformat = {format:?}\n{tail}");
        self.configure(&other)?;
        Ok(Configuration(before))
    }

    fn configure(&mut self, text: &str) -> Result<()> {
        if let Own::Podvisor { node, .. } = &self.own {
            fs::write(node.configuration_file(), text).context("writing the configuration")?;
        }
        self.stop()?;
        self.resume()
    }

    /// Everything that podvisor's daemons have logged.
    pub(crate) fn log(&self) -> Result<String> {
        let Own::Podvisor { node, .. } = &self.own else { anyhow::bail!("a peer's log is not ours") };
        let file = node.log_file();
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }

    /// Its daemon.
    pub(crate) fn daemon(&self) -> Result<i32> {
        let pid = match &self.own {
            Own::Podvisor { daemon, .. } => daemon.as_ref().map(Daemon::pid),
            Own::Peer(peer) => peer.pid(),
        };
        Ok(pid.context("the daemon does not run")?.as_raw_nonzero().get())
    }

    /// Its helpers, which it has per pod or per container.
    pub(crate) fn helpers(&self) -> Result<Vec<i32>> {
        process::named(match &self.own {
            Own::Podvisor { .. } => {
                &["podvisor-monit", "podvisor-fs", "podvisor-qemu", "podvisor-vmm", "qemu-system"]
            }
            Own::Peer(_) => &["containerd-shim", "conmon"],
        })
    }

    /// Stops it. No pod is left.
    pub(crate) fn end(mut self) -> Result<()> {
        self.stop()?;
        if let Own::Podvisor { .. } = self.own {
            peer::remove_network();
        }
        Ok(())
    }

    /// The end of what it has logged.
    pub(crate) fn log_tail(&self) -> String {
        let log = match &self.own {
            Own::Podvisor { node, .. } => node.log_tail(20),
            Own::Peer(peer) => peer.log(),
        };
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// Who gives pods their network.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Network {
    /// The plugins that the peers call.
    Cni,
    Builtin,
}

fn podvisor(handler: &str, network: Network, mirror: SocketAddr) -> Result<(Own, PathBuf)> {
    let mode = if network == Network::Cni { "cni" } else { "builtin" };
    let node = Node::new(&Options {
        mirrored: vec![HOST.to_owned()],
        mirror: Some(mirror),
        handler: handler.to_owned(),
        log: "info".to_owned(),
        network: mode.to_owned(),
        ..Options::default()
    })?;
    if network == Network::Cni {
        let networks = node.path("cni/net.d");
        fs::create_dir_all(&networks)?;
        fs::write(networks.join("10-peer.conflist"), peer::network())?;
    }
    let daemon = Some(node.start()?);
    let socket = node.socket();
    Ok((Own::Podvisor { daemon, node }, socket))
}

fn of_peer(kind: Kind, mirror: SocketAddr) -> Result<(Own, PathBuf)> {
    let peer = Peer::start(kind, &[HOST], mirror, PAUSE)?;
    let socket = peer.socket().to_owned();
    Ok((Own::Peer(peer), socket))
}
