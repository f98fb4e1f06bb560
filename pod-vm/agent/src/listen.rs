//! Where the monitor dials: two ports of vsock in a guest, two unix sockets in a test.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use podvisor_proto::agent::{CONTROL_PORT, STREAM_PORT};
use rustix::net::{SocketFlags, accept_with};

use crate::sys;

/// The two listening sockets.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) control: OwnedFd,
    pub(crate) stream: OwnedFd,
}

impl Listeners {
    pub(crate) fn vsock() -> io::Result<Self> {
        Ok(Self { control: sys::listen_vsock(CONTROL_PORT)?, stream: sys::listen_vsock(STREAM_PORT)? })
    }

    pub(crate) fn unix(directory: &Path) -> io::Result<Self> {
        let listen = |name: &str| -> io::Result<OwnedFd> {
            let listener = std::os::unix::net::UnixListener::bind(directory.join(name))?;
            listener.set_nonblocking(true)?;
            Ok(listener.into())
        };
        Ok(Self { control: listen("control.sock")?, stream: listen("stream.sock")? })
    }
}

/// The next connection, if there is one.
pub(crate) fn accept(listener: impl AsFd) -> Option<OwnedFd> {
    // A client that has gone already, or no descriptor left: the next round sees.
    accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()
}
