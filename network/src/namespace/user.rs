//! A user namespace and what it owns, without a process that stays: a child holds them until they are described and pinned.
//!
//! The kernel gives a new user namespace only to a process with a single thread (unshare(2)), which a daemon's thread is not, or to a
//! new process. The child here is made as posix_spawn(3) makes one: it shares the daemon's memory, so that no page table is copied,
//! while the thread that made it sleeps (CLONE_VFORK). It runs no program and does nothing but wait to be killed.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use rustix::process::{Pid, Signal};

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

/// Enough for two system calls.
const STACK: usize = 64 << 10;

/// What the child is told.
struct Order {
    /// The daemon: if its parent is another process, the daemon has died.
    parent: libc::pid_t,
    /// Takes the child's pid.
    ready: RawFd,
}

/// A process that is in new namespaces. Gone when this is dropped.
#[derive(Debug)]
pub(super) struct Holder {
    pid: Pid,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Holder {
    /// Makes a user namespace, and other namespaces that it owns.
    pub(super) fn start(net: bool, ipc: bool, uts: bool) -> io::Result<Self> {
        let mut flags = libc::CLONE_NEWUSER;
        for (wanted, flag) in
            [(net, libc::CLONE_NEWNET), (ipc, libc::CLONE_NEWIPC), (uts, libc::CLONE_NEWUTS)]
        {
            flags |= if wanted { flag } else { 0 };
        }
        let (reader, writer) = io::pipe()?;
        let thread = thread::Builder::new()
            .name("user-namespace".into())
            .spawn(move || hold(flags, &writer.into()))?;
        let mut said = [0; size_of::<libc::pid_t>()];
        let mut reader = File::from(OwnedFd::from(reader));
        match (reader.read_exact(&mut said), Pid::from_raw(libc::pid_t::from_ne_bytes(said))) {
            (Ok(()), Some(pid)) => Ok(Self { pid, thread: Some(thread) }),
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
fn hold(flags: libc::c_int, ready: &OwnedFd) -> io::Result<()> {
    let order = Order { parent: std::process::id().cast_signed(), ready: ready.as_raw_fd() };
    let mut stack = vec![0_u8; STACK];
    let flags = flags | libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
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
            // Pipes of others must not seem open longer than they are.
            libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
            loop {
                libc::pause();
            }
        }
        libc::_exit(1)
    }
}
