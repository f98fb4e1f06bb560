//! System calls that rustix has no safe wrapper for. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

/// Which process a [`clone`] returned in.
#[derive(Debug)]
pub(crate) enum Cloned {
    /// In the caller.
    Parent { pid: Pid, pidfd: OwnedFd },
    /// In the new process.
    Child,
}

/// clone3(2) without shared memory: a fork into new namespaces and perhaps a cgroup, with a pidfd. With CLONE_PARENT it is a child of the
/// caller's parent, which it signals when it ends as the caller would.
///
/// For processes with one thread: the child goes on in ordinary code, so no lock may be held by a thread that it does not have.
pub(crate) fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: libc::c_int = -1;
    let is_sibling = flags & u64::from(libc::CLONE_PARENT.cast_unsigned()) != 0;
    let into = if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let arguments = CloneArgs {
        flags: flags | into | u64::from(libc::CLONE_PIDFD.cast_unsigned()),
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: if is_sibling { 0 } else { u64::from(libc::SIGCHLD.cast_unsigned()) },
        cgroup: cgroup.map_or(0, |cgroup| u64::from(cgroup.as_raw_fd().cast_unsigned())),
        ..CloneArgs::default()
    };
    // SAFETY: the struct has the layout of clone_args (linux/sched.h, 88 bytes) and lives over the call; without CLONE_VM the child has
    // a copy of this address space and returns here like after fork(2). The caller has one thread (the crate's contract), so the
    // allocator's and the standard library's locks are free in the child. The kernel writes only `pidfd`.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) };
    match result {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
            // SAFETY: with CLONE_PIDFD the kernel has opened this descriptor for us.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MountAttributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// One of MS_SHARED, MS_PRIVATE, MS_SLAVE, MS_UNBINDABLE, or 0.
    pub(crate) propagation: u64,
    pub(crate) user_namespace: u64,
}

/// mount_setattr(2) on an open mount.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: MountAttributes,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, the struct has the kernel's layout (linux/mount.h) and is only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Loads a seccomp program (seccomp(2), SECCOMP_SET_MODE_FILTER): `program` is an array of `struct sock_filter` as bytes.
pub(crate) fn load_seccomp(program: &[u8], flags: u64) -> io::Result<()> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    if program.is_empty() || !program.len().is_multiple_of(INSTRUCTION) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no whole number of instructions"));
    }
    let mut instructions: Vec<libc::sock_filter> = program
        .chunks_exact(INSTRUCTION)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let length = u16::try_from(instructions.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "longer than the kernel allows"))?;
    let filter = libc::sock_fprog { len: length, filter: instructions.as_mut_ptr() };
    // SAFETY: `filter` points to `len` initialised instructions that outlive the call; the kernel copies and checks them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// execve(2): returns only with its error.
pub(crate) fn execute(path: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer, and the strings they point to outlive the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Lets every descriptor above the standard ones be closed at the next execve.
pub(crate) fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC nothing is closed now; no memory is touched.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes `descriptor` the standard descriptor `number` (0, 1 or 2).
pub(crate) fn become_standard(descriptor: BorrowedFd<'_>, number: libc::c_int) -> io::Result<()> {
    debug_assert!((0..=2).contains(&number));
    let from = descriptor.as_raw_fd();
    // SAFETY: both take plain integers. The standard descriptors are owned by nobody in the child: it uses them by number only.
    let result = unsafe {
        if from == number { libc::fcntl(from, libc::F_SETFD, 0) } else { libc::dup2(from, number) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Every signal at its default action and none blocked, as a program expects to be started.
pub(crate) fn default_signals() {
    // SAFETY: SIG_DFL runs no code of ours; numbers that take no action give EINVAL. A zeroed sigset_t is an empty set.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Children that end are forgotten at once, also those that were left by their parents.
pub(crate) fn ignore_ends_of_children() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Closes every descriptor. For a process that uses none any more, and never drops the values that own them.
pub(crate) fn close_all() {
    // SAFETY: the caller goes on in a loop that touches no descriptor and never returns, so no owner closes or uses one again.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
}

/// Gives the caller a cgroup, mount, … namespace of its own.
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: only namespace flags are passed, which touch no memory and no descriptor table; the caller has one thread.
    if unsafe { libc::unshare(flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Joins the namespaces in `flags` of a process (by its pidfd), or the one that a namespace file stands for.
pub(crate) fn setns(descriptor: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: touches no memory; the caller has one thread.
    if unsafe { libc::setns(descriptor.as_raw_fd(), flags) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes the terminal the controlling one of this session.
pub(crate) fn own_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer argument.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// One instruction of eBPF (linux/bpf.h, `struct bpf_insn`).
pub(crate) type EbpfInstruction = u64;

/// Attaches a device program to a cgroup, in place of one that was attached by this process before (`before`).
pub(crate) fn attach_device_filter(
    cgroup: BorrowedFd<'_>,
    program: &[EbpfInstruction],
    before: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    const BPF_F_REPLACE: u32 = 4;
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    #[repr(C)]
    #[derive(Default)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
        replaced: u32,
    }
    let mut load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Load::default()
    };
    load.name[..16].copy_from_slice(b"podvisor_devices"[..16].as_ref());
    load.name[15] = 0;
    // SAFETY: the struct begins like the kernel's `union bpf_attr` for BPF_PROG_LOAD; the pointers in it point to `program` and a C
    // string, which outlive the call; the kernel verifies the program.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    let loaded = i32::try_from(loaded).unwrap_or(-1);
    if loaded < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    let attach = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: loaded.as_raw_fd().cast_unsigned(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI | if before.is_some() { BPF_F_REPLACE } else { 0 },
        replaced: before.map_or(0, |before| before.as_raw_fd().cast_unsigned()),
    };
    // SAFETY: the struct begins like `union bpf_attr` for BPF_PROG_ATTACH and holds open descriptors.
    let attached =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if attached < 0 { Err(io::Error::last_os_error()) } else { Ok(loaded) }
}

/// Ends the process at once, without running anything.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) never returns and touches no memory.
    unsafe { libc::_exit(code) }
}
