//! The container runtime below a cluster: everything that differs between podvisor and its peer is in here.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::node::{Daemon, Node, Options, daemon_program, debug_daemon_program, guests_dir};
use podvisor_critest::peer::{Kind as PeerKind, Peer};
use podvisor_critest::registry::Registry;
use rustix::process::{Signal, kill_process};

use crate::images::{DEFAULT_REPOSITORY, OTHER_REPOSITORY, UNREACHABLE};
use crate::unit::Unit;

/// Which of the two files that know mirrors the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mirrors {
    /// containers-registries.conf(5).
    RegistriesConf,
    /// containerd's hosts.toml.
    HostsToml,
}

/// How the node's runtime is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setup {
    /// Its pause image; "" is the built-in one.
    pub(crate) pause_image: &'static str,
    /// Where its mirrors are written down.
    pub(crate) mirrors: Mirrors,
    /// Whether pods that say nothing are untrusted.
    pub(crate) untrusted: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { pause_image: "", mirrors: Mirrors::RegistriesConf, untrusted: false }
    }
}

/// A running container runtime; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Runtime(Kind);

#[derive(Debug)]
enum Kind {
    Podvisor { node: Node, daemon: Process },
    Containerd(Peer),
}

/// What runs podvisor.
#[derive(Debug)]
enum Process {
    /// The tests themselves: as a child, when it runs.
    Child(Option<Daemon>),
    /// systemd.
    Unit(Unit),
}

/// Whether the peer was asked for: `RUNTIME=containerd`.
pub(crate) fn is_peer() -> bool {
    std::env::var("RUNTIME").is_ok_and(|name| name == "containerd")
}

impl Runtime {
    /// Starts podvisor, or what `RUNTIME` says. Images come from `registry` alone.
    pub(crate) fn start(setup: &Setup, registry: &Registry) -> Result<Self> {
        if is_peer() {
            let hosts = [DEFAULT_REPOSITORY, host(OTHER_REPOSITORY)];
            return Ok(Self(Kind::Containerd(Peer::start(
                PeerKind::Containerd,
                &hosts,
                registry.address(),
                "registry.k8s.io/pause:3.10.2",
            )?)));
        }
        let directory = Path::new("/var/lib/podvisor");
        let daemon = if Unit::is_wanted() { Process::Unit(Unit::prepare()?) } else { Process::Child(None) };
        let options = Options {
            program: Path::new(PROGRAMS).join("podvisor"),
            network: "builtin".to_owned(),
            mirrored: Vec::new(),
            mirror: None,
            ..Options::default()
        };
        let node = Node::kept(directory, Path::new("/run/podvisor"), &options)?;
        fs::create_dir_all(node.path("root"))?;
        symlink(guests_dir(), node.path("root/guests")).context("linking to the guest")?;
        match setup.mirrors {
            Mirrors::RegistriesConf => {
                fs::write(node.path("registries.conf"), registries(registry.address()))?;
            }
            Mirrors::HostsToml => hosts_toml(&node.path("certs.d"), registry.address())?,
        }
        let mut runtime = Self(Kind::Podvisor { node, daemon });
        runtime.set_trust(setup.untrusted)?;
        runtime.set_pause_image(setup.pause_image)?;
        runtime.install(0)?;
        runtime.start_again()?;
        Ok(runtime)
    }

    /// Where it listens, for kubeadm.
    pub(crate) fn endpoint(&self) -> String {
        let socket = match &self.0 {
            Kind::Podvisor { node, .. } => node.socket(),
            Kind::Containerd(peer) => peer.socket().to_owned(),
        };
        format!("unix://{}", socket.display())
    }

    /// Its log.
    pub(crate) fn log(&self) -> String {
        match &self.0 {
            Kind::Podvisor { daemon: Process::Unit(_), .. } => Unit::log(),
            Kind::Podvisor { node, .. } => fs::read_to_string(node.log_file()).unwrap_or_default(),
            Kind::Containerd(peer) => peer.log(),
        }
    }

    /// SIGKILL, as a crash.
    pub(crate) fn kill(&mut self) -> Result<()> {
        match &mut self.0 {
            Kind::Podvisor { daemon: Process::Child(daemon), .. } => {
                daemon.take().context("the daemon does not run")?.kill()
            }
            Kind::Podvisor { daemon: Process::Unit(_), .. } => Unit::kill(),
            Kind::Containerd(_) => bail!("the peer is not killed"),
        }
    }

    /// Starts it after [`Runtime::kill`].
    pub(crate) fn start_again(&mut self) -> Result<()> {
        match &mut self.0 {
            Kind::Podvisor { node, daemon: Process::Child(daemon) } => {
                ensure!(daemon.is_none(), "the daemon runs already");
                *daemon = Some(node.start()?);
                Ok(())
            }
            Kind::Podvisor { daemon: Process::Unit(_), .. } => Unit::start(),
            Kind::Containerd(_) => bail!("the peer is not started again"),
        }
    }

    /// Replaces its programs by those of another build, 0 or 1. The daemon goes on; but a package restarts it.
    pub(crate) fn install(&self, build: usize) -> Result<()> {
        match &self.0 {
            Kind::Podvisor { daemon: Process::Child(_), .. } => {
                install(&[daemon_program(), debug_daemon_program()][build])
            }
            Kind::Podvisor { node, daemon: Process::Unit(_) } => {
                Unit::install(build, &node.configuration_file())
            }
            Kind::Containerd(_) => bail!("the peer is not upgraded"),
        }
    }

    /// Ends it as its unit does, and starts it again.
    pub(crate) fn restart(&mut self) -> Result<()> {
        if let Kind::Podvisor { daemon: Process::Child(daemon), .. } = &mut self.0 {
            let status = daemon.take().context("the daemon does not run")?.stop()?;
            ensure!(status.success(), "the daemon ended by {status}");
        }
        self.start_again()
    }

    /// What pods are that say nothing; counts from [`Runtime::reload`] on.
    pub(crate) fn set_trust(&self, untrusted: bool) -> Result<()> {
        let trust = if untrusted { "untrusted" } else { "trusted" };
        self.drop_in("trust", &format!("[runtime]\ndefault_workload_trust = \"{trust}\"\n"))
    }

    /// Sets the pause image; counts from [`Runtime::reload`] on.
    pub(crate) fn set_pause_image(&self, name: &str) -> Result<()> {
        self.drop_in("pause", &format!("[image]\npause_image = \"{name}\"\n"))
    }

    fn drop_in(&self, name: &str, text: &str) -> Result<()> {
        let Kind::Podvisor { node, .. } = &self.0 else { bail!("the peer has one configuration") };
        let directory = node.path("config.toml.d");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("{name}.toml")), text).context("writing a drop-in")
    }

    /// SIGHUP: takes over what may change while it runs, and returns when the log says that it was taken over.
    pub(crate) fn reload(&self) -> Result<()> {
        let said = || self.log().matches("took over the changed configuration").count();
        let before = said();
        match &self.0 {
            Kind::Podvisor { daemon: Process::Child(Some(daemon)), .. } => {
                kill_process(daemon.pid(), Signal::HUP).context("asking for a reload")?;
            }
            Kind::Podvisor { daemon: Process::Unit(_), .. } => Unit::reload()?,
            _ => bail!("podvisor does not run"),
        }
        crate::until("the daemon reloads", || {
            ensure!(said() > before, "it has not yet");
            Ok(())
        })
    }

    /// Its configuration file.
    pub(crate) fn configuration(&self) -> Result<std::path::PathBuf> {
        let Kind::Podvisor { node, .. } = &self.0 else { bail!("the peer's is its own business") };
        Ok(node.configuration_file())
    }

    /// Where its guests are: a link to those that all tests share.
    pub(crate) fn guests(&self) -> Result<std::path::PathBuf> {
        let Kind::Podvisor { node, .. } = &self.0 else { bail!("the peer has no guests") };
        Ok(node.path("root/guests"))
    }
}

/// Where podvisor's programs are installed.
const PROGRAMS: &str = "/var/lib/podvisor/bin";

/// Installs podvisor's programs, each by renaming, as dpkg does: who runs an older one goes on with it. `daemon` is one of them, and the
/// others lie beside it.
fn install(daemon: &Path) -> Result<()> {
    let source = daemon.parent().context("the daemon has no directory")?;
    fs::create_dir_all(PROGRAMS).with_context(|| format!("making {PROGRAMS}"))?;
    for name in ["podvisor", "podvisor-monitor", "podvisor-vmm", "podvisor-qemu", "podvisor-fs"] {
        let (part, to) = (format!("{PROGRAMS}/{name}.dpkg-new"), format!("{PROGRAMS}/{name}"));
        fs::copy(source.join(name), &part)
            .with_context(|| format!("copying {}", source.join(name).display()))?;
        fs::rename(&part, &to).with_context(|| format!("installing {to}"))?;
    }
    Ok(())
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let Kind::Podvisor { daemon, .. } = &mut self.0 else { return };
        match daemon {
            Process::Child(daemon) => {
                if let Some(daemon) = daemon.take() {
                    // One that cannot end is killed, and what it holds is reported by the sandbox.
                    let _ = daemon.stop();
                }
            }
            // Its package is purged at last.
            Process::Unit(_) => {
                let _ = Unit::stop();
            }
        }
        for directory in ["/var/lib/podvisor", "/run/podvisor"] {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let _ = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            }
        }
        let _ = fs::remove_dir("/run/podvisor");
    }
}

/// The host of an image repository.
fn host(repository: &str) -> &str {
    repository.split('/').next().unwrap_or(repository)
}

/// The two endpoints behind [`UNREACHABLE`], at which nothing listens.
pub(crate) const DEAD_MIRRORS: [&str; 2] = ["127.0.0.1:1", "127.0.0.1:2"];

fn registries(registry: SocketAddr) -> String {
    let mut text = String::new();
    let mut mirror = |host: &str, mirrors: &[String]| {
        // Writing to a string cannot fail.
        let _ = write!(text, "[[registry]]\nprefix = \"{host}\"\nlocation = \"{host}\"\n");
        for mirror in mirrors {
            let _ = write!(text, "[[registry.mirror]]\nlocation = \"{mirror}\"\ninsecure = true\n");
        }
    };
    mirror(DEFAULT_REPOSITORY, &[registry.to_string()]);
    mirror(host(OTHER_REPOSITORY), &[registry.to_string()]);
    mirror(UNREACHABLE, &DEAD_MIRRORS.map(str::to_owned));
    text
}

fn hosts_toml(certs: &Path, registry: SocketAddr) -> Result<()> {
    let dead: Vec<String> = DEAD_MIRRORS.map(str::to_owned).into();
    for (host, mirrors) in [
        (DEFAULT_REPOSITORY, vec![registry.to_string()]),
        (host(OTHER_REPOSITORY), vec![registry.to_string()]),
        (UNREACHABLE, dead),
    ] {
        let directory = certs.join(host);
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let mut text = format!("server = \"https://{host}\"\n");
        for mirror in mirrors {
            let _ = write!(text, "[host.\"http://{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
        }
        fs::write(directory.join("hosts.toml"), text).context("writing hosts.toml")?;
    }
    Ok(())
}
