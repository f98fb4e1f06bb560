//! `unshare(2)`, which has no safe wrapper.
#![allow(unsafe_code)]

use rustix::io;
use rustix::thread::UnshareFlags;

/// Moves the calling thread into new network, IPC and UTS namespaces, whichever are asked for.
pub(crate) fn unshare(net: bool, ipc: bool, uts: bool) -> io::Result<()> {
    let mut flags = UnshareFlags::empty();
    flags.set(UnshareFlags::NEWNET, net);
    flags.set(UnshareFlags::NEWIPC, ipc);
    flags.set(UnshareFlags::NEWUTS, uts);
    // SAFETY: rustix calls this unsafe because of CLONE_FILES, which would give the thread a descriptor table of its
    // own and so break I/O safety for descriptors owned elsewhere. The flags above are all there are.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
