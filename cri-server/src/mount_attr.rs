//! System calls about mounts that have no safe wrapper in rustix: mount_setattr(2), and unshare(2) of what setns(2) wants unshared.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::mount::MountPropagationFlags;

const READ_ONLY: u64 = 0x1;
const NO_SET_ID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
const NO_PROGRAMS: u64 = 0x8;
const ID_MAPPED: u64 = 0x0010_0000;

/// What a tree of mounts is to be.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Attributes<'u> {
    pub(crate) read_only: bool,
    /// What is mounted below is read-only too; else only the topmost mount.
    pub(crate) recursive: bool,
    /// The topmost mount shows its files with the ids of this user namespace: id 0 of a file is what that maps 0 to.
    pub(crate) user: Option<BorrowedFd<'u>>,
}

/// `struct mount_attr`.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user: u64,
}

/// Changes the tree of mounts that `tree` (from open_tree(2), at no path yet) is. Its files are mere data here: no programs, no devices.
pub(crate) fn set(
    tree: BorrowedFd<'_>,
    attributes: Attributes<'_>,
    propagation: MountPropagationFlags,
) -> io::Result<()> {
    let read_only = if attributes.read_only { READ_ONLY } else { 0 };
    let recursive = if attributes.recursive { read_only } else { 0 };
    let all = MountAttr {
        set: recursive | NO_SET_ID | NO_DEVICES | NO_PROGRAMS,
        propagation: u64::from(propagation.bits()),
        ..MountAttr::default()
    };
    change(tree, &all, libc::AT_RECURSIVE)?;
    let ids = if attributes.user.is_some() { ID_MAPPED } else { 0 };
    let user = attributes.user.map_or(0, |user| user.as_raw_fd().cast_unsigned().into());
    let top = MountAttr { set: read_only | ids, user, ..MountAttr::default() };
    if top.set != 0 { change(tree, &top, 0) } else { Ok(()) }
}

/// Makes a mount read-only or writable, alone.
///
/// # Errors
/// EBUSY for read-only while a file of it is open for writing.
pub(crate) fn set_read_only(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let (set, clear) = if read_only { (READ_ONLY, 0) } else { (0, READ_ONLY) };
    change(mount, &MountAttr { set, clear, ..MountAttr::default() }, 0)
}

fn change(tree: BorrowedFd<'_>, attributes: &MountAttr, flags: i32) -> io::Result<()> {
    // SAFETY: the path is a C string, the structure has the layout and the size that are passed; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the calling thread a root and working directory of its own, which it needs before it may enter a mount namespace (setns(2)).
pub(crate) fn own_directories() -> io::Result<()> {
    // SAFETY: rustix calls this unsafe because of CLONE_FILES, which is not asked for.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }?)
}
