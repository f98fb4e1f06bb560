//! The pod's init: PID 1 of a pid namespace that the pod's containers share. It reaps and waits.
//!
//! Containers can see it, so it holds nothing worth having: no capabilities, no descriptors, an empty root
//! directory of its own (/proc/1/root would otherwise be the node's), and it cannot be traced.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use podvisor_proto::monitor::StartInit;
use prost::Message;
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{DumpableBehavior, WaitOptions, set_dumpable_behavior, wait};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType};

use crate::sys::{self, Arrived, Forked};

/// What it is called in a process list.
pub(crate) const NAME: &str = "podvisor-init";
/// The command line argument that selects it.
pub(crate) const VERB: &str = "init";

/// What could not be done on the way to an init.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("read the instructions")]
    Instructions(#[source] io::Error),
    #[error("decode the instructions")]
    Decode(#[source] prost::DecodeError),
    #[error("enter the cgroup of {path}")]
    Cgroup { path: String, source: io::Error },
    #[error("join the namespace {path}")]
    Join { path: String, source: io::Error },
    #[error("make an empty root directory")]
    Root(#[source] io::Error),
    #[error("give up privileges")]
    Privileges(#[source] io::Error),
    #[error("make the pid namespace")]
    Namespace(#[source] io::Error),
    #[error("fork the init")]
    Fork(#[source] io::Error),
}

/// The helper: reads its instructions from stdin, forks the init, and answers with its pid or with what went wrong.
pub(crate) fn main() -> ! {
    match prepare_and_fork() {
        Ok((Forked::Child, _)) => run(),
        Ok((Forked::Parent(pid), ready)) => {
            // Ends when the init has closed what it inherited.
            let _ = File::from(ready).read(&mut [0]);
            let _ = writeln!(io::stdout(), "{}", pid.as_raw_pid());
            sys::exit_now(0)
        }
        Err(error) => {
            let _ = writeln!(io::stdout(), "{}", crate::disk::chain(error));
            sys::exit_now(1)
        }
    }
}

fn prepare_and_fork() -> Result<(Forked, OwnedFd), InitError> {
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(InitError::Instructions)?;
    let instructions = StartInit::decode(&*bytes).map_err(InitError::Decode)?;

    for path in &instructions.cgroup_procs {
        enter_cgroup(path).map_err(|source| InitError::Cgroup { path: path.clone(), source })?;
    }
    set_oom_score(instructions.oom_score_adj);
    // Opened before the root goes, joined after it: the mount namespace belongs to the node's user namespace.
    let mut namespaces = Vec::new();
    for path in &instructions.join_namespaces {
        let opened = File::open(path).and_then(|file| Ok((sys::namespace_kind(file.as_fd())?, file)));
        let (kind, file) = opened.map_err(|source| InitError::Join { path: path.clone(), source })?;
        namespaces.push((kind, file, path));
    }
    empty_root().map_err(InitError::Root)?;
    // The user namespace last: joining it gives up the right to join namespaces that belong to the node's.
    namespaces.sort_by_key(|(kind, ..)| *kind == libc::CLONE_NEWUSER);
    for (kind, file, path) in namespaces {
        join(kind, &file).map_err(|source| InitError::Join { path: path.clone(), source })?;
    }
    sys::unshare_pid_namespace().map_err(InitError::Namespace)?;
    drop_privileges().map_err(InitError::Privileges)?;
    sys::block_init_signals().map_err(InitError::Privileges)?;
    let _ = rustix::thread::set_name(c"podvisor-init");
    let (ready, held_by_init) = rustix::pipe::pipe().map_err(|error| InitError::Fork(error.into()))?;
    let forked = sys::fork().map_err(InitError::Fork)?;
    if matches!(forked, Forked::Parent(_)) {
        drop(held_by_init);
    } else {
        // The init closes all descriptors at once.
        std::mem::forget(held_by_init);
    }
    Ok((forked, ready))
}

/// Moves this process; what it forks later is in the same cgroup.
pub(crate) fn enter_cgroup(path: &str) -> io::Result<()> {
    // 0 is the writer itself.
    OpenOptions::new().write(true).open(path)?.write_all(b"0")
}

/// Sets the score, or the nearest that this process may set: going below what one has needs CAP_SYS_RESOURCE.
fn set_oom_score(wanted: i32) {
    const FILE: &str = "/proc/self/oom_score_adj";
    let wanted = wanted.clamp(-1000, 1000);
    let set = |score: i32| std::fs::write(FILE, score.to_string());
    if set(wanted).is_ok() {
        return;
    }
    let current = std::fs::read_to_string(FILE).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    // The lowest that is allowed lies between; scores are few, so it is found by halving.
    let (mut refused, mut allowed) = (wanted, current);
    while allowed - refused > 1 {
        let middle = i32::midpoint(refused, allowed);
        if set(middle).is_ok() {
            allowed = middle;
        } else {
            refused = middle;
        }
    }
}

/// Moves into a mount namespace with an empty read-only root.
fn empty_root() -> io::Result<()> {
    sys::unshare_mount_namespace()?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let locked = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Any directory that is certain to exist will do; it is out of reach a moment later.
    mount("tmpfs", "/proc", "tmpfs", locked, c"mode=0555,size=4k,nr_inodes=2")?;
    std::env::set_current_dir("/proc")?;
    rustix::process::pivot_root(".", ".")?;
    // The old root is now mounted over the new one, in the same place (pivot_root(2), "pivot_root(".", ".")").
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    mount_remount("/", locked | MountFlags::RDONLY, "")?;
    debug_assert!(rustix::fs::statat(CWD, "proc", rustix::fs::AtFlags::empty()).is_err());
    Ok(())
}

fn join(kind: i32, namespace: &File) -> io::Result<()> {
    let kind = match kind {
        libc::CLONE_NEWUSER => LinkNameSpaceType::User,
        libc::CLONE_NEWNET => LinkNameSpaceType::Network,
        libc::CLONE_NEWIPC => LinkNameSpaceType::InterProcessCommunication,
        libc::CLONE_NEWUTS => LinkNameSpaceType::HostNameAndNISDomainName,
        // Its own pid and mount namespaces are the point of an init; others nobody needs.
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))?;
    if kind == LinkNameSpaceType::User {
        // Still the node's root by its numbers, which this namespace does not map: become its root.
        let (uid, gid) = (rustix::process::Uid::ROOT, rustix::process::Gid::ROOT);
        rustix::thread::set_thread_groups(&[]).or_else(|error| match error {
            // A namespace may forbid it (/proc/PID/setgroups); then there are none to lose.
            rustix::io::Errno::PERM => Ok(()),
            other => Err(other),
        })?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    Ok(())
}

fn drop_privileges() -> io::Result<()> {
    for capability in CapabilitySet::all().iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel knows no such capability.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    rustix::thread::set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// PID 1.
fn run() -> ! {
    sys::close_all_descriptors();
    loop {
        match sys::wait_for_signal() {
            Arrived::Terminate => sys::exit_now(0),
            Arrived::Child => while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {},
        }
    }
}
