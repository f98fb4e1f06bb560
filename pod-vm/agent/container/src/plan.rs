//! What a spec asks for, checked and in the types of the system calls. What is not applied here is refused by its name.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Mount, Spec};

use crate::error::Refused;
use crate::options::{Options, Propagation};
use crate::process::{ProcessPlan, Seccomp};

/// A container to be.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) root: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) namespaces: Namespaces,
    pub(crate) uid_map: Vec<Mapping>,
    pub(crate) gid_map: Vec<Mapping>,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    pub(crate) mounts: Vec<MountPlan>,
    pub(crate) devices: Vec<Device>,
    pub(crate) sysctls: Vec<(String, String)>,
    pub(crate) masked: Vec<PathBuf>,
    pub(crate) read_only_paths: Vec<PathBuf>,
    pub(crate) propagation: Propagation,
    pub(crate) process: ProcessPlan,
}

/// Namespaces to make and to join.
#[derive(Debug, Clone, Default)]
pub(crate) struct Namespaces {
    /// `CLONE_NEW…` of those to make.
    pub(crate) new: i32,
    /// Kind and file of those to join.
    pub(crate) joined: Vec<(i32, PathBuf)>,
}

impl Namespaces {
    pub(crate) fn makes(&self, kind: i32) -> bool {
        self.new & kind != 0
    }

    pub(crate) fn joins(&self, kind: i32) -> Option<&Path> {
        self.joined.iter().find(|(joined, _)| *joined == kind).map(|(_, path)| path.as_path())
    }
}

/// One line of a uid_map or gid_map (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) inside: u32,
    pub(crate) outside: u32,
    pub(crate) length: u32,
}

/// A mount to make.
#[derive(Debug, Clone)]
pub(crate) struct MountPlan {
    /// Absolute, as seen in the container.
    pub(crate) destination: PathBuf,
    /// Name of the file system; unused for a bind.
    pub(crate) kind: String,
    pub(crate) source: PathBuf,
    /// The source is not looked up through links: others can put some there.
    pub(crate) linkless: bool,
    pub(crate) options: Options,
}

/// A device node to make.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) path: PathBuf,
    pub(crate) kind: rustix::fs::FileType,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Plan {
    /// Containers can write below this directory: no source of a bind below it is to be found by way of a link.
    pub fn distrust(&mut self, directory: &Path) {
        for mount in &mut self.mounts {
            mount.linkless |= mount.source.starts_with(directory);
        }
    }

    /// Reads a spec whose root file system is mounted at `root`; `seccomp` is its compiled profile.
    pub fn new(spec: &Spec, root: PathBuf, seccomp: Option<Seccomp>) -> Result<Self, Refused> {
        let process = spec.process().as_ref().ok_or_else(|| Refused::new("process", "is missing"))?;
        let linux = spec.linux().as_ref().ok_or_else(|| Refused::new("linux", "is missing"))?;
        let hooks = spec.hooks().as_ref().is_some_and(|hooks| *hooks != Default::default());
        let labelled = linux.mount_label().as_ref().is_some_and(|label| !label.is_empty());
        for (field, is_set) in [
            ("hooks", hooks),
            ("linux.mountLabel", labelled),
            ("linux.intelRdt", linux.intel_rdt().is_some()),
            ("linux.memoryPolicy", linux.memory_policy().is_some()),
            ("linux.personality", linux.personality().is_some()),
            ("linux.timeOffsets", linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty())),
            ("linux.netDevices", linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty())),
        ] {
            if is_set {
                return Err(Refused::new(field, "is not applied here"));
            }
        }
        let process = ProcessPlan::new(process, seccomp)?;
        let namespaces = namespaces(spec)?;
        let (uid_map, gid_map) = (
            mappings("uidMappings", linux.uid_mappings().as_ref())?,
            mappings("gidMappings", linux.gid_mappings().as_ref())?,
        );
        if namespaces.makes(libc::CLONE_NEWUSER) && (uid_map.is_empty() || gid_map.is_empty()) {
            return Err(Refused::new(
                "linux.uidMappings",
                "a new user namespace needs mappings of uids and gids",
            ));
        }
        let sysctls = linux.sysctl().iter().flatten();
        let paths = |field: &str, list: &Option<Vec<String>>| -> Result<Vec<PathBuf>, Refused> {
            let list = list.iter().flatten().enumerate();
            list.map(|(index, path)| inside(&format!("linux.{field}[{index}]"), Path::new(path))).collect()
        };
        Ok(Self {
            root,
            read_only: spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false),
            uid_map,
            gid_map,
            hostname: name("hostname", spec.hostname().as_ref())?,
            domainname: name("domainname", spec.domainname().as_ref())?,
            mounts: spec
                .mounts()
                .iter()
                .flatten()
                .enumerate()
                .map(|(index, mount)| mount_plan(index, mount))
                .collect::<Result<_, _>>()?,
            devices: devices(spec)?,
            sysctls: sysctls.map(|(name, value)| sysctl(name, value)).collect::<Result<_, _>>()?,
            masked: paths("maskedPaths", linux.masked_paths())?,
            read_only_paths: paths("readonlyPaths", linux.readonly_paths())?,
            propagation: propagation(linux.rootfs_propagation().as_deref())?,
            namespaces,
            process,
        })
    }
}

fn name(field: &str, name: Option<&String>) -> Result<Option<String>, Refused> {
    let name = name.filter(|name| !name.is_empty()).cloned();
    match name {
        // utsname(7): 64 bytes.
        Some(name) if name.len() > 64 => Err(Refused::new(field, "is longer than 64 bytes")),
        name => Ok(name),
    }
}

/// An absolute path of the container without `..`.
fn inside(field: &str, path: &Path) -> Result<PathBuf, Refused> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(Refused::new(field, format!("{} is no absolute path without '..'", path.display())));
    }
    Ok(path.to_owned())
}

fn namespaces(spec: &Spec) -> Result<Namespaces, Refused> {
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let mut namespaces = Namespaces::default();
    for (index, namespace) in list.into_iter().flatten().enumerate() {
        let field = || format!("linux.namespaces[{index}]");
        let kind = match namespace.typ() {
            LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
            LinuxNamespaceType::User => libc::CLONE_NEWUSER,
            LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
            LinuxNamespaceType::Network => libc::CLONE_NEWNET,
            LinuxNamespaceType::Time => {
                return Err(Refused::new(field(), "time namespaces are not made here"));
            }
        };
        if namespaces.makes(kind) || namespaces.joins(kind).is_some() {
            return Err(Refused::new(field(), "is given twice"));
        }
        match namespace.path() {
            None => namespaces.new |= kind,
            Some(_) if kind == libc::CLONE_NEWNS => {
                return Err(Refused::new(field(), "a container's mount namespace is its own"));
            }
            Some(path) if path.is_absolute() => namespaces.joined.push((kind, path.clone())),
            Some(_) => return Err(Refused::new(format!("{}.path", field()), "is no absolute path")),
        }
    }
    if !namespaces.makes(libc::CLONE_NEWNS) {
        return Err(Refused::new("linux.namespaces", "a container needs a mount namespace of its own"));
    }
    Ok(namespaces)
}

fn mappings(
    field: &str,
    list: Option<&Vec<oci_spec::runtime::LinuxIdMapping>>,
) -> Result<Vec<Mapping>, Refused> {
    let mut mappings = Vec::new();
    for (index, mapping) in list.into_iter().flatten().enumerate() {
        let (inside, outside, length) = (mapping.container_id(), mapping.host_id(), mapping.size());
        let fits = |start: u32| start.checked_add(length).is_some();
        if length == 0 || !fits(inside) || !fits(outside) {
            return Err(Refused::new(
                format!("linux.{field}[{index}]"),
                "is empty or goes beyond the last id",
            ));
        }
        mappings.push(Mapping { inside, outside, length });
    }
    Ok(mappings)
}

fn mount_plan(index: usize, mount: &Mount) -> Result<MountPlan, Refused> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(Refused::new(field("uidMappings"), "id-mapped mounts are not made here"));
    }
    let list = mount.options().clone().unwrap_or_default();
    let mut options = Options::parse(&field("options"), &list)?;
    let kind = mount.typ().clone().unwrap_or_default();
    options.bind |= kind == "bind";
    let source = mount.source().clone().unwrap_or_default();
    if options.bind && !source.is_absolute() {
        return Err(Refused::new(field("source"), "is no absolute path"));
    }
    if !options.bind && kind.is_empty() {
        return Err(Refused::new(field("type"), "is missing"));
    }
    Ok(MountPlan {
        destination: inside(&field("destination"), mount.destination())?,
        kind,
        source,
        linkless: false,
        options,
    })
}

fn devices(spec: &Spec) -> Result<Vec<Device>, Refused> {
    use rustix::fs::FileType;
    let list = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let mut devices = Vec::new();
    for (index, device) in list.into_iter().flatten().enumerate() {
        let field = |name: &str| format!("linux.devices[{index}].{name}");
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => return Err(Refused::new(field("type"), "'a' is for rules, not for nodes")),
        };
        let number = |name: &str, value: i64| {
            u32::try_from(value)
                .map_err(|_| Refused::new(field(name), format!("{value} is no device number")))
        };
        devices.push(Device {
            path: inside(&field("path"), device.path())?,
            kind,
            major: number("major", device.major())?,
            minor: number("minor", device.minor())?,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    Ok(devices)
}

/// The file of a sysctl below /proc/sys. A dot separates; with a slash before any dot the roles are swapped (sysctl(8)).
fn sysctl(name: &str, value: &str) -> Result<(String, String), Refused> {
    let swapped = name.find('/').is_some_and(|slash| name.find('.').is_none_or(|dot| slash < dot));
    let path = if swapped {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect()
    };
    if path.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(Refused::new(format!("linux.sysctl[{name:?}]"), "is no name of a sysctl"));
    }
    Ok((path, value.to_owned()))
}

fn propagation(name: Option<&str>) -> Result<Propagation, Refused> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(Propagation::Private) };
    Propagation::named(name.strip_prefix('r').unwrap_or(name))
        .ok_or_else(|| Refused::new("linux.rootfsPropagation", format!("{name:?} is no propagation")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(change: impl FnOnce(&mut serde_json::Value)) -> Result<Plan, Refused> {
        let mut spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        change(&mut spec);
        let spec: Spec = serde_json::from_value(spec).unwrap();
        Plan::new(&spec, "/rootfs".into(), None)
    }

    #[test]
    fn what_is_not_applied_is_refused_by_its_name() {
        let refused = |path: &str, value: serde_json::Value| {
            let changed = spec(|spec| *spec.pointer_mut(path).unwrap() = value);
            changed.map(drop).map_err(|refused| refused.field)
        };
        let namespace = |value| refused("/linux/namespaces", serde_json::json!([{"type": "mount"}, value]));
        assert_eq!(namespace(serde_json::json!({"type": "time"})), Err("linux.namespaces[1]".into()));
        assert_eq!(namespace(serde_json::json!({"type": "mount"})), Err("linux.namespaces[1]".into()));
        assert_eq!(namespace(serde_json::json!({"type": "user"})), Err("linux.uidMappings".into()));
        assert_eq!(refused("/process/cwd", "here".into()), Err("process.cwd".into()));
        assert_eq!(refused("/process/args", serde_json::json!([])), Err("process.args".into()));
        let linux = |key: &str, value: serde_json::Value| {
            spec(|spec| spec["linux"][key] = value).map(drop).map_err(|refused| refused.field)
        };
        assert_eq!(linux("maskedPaths", serde_json::json!(["/a", "b"])), Err("linux.maskedPaths[1]".into()));
        assert_eq!(linux("rootfsPropagation", "often".into()), Err("linux.rootfsPropagation".into()));
        assert_eq!(
            linux("personality", serde_json::json!({"domain": "LINUX"})),
            Err("linux.personality".into())
        );
        assert_eq!(
            spec(|spec| spec["hooks"] = serde_json::json!({"poststart": [{"path": "/x"}]}))
                .unwrap_err()
                .field,
            "hooks"
        );
        assert!(spec(|_| ()).is_ok());
    }

    #[test]
    fn names_of_sysctls() {
        let path = |name| sysctl(name, "1").map(|(path, _)| path).ok();
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Some("net/ipv4/ip_forward"));
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding").as_deref(),
            Some("net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(path("a/../b"), None);
        assert_eq!(path(""), None);
    }
}
