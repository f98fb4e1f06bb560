//! What a process is to be: read from the spec, checked, in the types of the system calls.

use std::ffi::CString;
use std::path::PathBuf;

use oci_spec::runtime::{Capability, LinuxCapabilities, PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::error::Refused;

/// A process to be: the first of a container, or one more.
#[derive(Debug, Clone)]
pub struct ProcessPlan {
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
    pub(crate) directory: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) umask: u32,
    pub(crate) capabilities: Capabilities,
    pub(crate) no_new_privileges: bool,
    pub(crate) limits: Vec<(Resource, Rlimit)>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) terminal: Terminal,
    pub(crate) seccomp: Option<Seccomp>,
}

/// A seccomp filter, compiled.
#[derive(Debug, Clone)]
pub struct Seccomp {
    /// `struct sock_filter`s (linux/filter.h).
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_… for seccomp(2).
    pub flags: u32,
}

/// Whether a process has a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terminal {
    None,
    /// `size`: columns and rows to begin with.
    Wanted {
        size: Option<(u16, u16)>,
    },
}

/// Capability sets (capabilities(7)).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capabilities {
    pub(crate) bounding: CapabilitySet,
    pub(crate) permitted: CapabilitySet,
    pub(crate) effective: CapabilitySet,
    pub(crate) inheritable: CapabilitySet,
    pub(crate) ambient: CapabilitySet,
}

impl ProcessPlan {
    /// Reads `process` of a spec; `seccomp` is the compiled program of the container's profile.
    pub fn new(process: &Process, seccomp: Option<Seccomp>) -> Result<Self, Refused> {
        let strings = |field: &str, list: &Option<Vec<String>>| {
            let list = list.iter().flatten().enumerate();
            list.map(|(index, text)| {
                let name = || format!("process.{field}[{index}]");
                CString::new(text.as_str()).map_err(|_| Refused::new(name(), "contains NUL"))
            })
            .collect::<Result<Vec<_>, _>>()
        };
        let arguments = strings("args", process.args())?;
        if arguments.first().is_none_or(|program| program.is_empty()) {
            return Err(Refused::new("process.args", "names no program"));
        }
        if !process.cwd().is_absolute() {
            return Err(Refused::new("process.cwd", "is no absolute path"));
        }
        for (field, is_set) in [
            ("apparmorProfile", process.apparmor_profile().as_ref().is_some_and(|name| !name.is_empty())),
            ("selinuxLabel", process.selinux_label().as_ref().is_some_and(|label| !label.is_empty())),
            ("ioPriority", process.io_priority().is_some()),
            ("scheduler", process.scheduler().is_some()),
            ("execCPUAffinity", process.exec_cpu_affinity().is_some()),
        ] {
            if is_set {
                return Err(Refused::new(format!("process.{field}"), "is not applied here"));
            }
        }
        let user = process.user();
        let size = process.console_size().map(|size| {
            let side = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
            (side(size.width()), side(size.height()))
        });
        Ok(Self {
            environment: strings("env", process.env())?,
            arguments,
            directory: process.cwd().clone(),
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(0o022),
            capabilities: Capabilities::new(process.capabilities().as_ref()),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            limits: limits(process)?,
            oom_score_adj: process.oom_score_adj(),
            terminal: match process.terminal() {
                Some(true) => Terminal::Wanted { size },
                _ => Terminal::None,
            },
            seccomp,
        })
    }
}

fn limits(process: &Process) -> Result<Vec<(Resource, Rlimit)>, Refused> {
    let mut limits = Vec::new();
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        use PosixRlimitType as T;
        let resource = match limit.typ() {
            T::RlimitCpu => Resource::Cpu,
            T::RlimitFsize => Resource::Fsize,
            T::RlimitData => Resource::Data,
            T::RlimitStack => Resource::Stack,
            T::RlimitCore => Resource::Core,
            T::RlimitRss => Resource::Rss,
            T::RlimitNproc => Resource::Nproc,
            T::RlimitNofile => Resource::Nofile,
            T::RlimitMemlock => Resource::Memlock,
            T::RlimitAs => Resource::As,
            T::RlimitLocks => Resource::Locks,
            T::RlimitSigpending => Resource::Sigpending,
            T::RlimitMsgqueue => Resource::Msgqueue,
            T::RlimitNice => Resource::Nice,
            T::RlimitRtprio => Resource::Rtprio,
            T::RlimitRttime => Resource::Rttime,
        };
        if limit.soft() > limit.hard() {
            return Err(Refused::new(
                format!("process.rlimits[{index}]"),
                "the soft limit is above the hard one",
            ));
        }
        if limits.iter().any(|(known, _)| *known == resource) {
            return Err(Refused::new(format!("process.rlimits[{index}]"), "is given twice"));
        }
        let bound = |value: u64| (value != u64::MAX).then_some(value);
        limits.push((resource, Rlimit { current: bound(limit.soft()), maximum: bound(limit.hard()) }));
    }
    Ok(limits)
}

impl Capabilities {
    fn new(asked: Option<&LinuxCapabilities>) -> Self {
        let none = CapabilitySet::empty();
        let Some(asked) = asked else {
            return Self {
                bounding: none,
                permitted: none,
                effective: none,
                inheritable: none,
                ambient: none,
            };
        };
        let set = |list: &Option<std::collections::HashSet<Capability>>| {
            list.iter().flatten().fold(none, |set, capability| set | bit(*capability))
        };
        Self {
            bounding: set(asked.bounding()),
            permitted: set(asked.permitted()),
            effective: set(asked.effective()),
            inheritable: set(asked.inheritable()),
            ambient: set(asked.ambient()),
        }
    }
}

/// linux/capability.h.
fn bit(capability: Capability) -> CapabilitySet {
    use Capability as C;
    match capability {
        C::AuditControl => CapabilitySet::AUDIT_CONTROL,
        C::AuditRead => CapabilitySet::AUDIT_READ,
        C::AuditWrite => CapabilitySet::AUDIT_WRITE,
        C::BlockSuspend => CapabilitySet::BLOCK_SUSPEND,
        C::Bpf => CapabilitySet::BPF,
        C::CheckpointRestore => CapabilitySet::CHECKPOINT_RESTORE,
        C::Chown => CapabilitySet::CHOWN,
        C::DacOverride => CapabilitySet::DAC_OVERRIDE,
        C::DacReadSearch => CapabilitySet::DAC_READ_SEARCH,
        C::Fowner => CapabilitySet::FOWNER,
        C::Fsetid => CapabilitySet::FSETID,
        C::IpcLock => CapabilitySet::IPC_LOCK,
        C::IpcOwner => CapabilitySet::IPC_OWNER,
        C::Kill => CapabilitySet::KILL,
        C::Lease => CapabilitySet::LEASE,
        C::LinuxImmutable => CapabilitySet::LINUX_IMMUTABLE,
        C::MacAdmin => CapabilitySet::MAC_ADMIN,
        C::MacOverride => CapabilitySet::MAC_OVERRIDE,
        C::Mknod => CapabilitySet::MKNOD,
        C::NetAdmin => CapabilitySet::NET_ADMIN,
        C::NetBindService => CapabilitySet::NET_BIND_SERVICE,
        C::NetBroadcast => CapabilitySet::NET_BROADCAST,
        C::NetRaw => CapabilitySet::NET_RAW,
        C::Perfmon => CapabilitySet::PERFMON,
        C::Setgid => CapabilitySet::SETGID,
        C::Setfcap => CapabilitySet::SETFCAP,
        C::Setpcap => CapabilitySet::SETPCAP,
        C::Setuid => CapabilitySet::SETUID,
        C::SysAdmin => CapabilitySet::SYS_ADMIN,
        C::SysBoot => CapabilitySet::SYS_BOOT,
        C::SysChroot => CapabilitySet::SYS_CHROOT,
        C::SysModule => CapabilitySet::SYS_MODULE,
        C::SysNice => CapabilitySet::SYS_NICE,
        C::SysPacct => CapabilitySet::SYS_PACCT,
        C::SysPtrace => CapabilitySet::SYS_PTRACE,
        C::SysRawio => CapabilitySet::SYS_RAWIO,
        C::SysResource => CapabilitySet::SYS_RESOURCE,
        C::SysTime => CapabilitySet::SYS_TIME,
        C::SysTtyConfig => CapabilitySet::SYS_TTY_CONFIG,
        C::Syslog => CapabilitySet::SYSLOG,
        C::WakeAlarm => CapabilitySet::WAKE_ALARM,
    }
}
