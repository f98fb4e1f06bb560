//! What a booted guest becomes a pod by: name, randomness, limits.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use podvisor_container::{IdRange, PodNamespaces};
use podvisor_proto::agent::{Exit, Personalise};
use rustix::process::Pid;
use rustix::time::ClockId;

use crate::agent::Agent;
use crate::container::PARENT;
use crate::failure::Failure;
use crate::init::Init;
use crate::interface::{self, Interface};
use crate::limits;
use crate::size::Began;
use crate::storage::Storage;
use crate::sys;
use crate::volumes::Volumes;

/// Where a pod's namespaces are pinned when it has a user namespace (agent.proto, `Personalise`).
const NAMESPACES: &str = "/run/podvisor/namespaces";

/// The pod that this guest is, once it is one.
#[derive(Debug)]
pub(crate) struct Pod {
    since: Instant,
    personalised: bool,
    pub(crate) began: Began,
    pub(crate) storage: Storage,
    pub(crate) volumes: Volumes,
    /// With a user namespace of the pod's.
    pub(crate) namespaces: Option<PodNamespaces>,
    /// PID 1 of the namespace that containers share.
    pub(crate) init: Option<Init>,
    /// Those that are configured.
    pub(crate) interfaces: Vec<Interface>,
    /// Children that ended and that nobody was known by.
    pub(crate) strays: VecDeque<(Pid, Exit)>,
}

impl Default for Pod {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            personalised: false,
            began: Began::default(),
            storage: Storage::default(),
            volumes: Volumes::default(),
            namespaces: None,
            init: None,
            interfaces: Vec::new(),
            strays: VecDeque::new(),
        }
    }
}

impl Pod {
    pub(crate) fn is_personalised(&self) -> bool {
        self.personalised
    }

    /// ns from the kernel's start until the agent listened: what the clock says less what has passed since.
    pub(crate) fn ready_ns(&self) -> u64 {
        let since_boot = rustix::time::clock_gettime(ClockId::Boottime);
        let since_boot = Duration::new(
            u64::try_from(since_boot.tv_sec).unwrap_or(0),
            u32::try_from(since_boot.tv_nsec).unwrap_or(0),
        );
        u64::try_from(since_boot.saturating_sub(self.since.elapsed()).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Pod {
    /// Calls `f` where the pod's network, IPC and host name are.
    pub(crate) fn inside<T>(&self, f: impl FnOnce() -> T) -> Result<T, Failure> {
        match &self.namespaces {
            Some(namespaces) => {
                namespaces.inside(f).map_err(|error| Failure::system("enter the pod's namespaces", error))
            }
            None => Ok(f()),
        }
    }

    fn set_sysctl(&self, name: &str, value: &str) -> Result<(), Failure> {
        let path = sysctl_file(name)?;
        let failed = |error| Failure::system(&format!("set sysctl {name} to {value:?}"), error);
        match (self.inside(|| fs::write(&path, value))?, &self.namespaces) {
            // Since Linux 6.9 IPC's are for the root of the namespace.
            (Err(error), Some(namespaces)) if error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(namespaces.as_root(|| fs::write(&path, value))?)
            }
            (outcome, _) => outcome.map_err(failed),
        }
    }
}

impl Agent {
    pub(crate) fn personalise(&mut self, wanted: &Personalise) -> Result<(), Failure> {
        if self.pod.personalised {
            return Err(Failure::state("this guest is a pod already"));
        }
        if !(32..=512).contains(&wanted.seed.len()) {
            return Err(Failure::invalid(format!(
                "the seed has {} bytes, 32 to 512 are needed",
                wanted.seed.len()
            )));
        }
        if let Some(wanted) = wanted.user_namespace {
            let range = |outside, length| match length {
                0 => Err(Failure::invalid("a user namespace needs ids")),
                _ => Ok(IdRange { outside, length }),
            };
            let (uids, gids) = (range(wanted.uid, wanted.uids)?, range(wanted.gid, wanted.gids)?);
            self.pod.namespaces = Some(PodNamespaces::make(uids, gids, Path::new(NAMESPACES))?);
        }
        let in_guest = std::process::id() == 1;
        if in_guest {
            crate::clock::set(wanted.time_ns)?;
            let random = File::options().write(true).open("/dev/urandom");
            random
                .and_then(|random| sys::credit_randomness(random.as_fd(), &wanted.seed))
                .map_err(|error| Failure::system("credit randomness", error))?;
            limits::inherit(&wanted.limits)?;
        }
        // Without a guest around it these would be the machine's.
        if in_guest || self.pod.namespaces.is_some() {
            self.pod.inside(|| -> Result<(), Failure> {
                rustix::system::sethostname(wanted.hostname.as_bytes())
                    .map_err(|error| Failure::system("set the host name", error))?;
                interface::bring_loopback_up()
            })??;
            for (name, value) in &wanted.sysctls {
                self.pod.set_sysctl(name, value)?;
            }
        }
        let parent = self.cgroups.cgroup(PARENT);
        parent.create().map_err(|error| Failure::system("make the pod's cgroup", error))?;
        if in_guest && let Some(directory) = parent.directory("memory") {
            let memory = machine_memory(&fs::read_to_string("/proc/iomem").unwrap_or_default());
            self.pod.began = Began { memory, reserve: wanted.reserve };
            fs::write(directory.join("memory.max"), self.pod.began.limit(0).to_string())
                .map_err(|error| Failure::system("limit the containers' memory", error))?;
        }
        self.pod.personalised = true;
        Ok(())
    }
}

/// Bytes that the machine has, from what /proc/iomem says. Not `MemTotal`, which lacks what the kernel took before it began to count, and
/// that is the guest's own part.
fn machine_memory(iomem: &str) -> u64 {
    let ranges = iomem.lines().filter_map(|line| line.strip_suffix(" : System RAM")?.split_once('-'));
    let bytes = ranges.filter_map(|(first, last)| {
        let (first, last) = (u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(last, 16).ok()?);
        Some(last.checked_sub(first)? + 1)
    });
    bytes.sum()
}

/// The file of a sysctl, whose name has dots or slashes.
fn sysctl_file(name: &str) -> Result<PathBuf, Failure> {
    let path: String = name.chars().map(|c| if c == '.' { '/' } else { c }).collect();
    if path.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(Failure::invalid(format!("{name:?} is no name of a sysctl")));
    }
    Ok(Path::new("/proc/sys").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_memory_is_all_of_its_ram() {
        let iomem = "00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n000f0000-000fffff : System ROM\n\
            00100000-09ffffff : System RAM\n  01000000-01c031d0 : Kernel code\n100000000-10fffffff : System RAM (kmem)\n";
        assert_eq!(machine_memory(iomem), 0x9ec00 + 0x9f0_0000);
        assert_eq!(machine_memory(""), 0);
    }
}
