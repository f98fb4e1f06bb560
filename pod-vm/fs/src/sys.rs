//! System calls that rustix has no safe wrapper for. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// Takes over a descriptor that this process was started with. None if there is no such descriptor.
pub(crate) fn inherited(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: borrowed for this one call, which fails if it is not open.
    let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    // SAFETY: it is open, and whoever started this process gave it to it; nothing here owns descriptors at this time but 0 to 2, which
    // the caller does not pass.
    open.is_ok().then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes all descriptors above standard error but one. Nothing may own any of them.
pub(crate) fn close_all_but(kept: &OwnedFd) -> io::Result<()> {
    let kept = kept.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.saturating_add(1), u32::MAX)] {
        // SAFETY: takes integers. The caller says that nobody owns these descriptors.
        if first <= last && unsafe { libc::close_range(first, last, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Forks (fork(2)): the child's identity, or none in the child. For a process without other threads.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: without other threads no lock is held that the child would wait for.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Ends a forked child, without what its parent wants done at its own end.
pub(crate) fn end_at_once(status: i32) -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(status) }
}

/// Leaves namespaces (unshare(2)).
pub(crate) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: unsafe because of CLONE_FILES, after which other threads' descriptors would be invalid; it is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// No devices, programs and set-user-ID programs on any mount from `path` down (mount_setattr(2)).
pub(crate) fn forbid_special_files(path: &str) -> io::Result<()> {
    let path = CString::new(path)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: path is a C string and attributes a mount_attr of the size that is given, both outlive the call, which only reads them.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
