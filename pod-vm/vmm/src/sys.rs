//! The system calls and conversions that have no safe wrapper. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::mmap::MmapRegion;

/// KVM by a descriptor of /dev/kvm.
pub(crate) fn kvm(descriptor: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and owned by nobody else; one of something else than /dev/kvm gives errors.
    unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) }
}

/// Lets a machine's processors reach a part of this process's memory.
///
/// The part must be mapped for as long as the machine lives, and used by nothing but accessors for volatile memory: it is a region of a
/// `GuestMemoryMmap`, which the devices hold until the process ends.
pub(crate) fn add_memory(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the caller upholds what is said above.
    unsafe { vm.set_user_memory_region(region) }
}

/// Maps the first `length` bytes of a file over a part of a region, for reading. What lies behind them in the last page reads as zeros.
///
/// Who has the file must not make it shorter: whoever reads beyond its end then is ended by SIGBUS.
pub(crate) fn map_file(region: &MmapRegion, at: u64, file: &File, length: u64) -> io::Result<()> {
    let (place, length) = part(region, at, length)?;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: the part is the region's, which nothing refers to but by accessors for volatile memory, and which is unmapped as a whole.
    let mapped = unsafe { libc::mmap(place.cast(), length, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts a page with these bytes into a region, for reading.
pub(crate) fn map_page(region: &MmapRegion, at: u64, bytes: &[u8; 4096]) -> io::Result<()> {
    let (place, length) = part(region, at, bytes.len() as u64)?;
    // SAFETY: as above; the page is writable for as long as it is filled, and known to nobody else.
    unsafe {
        check(libc::mprotect(place.cast(), length, libc::PROT_READ | libc::PROT_WRITE))?;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, length);
        check(libc::mprotect(place.cast(), length, libc::PROT_READ))
    }
}

/// Address and length of a part of a region that begins with a page.
fn part(region: &MmapRegion, at: u64, length: u64) -> io::Result<(*mut u8, usize)> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let at = usize::try_from(at).map_err(|_| outside())?;
    let length = usize::try_from(length).map_err(|_| outside())?;
    let end = length.checked_next_multiple_of(4096).and_then(|length| at.checked_add(length));
    if !at.is_multiple_of(4096) || end.is_none_or(|end| end > region.size()) {
        return Err(outside());
    }
    // SAFETY: `at` is within the region.
    Ok((unsafe { region.as_ptr().add(at) }, length))
}

/// Ends the process at once, whatever its other threads do.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: nothing has to be cleaned up: the kernel does.
    unsafe { libc::_exit(code) }
}

/// Bytes of the header before each packet of a tap.
pub(crate) fn set_tap_header(tap: impl AsFd, bytes: i32) -> io::Result<()> {
    let tap = tap.as_fd().as_raw_fd();
    // SAFETY: the call reads an int.
    check(unsafe { libc::ioctl(tap, TAP_SET_HEADER, &raw const bytes) })
}

/// What whoever reads from a tap takes over from the kernel: TUN_F_….
pub(crate) fn set_tap_offload(tap: impl AsFd, flags: u32) -> io::Result<()> {
    let tap = tap.as_fd().as_raw_fd();
    // SAFETY: the argument is an integer.
    check(unsafe { libc::ioctl(tap, TAP_SET_OFFLOAD, libc::c_ulong::from(flags)) })
}

/// How a process of its own ends in which `filter` holds and one system call is made: its wait status.
#[cfg(test)]
pub(crate) fn call_with(
    filter: &seccompiler::BpfProgram,
    number: libc::c_long,
    arguments: [u64; 6],
) -> libc::c_int {
    // SAFETY: between fork and _exit the child makes system calls alone; callers give arguments that nothing comes of.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            if seccompiler::apply_filter(filter).is_err() {
                libc::_exit(3);
            }
            let [first, second, third, fourth, fifth, sixth] = arguments;
            libc::syscall(number, first, second, third, fourth, fifth, sixth);
            libc::_exit(0);
        }
        let mut status = 0;
        assert!(child > 0 && libc::waitpid(child, &raw mut status, 0) == child);
        status
    }
}

/// `KVM_SET_USER_MEMORY_REGION` (linux/kvm.h)
pub(crate) const ADD_MEMORY: u64 = 0x4020_ae46;
/// `TUNSETVNETHDRSZ` and `TUNSETOFFLOAD` (linux/if_tun.h).
const TAP_SET_HEADER: libc::c_ulong = 0x4004_54d8;
pub(crate) const TAP_SET_OFFLOAD: libc::c_ulong = 0x4004_54d0;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
