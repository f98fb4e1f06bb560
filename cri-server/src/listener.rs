//! The CRI socket, for root only.
//!
//! Where systemd runs the daemon it keeps the socket while there is none (sd_pid_notify_with_fds(3), `FDSTORE=1`; the unit's
//! `FileDescriptorStoreMax=`): who connects meanwhile waits for the next daemon. Refused, kubelet would let seconds pass before it tries again.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::Context;
use sd_notify::NotifyState;

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: UnixListener,
    /// It outlives this process: its file is not to be removed.
    pub(crate) is_kept: bool,
}

/// The socket that systemd has kept, else a new one. Once in the life of a process.
pub(crate) fn listen(path: &Path) -> anyhow::Result<Listener> {
    let (kept, others) = pick(handed_over(), path);
    for name in others {
        // There is room for one.
        let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)]);
    }
    let listener = if let Some(socket) = kept {
        Listener { socket, is_kept: true }
    } else {
        let socket = bind(path)?;
        let is_kept = hand_over(&socket, path);
        Listener { socket, is_kept }
    };
    listener.socket.set_nonblocking(true).context("cannot make the CRI socket non-blocking")?;
    Ok(listener)
}

/// One that a killed daemon left is replaced: the image store's lock has shown that nobody serves it.
fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let _ = std::fs::remove_file(path);
    let socket = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .with_context(|| format!("cannot set the mode of {}", path.display()))?;
    Ok(socket)
}

/// What a socket is kept by: another file at its path means that nobody comes to it any more.
fn name(path: &Path) -> io::Result<String> {
    let file = std::fs::symlink_metadata(path)?;
    Ok(format!("cri-{:x}-{:x}", file.dev(), file.ino()))
}

/// Whether there is a systemd that keeps it.
fn hand_over(socket: &UnixListener, path: &Path) -> bool {
    let Ok(name) = name(path) else { return false };
    let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
    std::env::var_os("NOTIFY_SOCKET").is_some()
        && sd_notify::notify_with_fds(&state, &[socket.as_fd()]).is_ok()
}

/// What systemd has kept, by name.
fn handed_over() -> Vec<(OwnedFd, String)> {
    // Nothing, or what is no list of descriptors.
    let Ok(descriptors) = sd_notify::listen_fds_with_names() else { return Vec::new() };
    descriptors
        // SAFETY: they were opened before this process began, for it alone (sd_listen_fds(3)), and this is the only place that takes them.
        .map(|(descriptor, name)| (unsafe { OwnedFd::from_raw_fd(descriptor) }, name))
        .collect()
}

/// The socket that whoever connects to `path` comes to; the names of all others.
fn pick(kept: Vec<(OwnedFd, String)>, path: &Path) -> (Option<UnixListener>, Vec<String>) {
    let wanted = name(path).ok();
    let (mut found, mut others) = (None, Vec::new());
    for (descriptor, name) in kept {
        let socket = UnixListener::from(descriptor);
        let is_there = socket.local_addr().is_ok_and(|address| address.as_pathname() == Some(path));
        if found.is_none() && is_there && wanted.as_ref() == Some(&name) {
            found = Some(socket);
        } else {
            others.push(name);
        }
    }
    (found, others)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn kept(socket: &UnixListener, path: &Path) -> (OwnedFd, String) {
        (socket.as_fd().try_clone_to_owned().unwrap(), name(path).unwrap())
    }

    #[test]
    fn who_came_while_nobody_served_is_served_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/cri.sock");
        let socket = bind(&path).unwrap();
        let kept = kept(&socket, &path);
        drop(socket);
        let mut waiting = UnixStream::connect(&path).unwrap();
        let (found, others) = pick(vec![kept], &path);
        assert!(others.is_empty());
        let (mut served, _) = found.unwrap().accept().unwrap();
        waiting.write_all(b"hello").unwrap();
        drop(waiting);
        let mut said = String::new();
        served.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
    }

    #[test]
    fn a_socket_that_nobody_comes_to_is_let_go_of() {
        let directory = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (directory.path().join("cri.sock"), directory.path().join("other.sock"));
        let old = bind(&path).unwrap();
        let replaced = kept(&old, &path);
        // Another daemon took the path.
        let new = bind(&path).unwrap();
        let new = kept(&new, &path);
        let moved = bind(&elsewhere).unwrap();
        let moved = kept(&moved, &elsewhere);
        let file = (std::fs::File::open(directory.path()).unwrap().into(), name(&path).unwrap());
        let names =
            |kept: &[&(OwnedFd, String)]| kept.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>();
        let expected = names(&[&replaced, &moved, &file]);
        let (found, others) = pick(vec![replaced, moved, file, new], &path);
        assert!(found.is_some());
        assert_eq!(others, expected);
        std::fs::remove_file(&path).unwrap();
        assert!(pick(vec![kept(&old, &elsewhere)], &path).0.is_none());
    }
}
