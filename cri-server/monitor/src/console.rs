//! Sockets in the run directory: the pod's own, and those on which an OCI runtime hands over a terminal.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType, accept_with, bind, listen, recvmsg, socket_with,
};

/// A listening socket in a directory of any length. `path` is a name that other processes reach it by.
#[derive(Debug)]
pub(crate) struct ListeningSocket {
    pub(crate) socket: OwnedFd,
    pub(crate) path: PathBuf,
    /// Keeps `path` valid when it leads through this descriptor.
    _directory: Option<OwnedFd>,
}

impl ListeningSocket {
    pub(crate) fn bind(directory: &Path, name: &str) -> io::Result<Self> {
        let path = directory.join(name);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A socket address holds 107 bytes of path (unix(7)); a longer one is shortened through /proc.
        let (path, kept) = if let Ok(address) = SocketAddrUnix::new(&path) {
            bind(&socket, &address)?;
            (path, None)
        } else {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(directory, flags, Mode::empty())?;
            let pid = std::process::id();
            let path = PathBuf::from(format!("/proc/{pid}/fd/{}/{name}", opened.as_raw_fd()));
            bind(&socket, &SocketAddrUnix::new(&path)?)?;
            (path, Some(opened))
        };
        listen(&socket, 64)?;
        Ok(Self { socket, path, _directory: kept })
    }
}

/// Where the OCI runtime sends a terminal's master (`--console-socket`).
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listening: ListeningSocket,
}

impl ConsoleSocket {
    pub(crate) fn bind(run_dir: &Path, key: u64) -> io::Result<Self> {
        Ok(Self { listening: ListeningSocket::bind(run_dir, &format!("tty{key}.sock"))? })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.listening.path
    }

    /// The terminal. The runtime sends it before it ends, so this is asked after that, and never waits.
    pub(crate) fn receive(&self) -> io::Result<OwnedFd> {
        let connection = accept_with(&self.listening.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let mut name = [0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&connection, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut received = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        received.next().and_then(|mut first| first.next()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.listening.path);
    }
}
