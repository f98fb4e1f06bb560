//! overlayfs over a snapshot's layers.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::Rootfs;
use crate::error::ImageError;

/// Mounts `rootfs` at `target`. `links` is a directory for short names, `empty` an empty one: both only where the kernel needs them.
pub(crate) fn mount(rootfs: &Rootfs, target: &Path, links: &Path, empty: &Path) -> Result<(), ImageError> {
    let mut lower: Vec<PathBuf> = rootfs.lower.clone();
    // An image may have no layer at all, and overlayfs wants two where there is no upper one.
    if lower.is_empty() || (rootfs.upper.is_none() && lower.len() == 1) {
        lower.push(empty.to_owned());
    }
    let failed = |error: Errno| ImageError::Mount { path: target.to_owned(), source: error.into() };
    match modern(rootfs, &lower, target) {
        // Kernels before 6.5 do not know `lowerdir+`.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            classic(rootfs, &lower, target, links).map_err(failed)
        }
        done => done.map_err(failed),
    }
}

/// The mount API of 5.2 with overlayfs' parameters of 6.5: a layer per call, no limit on their number but the kernel's 500.
fn modern(rootfs: &Rootfs, lower: &[PathBuf], target: &Path) -> Result<(), Errno> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    for layer in lower {
        fsconfig_set_string(&context, "lowerdir+", layer)?;
    }
    if let (Some(upper), Some(work)) = (&rootfs.upper, &rootfs.work) {
        fsconfig_set_string(&context, "upperdir", upper)?;
        fsconfig_set_string(&context, "workdir", work)?;
    }
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// One option string, at most a page long: long names are replaced by short links.
fn classic(rootfs: &Rootfs, lower: &[PathBuf], target: &Path, links: &Path) -> Result<(), Errno> {
    let mut names = Vec::new();
    std::fs::create_dir_all(links).map_err(|_| Errno::IO)?;
    for layer in lower {
        let name = layer.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let link = links.join(&name[..name.len().min(16)]);
        match rustix::fs::symlink(layer, &link) {
            Err(Errno::EXIST) if std::fs::read_link(&link).is_ok_and(|to| to == *layer) => {}
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        names.push(link.display().to_string());
    }
    let mut options = format!("lowerdir={}", names.join(":"));
    if let (Some(upper), Some(work)) = (&rootfs.upper, &rootfs.work) {
        options.push_str(&format!(",upperdir={},workdir={}", upper.display(), work.display()));
    }
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str())
}
