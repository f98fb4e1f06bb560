//! What the child tells the caller, on a socket that keeps messages apart (SOCK_SEQPACKET): first perhaps its terminal, then that it is
//! ready or why not; after its start only a failure. The socket closes when the program is executed.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Longest text of a failure, bytes.
const LIMIT: usize = 4096;

/// One message of the child.
#[derive(Debug)]
pub(crate) enum Report {
    /// The controlling side of its terminal.
    Terminal(OwnedFd),
    /// Everything is prepared; it waits to be started.
    Ready,
    /// Not the child, which ends: its pid as the caller sees it, and its pidfd.
    Process(i32, OwnedFd),
    /// A step failed; the child ends.
    Failed(String),
    /// The program has been executed, or the child is gone.
    Closed,
}

/// Caller's and child's end; both close at an execve.
pub(crate) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// The child's side. An error means that the caller is gone; the child then ends.
pub(crate) fn send(socket: impl AsFd, report: &Report) -> io::Result<()> {
    let (text, descriptor) = match report {
        Report::Terminal(terminal) => (b"t".to_vec(), Some(terminal)),
        Report::Ready => (b"r".to_vec(), None),
        Report::Process(pid, pidfd) => ([b"p", &pid.to_ne_bytes()[..]].concat(), Some(pidfd)),
        Report::Failed(text) => {
            (std::iter::once(b'f').chain(text.bytes().take(LIMIT - 1)).collect::<Vec<u8>>(), None)
        }
        Report::Closed => return Ok(()),
    };
    let descriptors = descriptor.map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptor) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
    }
    sendmsg(socket, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The caller's side: waits for the next message.
pub(crate) fn wait(socket: &OwnedFd) -> io::Result<Report> {
    loop {
        if let Some(report) = receive(socket)? {
            return Ok(report);
        }
        // Interrupted or not: it is asked again.
        let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], None);
    }
}

/// The caller's side: the next message, or `None` when there is none yet.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<Option<Report>> {
    let mut bytes = [0; LIMIT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let length = match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
        Ok(received) => received.bytes,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        // The child was killed with messages of ours unread.
        Err(rustix::io::Errno::CONNRESET) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            descriptor = descriptors.next();
        }
    }
    Ok(Some(match (bytes[..length].split_first(), descriptor) {
        (None, _) => Report::Closed,
        (Some((b't', _)), Some(terminal)) => Report::Terminal(terminal),
        (Some((b'r', _)), _) => Report::Ready,
        (Some((b'p', pid)), Some(pidfd)) => {
            let pid = pid.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
            Report::Process(i32::from_ne_bytes(pid), pidfd)
        }
        (Some((b'f', text)), _) => Report::Failed(String::from_utf8_lossy(text).into_owned()),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    }))
}
