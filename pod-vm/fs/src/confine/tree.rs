//! The shared tree as the root, and namespaces with nothing in them.
//!
//! The tree stays connected to the host's: every mount here becomes a slave (mount_namespaces(7)), so what the host mounts below the
//! shared directory appears, what it unmounts goes, and nothing travels the other way.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

use crate::sys;

/// Why the shared tree is not the root.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    #[error("look at {0}")]
    Look(PathBuf, #[source] Errno),
    #[error("{0} is not a mount point: bind it to itself, and make it shared")]
    NoMountPoint(PathBuf),
    #[error("make namespaces; this takes root")]
    Namespaces(#[source] Errno),
    #[error("keep mounts from the host")]
    Slave(#[source] Errno),
    #[error("take hold of /proc/self/fd")]
    Descriptors(#[source] Errno),
    #[error("enter {0}")]
    Enter(PathBuf, #[source] Errno),
    #[error("change the root to {0}")]
    Pivot(PathBuf, #[source] Errno),
    #[error("let go of the old root")]
    LetGo(#[source] Errno),
    #[error("forbid devices and programs below the root")]
    Restrict(#[source] std::io::Error),
}

/// Makes `directory` the root. Gives the directory of the process's own descriptors, as a mount of which it is the top: it is all that can
/// be reached through it.
pub(crate) fn enter(directory: &Path) -> Result<File, TreeError> {
    check(directory)?;
    let apart = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(apart).map_err(TreeError::Namespaces)?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(TreeError::Slave)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(CWD, "/proc/self/fd", flags).map_err(TreeError::Descriptors)?;

    chdir(directory).map_err(|error| TreeError::Enter(directory.to_owned(), error))?;
    // With the same directory twice the old root lies on top of the new one, and comes off with one unmount (pivot_root(2), notes).
    pivot_root(".", ".").map_err(|error| TreeError::Pivot(directory.to_owned(), error))?;
    unmount(".", UnmountFlags::DETACH).map_err(TreeError::LetGo)?;
    chdir("/").map_err(|error| TreeError::Enter("/".into(), error))?;
    // Images hold device nodes and programs of strangers: here they are data. Mounts that come later have what the host gave them.
    sys::forbid_special_files("/").map_err(TreeError::Restrict)?;
    Ok(descriptors.into())
}

fn check(directory: &Path) -> Result<(), TreeError> {
    let status = statx(CWD, directory, AtFlags::empty(), StatxFlags::TYPE)
        .map_err(|error| TreeError::Look(directory.to_owned(), error))?;
    if status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        Ok(())
    } else {
        Err(TreeError::NoMountPoint(directory.to_owned()))
    }
}
