//! A user namespace of its own, in which every id is what it is outside (user_namespaces(7)).
//!
//! Capabilities in it count for files, because all their owners are mapped, and for nothing that belongs to the host: no device nodes, no
//! mounts, no network, no other process. The mount namespace is older than it and stays the host's.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions, WaitStatus, getpid, waitpid};
use rustix::thread::UnshareFlags;

use crate::sys;

/// Why there is no user namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("read {0}")]
    Read(&'static str, #[source] io::Error),
    #[error("{0} is not a map of ids")]
    Map(&'static str),
    #[error("start the child that writes the id maps")]
    Child(#[source] io::Error),
    #[error("make it; the limit is /proc/sys/user/max_user_namespaces")]
    Make(#[source] Errno),
    #[error("have its id maps written")]
    Maps(#[source] io::Error),
}

/// A child outside of the namespace: only there can a map of more than one id be written.
pub(crate) struct MapWriter {
    child: Pid,
    /// A byte makes it write.
    go: OwnedFd,
}

const USERS: &str = "/proc/self/uid_map";
const GROUPS: &str = "/proc/self/gid_map";

impl MapWriter {
    /// Starts the child. This process must have no other thread.
    pub(crate) fn start() -> Result<Self, IdentityError> {
        let users = same_inside(USERS)?;
        let groups = same_inside(GROUPS)?;
        let own = getpid();
        let (wait, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|error| IdentityError::Child(error.into()))?;
        if let Some(child) = sys::fork().map_err(IdentityError::Child)? {
            return Ok(Self { child, go });
        }
        drop(go);
        sys::end_at_once(i32::from(!write_maps(&wait, own, &users, &groups)))
    }

    /// Enters the namespace.
    pub(crate) fn enter(self) -> Result<(), IdentityError> {
        sys::unshare(UnshareFlags::NEWUSER).map_err(IdentityError::Make)?;
        let failed = |error: io::Error| IdentityError::Maps(error);
        rustix::io::write(&self.go, &[1]).map_err(|error| failed(error.into()))?;
        let ended = waitpid(Some(self.child), WaitOptions::empty()).map_err(|error| failed(error.into()))?;
        match ended.map(|(_, status)| WaitStatus::exit_status(status)) {
            Some(Some(0)) => Ok(()),
            _ => Err(failed(io::Error::other("the child that writes them failed"))),
        }
    }
}

/// The child's part: waits for the parent to be in its namespace, and writes the maps. False when anything fails.
fn write_maps(wait: &OwnedFd, parent: Pid, users: &str, groups: &str) -> bool {
    let mut byte = [0];
    let parent = parent.as_raw_nonzero();
    matches!(rustix::io::read(wait, &mut byte), Ok(1))
        && fs::write(format!("/proc/{parent}/uid_map"), users).is_ok()
        && fs::write(format!("/proc/{parent}/gid_map"), groups).is_ok()
}

/// A map for a child namespace that gives every id of this one to itself.
fn same_inside(path: &'static str) -> Result<String, IdentityError> {
    let map = fs::read_to_string(path).map_err(|error| IdentityError::Read(path, error))?;
    same_map(&map).ok_or(IdentityError::Map(path))
}

/// Of every line `INSIDE OUTSIDE COUNT` the same ids inside as outside, which for the new namespace are those inside of this one.
fn same_map(map: &str) -> Option<String> {
    let lines: Option<Vec<String>> = map
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let (first, _, count) = (words.next()?, words.next()?, words.next()?);
            Some(format!("{first} {first} {count}\n"))
        })
        .collect();
    lines.filter(|lines| !lines.is_empty()).map(|lines| lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_stay_what_they_are() {
        assert_eq!(same_map("         0          0 4294967295\n").unwrap(), "0 0 4294967295\n");
        let nested = "0 100000 1000\n1000 1000 1\n";
        assert_eq!(same_map(nested).unwrap(), "0 0 1000\n1000 1000 1\n");
        assert_eq!(same_map(""), None);
        assert_eq!(same_map("0 0\n"), None);
    }
}
