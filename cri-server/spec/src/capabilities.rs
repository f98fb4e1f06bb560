//! Which capabilities a container gets.
//!
//! Sets are bit masks in the kernel's numbering (`include/uapi/linux/capability.h`). A container gets the same bounding, permitted
//! and effective set, whoever it runs as: at execve(2) the kernel itself takes the permitted and effective capabilities from a process
//! that is not root. Inheritable stays empty (CVE-2022-24769) but for ambient capabilities, which need it.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use podvisor_proto::cri;

use crate::HostFacts;
use crate::error::{Result, SpecError};

/// By number.
#[rustfmt::skip]
const NAMES: [(&str, Capability); 41] = [
    ("CAP_CHOWN", Capability::Chown),
    ("CAP_DAC_OVERRIDE", Capability::DacOverride),
    ("CAP_DAC_READ_SEARCH", Capability::DacReadSearch),
    ("CAP_FOWNER", Capability::Fowner),
    ("CAP_FSETID", Capability::Fsetid),
    ("CAP_KILL", Capability::Kill),
    ("CAP_SETGID", Capability::Setgid),
    ("CAP_SETUID", Capability::Setuid),
    ("CAP_SETPCAP", Capability::Setpcap),
    ("CAP_LINUX_IMMUTABLE", Capability::LinuxImmutable),
    ("CAP_NET_BIND_SERVICE", Capability::NetBindService),
    ("CAP_NET_BROADCAST", Capability::NetBroadcast),
    ("CAP_NET_ADMIN", Capability::NetAdmin),
    ("CAP_NET_RAW", Capability::NetRaw),
    ("CAP_IPC_LOCK", Capability::IpcLock),
    ("CAP_IPC_OWNER", Capability::IpcOwner),
    ("CAP_SYS_MODULE", Capability::SysModule),
    ("CAP_SYS_RAWIO", Capability::SysRawio),
    ("CAP_SYS_CHROOT", Capability::SysChroot),
    ("CAP_SYS_PTRACE", Capability::SysPtrace),
    ("CAP_SYS_PACCT", Capability::SysPacct),
    ("CAP_SYS_ADMIN", Capability::SysAdmin),
    ("CAP_SYS_BOOT", Capability::SysBoot),
    ("CAP_SYS_NICE", Capability::SysNice),
    ("CAP_SYS_RESOURCE", Capability::SysResource),
    ("CAP_SYS_TIME", Capability::SysTime),
    ("CAP_SYS_TTY_CONFIG", Capability::SysTtyConfig),
    ("CAP_MKNOD", Capability::Mknod),
    ("CAP_LEASE", Capability::Lease),
    ("CAP_AUDIT_WRITE", Capability::AuditWrite),
    ("CAP_AUDIT_CONTROL", Capability::AuditControl),
    ("CAP_SETFCAP", Capability::Setfcap),
    ("CAP_MAC_OVERRIDE", Capability::MacOverride),
    ("CAP_MAC_ADMIN", Capability::MacAdmin),
    ("CAP_SYSLOG", Capability::Syslog),
    ("CAP_WAKE_ALARM", Capability::WakeAlarm),
    ("CAP_BLOCK_SUSPEND", Capability::BlockSuspend),
    ("CAP_AUDIT_READ", Capability::AuditRead),
    ("CAP_PERFMON", Capability::Perfmon),
    ("CAP_BPF", Capability::Bpf),
    ("CAP_CHECKPOINT_RESTORE", Capability::CheckpointRestore),
];

/// What a container has that asks for nothing: the set of Docker and containerd, which images are built against.
const DEFAULT: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const FIELD: &str = "config.linux.security_context.capabilities";

/// Names of the capabilities in a mask such as `CapBnd` in `/proc/self/status`. Numbers newer than Linux 6.x's are left out.
pub fn capability_names(mask: u64) -> Vec<String> {
    names(mask).map(str::to_owned).collect()
}

/// Names of the capabilities that a container is to have in its bounding set: what a seccomp profile is evaluated with.
pub fn capabilities(config: &cri::ContainerConfig, host: &HostFacts) -> Result<Vec<String>> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    Ok(capability_names(granted(security, host)?.bounding))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) bounding: u64,
    ambient: u64,
}

impl Granted {
    pub(crate) fn sets(self) -> LinuxCapabilities {
        let mut sets = LinuxCapabilities::default();
        sets.set_bounding(Some(set(self.bounding)))
            .set_effective(Some(set(self.bounding)))
            .set_permitted(Some(set(self.bounding)))
            .set_inheritable(Some(set(self.ambient)))
            .set_ambient(Some(set(self.ambient)));
        sets
    }
}

/// Additions and removals in the order that the words suggest: ALL first, single names after, so that "drop ALL, add CHOWN" leaves CHOWN and
/// "add ALL, drop CHOWN" all but that. What is both added and dropped by name is dropped.
pub(crate) fn granted(
    security: Option<&cri::LinuxContainerSecurityContext>,
    host: &HostFacts,
) -> Result<Granted> {
    let available: u64 = host.capabilities.iter().filter_map(|name| bit(name)).sum_bits();
    let requested = security.and_then(|security| security.capabilities.as_ref());
    let none: &[String] = &[];
    let list = |pick: fn(&cri::Capability) -> &Vec<String>| requested.map_or(none, |caps| pick(caps));
    let add = parsed("add_capabilities", list(|caps| &caps.add_capabilities))?;
    let drop = parsed("drop_capabilities", list(|caps| &caps.drop_capabilities))?;
    let ambient = parsed("add_ambient_capabilities", list(|caps| &caps.add_ambient_capabilities))?;

    if security.is_some_and(|security| security.privileged) {
        let ambient = ambient.mask(available) & available;
        return Ok(Granted { bounding: available, ambient });
    }
    for (name, wanted) in [("add_capabilities", &add), ("add_ambient_capabilities", &ambient)] {
        if let Some((index, missing)) =
            wanted.single.iter().find(|(_, bit)| bit & available == 0 && bit & drop.singles() == 0)
        {
            let missing = names(*missing).next().unwrap_or_default();
            let why = format!(
                "{missing} is not in the bounding set of this node's runtime, so no container can have it"
            );
            return Err(SpecError::unsupported(format!("{FIELD}.{name}[{index}]"), why));
        }
    }
    let mut bounding = DEFAULT.iter().filter_map(|name| bit(name)).sum_bits() & available;
    if add.all {
        bounding = available;
    }
    if drop.all {
        bounding = 0;
    }
    let ambient = ambient.mask(available) & !drop.singles();
    bounding = (bounding | add.singles() | ambient) & !drop.singles();
    Ok(Granted { bounding, ambient })
}

/// One list of a request.
struct List {
    all: bool,
    /// Position and bit.
    single: Vec<(usize, u64)>,
}

impl List {
    fn singles(&self) -> u64 {
        self.single.iter().map(|(_, bit)| *bit).sum_bits()
    }

    fn mask(&self, all: u64) -> u64 {
        if self.all { all | self.singles() } else { self.singles() }
    }
}

fn parsed(field: &str, names: &[String]) -> Result<List> {
    let mut list = List { all: false, single: Vec::new() };
    for (index, name) in names.iter().enumerate() {
        if name.eq_ignore_ascii_case("ALL") {
            list.all = true;
            continue;
        }
        let Some(bit) = bit(name) else {
            return Err(SpecError::invalid(
                format!("{FIELD}.{field}[{index}]"),
                format!("{name:?} is not a capability"),
            ));
        };
        list.single.push((index, bit));
    }
    Ok(list)
}

/// Takes names with and without `CAP_`, in either case, as kubelet and crictl send both.
fn bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = NAMES.iter().position(|(known, _)| known.strip_prefix("CAP_") == Some(bare))?;
    Some(1 << number)
}

fn names(mask: u64) -> impl Iterator<Item = &'static str> {
    NAMES.iter().enumerate().filter(move |(number, _)| mask >> number & 1 == 1).map(|(_, (name, _))| *name)
}

fn set(mask: u64) -> Capabilities {
    let with_number = NAMES.iter().enumerate().filter(|(number, _)| mask >> number & 1 == 1);
    with_number.map(|(_, (_, capability))| *capability).collect()
}

trait SumBits {
    fn sum_bits(self) -> u64;
}

impl<I: Iterator<Item = u64>> SumBits for I {
    fn sum_bits(self) -> u64 {
        self.fold(0, |mask, bit| mask | bit)
    }
}

#[cfg(test)]
mod tests;
