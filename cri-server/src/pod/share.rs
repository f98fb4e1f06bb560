//! What a pod's guest sees of the host: one directory, served by the pod's file server, in which the root file systems and volumes of its
//! containers are mounted while it runs.
//!
//! ```text
//! <run>/pods/<pod>/share/            tmpfs, mount propagation shared: the file server's copy of it follows
//!     files/hostname, hosts, resolv.conf
//!     <container>/                   tmpfs; to unmount it unmounts all below
//!         rootfs                     the container's root file system
//!         mounts/<n>                 the source of its n-th mount
//! ```
//!
//! A mount that the container may only read is read-only here already: a guest is not trusted to keep to it.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use rustix::mount::{mount, mount_change, move_mount, open_tree};

use super::acquired::Acquisition;
use crate::error::PodError;
use crate::id::{ContainerId, PodId};
use crate::mount_attr::{self, Attributes};
use crate::node::Node;

/// What the guest knows the share by.
pub(super) const TAG: &str = "pod";

/// Where the agent mounts shares (agent.proto, `AddShare`).
const IN_GUEST: &str = "/run/podvisor/shares";

/// Bytes of the tmpfs: three files that the guest may write to, and mount points.
const SIZE: &std::ffi::CStr = c"mode=0755,size=4m";

/// The share of a pod.
pub(super) fn directory(node: &Node, pod: &PodId) -> PathBuf {
    node.pod_directory(pod).join("share")
}

/// The files that a pod's containers share.
pub(super) fn files(node: &Node, pod: &PodId) -> PathBuf {
    directory(node, pod).join("files")
}

/// A container's part of it.
fn part(node: &Node, pod: &PodId, container: &ContainerId) -> PathBuf {
    directory(node, pod).join(container.as_str())
}

/// A path of the share as the guest sees it.
pub(super) fn in_guest(relative: impl AsRef<Path>) -> PathBuf {
    Path::new(IN_GUEST).join(TAG).join(relative)
}

/// What is held for a container.
pub(super) fn acquisitions(node: &Node, pod: &PodId, container: &ContainerId) -> [Acquisition; 2] {
    let part = part(node, pod, container);
    [Acquisition::Directory(part.clone()), Acquisition::Mount(part)]
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> PodError {
    let path = path.to_owned();
    move |error| PodError::File { operation, path, source: error.into() }
}

fn make_directory(path: &Path) -> Result<(), PodError> {
    std::fs::create_dir_all(path).map_err(|source| PodError::File {
        operation: "make",
        path: path.to_owned(),
        source,
    })
}

/// Makes a pod's share. Blocking.
pub(super) fn make(node: &Node, pod: &PodId) -> Result<(), PodError> {
    let directory = directory(node, pod);
    make_directory(&directory)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("podvisor-share", &directory, "tmpfs", flags, SIZE)
        .map_err(failed("mount a tmpfs at", &directory))?;
    // In nobody else's peer group, whatever the run directory is mounted as.
    for propagation in [MountPropagationFlags::PRIVATE, MountPropagationFlags::SHARED] {
        mount_change(&directory, propagation).map_err(failed("set the mount propagation of", &directory))?;
    }
    make_directory(&files(node, pod))
}

/// Makes a container's part, with its root file system, which is mounted at `rootfs`. Blocking.
pub(super) fn add_container(
    node: &Node,
    pod: &PodId,
    container: &ContainerId,
    rootfs: &Path,
) -> Result<(), PodError> {
    let part = part(node, pod, container);
    make_directory(&part)?;
    mount("podvisor-share", &part, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, SIZE)
        .map_err(failed("mount a tmpfs at", &part))?;
    bind(rootfs, &part.join("rootfs"), Attributes::default(), false)
}

/// How a mount of a container is seen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Access<'u> {
    pub(super) attributes: Attributes<'u>,
    /// Mounts that come to the source on the host later come to the guest.
    pub(super) follows: bool,
}

/// Shows `source` as the container's mount `index`; gives the path that the guest sees it at. Blocking.
pub(super) fn add_mount(
    node: &Node,
    pod: &PodId,
    container: &ContainerId,
    index: usize,
    source: &Path,
    access: Access<'_>,
) -> Result<PathBuf, PodError> {
    let relative = Path::new("mounts").join(index.to_string());
    let target = part(node, pod, container).join(&relative);
    bind(source, &target, access.attributes, access.follows)?;
    Ok(in_guest(Path::new(container.as_str()).join(relative)))
}

/// Mounts a copy of the tree at `source`, complete with its attributes before anybody can see it.
fn bind(source: &Path, target: &Path, attributes: Attributes<'_>, follows: bool) -> Result<(), PodError> {
    let is_directory = std::fs::metadata(source)
        .map_err(|error| PodError::File { operation: "look at", path: source.to_owned(), source: error })?
        .is_dir();
    if is_directory {
        make_directory(target)?;
    } else {
        make_directory(target.parent().unwrap_or(target))?;
        std::fs::File::create(target).map_err(|error| PodError::File {
            operation: "make",
            path: target.to_owned(),
            source: error,
        })?;
    }
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, flags).map_err(failed("copy the mounts at", source))?;
    let propagation =
        if follows { MountPropagationFlags::DOWNSTREAM } else { MountPropagationFlags::PRIVATE };
    mount_attr::set(tree.as_fd(), attributes, propagation).map_err(|error| PodError::File {
        operation: "set the attributes of",
        path: source.to_owned(),
        source: error,
    })?;
    // In a shared mount it becomes shared (and stays a follower): what appears in it later appears in the file server's copy.
    move_mount(tree.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("mount at", target))
}
