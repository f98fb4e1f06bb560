//! The two ways to name cgroups: paths (cgroupfs) and systemd's slices and scopes.

use std::path::Path;

use crate::layout::normal;
use crate::{CgroupError, Result};

/// Who makes the containers' cgroups. kubelet has to use the same; it asks with the CRI's RuntimeConfig.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Directories, by the OCI runtime itself.
    Cgroupfs,
    /// Transient scopes, by systemd over D-Bus.
    Systemd,
}

/// Where pods go whose request names no parent.
const DEFAULT_PARENT: &str = "/podvisor";
const DEFAULT_SLICE: &str = "system.slice";

/// Longest file name; a cgroup's directory is one.
const NAME_MAX: usize = 255;

impl Driver {
    /// systemd where it is PID 1 (sd_booted(3)), else cgroupfs.
    pub fn detect() -> Self {
        if Path::new("/run/systemd/system").is_dir() { Self::Systemd } else { Self::Cgroupfs }
    }

    /// Its name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroupfs => "cgroupfs",
            Self::Systemd => "systemd",
        }
    }

    /// `linux.cgroupsPath` of the OCI spec: `PARENT/ID`, or `SLICE:podvisor:ID` for runtimes that are called with `--systemd-cgroup`.
    /// An empty parent means the default one. For systemd the parent's last part counts, because kubelet gives the expanded path
    /// (`/kubepods.slice/kubepods-burstable.slice`). A parent in the other driver's syntax is an error: containers would silently escape
    /// their pod's limits.
    pub fn container_path(self, parent: &str, id: &str) -> Result<String> {
        let parent = self.parent(parent)?;
        Ok(match self {
            Self::Cgroupfs => format!("{parent}/{id}"),
            Self::Systemd => format!("{parent}:podvisor:{id}"),
        })
    }

    /// The container's cgroup below the mount, for a parent that [`Driver::container_path`] takes.
    pub fn container_cgroup(self, parent: &str, id: &str) -> String {
        let parent = self.parent_cgroup(parent);
        match self {
            Self::Cgroupfs => format!("{parent}/{id}"),
            Self::Systemd => format!("{parent}/{}", Self::scope_name(id)),
        }
    }

    /// The parent's cgroup below the mount, for a parent that [`Driver::container_path`] takes.
    pub fn parent_cgroup(self, parent: &str) -> String {
        match self.parent(parent) {
            Ok(parent) => match self {
                Self::Cgroupfs => parent,
                Self::Systemd => expand_slice(&parent),
            },
            Err(_) => format!("/{}", normal(parent)),
        }
    }

    /// The slice that a parent names (systemd), or its path (cgroupfs).
    pub fn parent(self, parent: &str) -> Result<String> {
        let invalid = |why| Err(CgroupError::Parent { parent: parent.into(), why });
        let mismatch =
            |is| Err(CgroupError::DriverMismatch { parent: parent.into(), is, driver: self.name() });
        if parent.bytes().any(|byte| byte < b' ' || byte == 0x7f) {
            return invalid("it contains control characters");
        }
        if parent.split('/').any(|part| part == "..") {
            return invalid("it contains \"..\"");
        }
        if parent.split('/').any(|part| part.len() > NAME_MAX) {
            return invalid("a part of it is longer than 255 bytes");
        }
        let path = normal(parent);
        let last = path.rsplit('/').next().unwrap_or_default();
        match self {
            Self::Cgroupfs if parent.is_empty() => Ok(DEFAULT_PARENT.to_owned()),
            Self::Cgroupfs if last.strip_suffix(".slice").is_some() => mismatch("a systemd slice"),
            Self::Cgroupfs if parent.contains(':') => invalid("it contains a colon"),
            Self::Cgroupfs if path.is_empty() => invalid("it is the root cgroup"),
            Self::Cgroupfs => Ok(format!("/{path}")),
            Self::Systemd if parent.is_empty() => Ok(DEFAULT_SLICE.to_owned()),
            Self::Systemd => match last.strip_suffix(".slice") {
                None => mismatch("not a systemd slice"),
                Some("-") => invalid("it is the root slice"),
                Some(name) if !is_slice_name(name) => {
                    invalid("it is not a name that systemd takes for a slice")
                }
                Some(_) => Ok(last.to_owned()),
            },
        }
    }

    /// The cgroup below the mount that a container's `linux.cgroupsPath` names, where it was not made by [`Driver::container_path`].
    pub fn cgroup_of(self, path: &str) -> Result<String> {
        let invalid = |why| Err(CgroupError::Parent { parent: path.into(), why });
        match self {
            // A relative one would be looked for below the OCI runtime's own cgroup.
            Self::Cgroupfs if !path.starts_with('/') => invalid("it is not absolute"),
            Self::Cgroupfs => self.parent(path),
            Self::Systemd => match path.split(':').collect::<Vec<_>>()[..] {
                [slice, prefix, name] if is_slice_name(prefix) && is_slice_name(name) => {
                    let slice = expand_slice(&self.parent(slice)?);
                    Ok(format!("{slice}/{prefix}-{name}.scope"))
                }
                _ => invalid("it is not SLICE:PREFIX:NAME"),
            },
        }
    }

    /// The unit that the OCI runtime makes for a container.
    pub fn scope_name(id: &str) -> String {
        format!("podvisor-{id}.scope")
    }
}

/// systemd.unit(5) and systemd.slice(5): letters, digits and `:-_.\@`; dashes separate levels, so none at the ends and no two together.
fn is_slice_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.\\@".contains(&byte);
    !name.is_empty() && name.bytes().all(allowed) && name.split('-').all(|level| !level.is_empty())
}

/// `a-b.slice` is `/a.slice/a-b.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> String {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.fold(String::new(), |path, end| path + "/" + &name[..end] + ".slice")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        #[rustfmt::skip]
        let table = [
            (Driver::Cgroupfs, "/kubepods/burstable/podx", "/kubepods/burstable/podx/ID", "/kubepods/burstable/podx/ID"),
            (Driver::Cgroupfs, "relative/", "/relative/ID", "/relative/ID"),
            (Driver::Cgroupfs, "", "/podvisor/ID", "/podvisor/ID"),
            (Driver::Systemd, "", "system.slice:podvisor:ID", "/system.slice/podvisor-ID.scope"),
            (Driver::Systemd, "kubepods.slice", "kubepods.slice:podvisor:ID", "/kubepods.slice/podvisor-ID.scope"),
            (Driver::Systemd, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
             "kubepods-burstable-pod1_2.slice:podvisor:ID",
             "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/podvisor-ID.scope"),
        ];
        for (driver, parent, path, cgroup) in table {
            assert_eq!(driver.container_path(parent, "ID").unwrap(), path);
            assert_eq!(driver.container_cgroup(parent, "ID"), cgroup);
            assert_eq!(format!("{}/", driver.parent_cgroup(parent)), cgroup[..=cgroup.rfind('/').unwrap()]);
        }
    }

    #[test]
    fn a_cgroups_path_of_somebody_elses_making() {
        for (driver, path, cgroup) in [
            (Driver::Cgroupfs, "/a/b/", Some("/a/b")),
            (Driver::Cgroupfs, "a/b", None),
            (Driver::Cgroupfs, "/a/../b", None),
            (Driver::Cgroupfs, "/", None),
            (Driver::Systemd, "a-b.slice:cri:x1", Some("/a.slice/a-b.slice/cri-x1.scope")),
            (Driver::Systemd, "a-b.slice:cri", None),
            (Driver::Systemd, "a-b.slice:cri:../x", None),
            (Driver::Systemd, "/a/b:cri:x", None),
        ] {
            assert_eq!(driver.cgroup_of(path).ok().as_deref(), cgroup, "{path}");
        }
    }

    #[test]
    fn the_other_drivers_syntax_is_refused() {
        for (driver, parent) in [
            (Driver::Cgroupfs, "kubepods-besteffort.slice"),
            (Driver::Cgroupfs, "/kubepods.slice/kubepods-a.slice/"),
            (Driver::Systemd, "/kubepods/besteffort"),
            (Driver::Systemd, "/kubepods.slice/leaf"),
        ] {
            let error = driver.container_path(parent, "ID").unwrap_err();
            assert!(matches!(error, CgroupError::DriverMismatch { .. }), "{parent}");
            assert!(error.to_string().contains("same cgroup driver"), "{error}");
        }
    }

    #[test]
    fn bad_parents_are_refused() {
        let long = "x".repeat(256);
        #[rustfmt::skip]
        let table = [
            (Driver::Cgroupfs, "/"), (Driver::Cgroupfs, "/a/../b"), (Driver::Cgroupfs, "a\0b"), (Driver::Cgroupfs, "/a:b"),
            (Driver::Cgroupfs, "//"), (Driver::Cgroupfs, &long),
            (Driver::Systemd, "-.slice"), (Driver::Systemd, ".slice"), (Driver::Systemd, "a--b.slice"), (Driver::Systemd, "-a.slice"),
            (Driver::Systemd, "a-.slice"), (Driver::Systemd, "a b.slice"), (Driver::Systemd, "a:b.slice"), (Driver::Systemd, "../a.slice"),
            (Driver::Systemd, "a\n.slice"),
        ];
        for (driver, parent) in table {
            let error = driver.container_path(parent, "ID").unwrap_err();
            assert!(matches!(error, CgroupError::Parent { .. }), "{parent:?}: {error}");
            // Still total: no panic, and no way out of the mount.
            assert!(!driver.container_cgroup(parent, "ID").contains(".."));
        }
    }
}
