//! mount_setattr(2), which has no safe wrapper in rustix.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::mount::MountPropagationFlags;

/// What a tree of mounts is to be.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Attributes {
    pub(crate) read_only: bool,
    /// What is mounted below is read-only too; else only the topmost mount.
    pub(crate) recursive: bool,
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

/// Changes the tree of mounts that `tree` (from open_tree(2), at no path yet) is.
pub(crate) fn set(
    tree: BorrowedFd<'_>,
    attributes: Attributes,
    propagation: MountPropagationFlags,
) -> io::Result<()> {
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let read_only = if attributes.read_only { MOUNT_ATTR_RDONLY } else { 0 };
    let all = MountAttr {
        set: if attributes.recursive { read_only } else { 0 },
        propagation: u64::from(propagation.bits()),
        ..MountAttr::default()
    };
    change(tree, &all, libc::AT_RECURSIVE)?;
    let top = MountAttr { set: read_only, ..MountAttr::default() };
    if read_only != 0 { change(tree, &top, 0) } else { Ok(()) }
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
