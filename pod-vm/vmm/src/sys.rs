//! The system calls and conversions that have no safe wrapper. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};

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
