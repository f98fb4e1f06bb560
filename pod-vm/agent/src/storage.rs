//! Shares of the file server and root file systems, below a place that only the agent sees.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;
use podvisor_proto::agent::add_root::{Lower, Upper};
use podvisor_proto::agent::{AddRoot, AddShare};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags};
use rustix::mount::{mount, mount_bind_recursive, open_tree, unmount};

use crate::boot::RUN;
use crate::container::check_id;
use crate::disks;
use crate::failure::Failure;
use crate::images;

/// What is mounted.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    shares: BTreeSet<String>,
    roots: BTreeSet<String>,
    /// Directories that are mounted in place of shares, where there is no file server.
    pub(crate) stand_ins: BTreeMap<String, PathBuf>,
}

/// Where a container's root file system is mounted.
pub(crate) fn root_of(container: &str) -> PathBuf {
    Path::new(RUN).join("roots").join(container)
}

/// Sources of a container's mounts that are places of shares.
pub(crate) fn shared(mounts: Option<&Vec<Mount>>) -> Vec<PathBuf> {
    let shares = Path::new(RUN).join("shares");
    let sources = mounts.into_iter().flatten().filter_map(|mount| mount.source().clone());
    sources.filter(|source| source.starts_with(&shares)).collect()
}

fn share(tag: &str) -> PathBuf {
    Path::new(RUN).join("shares").join(tag)
}

/// What belongs to a root file system besides its place.
fn parts_of(container: &str) -> PathBuf {
    Path::new(RUN).join("parts").join(container)
}

pub(crate) fn make(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|error| Failure::system(&format!("make {}", path.display()), error))
}

pub(crate) fn mounted(
    kind: &str,
    source: &Path,
    place: &Path,
    flags: MountFlags,
    data: &str,
) -> Result<(), Failure> {
    let data = CString::new(data).map_err(|_| Failure::invalid("a path contains NUL"))?;
    mount(source, place, kind, flags, data.as_c_str())
        .map_err(|error| Failure::system(&format!("mount {kind} at {}", place.display()), error))
}

impl Storage {
    /// `false` when no device has that tag.
    pub(crate) fn add_share(&mut self, wanted: &AddShare) -> Result<bool, Failure> {
        check_id(&wanted.tag)?;
        if self.shares.contains(&wanted.tag) {
            return Err(Failure::exists(format!("share {:?} is mounted already", wanted.tag)));
        }
        let place = share(&wanted.tag);
        make(&place)?;
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::RDONLY, wanted.read_only);
        let outcome = match self.stand_ins.get(&wanted.tag) {
            Some(directory) => mount_bind_recursive(directory, &place),
            None => mount(wanted.tag.as_str(), &place, "virtiofs", flags, None),
        };
        match outcome {
            Ok(()) => {}
            // What virtio_fs says of a tag that it does not know.
            Err(Errno::INVAL) => return Ok(false),
            Err(error) => {
                return Err(Failure::system(&format!("mount a share at {}", place.display()), error));
            }
        }
        self.shares.insert(wanted.tag.clone());
        Ok(true)
    }

    pub(crate) fn remove_share(&mut self, tag: &str) -> Result<(), Failure> {
        if !self.shares.contains(tag) {
            return Ok(());
        }
        release(&share(tag))?;
        self.shares.remove(tag);
        Ok(())
    }

    /// A path `TAG/…` of a share that is mounted.
    fn in_share(&self, path: &str) -> Result<PathBuf, Failure> {
        let (tag, rest) = path.split_once('/').unwrap_or((path, ""));
        let plain = Path::new(rest).components().all(|part| matches!(part, Component::Normal(_)));
        if !self.shares.contains(tag) || !plain {
            return Err(Failure::invalid(format!("{path:?} is not in a share that is mounted")));
        }
        Ok(share(tag).join(rest))
    }

    /// Mounts what the file server has mounted at these places, where all containers get it from: in the mount namespace of a container it
    /// would be a file system of its own, with locks of its own. What is not there is for the container to miss.
    pub(crate) fn reach(sources: &[PathBuf]) {
        for source in sources {
            // Unlike most calls this one waits for an automount.
            let _ = open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLOEXEC);
        }
    }

    /// Lets go of what no container uses any more, so that the file server can.
    pub(crate) fn leave(sources: &[PathBuf]) {
        for source in sources {
            let _ = unmount(source, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }

    /// `false` when a disk is not there.
    pub(crate) fn add_root(&mut self, wanted: &AddRoot) -> Result<bool, Failure> {
        let id = &wanted.container_id;
        check_id(id)?;
        if self.roots.contains(id) {
            return Err(Failure::exists(format!("container {id:?} has a root file system already")));
        }
        let joined = self.join_root(id, wanted);
        if matches!(joined, Ok(true)) {
            self.roots.insert(id.clone());
        } else {
            // The first failure is the one to tell.
            let _ = release_root(id);
        }
        joined
    }

    fn join_root(&self, id: &str, wanted: &AddRoot) -> Result<bool, Failure> {
        let (place, parts) = (root_of(id), parts_of(id));
        make(&place)?;
        let (Some(lower), Some(upper)) = (&wanted.lower, &wanted.upper) else {
            return Err(Failure::invalid("a root file system needs a lower and an upper part"));
        };
        if let Upper::SharedUpper(path) = upper {
            // The host has joined the layers already.
            let source = self.in_share(path)?;
            return mounted("none", &source, &place, MountFlags::BIND | MountFlags::REC, "").map(|()| true);
        }
        let lower = match lower {
            Lower::SharePath(path) => self.in_share(path)?,
            Lower::BlockSerial(serial) => {
                let Some(disk) = disks::node(serial) else { return Ok(false) };
                let place = parts.join("lower");
                make(&place)?;
                mounted("erofs", &disk, &place, MountFlags::RDONLY | MountFlags::NODEV, "")?;
                place
            }
            Lower::PmemSerial(serial) => {
                let Some(device) = images::node(serial) else { return Ok(false) };
                let place = parts.join("lower");
                make(&place)?;
                // What containers read, they read where the host has it.
                mounted("erofs", &device, &place, MountFlags::RDONLY | MountFlags::NODEV, "dax")?;
                place
            }
        };
        let mut options = "";
        let mut layers = parts.join("upper");
        if !matches!(upper, Upper::SharedLayers(_)) {
            make(&layers)?;
        }
        match upper {
            Upper::Tmpfs(upper) => {
                let size = format!("size={},mode=0755", upper.size.max(4096));
                mounted("tmpfs", Path::new("upper"), &layers, MountFlags::NODEV, &size)?;
            }
            Upper::DiskSerial(_) if wanted.format => {
                return Err(Failure::unsupported(
                    "this agent makes no file systems: give it a disk that has an ext4",
                ));
            }
            Upper::DiskSerial(serial) => {
                let Some(disk) = disks::node(serial) else { return Ok(false) };
                // What is removed is the host's again. No thread of the kernel fills tables with zeros that the host would keep.
                mounted("ext4", &disk, &layers, MountFlags::NODEV, "discard,noinit_itable")?;
            }
            Upper::SharedLayers(path) => {
                // The file server may set no attributes but users' (overlayfs.rst, "userxattr").
                layers = self.in_share(path)?;
                options = ",userxattr";
            }
            // Done above.
            Upper::SharedUpper(_) => {}
        }
        let (upper, work) = (layers.join("upper"), layers.join("work"));
        if !upper.exists() {
            make(&upper)?;
            // The root directory is the upper layer's (overlayfs.rst).
            copy_attributes(&lower, &upper)
                .map_err(|error| Failure::system(&format!("make {}", upper.display()), error))?;
        }
        make(&work)?;
        let [lower, upper, work] = [lower, upper, work].map(|path| path.display().to_string());
        if lower.contains([',', ':', '\\']) {
            return Err(Failure::invalid(format!("{lower:?} cannot be a layer of an overlay")));
        }
        let data = format!("lowerdir={lower},upperdir={upper},workdir={work}{options}");
        mounted("overlay", Path::new("overlay"), &place, MountFlags::empty(), &data).map(|()| true)
    }

    pub(crate) fn remove_root(&mut self, id: &str) -> Result<(), Failure> {
        if !self.roots.contains(id) {
            return Ok(());
        }
        release_root(id)?;
        self.roots.remove(id);
        Ok(())
    }
}

/// Owner and permissions.
fn copy_attributes(from: &Path, to: &Path) -> std::io::Result<()> {
    let metadata = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())
}

fn release_root(id: &str) -> Result<(), Failure> {
    let parts = parts_of(id);
    for place in [root_of(id), parts.join("upper"), parts.join("lower"), parts] {
        release(&place)?;
    }
    Ok(())
}

/// Unmounts and removes a place; fine when nothing is there.
pub(crate) fn release(place: &Path) -> Result<(), Failure> {
    match unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(Failure::system(&format!("unmount {}", place.display()), error)),
    }
    match fs::remove_dir(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::system(&format!("remove {}", place.display()), error))
        }
        _ => Ok(()),
    }
}
