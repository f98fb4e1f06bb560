//! The system calls and instructions that have no safe wrapper in rustix. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Takes over the descriptor that the parent process left open for this one under a number.
pub fn inherited_descriptor(number: i32) -> io::Result<OwnedFd> {
    if (0..=libc::STDERR_FILENO).contains(&number) {
        return Err(io::Error::other("it is a standard stream"));
    }
    // SAFETY: F_SETFD takes a plain integer and touches no memory; a number that is no descriptor gives EBADF.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is an open descriptor (fcntl above) and nothing in this process owns it yet: `main` calls
    // this once, before it opens anything.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor above stderr except `kept`: what the monitor leaked must not reach the machine.
///
/// Only for the first moments of `main`, before anything else in the process owns a descriptor.
pub fn close_other_descriptors(kept: BorrowedFd<'_>) {
    let kept = u32::try_from(kept.as_raw_fd()).unwrap_or(u32::MAX);
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.saturating_add(1), u32::MAX)] {
        if first <= last {
            // SAFETY: the call touches no memory, and the caller promises that nobody owns a descriptor in the range.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Makes glibc's allocator fit a small process: one arena for all threads, and freed memory goes back at once.
pub fn tune_allocator() {
    // SAFETY: mallopt changes allocator parameters; called before a second thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
    }
}

/// The processor's time stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and the kernel leaves it to user space unless a process asks to be
    // without it (PR_SET_TSC), which this one does not.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Lets `prepare` run in the child between fork and exec.
///
/// `prepare` must keep to what is allowed there: system calls, no memory allocation, no locks. Everything in `confine.rs` that is
/// reached from it does.
pub fn before_exec(command: &mut Command, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the caller upholds what is said above.
    unsafe { command.pre_exec(prepare) };
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Leaves a descriptor open in the program that is executed next.
pub fn leave_open(number: i32) -> io::Result<()> {
    // SAFETY: F_SETFD takes a plain integer and touches no memory.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }.into())
}

/// Writes to a descriptor or file by number and path, without the allocations of `std::fs`.
pub fn write_file(path: &CStr, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: `path` is a C string, `bytes` are readable for the length given, and the descriptor is closed by the one that opened it.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(file.into())?;
        let written = libc::write(file, bytes.as_ptr().cast(), bytes.len());
        let result = check(written as libc::c_long);
        libc::close(file);
        result
    }
}

/// Gives the process namespaces of its own, of the kinds in `flags`, which must not include CLONE_VM, CLONE_FILES or CLONE_NEWPID.
pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: with those kinds nothing that the program's memory depends on changes.
    check(unsafe { libc::unshare(flags) }.into())
}

/// Becomes another user, with `groups` as the only further groups. By the system calls themselves: the C library's functions
/// do it for all threads and take locks for that.
pub fn become_user(user: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: `groups` is readable for the length given; the other arguments are integers.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, user, user, user))?;
        check(libc::syscall(libc::SYS_setresuid, user, user, user))
    }
}

/// No program that is executed later gets a capability by its user. Needs CAP_SETPCAP, so it comes before the user changes.
pub fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes an integer.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let error = io::Error::last_os_error();
            // Beyond the last one that the kernel knows.
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// Gives up every capability.
pub fn drop_capabilities() -> io::Result<()> {
    // struct __user_cap_header_struct, version 3, of this process; then two of __user_cap_data_struct.
    let mut header: [u32; 2] = [0x2008_0522, 0];
    let none = [0u32; 6];
    // SAFETY: both arrays have the layout that capset(2) reads; the header it also writes to, when the version is unknown to it.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), none.as_ptr()) })
}

/// No program that is executed later gets rights by its file.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: the arguments are integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// No core file: it would hold the guest's memory.
pub fn no_core_file() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is read.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) }.into())
}

/// The process is killed when the thread that made it ends; it is an error when that has happened already.
pub fn die_with(parent: i32) -> io::Result<()> {
    // SAFETY: both calls take integers.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0).into())?;
        if libc::getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    }
}

/// Whether this network namespace has an interface of that name.
pub fn interface_exists(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a C string.
    if unsafe { libc::if_nametoindex(name.as_ptr()) } == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches a descriptor of /dev/net/tun to a persistent tap: whole Ethernet frames, with a virtio header before each.
pub fn attach_tap(device: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero, the name's end.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
            .map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }.into())
}

/// What landlock_create_ruleset(2) is asked with: struct landlock_ruleset_attr.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RulesetAttributes {
    /// `handled_access_fs`
    pub files: u64,
    /// `handled_access_net`
    pub network: u64,
    /// `scoped`
    pub scopes: u64,
}

impl RulesetAttributes {
    /// All kinds of access that a version of Landlock can forbid, the abilities to reach unix sockets and processes outside among them.
    pub fn all(version: u32) -> Self {
        let files = match version {
            1 => 13,
            2 => 14,
            3 | 4 => 15,
            _ => 16,
        };
        Self {
            files: (1 << files) - 1,
            // Neither binds nor connects.
            network: if version >= 4 { 0b11 } else { 0 },
            // No abstract unix sockets and no signals out of it.
            scopes: if version >= 6 { 0b11 } else { 0 },
        }
    }
}

/// Which version of Landlock the kernel has; none where it has none.
pub fn landlock_version() -> Option<u32> {
    const VERSION: u32 = 1;
    // SAFETY: with this flag and no attributes nothing but the version is asked for.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttributes>(),
            0usize,
            VERSION,
        )
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Makes a ruleset that forbids all of `attributes` until something is allowed.
pub fn landlock_ruleset(attributes: &RulesetAttributes) -> io::Result<OwnedFd> {
    let size = size_of::<RulesetAttributes>();
    // SAFETY: the struct is readable for the size given; fields that the kernel does not know yet must be zero, which it checks.
    let made =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const *attributes, size, 0u32) };
    check(made)?;
    let number = i32::try_from(made).map_err(io::Error::other)?;
    // SAFETY: the call has just made it, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Allows `rights` on a file, or on everything below a directory.
pub fn landlock_allow(ruleset: BorrowedFd<'_>, path: BorrowedFd<'_>, rights: u64) -> io::Result<()> {
    /// struct landlock_path_beneath_attr
    #[repr(C, packed)]
    struct PathBeneath {
        rights: u64,
        parent: i32,
    }
    const PATH_BENEATH: u32 = 1;
    let rule = PathBeneath { rights, parent: path.as_raw_fd() };
    // SAFETY: the struct has the layout that this kind of rule has, and is only read.
    check(unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), PATH_BENEATH, &raw const rule, 0u32)
    })
}

/// From here on the process is held to the ruleset.
pub fn landlock_restrict(ruleset: i32) -> io::Result<()> {
    // SAFETY: the arguments are integers.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0u32) })
}
