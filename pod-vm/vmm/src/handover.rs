//! Messages between the two processes, with descriptors: packets of a socket pair, so that each comes as a whole with what belongs to it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Bytes of a message: a request with all of a machine's devices is a few thousand.
pub(crate) const LONGEST: usize = 128 << 10;
/// Descriptors of a message: what the kernel lets pass (SCM_MAX_FD).
const MOST: usize = 253;

/// Both ends.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Does not wait: a receiver that lets messages pile up does not work.
pub(crate) fn send(link: impl AsFd, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    if bytes.len() > LONGEST || descriptors.len() > MOST {
        return Err(io::Error::other("it is more than a message can hold"));
    }
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    sendmsg(link, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// Waits for the next message, of at most so many bytes.
pub(crate) fn receive(link: impl AsFd, longest: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; longest];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(&link, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::other("a message was cut off"));
    }
    bytes.truncate(got.bytes);
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok((bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_come_with_their_message() {
        let (one, other) = pair().unwrap();
        let files: Vec<OwnedFd> = (0..30).map(|_| tempfile::tempfile().unwrap().into()).collect();
        send(&one, b"first", &files).unwrap();
        send(&one, b"second", &[]).unwrap();
        let (bytes, descriptors) = receive(&other, LONGEST).unwrap();
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"first"[..], 30));
        let (bytes, descriptors) = receive(&other, LONGEST).unwrap();
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"second"[..], 0));
        drop(one);
        assert_eq!(receive(&other, LONGEST).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
