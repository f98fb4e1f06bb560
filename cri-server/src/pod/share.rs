//! What a pod's guest sees of the host: one directory, served by the pod's file server, in which the root file systems and volumes of its
//! containers are mounted while it runs.
//!
//! ```text
//! <run>/pods/<pod>/share/            tmpfs; the root of the file server's mount namespace
//!     files/hostname, hosts, resolv.conf
//!     <container>/                   tmpfs; to unmount it unmounts all below
//!         rootfs                     the container's root file system; or, where the guest has the image in its memory,
//!         changes                    the upper and the work directory of an overlay
//!     volumes/<name>                 sources of containers' mounts, see `shared_volumes.rs`
//! ```
//!
//! What belongs to containers is mounted in the file server's mount namespace alone: in the host's it would keep directories below volumes
//! busy that kubelet wants to remove. What no container of the pod may write to is read-only there already: a guest is not trusted to keep
//! to it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use rustix::mount::{UnmountFlags, mount, mount_change, move_mount, open_tree, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::acquired::Acquisition;
use super::record::{PodRecord, ProcessIdentity};
use super::shared_volumes;
use crate::error::PodError;
use crate::id::{ContainerId, PodId};
use crate::monitor::process;
use crate::mount_attr::{self, Attributes};
use crate::node::Node;

/// What the guest knows the share by.
pub(super) const TAG: &str = "pod";

/// Where the agent mounts shares (agent.proto, `AddShare`).
const IN_GUEST: &str = "/run/podvisor/shares";

/// Bytes of the tmpfs: three files that the guest may write to, and mount points.
pub(super) const SIZE: &std::ffi::CStr = c"mode=0755,size=4m";

/// The share of a pod.
pub(super) fn directory(node: &Node, pod: &PodId) -> PathBuf {
    node.pod_directory(pod).join("share")
}

/// The files that a pod's containers share.
pub(super) fn files(node: &Node, pod: &PodId) -> PathBuf {
    directory(node, pod).join("files")
}

/// A container's part of it, in the file server's mount namespace.
fn part(container: &str) -> PathBuf {
    Path::new("/").join(container)
}

/// A path of the share as the guest sees it.
pub(super) fn in_guest(relative: impl AsRef<Path>) -> PathBuf {
    Path::new(IN_GUEST).join(TAG).join(relative)
}

/// What is held for a container.
pub(super) fn acquisition(pod: &PodRecord, container: &ContainerId) -> Option<Acquisition> {
    let server = pod.machine.as_ref()?.file_server;
    Some(Acquisition::Share { server, pod: Some(pod.id.clone()), container: container.to_string() })
}

pub(super) fn failed(operation: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> PodError {
    let path = path.to_owned();
    move |error| PodError::File { operation, path, source: error.into() }
}

pub(super) fn make_directory(path: &Path) -> Result<(), PodError> {
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

/// Runs `work` in the file server's mount namespace; `None`: the server is gone, and everything in it. Blocking.
pub(super) fn in_server<T: Send>(
    server: ProcessIdentity,
    work: impl FnOnce() -> Result<T, PodError> + Send,
) -> Result<Option<T>, PodError> {
    let path = PathBuf::from(format!("/proc/{}/ns/mnt", server.pid));
    let Ok(namespace) = File::open(&path) else { return Ok(None) };
    // Opened first: it is this very process's.
    if !process::lives(server) {
        return Ok(None);
    }
    let enter = || {
        mount_attr::own_directories()?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
        Ok(())
    };
    let failed = |source| PodError::File { operation: "enter", path: path.clone(), source };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("share".into())
            .spawn_scoped(scope, || {
                enter().map_err(failed)?;
                work().map(Some)
            })
            .map_err(failed)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The same where the server has to be there.
pub(super) fn in_living_server<T: Send>(
    pod: &PodRecord,
    work: impl FnOnce() -> Result<T, PodError> + Send,
) -> Result<T, PodError> {
    let gone = || PodError::NotReady {
        id: pod.id.to_string(),
        why: "the file server of its virtual machine is gone".to_owned(),
    };
    let server = pod.machine.as_ref().ok_or_else(gone)?.file_server;
    in_server(server, work)?.ok_or_else(gone)
}

/// Makes a container's part, with what there is at `source` under that name. Blocking.
pub(super) fn add_container(
    pod: &PodRecord,
    container: &ContainerId,
    name: &str,
    source: &Path,
) -> Result<(), PodError> {
    let tree = copy(source, Attributes::default(), false)?;
    let part = part(container.as_str());
    in_living_server(pod, || {
        make_directory(&part)?;
        mount("podvisor-share", &part, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, SIZE)
            .map_err(failed("mount a tmpfs at", &part))?;
        tree.attach(&part.join(name))
    })
}

/// Takes a container's part away. Idempotent. Blocking.
pub(super) fn remove_container(server: ProcessIdentity, container: &str) -> Result<(), PodError> {
    let part = part(container);
    let removed = in_server(server, || {
        match unmount(&part, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(failed("unmount", &part)(error)),
        }
        match std::fs::remove_dir(&part) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(PodError::File { operation: "remove", path: part.clone(), source })
            }
            _ => Ok(()),
        }
    });
    removed.map(|_| ())
}

/// How a mount of a container is seen.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Access<'u> {
    pub(super) attributes: Attributes<'u>,
    /// Mounts that come to the source on the host later come to the guest.
    pub(super) follows: bool,
}

/// A copy of the mounts at a path, which nobody can see yet.
pub(super) struct Tree {
    mount: OwnedFd,
    is_directory: bool,
}

/// Complete with its attributes.
pub(super) fn copy(source: &Path, attributes: Attributes<'_>, follows: bool) -> Result<Tree, PodError> {
    let is_directory = std::fs::metadata(source)
        .map_err(|error| PodError::File { operation: "look at", path: source.to_owned(), source: error })?
        .is_dir();
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let mount = open_tree(CWD, source, flags).map_err(failed("copy the mounts at", source))?;
    let propagation =
        if follows { MountPropagationFlags::DOWNSTREAM } else { MountPropagationFlags::PRIVATE };
    mount_attr::set(mount.as_fd(), attributes, propagation).map_err(|error| PodError::File {
        operation: "set the attributes of",
        path: source.to_owned(),
        source: error,
    })?;
    Ok(Tree { mount, is_directory })
}

impl Tree {
    pub(super) fn attach(&self, target: &Path) -> Result<(), PodError> {
        if self.is_directory {
            make_directory(target)?;
        } else {
            make_directory(target.parent().unwrap_or(target))?;
            shared_volumes::make_file(target)?;
        }
        move_mount(self.mount.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed("mount at", target))
    }
}
