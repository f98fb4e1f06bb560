//! A node of one's own: directories, configuration and the daemon that runs on them.
//!
//! For use inside a [sandbox](crate::sandbox): the daemon makes interfaces, mounts and cgroups. Everything of a node
//! is below one temporary directory, so that nodes do not meet and nothing remains.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{target_dir, tools_dir};

/// How long a daemon may take until it says that it is ready, also when it has many pods to take over.
const START: Duration = Duration::from_secs(60);

/// How long a daemon may take to end after SIGTERM.
const STOP: Duration = Duration::from_secs(60);

/// Where namespaces are pinned; each is a mount of its own, made once per machine.
pub const PINS: [&str; 4] = ["/run/netns", "/run/ipcns", "/run/utsns", "/run/userns"];

/// The daemon's default for the monitors' cgroup.
pub const SLICE: &str = "podvisor.slice";

const CGROUPS: &str = "/sys/fs/cgroup";

/// The daemon as `make build` leaves it.
pub fn daemon_program() -> PathBuf {
    std::env::var_os("PODVISOR").map_or_else(|| target_dir().join("release/podvisor"), PathBuf::from)
}

/// Handlers that a node has only when its pods are to get them, and their configuration: Debian's runc, which is older
/// than the one of this project's tools, and gVisor.
const FURTHER_HANDLERS: [(&str, &str); 2] = [
    ("runc-debian", "type = \"oci\"\npath = \"/usr/sbin/runc\""),
    (
        "runsc",
        "type = \"oci\"\npath = \"TOOLS/runsc\"\narguments = [\"--platform=systrap\", \"--oci-seccomp\", \"--allow-suid\"]\nsandbox_container = true",
    ),
];

/// The handler whose pods are virtual machines. Where it is asked for, every pod that can be one is: those that are privileged or use a
/// namespace of the host's go to runc. The machines are made by QEMU's translator where there is no KVM.
pub const VM: &str = "vm";

/// Where the guest is that pods in virtual machines get (`make guest`).
pub fn guests_dir() -> PathBuf {
    target_dir().join("guest/guests")
}

/// The daemon as `cargo test` leaves it, with its failure points.
pub fn debug_daemon_program() -> PathBuf {
    std::env::var_os("PODVISOR_DEBUG").map_or_else(|| target_dir().join("debug/podvisor"), PathBuf::from)
}

/// What a node's configuration is made from.
#[derive(Debug, Clone)]
pub struct Options {
    /// Registries that are reached through `mirror`, by host name.
    pub mirrored: Vec<String>,
    /// The registry that mirrors them.
    pub mirror: Option<SocketAddr>,
    /// Name of the handler for pods that name none: `runc`, `crun`, one of [`FURTHER_HANDLERS`], or [`VM`].
    pub handler: String,
    /// What makes virtual machines: `auto`, `kvm` or `qemu`.
    pub hypervisor: String,
    /// More lines for the daemon's configuration, whole tables.
    pub more: String,
    /// Lines for the table `[nri]`. Its paths are below the node's directory `nri`.
    pub nri: String,
    /// The daemon's log filter.
    pub log: String,
    /// `builtin` or `cni`.
    pub network: String,
    /// The daemon's program.
    pub program: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mirrored: Vec::new(),
            mirror: None,
            handler: "runc".to_owned(),
            hypervisor: "auto".to_owned(),
            more: String::new(),
            // Machines that run tests are slow now and then, which is not to cost a plugin its place.
            nri: "registration_timeout = 60\nrequest_timeout = 60\n".to_owned(),
            log: "info,podvisor=debug".to_owned(),
            network: "builtin".to_owned(),
            program: daemon_program(),
        }
    }
}

/// Directories and configuration of one daemon.
#[derive(Debug)]
pub struct Node {
    directory: PathBuf,
    run: PathBuf,
    bridge: String,
    program: PathBuf,
    _own: Option<TempDir>,
}

impl Node {
    /// Makes the directories and writes the configuration.
    pub fn new(options: &Options) -> Result<Self> {
        let own =
            tempfile::Builder::new().prefix("node.").tempdir().context("making a directory for a node")?;
        let node = Self {
            directory: own.path().to_owned(),
            run: own.path().join("run"),
            bridge: "podvisor0".to_owned(),
            program: options.program.clone(),
            _own: Some(own),
        };
        node.configure(options)
    }

    /// A node on a directory that stays. What a restart of the machine has to empty is in `run`.
    pub fn kept(directory: &Path, run: &Path, options: &Options) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let node = Self {
            directory: directory.to_owned(),
            run: run.to_owned(),
            bridge: "podvisor0".to_owned(),
            program: options.program.clone(),
            _own: None,
        };
        node.configure(options)
    }

    fn configure(self, options: &Options) -> Result<Self> {
        if std::env::var_os(crate::sandbox::MARK).is_none() {
            bail!(
                "a node changes interfaces, mounts and cgroups: run this in `podvisor-critest sandbox -- …`"
            );
        }
        // As /run and /var are: the root of a pod's user namespace has to pass.
        fs::set_permissions(&self.directory, fs::Permissions::from_mode(0o711))
            .context("opening the node's directory")?;
        fs::write(self.path("registries.conf"), registries(options))?;
        fs::write(self.path("config.toml"), self.configuration(options))?;
        if options.handler == VM {
            fs::create_dir_all(self.path("root"))?;
            std::os::unix::fs::symlink(guests_dir(), self.path("root/guests"))
                .context("linking to the guest")?;
        }
        Ok(self)
    }

    /// A path below the node's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The configuration file.
    pub fn configuration_file(&self) -> PathBuf {
        self.path("config.toml")
    }

    /// The socket that the daemon serves.
    pub fn socket(&self) -> PathBuf {
        self.run.join("podvisor.sock")
    }

    /// The daemon's log, of all its starts.
    pub fn log_file(&self) -> PathBuf {
        self.path("daemon.log")
    }

    /// The file that the daemon takes for the machine's boot id when [`Node::reboot`] was called.
    fn boot_id_file(&self) -> PathBuf {
        self.path("boot_id")
    }

    fn configuration(&self, options: &Options) -> String {
        let Options { handler, hypervisor, more, nri, log, network, .. } = options;
        let [root, registries, certs, auth, cni] = ["root", "registries.conf", "certs.d", "auth.json", "cni"]
            .map(|name| self.path(name).display().to_string());
        let [run, socket] = [&self.run, &self.socket()].map(|path| path.display().to_string());
        let runc = tools_dir().join("runc").display().to_string();
        let plugins = self.path("nri").display().to_string();
        let bridge = &self.bridge;
        let further = FURTHER_HANDLERS.iter().find(|(name, _)| name == handler).map(|(name, table)| {
            let table = table.replace("TOOLS", &tools_dir().display().to_string());
            format!("[runtime.handlers.{name}]\n{table}\n")
        });
        let further = further.unwrap_or_default();
        let (trusted, trust) =
            if handler == VM { ("runc", "untrusted") } else { (handler.as_str(), "trusted") };
        format!(
            "root = {root:?}\nrun = {run:?}\nsocket = {socket:?}\n\
             [log]\nlevel = {log:?}\n\
             [runtime]\ntrusted_handler = {trusted:?}\ndefault_workload_trust = {trust:?}\n\
             [runtime.handlers.runc]\ntype = \"oci\"\npath = {runc:?}\n\
             [runtime.handlers.crun]\ntype = \"oci\"\npath = \"crun\"\n\
             [runtime.handlers.vm]\nallow_emulation = true\nhypervisor = {hypervisor:?}\n\
             {further}\
             [image]\nregistries_conf = {registries:?}\ncerts_dir = {certs:?}\nauth_files = [{auth:?}]\n\
             [network]\nmode = {network:?}\nbridge = {bridge:?}\ncni_config_dir = \"{cni}/net.d\"\n\
             cni_cache_dir = \"{cni}/cache\"\n\
             [nri]\nsocket = \"{plugins}/nri.sock\"\nplugin_dir = \"{plugins}/plugins\"\n\
             plugin_config_dir = \"{plugins}/conf.d\"\n{nri}\n\
             {more}\n"
        )
    }

    /// From now on the daemon believes that the machine has been started again.
    pub fn reboot(&self) -> Result<()> {
        let id = fs::read("/proc/sys/kernel/random/uuid").context("making up a boot id")?;
        fs::write(self.boot_id_file(), id).context("writing another boot id")
    }

    /// Starts the daemon and returns when it serves.
    pub fn start(&self) -> Result<Daemon> {
        self.start_with(&[])
    }

    /// The same with more in its environment.
    pub fn start_with(&self, environment: &[(&str, &str)]) -> Result<Daemon> {
        let (mut daemon, notifications) = self.spawn_with(environment)?;
        let deadline = Instant::now() + START;
        let mut message = [0_u8; 4096];
        loop {
            match notifications.recv(&mut message) {
                Ok(length)
                    if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == "READY=1") =>
                {
                    return Ok(daemon);
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("waiting for the daemon's notification"),
            }
            if let Some(status) = daemon.ended()? {
                bail!("the daemon ended at its start: {status}\n{}", self.log_tail(40));
            }
            if Instant::now() > deadline {
                bail!("the daemon did not say READY=1 within {START:?}\n{}", self.log_tail(40));
            }
        }
    }

    /// Starts the daemon without waiting for anything; its notifications (sd_notify(3)) come on the socket.
    pub fn spawn(&self) -> Result<(Daemon, UnixDatagram)> {
        self.spawn_with(&[])
    }

    fn spawn_with(&self, environment: &[(&str, &str)]) -> Result<(Daemon, UnixDatagram)> {
        let notify = self.path("notify.sock");
        if notify.exists() {
            fs::remove_file(&notify).context("removing the last notification socket")?;
        }
        let notifications = UnixDatagram::bind(&notify).context("making a notification socket")?;
        // So that the end of the process is noticed too, for which no message comes.
        notifications.set_read_timeout(Some(Duration::from_millis(100)))?;
        let log =
            File::options().create(true).append(true).open(self.log_file()).context("opening the log")?;
        let mut command = Command::new(&self.program);
        command
            .envs(environment.iter().copied())
            .arg("--config")
            .arg(self.configuration_file())
            .arg("serve")
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if self.boot_id_file().exists() {
            command.env("PODVISOR_BOOT_ID_FILE", self.boot_id_file());
        }
        let process = command
            .spawn()
            .with_context(|| format!("starting {} (`make build` makes it)", self.program.display()))?;
        Ok((Daemon { process }, notifications))
    }

    /// Takes away what the built-in network shares among pods: the bridge and the packet filter's tables.
    pub fn remove_network(&self) {
        for command in [vec!["ip", "link", "delete", &self.bridge], vec!["nft", "flush", "ruleset"]] {
            // Without pods there may be none.
            let _ = Command::new(command[0]).args(&command[1..]).stderr(Stdio::null()).status();
        }
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.log_file()).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Node {
    /// What outlives a daemon because pods do ends with the node: the bridge and its packet filter, the directories
    /// of pinned namespaces, the monitors' cgroup. What is not empty stays, and the sandbox reports it.
    fn drop(&mut self) {
        self.remove_network();
        // gVisor keeps an empty network namespace for all its sandboxes.
        let _ = unmount(self.path("run/runsc/null-netns"), UnmountFlags::DETACH);
        for directory in PINS {
            if fs::read_dir(directory).is_ok_and(|mut pins| pins.next().is_none()) {
                let _ = unmount(directory, UnmountFlags::DETACH);
                let _ = fs::remove_dir(directory);
            }
        }
        let _ = fs::remove_dir(Path::new(CGROUPS).join(SLICE));
        for hierarchy in fs::read_dir(CGROUPS).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(SLICE));
        }
    }
}

fn registries(options: &Options) -> String {
    let mut text = String::new();
    let Some(mirror) = options.mirror else { return text };
    for host in &options.mirrored {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "[[registry]]\nprefix = \"{host}\"\nlocation = \"{host}\"\n\
             [[registry.mirror]]\nlocation = \"{mirror}\"\ninsecure = true\n\n"
        );
    }
    text
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Child,
}

impl Daemon {
    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Its exit status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.try_wait().context("looking after the daemon")
    }

    /// Waits for its end, at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the daemon did not end within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL, as a crash.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill().context("killing the daemon")?;
        let status = self.process.wait().context("waiting for the daemon")?;
        if status.signal() != Some(Signal::KILL.as_raw()) {
            bail!("the daemon had ended by itself: {status}");
        }
        Ok(())
    }

    /// SIGTERM, and waits for its end.
    pub fn stop(mut self) -> Result<ExitStatus> {
        kill_process(self.pid(), Signal::TERM).context("stopping the daemon")?;
        self.wait(STOP)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
