//! What a node has and a sandbox lacks: an interface with a default route, a name, a name server of its own; and what kubelet must not
//! reach, which is what belongs to the whole machine.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The node's name.
pub(crate) const NAME: &str = "node";

/// The node's address (RFC 5737 keeps it for documentation, so that it is nobody's).
pub(crate) const ADDRESS: &str = "192.0.2.10";

/// The same of IPv6 (RFC 3849).
pub(crate) const ADDRESS6: &str = "2001:db8::10";

/// The node's interface.
const INTERFACE: &str = "eth0";

/// Files of the tests' own, apart from what kubeadm makes.
pub(crate) const DIRECTORY: &str = "/run/kubernetes-test";

const HOSTS: &str = "/etc/hosts";

/// What kubelet sets for the whole machine when it starts. It is shown these values as if they were set already (kubelet's
/// `setupKernelTunables`), in a mount namespace of its own.
const TUNABLES: [(&str, &str); 6] = [
    ("/proc/sys/vm/overcommit_memory", "1"),
    ("/proc/sys/vm/panic_on_oom", "0"),
    ("/proc/sys/kernel/panic", "10"),
    ("/proc/sys/kernel/panic_on_oops", "1"),
    ("/proc/sys/kernel/keys/root_maxkeys", "1000000"),
    ("/proc/sys/kernel/keys/root_maxbytes", "25000000"),
];

/// What kubeadm, kubelet and the control plane's pods leave on a node by design, also after a reset.
const KEPT: [&str; 5] = ["/etc/kubernetes", "/etc/cni", "/var/lib/etcd", "/var/lib/cni", "/run/xtables.lock"];

/// The node's surroundings; they go when this is dropped.
#[derive(Debug)]
pub(crate) struct Machine(());

impl Machine {
    /// Makes them.
    pub(crate) fn prepare() -> Result<Self> {
        ensure!(
            std::env::var_os(podvisor_critest::sandbox::MARK).is_some(),
            "a cluster changes interfaces, mounts and files: run this in `podvisor-critest sandbox -- …`"
        );
        let machine = Self(());
        fs::create_dir_all(DIRECTORY).with_context(|| format!("making {DIRECTORY}"))?;
        rustix::system::sethostname(NAME.as_bytes()).context("naming the node")?;
        // Nobody answers there: names outside of the cluster are unknown.
        fs::write(resolv_conf(), "nameserver 192.0.2.1\n").context("writing resolv.conf")?;
        // A node knows its own name; kubelet looks it up before it starts its first pods.
        let hosts = format!("{DIRECTORY}/hosts");
        fs::write(&hosts, format!("127.0.0.1 localhost\n{ADDRESS} {NAME}\n")).context("writing hosts")?;
        rustix::mount::mount_bind(&hosts, HOSTS).context("putting the node's name into /etc/hosts")?;
        for (file, value) in TUNABLES {
            fs::write(tunable(file), format!("{value}\n"))
                .with_context(|| format!("standing in for {file}"))?;
        }
        for command in [
            vec!["link", "add", INTERFACE, "type", "veth", "peer", "name", "uplink"],
            vec!["link", "set", "uplink", "up"],
            vec!["link", "set", INTERFACE, "up"],
            vec!["address", "add", &format!("{ADDRESS}/24"), "dev", INTERFACE],
            vec!["route", "add", "default", "via", "192.0.2.1", "dev", INTERFACE],
            vec!["address", "add", &format!("{ADDRESS6}/64"), "dev", INTERFACE, "nodad"],
            vec!["route", "add", "default", "via", "2001:db8::1", "dev", INTERFACE],
        ] {
            run(Command::new("ip").args(&command))?;
        }
        Ok(machine)
    }
}

impl Drop for Machine {
    /// What fails is reported by the sandbox.
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["link", "delete", INTERFACE]));
        let _ = rustix::mount::unmount(HOSTS, rustix::mount::UnmountFlags::DETACH);
        for path in KEPT.into_iter().chain([DIRECTORY]).map(Path::new) {
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
        for root in ["/var/lib/kubelet", "/var/log/pods", "/var/log/containers"] {
            for entry in fs::read_dir(root).into_iter().flatten().flatten() {
                let path = entry.path();
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let _ = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            }
        }
        remove_cgroups();
    }
}

/// Removes kubelet's cgroups, which a reset leaves. What still holds a process stays, and the sandbox reports it.
pub(crate) fn remove_cgroups() {
    let root = Path::new("/sys/fs/cgroup");
    for hierarchy in directories(root).into_iter().chain([root.to_owned()]) {
        remove_tree(&hierarchy.join("kubepods"));
    }
}

fn remove_tree(path: &Path) {
    for below in directories(path) {
        remove_tree(&below);
    }
    let _ = fs::remove_dir(path);
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// The file that pods take their name servers from.
pub(crate) fn resolv_conf() -> String {
    format!("{DIRECTORY}/resolv.conf")
}

fn tunable(file: &str) -> String {
    format!("{DIRECTORY}/{}", file.rsplit('/').next().unwrap_or(file))
}

/// A shell command that shows what [`TUNABLES`] says and then becomes its arguments, in a mount namespace from which mounts still
/// propagate to the node's.
pub(crate) fn with_tunables() -> Command {
    let mut script = String::from("mount --make-rprivate /proc");
    for (file, _) in TUNABLES {
        // Writing to a string cannot fail.
        let _ = write!(script, " && mount --bind {} {file}", tunable(file));
    }
    script.push_str(" && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "unchanged", "sh", "-c", &script, "kubelet"]);
    command
}

/// Runs a command to its end; what it printed, or an error with what it complained of.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}
