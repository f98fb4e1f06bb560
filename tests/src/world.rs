//! What a daemon and its pods make outside their own directories: processes, mounts, pinned namespaces, cgroups,
//! interfaces. For use in a sandbox, where everything that appears is the tests' own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{PINS, SLICE};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::ask::CGROUPS;

/// What is there at one moment.
#[derive(Debug, Default)]
pub struct World {
    things: BTreeSet<String>,
    /// Cgroups of monitors; some wait for pods as long as a daemon runs.
    of_monitors: BTreeSet<String>,
    processes: BTreeSet<(u32, String)>,
}

impl World {
    /// Looks.
    pub fn now() -> Self {
        let mut things = BTreeSet::new();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        // Once per machine: the directories of pins, and gVisor's empty network namespace.
        let pods = points.filter(|point| !PINS.contains(point) && !point.ends_with("/null-netns"));
        things.extend(pods.map(|point| format!("mount {point}")));
        for directory in PINS {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            things.extend(entries.map(|pin| format!("namespace {}", pin.path().display())));
        }
        for pod in kubepods().iter().flat_map(|parent| directories(parent)) {
            things.extend(directories(&pod).iter().map(|path| format!("cgroup {}", path.display())));
        }
        let slices = hierarchies().into_iter().map(|root| root.join(SLICE));
        let of_monitors =
            slices.flat_map(|slice| directories(&slice)).map(|leaf| format!("cgroup {}", leaf.display()));
        for interface in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            let name = interface.file_name().display().to_string();
            // The built-in network's bridge stays while its node does.
            if !interface.path().join("bridge").exists() {
                things.insert(format!("interface {name}"));
            }
        }
        Self { things, of_monitors: of_monitors.collect(), processes: processes() }
    }

    /// Fails with what is here now and was not `before`, processes aside.
    pub fn things_since(&self, before: &Self) -> Result<()> {
        let left: Vec<&str> = self.things.difference(&before.things).map(String::as_str).collect();
        ensure!(left.is_empty(), "left: {}", left.join(", "));
        Ok(())
    }

    /// Fails with the processes that are here now and were not `before`, and with the monitors' cgroups.
    pub fn processes_since(&self, before: &Self) -> Result<()> {
        let processes = self
            .processes
            .difference(&before.processes)
            .map(|(pid, command)| format!("process {pid} {command}"));
        let left: Vec<String> =
            processes.chain(self.of_monitors.difference(&before.of_monitors).cloned()).collect();
        ensure!(left.is_empty(), "left: {}", left.join(", "));
        Ok(())
    }

    /// Takes off what is mounted now and was not `before`; files of pinned namespaces stay.
    pub fn unmount_since(&self, before: &Self) -> Result<()> {
        let mounts = self.things.difference(&before.things).filter_map(|thing| thing.strip_prefix("mount "));
        for point in mounts.collect::<Vec<_>>().into_iter().rev() {
            unmount(point, UnmountFlags::DETACH).with_context(|| format!("unmounting {point}"))?;
        }
        Ok(())
    }

    /// Kills the processes that are here now and were not `before`.
    pub fn end_processes_since(&self, before: &Self) {
        for (pid, _) in self.processes.difference(&before.processes) {
            if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
                // The only error is that it is gone.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Every process but PID 1 and zombies, with its command line.
fn processes() -> BTreeSet<(u32, String)> {
    let mut found = BTreeSet::new();
    for process in directories(Path::new("/proc")) {
        let Some(pid) = process.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(command) = fs::read(process.join("cmdline")) else { continue };
        // A zombie has no command line and waits only for PID 1.
        if pid != 1 && !command.is_empty() {
            found.insert((pid, String::from_utf8_lossy(&command).replace('\0', " ").trim_end().to_owned()));
        }
    }
    found
}

/// Removes what kubelet would remove: the pods' own cgroups and their parent. What is not empty stays, and the
/// sandbox reports it.
pub fn remove_pod_cgroups() {
    for parent in kubepods() {
        for pod in directories(&parent) {
            let _ = fs::remove_dir(pod);
        }
        let _ = fs::remove_dir(parent);
    }
}

/// [`CGROUPS`] in every hierarchy that has it.
fn kubepods() -> Vec<PathBuf> {
    let name = CGROUPS.trim_start_matches('/');
    hierarchies().into_iter().map(|root| root.join(name)).filter(|path| path.is_dir()).collect()
}

/// The mount points of cgroup v1's hierarchies, or that of cgroup v2.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.procs").exists() { vec![root.to_owned()] } else { directories(root) }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}
