//! Sockets in the run directory: the pod's own, and those on which an OCI runtime hands over a terminal.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType, accept_with, bind, connect, listen, recvmsg, socket_with,
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
        let socket = stream_socket()?;
        let (path, kept) = short_name(directory, name)?;
        bind(&socket, &SocketAddrUnix::new(&path)?)?;
        listen(&socket, 64)?;
        Ok(Self { socket, path, _directory: kept })
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// A name that fits a socket's address, which holds 107 bytes of path (unix(7)): a longer one is shortened through /proc, as long as
/// the descriptor is kept.
fn short_name(directory: &Path, name: &str) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    let path = directory.join(name);
    if SocketAddrUnix::new(&path).is_ok() {
        return Ok((path, None));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty())?;
    let pid = std::process::id();
    Ok((PathBuf::from(format!("/proc/{pid}/fd/{}/{name}", opened.as_raw_fd())), Some(opened)))
}

/// A connection to a unix socket in a directory of any length. When its queue is full, that is an error: this never waits.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let socket = stream_socket()?;
    let (path, _directory) = short_name(directory, name)?;
    connect(&socket, &SocketAddrUnix::new(&path)?)?;
    Ok(socket)
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
