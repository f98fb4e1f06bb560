//! A user namespace and what it owns, without a process that stays: a child holds them until they are described and pinned.
//!
//! The kernel gives a new user namespace only to a process with a single thread (unshare(2)), which a daemon's thread is not, or to a
//! new process. The child here is made as posix_spawn(3) makes one: it shares the daemon's memory, so that no page table is copied,
//! while the thread that made it sleeps (CLONE_VFORK). It runs no program and does nothing but wait to be killed.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use rustix::process::{Pid, Signal};

use super::dumpable;

/// A range of ids, as a line of `/proc/PID/uid_map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IdRange {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub length: u32,
}

/// Which ids a user namespace has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UserMappings {
    /// Users.
    pub uids: IdRange,
    /// Groups.
    pub gids: IdRange,
}

/// Enough for a few system calls.
const STACK: usize = 64 << 10;

/// What the child is told.
struct Order {
    /// The daemon: if its parent is another process, the daemon has died.
    parent: libc::pid_t,
    /// Takes the child's pid, and then what became of `namespaces`: 0 or an errno.
    ready: RawFd,
    /// Gives a byte when there are ids.
    mapped: RawFd,
    /// What else it makes, as unshare(2) takes it.
    namespaces: libc::c_int,
}

/// A process that is in new namespaces. Gone when this is dropped.
#[derive(Debug)]
pub(super) struct Holder {
    pid: Pid,
    said: File,
    mapped: Option<io::PipeWriter>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Holder {
    /// Makes a user namespace, and with [`Holder::own`] other namespaces that it owns.
    pub(super) fn start(net: bool, ipc: bool, uts: bool) -> io::Result<Self> {
        let mut namespaces = 0;
        for (wanted, flag) in
            [(net, libc::CLONE_NEWNET), (ipc, libc::CLONE_NEWIPC), (uts, libc::CLONE_NEWUTS)]
        {
            namespaces |= if wanted { flag } else { 0 };
        }
        let (reader, writer) = io::pipe()?;
        let (waits, mapped) = io::pipe()?;
        let thread = thread::Builder::new()
            .name("user-namespace".into())
            .spawn(move || hold(namespaces, &writer.into(), &waits.into()))?;
        let mut pid = [0; size_of::<libc::pid_t>()];
        let mut said = File::from(OwnedFd::from(reader));
        match (said.read_exact(&mut pid), Pid::from_raw(libc::pid_t::from_ne_bytes(pid))) {
            (Ok(()), Some(pid)) => Ok(Self { pid, said, mapped: Some(mapped), thread: Some(thread) }),
            // The pipe was closed: there is no child (any more).
            _ => Err(join(thread).err().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Says which ids there are. The writer is the node's root, so the group map needs no `deny` in `setgroups`
    /// (user_namespaces(7)).
    pub(super) fn map(&self, mappings: &UserMappings) -> io::Result<()> {
        for (file, range) in [("uid_map", mappings.uids), ("gid_map", mappings.gids)] {
            // One write with all of it, or the kernel takes none.
            let line = format!("{} {} {}\n", range.inside, range.outside, range.length);
            std::fs::write(format!("/proc/{}/{file}", self.pid.as_raw_pid()), line)?;
        }
        Ok(())
    }

    /// Makes the other namespaces, as the root of the user namespace: what is in them from the beginning (the directory of POSIX message
    /// queues) belongs to whoever makes them. To be called once, when there are ids.
    pub(super) fn own(&mut self) -> io::Result<()> {
        let Some(mut mapped) = self.mapped.take() else { return Ok(()) };
        let errno = dumpable::kept(|| {
            mapped.write_all(&[1])?;
            let mut errno = [0; size_of::<libc::c_int>()];
            self.said.read_exact(&mut errno)?;
            Ok(errno)
        })?;
        match libc::c_int::from_ne_bytes(errno) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Where the kernel shows a namespace of it: `user`, `net`, `ipc`, `uts`.
    pub(super) fn namespace(&self, kind: &str) -> PathBuf {
        format!("/proc/{}/ns/{kind}", self.pid.as_raw_pid()).into()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It is reaped by the thread below and by nobody else, so the number is still its own.
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
        if let Some(thread) = self.thread.take() {
            let _ = join(thread);
        }
    }
}

fn join(thread: JoinHandle<io::Result<()>>) -> io::Result<()> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Makes the child and sleeps until it is gone.
fn hold(namespaces: libc::c_int, ready: &OwnedFd, mapped: &OwnedFd) -> io::Result<()> {
    let order = Order {
        parent: std::process::id().cast_signed(),
        ready: ready.as_raw_fd(),
        mapped: mapped.as_raw_fd(),
        namespaces,
    };
    let mut stack = vec![0_u8; STACK];
    let flags = libc::CLONE_NEWUSER | libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs `child` on a stack of its own; this thread, whose thread-local storage (errno) and locals it shares, does
    // not run before the child has ended (CLONE_VFORK), so `order` and `stack` outlive it. All signals are blocked first, in a thread
    // that does nothing else, so that no handler of the daemon runs in the child.
    let pid = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        // It grows downwards, and the ABI wants 16 bytes.
        let top = stack.as_mut_ptr().add(STACK & !15).map_addr(|address| address & !15);
        libc::clone(child, top.cast::<c_void>(), flags, (&raw const order).cast_mut().cast::<c_void>())
    };
    let Some(pid) = Pid::from_raw(pid).filter(|_| pid > 0) else { return Err(io::Error::last_os_error()) };
    let ended = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    drop(stack);
    Ok(ended.map(drop)?)
}

extern "C" fn child(order: *mut c_void) -> libc::c_int {
    // SAFETY: `order` is `hold`'s, which sleeps. Nothing below allocates, locks or unwinds: system calls only, all of them
    // async-signal-safe. The descriptors that are closed are copies in a table of the child's own (no CLONE_FILES).
    unsafe {
        let order = &*order.cast::<Order>();
        // Ends with the thread that made it, and so with the daemon.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() == order.parent {
            let pid = libc::getpid();
            libc::write(order.ready, (&raw const pid).cast::<c_void>(), size_of::<libc::pid_t>());
            let mut byte = 0_u8;
            // Nothing comes when nothing else is wanted.
            if libc::read(order.mapped, (&raw mut byte).cast::<c_void>(), 1) == 1 {
                let errno = become_root().and_then(|()| unshare(order.namespaces)).err().unwrap_or(0);
                libc::write(order.ready, (&raw const errno).cast::<c_void>(), size_of::<libc::c_int>());
            }
            // Pipes of others must not seem open longer than they are.
            libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
            loop {
                libc::pause();
            }
        }
        libc::_exit(1)
    }
}

/// Takes the ids 0 of the user namespace that the calling process is in, and nobody else with it: libc's own functions would go through
/// all threads of the daemon, whose memory this is.
///
/// # Safety
///
/// To be called in the child only.
unsafe fn become_root() -> Result<(), libc::c_int> {
    // SAFETY: system calls without pointers. The parent-death signal is forgotten when ids change.
    unsafe {
        let failed = libc::syscall(libc::SYS_setresgid, 0, 0, 0) != 0
            || libc::syscall(libc::SYS_setresuid, 0, 0, 0) != 0;
        let errno = *libc::__errno_location();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if failed { Err(errno) } else { Ok(()) }
    }
}

/// # Safety
///
/// To be called in the child only.
unsafe fn unshare(namespaces: libc::c_int) -> Result<(), libc::c_int> {
    // SAFETY: namespaces of the child's own; no flag of these concerns the memory that it shares.
    unsafe { if libc::unshare(namespaces) == 0 { Ok(()) } else { Err(*libc::__errno_location()) } }
}
