//! Joining namespaces and making them, and the identity maps of a new user namespace.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::Pid;

use crate::error::{ContainerError, During, Step};
use crate::plan::{Mapping, Namespaces};
use crate::sys::{self, Cloned};

/// Kinds that clone3 makes at once. A cgroup namespace has its root where the process is when it is made, and only after the clone is that
/// the container's cgroup. A pid namespace to join is the caller's business too: it counts for children only.
const BY_CLONE: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET;

/// What has to be opened before the clone, and the flags for it.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    pub(crate) clone_flags: u64,
    /// Joined before the clone, so that what is made belongs to it: see `launch.rs`.
    pub(crate) user: Option<File>,
    pub(crate) pid: Option<File>,
    /// Joined by the child.
    pub(crate) joined: Vec<(i32, File)>,
    /// Made by the child after it has joined those.
    pub(crate) late: i32,
}

/// Opens the namespaces that a container joins.
pub(crate) fn open(namespaces: &Namespaces) -> Result<Opened, ContainerError> {
    let now = namespaces.new & BY_CLONE;
    let late = namespaces.new & !BY_CLONE;
    let mut opened = Opened { clone_flags: u64::from(now.cast_unsigned()), late, ..Opened::default() };
    for (kind, path) in &namespaces.joined {
        let file =
            File::open(path).map_err(ContainerError::system(format!("open namespace {}", path.display())))?;
        match *kind {
            libc::CLONE_NEWPID => opened.pid = Some(file),
            libc::CLONE_NEWUSER => opened.user = Some(file),
            kind => opened.joined.push((kind, file)),
        }
    }
    Ok(opened)
}

/// In a process between: joins the user namespace and clones from there. The new process is a child of the caller's parent.
pub(crate) fn clone_below(opened: &Opened) -> Step<Cloned> {
    join_user(opened.user.as_ref())?;
    if let Some(pid) = &opened.pid {
        sys::setns(pid.as_fd(), libc::CLONE_NEWPID).during(|| "join the pid namespace".into())?;
    }
    let flags = opened.clone_flags | u64::from(libc::CLONE_PARENT.cast_unsigned());
    sys::clone(flags, None).during(|| "start the container's process".into())
}

/// Joins a user namespace and becomes its root.
pub(crate) fn join_user(user: Option<&File>) -> Step {
    let Some(user) = user else { return Ok(()) };
    sys::setns(user.as_fd(), libc::CLONE_NEWUSER).during(|| "join the user namespace".into())?;
    become_root()
}

/// Clones with `pid` as the namespace of the caller's children, and takes that back.
pub(crate) fn clone_into(
    pid: Option<impl AsFd>,
    clone: impl FnOnce() -> io::Result<Cloned>,
) -> io::Result<Cloned> {
    let Some(pid) = pid else { return clone() };
    let own = File::open("/proc/self/ns/pid")?;
    sys::setns(pid.as_fd(), libc::CLONE_NEWPID)?;
    let cloned = clone();
    if !matches!(cloned, Ok(Cloned::Child)) {
        // It is an ancestor's or the same, so this cannot fail (kernel/pid_namespace.c, pidns_install).
        sys::setns(own.as_fd(), libc::CLONE_NEWPID)?;
    }
    cloned
}

/// Writes the maps of a child's new user namespace. It waits for that.
pub(crate) fn map(pid: Pid, uids: &[Mapping], gids: &[Mapping]) -> Result<(), ContainerError> {
    let write = |file: &str, mappings: &[Mapping]| {
        let path = format!("/proc/{}/{file}", pid.as_raw_pid());
        let lines: Vec<String> = mappings
            .iter()
            .map(|mapping| format!("{} {} {}", mapping.inside, mapping.outside, mapping.length))
            .collect();
        let lines = lines.join("\n");
        fs::write(&path, lines).map_err(ContainerError::system(format!("write {path}")))
    };
    write("uid_map", uids)?;
    write("gid_map", gids)
}

/// The child's part: joins, and makes what was left to it.
pub(crate) fn enter(opened: &Opened) -> Step {
    for (kind, file) in &opened.joined {
        sys::setns(file.as_fd(), *kind).during(|| format!("join the {} namespace", name(*kind)))?;
    }
    if opened.late != 0 {
        sys::unshare(opened.late).during(|| format!("make the {} namespace", name(opened.late)))?;
    }
    Ok(())
}

/// Uid and gid 0 of the user namespace: until the end the child works as its root.
pub(crate) fn become_root() -> Step {
    use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
    let root = || "become root of the user namespace".to_owned();
    set_thread_groups(&[]).during(root)?;
    set_thread_gid(rustix::process::Gid::ROOT).during(root)?;
    set_thread_uid(rustix::process::Uid::ROOT).during(root)
}

/// Joins every namespace of a container's process but its pid namespace (which the caller's children are in already).
pub(crate) fn join_all(init: &OwnedFd, user: bool) -> Step {
    let mut kinds = libc::CLONE_NEWNS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP;
    if user {
        kinds |= libc::CLONE_NEWUSER;
    }
    sys::setns(init.as_fd(), kinds).during(|| "join the container's namespaces".into())
}

fn name(kind: i32) -> &'static str {
    match kind {
        libc::CLONE_NEWNET => "network",
        libc::CLONE_NEWIPC => "ipc",
        libc::CLONE_NEWUTS => "uts",
        libc::CLONE_NEWCGROUP => "cgroup",
        libc::CLONE_NEWNS => "mount",
        _ => "new",
    }
}
