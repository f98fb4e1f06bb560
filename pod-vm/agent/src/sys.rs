//! System calls that rustix has no safe wrapper for. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An ELF note (elf(5)) by which a guest's builder learns, without running this program, which protocol it speaks: owner `podvisor`, type 1,
/// the version as a little-endian u32.
#[repr(C, align(4))]
struct Note {
    owner_length: u32,
    length: u32,
    kind: u32,
    owner: [u8; 12],
    version: [u8; 4],
}

// The name makes it a note section, which ends up in a PT_NOTE segment.
#[used]
#[unsafe(link_section = ".note.podvisor")]
static NOTE: Note = Note {
    owner_length: 9,
    length: 4,
    kind: 1,
    owner: *b"podvisor\0\0\0\0",
    version: podvisor_proto::agent::PROTOCOL_VERSION.to_le_bytes(),
};

/// Listens on a port of vsock(7), for anybody: only the host can dial.
pub(crate) fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    const BACKLOG: libc::c_int = 64;
    // SAFETY: socket(2) takes plain integers and returns a new descriptor.
    let socket = unsafe {
        libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has just been made, nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: a zeroed sockaddr_vm is a valid value; the length passed is its own. listen(2) takes integers.
    let bound = unsafe {
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
        address.svm_cid = libc::VMADDR_CID_ANY;
        address.svm_port = port;
        let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or_default();
        let bound = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length);
        if bound < 0 { bound } else { libc::listen(socket.as_raw_fd(), BACKLOG) }
    };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// A descriptor that is readable when a child has ended. The signal is blocked from then on; a child's program has it unblocked again.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: a zeroed sigset_t is an object for sigemptyset to fill; the calls only read it afterwards, and signalfd returns a new
    // descriptor that nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let descriptor = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if descriptor < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(descriptor)) }
    }
}

/// Adopts processes whose parents end, as PID 1 does anyway (prctl(2), PR_SET_CHILD_SUBREAPER).
pub(crate) fn adopt_orphans() -> io::Result<()> {
    // SAFETY: takes plain integers.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Loads a kernel module from an open, uncompressed file.
pub(crate) fn load_module(file: BorrowedFd<'_>) -> io::Result<()> {
    let none: &CStr = c"";
    // SAFETY: the parameters are an empty C string that outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), none.as_ptr(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Credits randomness to the kernel's pool and makes it take that in at once (random(4)).
pub(crate) fn credit_randomness(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        length: libc::c_int,
        bytes: [u8; 512],
    }
    let taken = seed.len().min(512);
    let length = libc::c_int::try_from(taken).unwrap_or(0);
    let mut pool = Pool { bits: length * 8, length, bytes: [0; 512] };
    pool.bytes[..taken].copy_from_slice(&seed[..taken]);
    // SAFETY: the struct begins like `struct rand_pool_info` and holds at least `length` bytes; the kernel only reads it. The second call
    // has no argument.
    unsafe {
        if libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) < 0
            || libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Lets the clock catch up with a difference of `ns` bit by bit (adjtime(3)).
pub(crate) fn slew_clock(ns: i64) -> io::Result<()> {
    let delta = libc::timeval { tv_sec: 0, tv_usec: ns / 1000 };
    // SAFETY: the struct is only read; the old value is not asked for.
    if unsafe { libc::adjtime(&raw const delta, std::ptr::null_mut()) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// By how many ns the clock behind `device` is ahead of the system's, both read at the same moment (linux/ptp_clock.h,
/// `PTP_SYS_OFFSET_PRECISE`).
pub(crate) fn clock_difference(device: BorrowedFd<'_>) -> io::Result<i64> {
    const PTP_SYS_OFFSET_PRECISE: libc::c_ulong = 0xc040_3d08;
    #[repr(C)]
    #[derive(Default)]
    struct Time {
        seconds: i64,
        nanoseconds: u32,
        reserved: u32,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Offset {
        device: Time,
        realtime: Time,
        monotonic_raw: Time,
        reserved: [u32; 4],
    }
    let mut offset = Offset::default();
    // SAFETY: the struct has the layout and the size, 64 bytes, that the request's number says; the kernel fills it.
    if unsafe { libc::ioctl(device.as_raw_fd(), PTP_SYS_OFFSET_PRECISE, &raw mut offset) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let ns =
        |time: &Time| time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanoseconds));
    Ok(ns(&offset.device).saturating_sub(ns(&offset.realtime)))
}

/// A signal by its number, the real-time ones too.
pub(crate) fn signal(number: i32) -> Option<rustix::process::Signal> {
    use rustix::process::Signal;
    let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
    // SAFETY: within SIGRTMIN to SIGRTMAX it is a signal that exists and that the C library does not use itself.
    Signal::from_named_raw(number)
        .or_else(|| real_time.contains(&number).then(|| unsafe { Signal::from_raw_unchecked(number) }))
}

/// Makes what is started lead a session of its own, whose terminal is its standard input.
pub(crate) fn on_own_terminal(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let prepare = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: two system calls, which may be made after a fork; nothing is allocated or locked.
    unsafe { command.pre_exec(prepare) };
}
