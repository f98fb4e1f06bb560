//! Root file systems of containers with a user namespace: the image's ids are those inside, and no file of a layer is touched.
//!
//! overlayfs cannot be id-mapped itself (6.18), but takes id-mapped layers (5.19). So the directory with all layers is mounted over itself
//! with the namespace's ids, once, in a mount namespace that only a thread of ours is in, and the overlay is made there: it keeps clones
//! of what it stands on. The thread ends, and with it the mount: nothing is seen on the machine, or left there by a crash.
//!
//! The upper directory is not id-mapped: what a container writes belongs on the disk to the ids outside, so that a set-user-id file of
//! its root is no program of the node's root. Rejected: id-mapping it too, and chown of a copy of the image.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{MountPropagationFlags, OpenTreeFlags, mount_change, open_tree};

use crate::error::ImageError;
use crate::mount::{attach, overlay};
use crate::{Rootfs, sys};

/// Directories of the store.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) layers: PathBuf,
    /// Holds two empty directories.
    pub(crate) empty: PathBuf,
    /// For short names.
    pub(crate) links: PathBuf,
}

/// Mounts `rootfs` at `target` with the ids of the user namespace `user`.
pub(crate) fn mount(
    rootfs: &Rootfs,
    target: &Path,
    label: Option<&str>,
    places: &Places,
    user: BorrowedFd<'_>,
) -> Result<(), ImageError> {
    let failed = |source| ImageError::Mount { path: target.to_owned(), source };
    let made = in_view(&places.layers, user, || {
        own_upper(rootfs, &places.layers)?;
        detached(rootfs, target, label, places)
    })?;
    made.and_then(|overlay| attach(&overlay, target)).map_err(failed)
}

/// Does the same with nothing in it.
pub(crate) fn try_out(places: &Places, user: BorrowedFd<'_>) -> Result<(), ImageError> {
    let lower = vec![places.layers.clone()];
    let rootfs = Rootfs { key: String::new(), lower, upper: None, work: None };
    in_view(&places.layers, user, || detached(&rootfs, &places.empty, None, places).map(drop))?
        .map_err(|source| ImageError::IdMap { path: places.layers.clone(), source })
}

/// The root directory's owner is the upper directory's (kernel, overlayfs.rst).
fn own_upper(rootfs: &Rootfs, layers: &Path) -> io::Result<()> {
    let Some(upper) = &rootfs.upper else { return Ok(()) };
    // Without a layer it is root, as is the owner of the layers.
    let owner = std::fs::metadata(rootfs.lower.first().map_or(layers, PathBuf::as_path))?;
    std::os::unix::fs::chown(upper, Some(owner.uid()), Some(owner.gid()))
}

fn detached(rootfs: &Rootfs, target: &Path, label: Option<&str>, places: &Places) -> io::Result<OwnedFd> {
    match overlay(rootfs, target, label, &places.links, &places.empty)? {
        Some(overlay) => Ok(overlay),
        // It is mounted where nobody sees it.
        None => {
            Ok(open_tree(CWD, target, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
        }
    }
}

/// Runs `work` in a thread that sees `layers` with the ids of `user`.
fn in_view<T: Send>(
    layers: &Path,
    user: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, ImageError> {
    let failed = |source| ImageError::IdMap { path: layers.to_owned(), source };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("id-mapped-layers".into())
            .spawn_scoped(scope, || {
                look_through(layers, user)?;
                Ok(work())
            })
            .map_err(failed)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(failed)
    })
}

fn look_through(layers: &Path, user: BorrowedFd<'_>) -> io::Result<()> {
    sys::unshare_mount_namespace()?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let view = open_tree(CWD, layers, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    sys::map_ids(view.as_fd(), user)?;
    attach(&view, layers)
}
