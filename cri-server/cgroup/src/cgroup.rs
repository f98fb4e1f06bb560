//! One cgroup: a directory in each hierarchy. Making it, putting processes into it, killing and removing it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tracing::debug;

use crate::files::{child_directories, read_optional, write};
use crate::layout::{UNIFIED, normal};
use crate::{CgroupError, Layout, Result};

/// How long [`Cgroup::remove`] waits for killed processes to be gone. A process that dumps a large core or has much memory to give
/// back takes that long.
const REMOVE_WITHIN: Duration = Duration::from_secs(5);

/// Rounds of [`Cgroup::kill`] where the kernel cannot do it at once.
const KILL_ROUNDS: u32 = 100;

/// One cgroup. The value is only a name: the cgroup need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    pub(crate) hierarchy: Hierarchy,
    /// Below the mount, without leading slash.
    path: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hierarchy {
    V2 { mount: PathBuf, directory: PathBuf },
    V1 { controllers: BTreeMap<String, Member> },
}

/// The cgroup in one hierarchy of version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    mount: PathBuf,
    directory: PathBuf,
}

impl Cgroup {
    pub(crate) fn at(layout: &Layout, path: String) -> Self {
        let hierarchy = match layout {
            Layout::V2 { mount } => Hierarchy::V2 { mount: mount.clone(), directory: join(mount, &path) },
            Layout::V1 { controllers } => Hierarchy::V1 {
                controllers: controllers
                    .iter()
                    .map(|(name, mount)| {
                        (name.clone(), Member { mount: mount.clone(), directory: join(mount, &path) })
                    })
                    .collect(),
            },
        };
        Self { hierarchy, path }
    }

    /// Version 1 with a path per controller. A controller without one is left out.
    pub(crate) fn at_each(layout: &Layout, paths: &BTreeMap<String, String>) -> Self {
        let Layout::V1 { controllers } = layout else {
            return Self::at(layout, paths.values().next().cloned().unwrap_or_default());
        };
        let members: BTreeMap<_, _> = controllers
            .iter()
            .filter_map(|(name, mount)| {
                let directory = join(mount, paths.get(name)?);
                Some((name.clone(), Member { mount: mount.clone(), directory }))
            })
            .collect();
        let path = PRIMARY.iter().find_map(|name| paths.get(*name)).or_else(|| paths.values().next());
        Self { path: path.cloned().unwrap_or_default(), hierarchy: Hierarchy::V1 { controllers: members } }
    }

    /// Its path below the mount, with a leading slash. Where hierarchies differ, that of the one which lists its processes.
    pub fn path(&self) -> String {
        format!("/{}", self.path)
    }

    /// The cgroup below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let name = normal(name);
        let mut child = self.clone();
        child.path = normal(&format!("{}/{name}", self.path));
        match &mut child.hierarchy {
            Hierarchy::V2 { directory, .. } => directory.push(&name),
            Hierarchy::V1 { controllers } => {
                for member in controllers.values_mut() {
                    member.directory.push(&name);
                }
            }
        }
        child
    }

    /// Its directories, one per hierarchy; controllers that are mounted together share one.
    pub fn directories(&self) -> Vec<&Path> {
        match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => vec![directory],
            Hierarchy::V1 { controllers } => {
                let set: BTreeSet<&Path> =
                    controllers.values().map(|member| member.directory.as_path()).collect();
                set.into_iter().collect()
            }
        }
    }

    /// The directory where a controller's files are. `None`: that controller is not there.
    pub fn directory(&self, controller: &str) -> Option<&Path> {
        match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => Some(directory),
            Hierarchy::V1 { controllers } => {
                controllers.get(controller).map(|member| member.directory.as_path())
            }
        }
    }

    /// Hybrid layout: its directory in version 2's hierarchy, unless that is the root.
    pub(crate) fn in_unified(&self) -> Option<&Path> {
        let Hierarchy::V1 { controllers } = &self.hierarchy else { return None };
        let member = controllers.get(UNIFIED)?;
        (member.directory != member.mount).then_some(member.directory.as_path())
    }

    /// The hierarchy whose `cgroup.procs` is the truth about who is in.
    pub(crate) fn primary(&self) -> &Path {
        match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => directory,
            Hierarchy::V1 { controllers } => PRIMARY
                .iter()
                .find_map(|name| controllers.get(*name))
                .or_else(|| controllers.values().next())
                .map_or(Path::new("/nonexistent"), |member| &member.directory),
        }
    }

    /// Makes it, with its parents, in every hierarchy; fine when it exists. Version 1: an empty cpuset gets its parent's CPUs and
    /// memory nodes, without which no process can enter. Version 2: the parents hand down every controller they can; a parent that has
    /// processes of its own cannot (`Documentation/admin-guide/cgroup-v2.rst`, "No Internal Process Constraint"), which is no error here.
    pub fn create(&self) -> Result<()> {
        match &self.hierarchy {
            Hierarchy::V2 { mount, directory } => {
                for level in levels(mount, directory) {
                    if level != *mount {
                        make(&level)?;
                    }
                    if level != *directory {
                        hand_down_controllers(&level);
                    }
                }
            }
            Hierarchy::V1 { controllers } => {
                for (name, member) in controllers {
                    for level in levels(&member.mount, &member.directory).skip(1) {
                        make(&level)?;
                        if name == "cpuset" {
                            inherit_cpuset(&level)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether it is there (version 1: where its processes are listed).
    pub fn exists(&self) -> bool {
        self.primary().is_dir()
    }

    /// The `cgroup.procs` files to write a pid into, one per hierarchy.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        self.directories().into_iter().map(|directory| directory.join("cgroup.procs")).collect()
    }

    /// Moves a process (all its threads) into it, in every hierarchy.
    pub fn add(&self, pid: i32) -> Result<()> {
        self.procs_files().iter().try_for_each(|file| write(file, &pid.to_string()))
    }

    /// Limits how many bytes of its memory may be swapped; `None`: no limit. Nothing happens where swap is not counted apart from memory, which
    /// only version 2 does.
    pub fn limit_swap(&self, most: Option<u64>) -> Result<()> {
        let Hierarchy::V2 { directory, .. } = &self.hierarchy else { return Ok(()) };
        let value = most.map_or_else(|| "max".to_owned(), |most| most.to_string());
        match write(&directory.join("memory.swap.max"), &value) {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }

    /// Processes directly in it; empty when it does not exist. A process outside of the caller's pid namespace is left out.
    pub fn pids(&self) -> Result<Vec<i32>> {
        pids_of(self.primary())
    }

    /// Processes in it and in all cgroups below it.
    pub fn all_pids(&self) -> Result<Vec<i32>> {
        let mut found = BTreeSet::new();
        let mut todo = vec![self.primary().to_path_buf()];
        while let Some(directory) = todo.pop() {
            found.extend(pids_of(&directory)?);
            todo.extend(child_directories(&directory)?);
        }
        Ok(found.into_iter().collect())
    }

    /// Sends SIGKILL to everything in it and below it, also to what is forked meanwhile; paused ones die too. Does not wait for them to be gone:
    /// [`Cgroup::remove`] does. Fine when it does not exist.
    pub fn kill(&self) -> Result<()> {
        if self.path.is_empty() {
            return Err(CgroupError::Root { action: "kill" });
        }
        if let Hierarchy::V2 { directory, .. } = &self.hierarchy {
            let file = directory.join("cgroup.kill");
            match write(&file, "1") {
                Ok(()) => return Ok(()),
                // Gone, or a kernel before 5.14: the loop below tells.
                Err(error) if error.is_not_found() => {}
                // EOPNOTSUPP: a threaded cgroup, whose processes belong to the domain above.
                Err(error) => return Err(error),
            }
        }
        self.kill_one_by_one()
    }

    fn kill_one_by_one(&self) -> Result<()> {
        // Frozen processes can neither fork nor end, so that a pid that is read is still that process when it is killed.
        self.freeze(true)?;
        let killed = self.kill_rounds();
        self.freeze(false)?;
        killed?;
        // Where freezing does not work, something may have been forked between the last look and here.
        self.kill_rounds()
    }

    fn kill_rounds(&self) -> Result<()> {
        let mut signalled = BTreeSet::new();
        for _ in 0..KILL_ROUNDS {
            let fresh: Vec<i32> =
                self.all_pids()?.into_iter().filter(|pid| !signalled.contains(pid)).collect();
            if fresh.is_empty() {
                return Ok(());
            }
            for pid in fresh {
                signalled.insert(pid);
                if let Some(target) = Pid::from_raw(pid) {
                    // ESRCH: it ended by itself, which is as good.
                    let _ = kill_process(target, Signal::KILL);
                }
            }
        }
        Err(CgroupError::StillForking { path: self.primary().into(), rounds: KILL_ROUNDS })
    }

    /// Best effort: a cgroup without freezer is killed without it. Thawing reaches every cgroup below, because version 1 keeps the signal from
    /// a process whose own cgroup was frozen by somebody else (a paused container).
    fn freeze(&self, frozen: bool) -> Result<()> {
        let (mut todo, file, value) = match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => {
                (vec![directory.clone()], "cgroup.freeze", if frozen { "1" } else { "0" })
            }
            Hierarchy::V1 { controllers } => {
                let Some(member) = controllers.get("freezer") else { return Ok(()) };
                (vec![member.directory.clone()], "freezer.state", if frozen { "FROZEN" } else { "THAWED" })
            }
        };
        while let Some(directory) = todo.pop() {
            if let Err(error) = write(&directory.join(file), value) {
                debug!(error = &error as &dyn std::error::Error, "cannot change a cgroup's freezer");
            }
            if !frozen {
                todo.extend(child_directories(&directory)?);
            }
        }
        Ok(())
    }

    /// Removes it and everything below it in every hierarchy. Waits up to five seconds while killed processes are still in it
    /// (so not for an async thread); fine when it does not exist.
    pub fn remove(&self) -> Result<()> {
        if self.path.is_empty() {
            return Err(CgroupError::Root { action: "remove" });
        }
        let deadline = Instant::now() + REMOVE_WITHIN;
        let directories: BTreeSet<&Path> = match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => [directory.as_path()].into(),
            // A process need not be in a cgroup of its own everywhere: the root of a hierarchy is nobody's.
            Hierarchy::V1 { controllers } => {
                let own = controllers.values().filter(|member| member.directory != member.mount);
                own.map(|member| member.directory.as_path()).collect()
            }
        };
        // All hierarchies are tried before the first failure is told: the rest is not to leak because of one.
        let results: Vec<_> =
            directories.into_iter().map(|directory| remove_tree(directory, deadline)).collect();
        results.into_iter().collect()
    }
}

/// Version 1: in which hierarchy to look for a cgroup's processes. Runtimes put processes into all of them; the freezer is one that nobody
/// else (systemd, a user) moves them in.
const PRIMARY: [&str; 7] = ["freezer", "devices", "pids", "memory", "cpu", "cpuset", "systemd"];

fn join(mount: &Path, path: &str) -> PathBuf {
    if path.is_empty() { mount.to_path_buf() } else { mount.join(path) }
}

/// From the mount down to the directory, both included.
fn levels(mount: &Path, directory: &Path) -> impl Iterator<Item = PathBuf> {
    let mut levels: Vec<PathBuf> =
        directory.ancestors().take_while(|level| level.starts_with(mount)).map(Path::to_path_buf).collect();
    levels.reverse();
    levels.into_iter()
}

fn make(directory: &Path) -> Result<()> {
    match std::fs::create_dir(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(CgroupError::Create { path: directory.into(), source }),
    }
}

fn inherit_cpuset(directory: &Path) -> Result<()> {
    let Some(parent) = directory.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        // A race with another creator of the same cgroup is harmless: both write what the parent has.
        let own = directory.join(file);
        if read_optional(&own)?.is_some_and(|value| value.trim().is_empty())
            && let Some(value) = read_optional(&parent.join(file))?
        {
            write(&own, value.trim())?;
        }
    }
    Ok(())
}

fn hand_down_controllers(directory: &Path) {
    let list = |file| -> Vec<String> {
        let text = read_optional(&directory.join(file)).ok().flatten().unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let enabled = list("cgroup.subtree_control");
    for name in list("cgroup.controllers").into_iter().filter(|name| !enabled.contains(name)) {
        // One at a time: a write is all or nothing, and one that cannot be enabled (cpu beside realtime processes) must not hold up the others.
        if let Err(error) = write(&directory.join("cgroup.subtree_control"), &format!("+{name}")) {
            debug!(error = &error as &dyn std::error::Error, "a cgroup does not hand down a controller");
        }
    }
}

pub(crate) fn pids_of(directory: &Path) -> Result<Vec<i32>> {
    let text = read_optional(&directory.join("cgroup.procs"))?.unwrap_or_default();
    // 0 stands for a process that the reader's pid namespace does not contain.
    Ok(text.lines().filter_map(|line| line.trim().parse().ok()).filter(|pid| *pid > 0).collect())
}

fn remove_tree(directory: &Path, deadline: Instant) -> Result<()> {
    let failed = |source| CgroupError::Remove { path: directory.into(), source };
    let mut pause = Duration::from_millis(1);
    loop {
        match rustix::fs::rmdir(directory) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::BUSY) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        let children = child_directories(directory)?;
        if children.is_empty() {
            if Instant::now() >= deadline {
                return Err(failed(rustix::io::Errno::BUSY.into()));
            }
            // Version 1 has no event for "the last process is gone"; one way for both.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        for child in children {
            remove_tree(&child, deadline)?;
        }
    }
}

#[cfg(test)]
mod tests;
