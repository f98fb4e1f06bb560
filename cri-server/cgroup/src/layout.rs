//! Which cgroup hierarchies this process can see, from `/proc/self/mountinfo`.
//!
//! Not from the usual paths: in a private mount namespace or inside a cgroup namespace they can be elsewhere, hidden by another mount,
//! or show only a part of the hierarchy.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::files::read;
use crate::{Cgroup, CgroupError, Result};

/// The hierarchies that are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// One unified hierarchy.
    V2 {
        /// Its mount point, e.g. `/sys/fs/cgroup`.
        mount: PathBuf,
    },
    /// Version 1 (also hybrid): controller name → mount point. `name=systemd` is listed as `systemd`, the hybrid layout's version 2
    /// hierarchy, which runc uses beside the others, as `unified`.
    V1 {
        /// By controller.
        controllers: BTreeMap<String, PathBuf>,
    },
}

/// Name of version 2 among the controllers of a hybrid layout.
pub(crate) const UNIFIED: &str = "unified";

const MOUNTINFO: &str = "/proc/self/mountinfo";

impl Layout {
    /// Reads what is mounted now.
    pub fn detect() -> Result<Self> {
        Self::from_mounts(&cgroup_mounts(&read(Path::new(MOUNTINFO))?))
    }

    fn from_mounts(mounts: &[Mount]) -> Result<Self> {
        let unified = |mount: &&Mount| mount.controllers.is_none();
        // As runc and crun decide: the unified mode is what is mounted at /sys/fs/cgroup itself. A cgroup2 mount elsewhere beside
        // controllers of version 1 is the hybrid layout, where the unified hierarchy has nothing to control.
        if let Some(mount) =
            mounts.iter().filter(unified).find(|mount| mount.point == Path::new("/sys/fs/cgroup"))
        {
            return Ok(Self::V2 { mount: mount.point.clone() });
        }
        let mut controllers = BTreeMap::new();
        for mount in mounts {
            for controller in mount.controllers.iter().flatten() {
                let better =
                    controllers.get(controller).is_none_or(|known: &&Mount| mount.rank() > known.rank());
                if better {
                    controllers.insert(controller.clone(), mount);
                }
            }
        }
        let mount = mounts.iter().filter(unified).max_by_key(|mount| mount.rank());
        // `name=systemd` alone controls nothing: systemd mounts it in the hybrid layout whose controllers are all in cgroup2.
        if controllers.keys().any(|name| name != "systemd") {
            let hybrid = mount.map(|mount| (UNIFIED.to_owned(), mount.point.clone()));
            let controllers = controllers.into_iter().map(|(name, mount)| (name, mount.point.clone()));
            return Ok(Self::V1 { controllers: controllers.chain(hybrid).collect() });
        }
        mount.map(|mount| Self::V2 { mount: mount.point.clone() }).ok_or(CgroupError::NotMounted)
    }

    /// Whether it is the unified hierarchy.
    pub fn is_v2(&self) -> bool {
        matches!(self, Self::V2 { .. })
    }

    /// Whether a controller (`memory`, `cpu`, `hugetlb`, …) can be used at all. On version 2 `cpuacct` is part of `cpu`, and `devices` and
    /// `freezer` are always there (BPF programs and `cgroup.freeze`).
    pub fn has(&self, controller: &str) -> bool {
        match self {
            Self::V1 { controllers } => controllers.contains_key(controller),
            Self::V2 { mount } => {
                let name = match controller {
                    "devices" | "freezer" => return true,
                    "cpuacct" => "cpu",
                    "blkio" => "io",
                    other => other,
                };
                let listed = read(&mount.join("cgroup.controllers")).unwrap_or_default();
                listed.split_whitespace().any(|known| known == name)
            }
        }
    }

    /// The cgroup of this path below the mounts, whether it exists or not. `.` and `..` are resolved by text and never lead above the mount.
    pub fn cgroup(&self, path: &str) -> Cgroup {
        Cgroup::at(self, normal(path))
    }

    /// For finding the cgroups of processes.
    pub fn processes(&self) -> Result<Processes> {
        Ok(Processes { layout: self.clone(), mounts: cgroup_mounts(&read(Path::new(MOUNTINFO))?) })
    }

    fn resolve(&self, pid: i32, text: &str, mounts: &[Mount]) -> Result<Cgroup> {
        let mut paths = BTreeMap::new();
        for line in text.lines() {
            // cgroups(7): hierarchy-ID:controller-list:cgroup-path; the path may contain colons, the rest not.
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(names), Some(path)) = (parts.next(), parts.next()) else { continue };
            for name in names.split(',') {
                paths.insert(name.strip_prefix("name=").unwrap_or(name).to_owned(), path.to_owned());
            }
        }
        let below = |point: &Path, name: &str| -> Option<Result<String>> {
            let path = paths.get(name)?;
            let root =
                mounts.iter().find(|mount| mount.point == point).map_or("/", |mount| mount.root.as_str());
            let visible = strip_root(path, root).map(normal);
            Some(visible.ok_or_else(|| CgroupError::NotVisible { pid, cgroup: path.clone() }))
        };
        match self {
            Self::V2 { mount } => {
                let path = below(mount, "").unwrap_or_else(|| {
                    Err(CgroupError::NotVisible { pid, cgroup: text.trim().to_owned() })
                })?;
                Ok(Cgroup::at(self, path))
            }
            Self::V1 { controllers } => {
                let mut own = BTreeMap::new();
                for (name, point) in controllers {
                    if let Some(path) = below(point, if name == UNIFIED { "" } else { name }) {
                        own.insert(name.clone(), path?);
                    }
                }
                Ok(Cgroup::at_each(self, &own))
            }
        }
    }
}

/// Finds the cgroups of processes by the mounts that were there when it was made: the table has a line for every mount of every pod.
#[derive(Debug)]
pub struct Processes {
    layout: Layout,
    mounts: Vec<Mount>,
}

impl Processes {
    /// The cgroup that a process is in. On version 1 the hierarchies can disagree; then each keeps its own path.
    pub fn cgroup_of(&self, pid: i32) -> Result<Cgroup> {
        let text = read(&PathBuf::from(format!("/proc/{pid}/cgroup")))?;
        self.layout.resolve(pid, &text, &self.mounts)
    }
}

/// A cgroup mount that is not hidden by a later one.
#[derive(Debug, Clone)]
struct Mount {
    point: PathBuf,
    /// The part of the hierarchy that it shows, as seen from this process' cgroup namespace.
    root: String,
    /// `None`: version 2.
    controllers: Option<Vec<String>>,
}

impl Mount {
    /// Prefers a mount that shows the whole hierarchy, then the usual place.
    fn rank(&self) -> (bool, bool) {
        (self.root == "/", self.point.starts_with("/sys/fs/cgroup"))
    }
}

/// proc_pid_mountinfo(5): `ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAGS…] - TYPE SOURCE SUPEROPTIONS`.
fn cgroup_mounts(mountinfo: &str) -> Vec<Mount> {
    let mut found: Vec<Mount> = Vec::new();
    for line in mountinfo.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let mut head = head.split(' ').skip(3);
        let (Some(root), Some(point)) = (head.next(), head.next()) else { continue };
        let point = PathBuf::from(unescape(point));
        // Lines are in mount order: whatever is mounted on a mount or above it later hides it.
        found.retain(|earlier| !earlier.point.starts_with(&point));
        let mut tail = tail.split(' ');
        let controllers = match tail.next() {
            Some("cgroup2") => None,
            Some("cgroup") => {
                let options = tail.nth(1).unwrap_or_default();
                Some(options.split(',').filter_map(controller).map(str::to_owned).collect())
            }
            _ => continue,
        };
        found.push(Mount { point, root: unescape(root), controllers });
    }
    found
}

/// Super options of a version 1 mount: the controllers among general options.
fn controller(option: &str) -> Option<&str> {
    match option {
        "rw" | "ro" | "xattr" | "noprefix" | "clone_children" | "cpuset_v2_mode" | "favordynmods"
        | "seclabel" => None,
        option if option.starts_with("release_agent=") => None,
        option => Some(option.strip_prefix("name=").unwrap_or(option)),
    }
}

/// mountinfo writes space, tab, newline and backslash as octal escapes.
fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| field.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = octal {
            out.push(byte);
            at += 4;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// `path` relative to a mount that shows `root`. `None`: outside of what the mount shows.
fn strip_root<'a>(path: &'a str, root: &str) -> Option<&'a str> {
    // "/.." appears where path or mount is outside of the reader's cgroup namespace: nothing to compare.
    if path.starts_with("/..") || root.starts_with("/..") {
        return None;
    }
    let rest = path.strip_prefix(root.trim_end_matches('/'))?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

/// Path without leading slash, empty parts, `.` and `..`.
pub(crate) fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests;
