//! A subtree in every mounted cgroup hierarchy.
//!
//! With cgroup v1 (and in the hybrid layout) there is one hierarchy per controller, and the subtree is made below the
//! caller's own cgroup, so that the caller's limits hold for it. With cgroup v2 alone it is made below the mount's root,
//! because a cgroup that holds processes cannot hand controllers to its children (Control Group v2, "No Internal
//! Process Constraint").

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Hands the subtree to the later stages.
pub(super) const VARIABLE: &str = "PODVISOR_SANDBOX_CGROUPS";

/// Where the hierarchies are mounted.
pub(super) const MOUNT_POINT: &str = "/sys/fs/cgroup";

const PREFIX: &str = "podvisor-sandbox-";

/// How long the last processes may take to disappear from a cgroup after they were killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// One hierarchy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Hierarchy {
    /// Mount options that name it (`cpu`, `name=systemd`); empty for cgroup v2.
    pub(super) options: String,
    /// Where it is mounted.
    pub(super) mounted: PathBuf,
    /// The subtree's directory.
    directory: PathBuf,
}

impl Hierarchy {
    pub(super) fn is_v2(&self) -> bool {
        self.options.is_empty()
    }
}

/// The sandbox's cgroups.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Subtree {
    pub(super) hierarchies: Vec<Hierarchy>,
}

impl Subtree {
    /// Makes the directories, after removing what sandboxes left that were killed together with their keeper.
    pub(super) fn create() -> Result<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("reading the mount table")?;
        let own = fs::read_to_string("/proc/self/cgroup").context("reading this process's cgroups")?;
        let mut hierarchies = mounted_hierarchies(&mountinfo, &own)?;
        if hierarchies.is_empty() {
            bail!("no cgroup hierarchy is mounted on this machine");
        }
        let unified = hierarchies.iter().all(Hierarchy::is_v2);
        for hierarchy in &mut hierarchies {
            let parent =
                if unified { hierarchy.mounted.clone() } else { std::mem::take(&mut hierarchy.directory) };
            remove_stale(&parent)?;
            hierarchy.directory = parent.join(format!("{PREFIX}{}", std::process::id()));
            if unified {
                delegate_all(&parent)?;
            }
            fs::create_dir(&hierarchy.directory)
                .with_context(|| format!("making the cgroup {}", hierarchy.directory.display()))?;
            // A fresh cpuset is empty and takes no process (cgroup v1, "cpusets").
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if !hierarchy.is_v2() && parent.join(file).exists() {
                    fs::copy(parent.join(file), hierarchy.directory.join(file))
                        .with_context(|| format!("copying {file} of {}", parent.display()))?;
                }
            }
        }
        Ok(Self { hierarchies })
    }

    pub(super) fn as_variable(&self) -> String {
        serde_json::to_string(self).expect("paths of cgroups are text")
    }

    pub(super) fn from_variable() -> Result<Self> {
        let text = std::env::var(VARIABLE).context("this stage is for the sandbox's own use")?;
        serde_json::from_str(&text).with_context(|| format!("reading {VARIABLE}"))
    }

    /// Moves this process in.
    pub(super) fn join(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            fs::write(hierarchy.directory.join("cgroup.procs"), "0")
                .with_context(|| format!("joining the cgroup {}", hierarchy.directory.display()))?;
        }
        Ok(())
    }

    /// With cgroup v2 alone: moves this process, which has made the subtree its namespace's root, into a leaf, because
    /// a cgroup that holds processes cannot hand controllers to its children.
    pub(super) fn step_aside(&self) -> Result<()> {
        if !self.hierarchies.iter().all(Hierarchy::is_v2) {
            return Ok(());
        }
        for hierarchy in &self.hierarchies {
            let leaf = hierarchy.directory.join("sandbox");
            fs::create_dir(&leaf).with_context(|| format!("making the cgroup {}", leaf.display()))?;
            fs::write(leaf.join("cgroup.procs"), "0")
                .with_context(|| format!("joining the cgroup {}", leaf.display()))?;
        }
        Ok(())
    }

    /// With cgroup v2 alone: hands every controller to the children of what is now the root. To be called where the
    /// hierarchies are mounted anew.
    pub(super) fn delegate(&self) -> Result<()> {
        if self.hierarchies.iter().all(Hierarchy::is_v2) {
            delegate_all(Path::new(MOUNT_POINT))
        } else {
            Ok(())
        }
    }

    /// Removes the directories, deepest first, waiting for processes that are still going away.
    pub(super) fn remove(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            remove_tree(&hierarchy.directory)?;
        }
        Ok(())
    }
}

/// Hierarchies below [`MOUNT_POINT`] with the directory of this process's own cgroup in each. In the hybrid layout the
/// unified one comes along: its processes are to be in the subtree too.
fn mounted_hierarchies(mountinfo: &str, own: &str) -> Result<Vec<Hierarchy>> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        // proc_pid_mountinfo(5): fields up to a dash, then type, source, super block options.
        let Some((fields, tail)) = line.split_once(" - ") else { continue };
        let mut fields = fields.split(' ').skip(3);
        let (Some(root), Some(mounted)) = (fields.next(), fields.next()) else { continue };
        let mut tail = tail.split(' ');
        let kind = tail.next().unwrap_or_default();
        let superblock = tail.nth(1).unwrap_or_default();
        let options = match kind {
            "cgroup" => superblock
                .split(',')
                .filter(|option| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children" | "noprefix"))
                .filter(|option| !option.starts_with("release_agent="))
                .collect::<Vec<_>>()
                .join(","),
            "cgroup2" => String::new(),
            _ => continue,
        };
        if !Path::new(mounted).starts_with(MOUNT_POINT) || found.iter().any(|other| other.options == options)
        {
            continue;
        }
        let wanted = options.split(',').next().unwrap_or_default();
        let path = own
            .lines()
            .filter_map(|line| line.split_once(':')?.1.split_once(':'))
            .find(|(controllers, _)| controllers.split(',').any(|controller| controller == wanted))
            .map(|(_, path)| path)
            .with_context(|| format!("this process has no cgroup in the hierarchy at {mounted}"))?;
        let below = Path::new(path).strip_prefix(root).unwrap_or_else(|_| Path::new(""));
        found.push(Hierarchy { options, mounted: mounted.into(), directory: Path::new(mounted).join(below) });
    }
    Ok(found)
}

/// Hands every controller that a cgroup has to its children.
fn delegate_all(directory: &Path) -> Result<()> {
    let controllers = fs::read_to_string(directory.join("cgroup.controllers"))
        .with_context(|| format!("reading the controllers of {}", directory.display()))?;
    for controller in controllers.split_whitespace() {
        fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("handing {controller} to the children of {}", directory.display()))?;
    }
    Ok(())
}

fn remove_stale(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).with_context(|| format!("reading {}", parent.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).map(str::to_owned);
        if let Some(owner) = owner
            && !Path::new("/proc").join(owner).exists()
        {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> Result<()> {
    for child in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let child = child?;
        if child.file_type()?.is_dir() {
            remove_tree(&child.path())?;
        }
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) && Instant::now() < deadline =>
            {
                // Neither hierarchy says when the last zombie is gone: v1 has no event for it at all.
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => {
                return Err(error).with_context(|| format!("removing the cgroup {}", directory.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hybrid_layout_has_one_directory_per_hierarchy() {
        let mountinfo = "\
31 30 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
34 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
35 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let own = "4:name=systemd:/\n3:memory:/a/b\n2:cpu,cpuacct:/\n0::/u\n";
        let found = mounted_hierarchies(mountinfo, own).unwrap();
        let short: Vec<_> =
            found.iter().map(|h| (h.options.as_str(), h.directory.to_str().unwrap())).collect();
        assert_eq!(
            short,
            [
                ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/"),
                ("memory", "/sys/fs/cgroup/memory/a/b"),
                ("name=systemd", "/sys/fs/cgroup/systemd/"),
                ("", "/sys/fs/cgroup/unified/u"),
            ]
        );
    }

    #[test]
    fn a_mount_of_a_part_is_taken_from_there() {
        let mountinfo = "33 31 0:29 /a /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n";
        let found = mounted_hierarchies(mountinfo, "0::/a/b\n").unwrap();
        assert_eq!(found[0].directory, Path::new("/sys/fs/cgroup/b"));
    }
}
