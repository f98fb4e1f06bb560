//! Namespaces with nothing in them.

use std::io;

use podvisor_hypervisor::sys;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{chdir, pivot_root};

/// Gives this process empty ones. `place`: a directory on which the new root lies for a moment.
pub(super) fn empty(place: &str) -> io::Result<()> {
    let kinds = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    sys::unshare(kinds)?;
    // Nothing of what happens here is seen outside, and what is unmounted outside is not kept here.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount("nothing", place, "tmpfs", flags, Some(c"size=4k,nr_inodes=2,mode=555"))?;
    chdir(place)?;
    // With the same directory twice the old root lies on top of the new one, and comes off with one unmount (pivot_root(2), notes).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}
