//! What vmm-sys-util has no safe way for.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestAddress, GuestMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Memory;

/// Gives the whole pages of a part of the guest's memory back to the host: they read as zeros from now on.
pub fn discard(part: &VolatileSlice<'_>) {
    const PAGE: usize = 4096;
    let memory = part.ptr_guard_mut();
    let first = memory.as_ptr().align_offset(PAGE);
    let Some(length) = part.len().checked_sub(first).map(|length| length / PAGE * PAGE) else { return };
    if length == 0 {
        return;
    }
    // SAFETY: `first` and `length` stay within the part, which is mapped for as long as it is borrowed. What the guest finds there then is its own
    // affair, and nothing in this process holds a reference into its memory.
    unsafe { libc::madvise(memory.as_ptr().add(first).cast(), length, libc::MADV_DONTNEED) };
}

/// The same for a range of addresses, as far as it is memory.
pub fn discard_at(memory: &Memory, address: u64, length: u64) {
    let Ok(length) = usize::try_from(length) else { return };
    for part in memory.get_slices(GuestAddress(address), length) {
        let Ok(part) = part else { return };
        discard(&part);
    }
}

/// An event's descriptor, to be watched.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and is borrowed for as long as the result lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
