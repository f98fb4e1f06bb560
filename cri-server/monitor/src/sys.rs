//! The system calls that have no safe wrapper in rustix. Everything else in this crate is safe code.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::{Pid, Signal};

/// Takes over the descriptor that the parent process left open for this one under a number.
pub(crate) fn inherited_descriptor(number: i32) -> io::Result<OwnedFd> {
    if (0..=libc::STDERR_FILENO).contains(&number) {
        return displaced(number);
    }
    // SAFETY: F_SETFD takes a plain integer and touches no memory; a number that is no descriptor gives EBADF.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is an open descriptor (fcntl above) and nothing in this process owns it yet: `main` calls
    // this once, before it opens anything.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A standard descriptor that the parent used for the control connection: it moves up, and /dev/null takes its place.
fn displaced(number: i32) -> io::Result<OwnedFd> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: F_DUPFD_CLOEXEC takes plain integers and touches no memory; a number that is no descriptor gives EBADF.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, libc::STDERR_FILENO + 1) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl has just made this descriptor, so nothing else owns it.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    // SAFETY: dup2 takes plain integers; no `OwnedFd` in this process owns the standard descriptor that it replaces, as
    // the standard streams go by number.
    if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy)
}

/// Closes every descriptor above stderr except `kept`: what the daemon leaked must not reach a container.
///
/// Only for the first moments of `main`, before anything else in the process owns a descriptor.
pub(crate) fn close_other_descriptors(kept: BorrowedFd<'_>) {
    let kept = u32::try_from(kept.as_raw_fd()).unwrap_or(u32::MAX);
    close_range(3, kept.saturating_sub(1));
    close_range(kept.saturating_add(1), u32::MAX);
}

/// Closes every descriptor, the standard ones too. Only in the pod's init, which uses none from then on.
pub(crate) fn close_all_descriptors() {
    close_range(0, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    if first > last {
        return;
    }
    // SAFETY: neither call touches memory; the two callers promise that nobody owns a descriptor in the range.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, last, 0) < 0 {
            // Linux before 5.9, or a filter that does not know the call.
            for number in (first..=last.min(1023)).filter_map(|number| i32::try_from(number).ok()) {
                libc::close(number);
            }
        }
    }
}

/// Makes glibc's allocator fit a small process: one arena for both threads, and freed memory goes back at once.
pub(crate) fn tune_allocator() {
    // SAFETY: mallopt changes allocator parameters; called before the second thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // Fixed thresholds switch off glibc's dynamic adjustment, which would keep the largest block ever freed.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
    }
}

/// The eventfd that [`on_child`] writes to; -1 until [`catch_signals`].
static CHILD_WAKER: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_child(_signal: libc::c_int) {
    let one = 1u64;
    // SAFETY: errno's address is valid for this thread; write(2) is async-signal-safe; `one` outlives the call. The
    // descriptor is never closed (catch_signals leaks it). errno is put back for the code that was interrupted.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(CHILD_WAKER.load(Ordering::Relaxed), (&raw const one).cast(), size_of::<u64>());
        *errno = before;
    }
}

extern "C" fn on_ignored(_signal: libc::c_int) {}

/// Lets SIGCHLD make `waker` readable, and SIGTERM, SIGHUP and SIGINT do nothing.
///
/// SIGPIPE stays ignored, as Rust's start-up has it; `Command` gives its children the default action back.
///
/// Functions and no blocked or ignored signals: exec resets a function to the default action, but hands a blocked or
/// ignored signal down, and a container would then not end at SIGTERM.
pub(crate) fn catch_signals(waker: OwnedFd) -> io::Result<BorrowedFd<'static>> {
    let raw = waker.into_raw_fd();
    CHILD_WAKER.store(raw, Ordering::Relaxed);
    // Whoever started the daemon may have had signals ignored (nohup, a shell's background jobs).
    for signal in (1..=libc::SIGRTMAX()).filter(|signal| *signal != libc::SIGPIPE) {
        // SAFETY: SIG_DFL runs no code of ours. Numbers that take no action (SIGKILL, the C library's own) give EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    install(libc::SIGCHLD, on_child, libc::SA_NOCLDSTOP)?;
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
        install(signal, on_ignored, 0)?;
    }
    // SAFETY: an all-zero sigset_t is a valid object for sigemptyset to fill, and sigprocmask only reads it.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        if libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the descriptor was leaked by into_raw_fd above, so it stays open for the rest of the process.
    Ok(unsafe { BorrowedFd::borrow_raw(raw) })
}

fn install(signal: libc::c_int, function: extern "C" fn(libc::c_int), flags: libc::c_int) -> io::Result<()> {
    // SAFETY: a zeroed sigaction is a valid value (empty mask); `function` has the signature that is called without
    // SA_SIGINFO and is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = function as *const () as usize;
        action.sa_flags = flags | libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Signals that [`wait_for_signal`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// A child ended.
    Child,
    /// Somebody asks for the end: SIGTERM or SIGINT.
    Terminate,
}

fn init_signals() -> libc::sigset_t {
    // SAFETY: an all-zero sigset_t is a valid object for sigemptyset and sigaddset to fill.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Blocks what [`wait_for_signal`] waits for. As PID 1 of a namespace a blocked signal is kept for us, where one with
/// the default action would be thrown away.
pub(crate) fn block_init_signals() -> io::Result<()> {
    let set = init_signals();
    // SAFETY: `set` is initialised and only read.
    if unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sleeps until one of the signals of [`block_init_signals`] comes.
pub(crate) fn wait_for_signal() -> Arrived {
    let set = init_signals();
    loop {
        // SAFETY: `set` is initialised and only read; no siginfo is asked for.
        match unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) } {
            libc::SIGCHLD => return Arrived::Child,
            libc::SIGTERM | libc::SIGINT => return Arrived::Terminate,
            _ => {}
        }
    }
}

/// Which process a [`fork`] returned in.
pub(crate) enum Forked {
    /// In the parent, with the child's pid.
    Parent(Pid),
    /// In the child.
    Child,
}

/// fork(2) for a process with a single thread (the init helper); both sides may go on as they like.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: the only caller is the init helper, which never starts a thread, so no lock is held by a thread that
    // does not exist in the child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => {
            Ok(Forked::Parent(Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?))
        }
    }
}

/// Gives the caller's later children a new pid namespace.
pub(crate) fn unshare_pid_namespace() -> io::Result<()> {
    // SAFETY: CLONE_NEWPID shares or unshares no memory and no descriptor table; it only affects later forks.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the caller a mount namespace of its own.
pub(crate) fn unshare_mount_namespace() -> io::Result<()> {
    // SAFETY: CLONE_NEWNS (with the CLONE_FS it implies) touches no memory and no descriptor table; the caller has a
    // single thread, so nobody else relied on the shared working directory.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The `CLONE_NEW…` kind of an open namespace file (ioctl_ns(2)).
pub(crate) fn namespace_kind(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: NS_GET_NSTYPE takes no argument and returns the kind; on another sort of file it fails with ENOTTY.
    let kind = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}

/// A signal by its number, the real-time ones too: systemd's images are stopped by one (SIGRTMIN+3).
pub(crate) fn signal(number: i32) -> Option<Signal> {
    let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
    // SAFETY: within SIGRTMIN to SIGRTMAX it is a signal that exists and that the C library does not use itself.
    Signal::from_named_raw(number)
        .or_else(|| real_time.contains(&number).then(|| unsafe { Signal::from_raw_unchecked(number) }))
}

/// Ends the process at once, without running anything.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) never returns and touches no memory.
    unsafe { libc::_exit(code) }
}
