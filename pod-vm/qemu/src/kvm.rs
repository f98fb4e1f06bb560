//! /dev/kvm for a user who may not open it.
//!
//! Most systems let everybody or a group open it. Where neither is so, QEMU, which knows it only by its path, gets a mount namespace in
//! which another node of the same device, its user's own, lies in that place.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use podvisor_hypervisor::sys;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, mknodat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, mount_bind, mount_change, move_mount, unmount,
};

pub(crate) const PATH: &str = "/dev/kvm";

/// How a user gets at it.
#[derive(Debug)]
pub(crate) enum Access {
    /// As it is, or there is none, which QEMU says best.
    Plain,
    /// As a member of this group.
    Group(u32),
    /// By a node of its own, which is to take the device's place.
    Own(Node),
}

/// A node of the device for one user, in a file system that is not mounted anywhere.
#[derive(Debug)]
pub(crate) struct Node {
    directory: OwnedFd,
    /// Itself, only to be referred to.
    pub(crate) file: OwnedFd,
    /// Where the file system may lie for a moment, and the node then.
    place: CString,
    path: CString,
}

/// How `user` can open it for reading and writing; `place`: a directory where something can be mounted for a moment.
pub(crate) fn access(user: u32, place: &str) -> io::Result<Access> {
    let Ok(device) = fs::metadata(PATH) else { return Ok(Access::Plain) };
    if user == 0 || !device.file_type().is_char_device() || device.mode() & 0o006 == 0o006 {
        return Ok(Access::Plain);
    }
    // Root's group opens more than this.
    if device.mode() & 0o060 == 0o060 && device.gid() != 0 {
        return Ok(Access::Group(device.gid()));
    }
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let directory = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(&directory, "kvm", FileType::CharacterDevice, mode, device.rdev())?;
    chownat(&directory, "kvm", Some(Uid::from_raw(user)), Some(Gid::from_raw(user)), AtFlags::empty())?;
    let file = openat(&directory, "kvm", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let (place, path) = (CString::new(place)?, CString::new(format!("{place}/kvm"))?);
    Ok(Access::Own(Node { directory, file, place, path }))
}

impl Node {
    /// Puts it in the place of /dev/kvm, in a mount namespace of this process' own. That one follows what is mounted and unmounted
    /// outside, so that it keeps nothing from going. Between fork and exec: system calls only.
    pub(crate) fn take_its_place(&self) -> io::Result<()> {
        sys::unshare(libc::CLONE_NEWNS)?;
        mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.directory, c"", CWD, self.place.as_c_str(), flags)?;
        mount_bind(self.path.as_c_str(), c"/dev/kvm")?;
        unmount(self.place.as_c_str(), UnmountFlags::DETACH)?;
        Ok(())
    }
}
