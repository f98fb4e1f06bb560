//! What vmm-sys-util has no safe way for.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// An event's descriptor, to be watched.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and is borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
