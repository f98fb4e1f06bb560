//! The control connection: frames in, frames out, never waiting.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use podvisor_proto::agent::{Event, MAX_FRAME, Reply, Request, reply};
use prost::Message;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::failure::Failure;

/// Bytes that may wait to be read by the monitor. A monitor that lets more pile up does not read, and is let go.
const QUEUE_LIMIT: usize = 2 * MAX_FRAME;

const READ_AT_ONCE: usize = 16 * 1024;

/// One connection of the monitor's.
#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// The requests that are not answered yet: the agent's number of each, and the monitor's. One that came over another connection is not
    /// answered here.
    open: BTreeMap<u64, u64>,
    /// It has said Hello: before that nothing else is answered.
    pub(crate) greeted: bool,
    over: bool,
}

impl Control {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            open: BTreeMap::new(),
            greeted: false,
            over: false,
        }
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn wants_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// It is to be dropped.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Reads what there is and takes the whole requests out of it.
    pub(crate) fn read(&mut self) -> Vec<Request> {
        let mut bytes = [0; READ_AT_ONCE];
        match recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.over = true,
            Ok((length, _)) => self.incoming.extend_from_slice(&bytes[..length]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => self.over = true,
        }
        let mut requests = Vec::new();
        while !self.over {
            match take_frame(&mut self.incoming) {
                Ok(None) => break,
                Ok(Some(frame)) => match Request::decode(frame.as_slice()) {
                    Ok(request) => requests.push(request),
                    Err(_) => self.over = true,
                },
                Err(_) => self.over = true,
            }
        }
        requests
    }

    /// Remembers that the request `number` of the agent's is `id` of the monitor's.
    pub(crate) fn asked(&mut self, number: u64, id: u64) {
        self.open.insert(number, id);
    }

    pub(crate) fn reply(&mut self, number: u64, outcome: Result<reply::Result, Failure>) {
        let Some(id) = self.open.remove(&number) else { return };
        let result = outcome.unwrap_or_else(|failure| reply::Result::Error(failure.into_message()));
        self.put(&Reply { id, result: Some(result) });
    }

    pub(crate) fn tell(&mut self, event: &Event) {
        self.put(&Reply { id: 0, result: Some(reply::Result::Event(event.clone())) });
    }

    fn put(&mut self, reply: &Reply) {
        if self.outgoing.len() > QUEUE_LIMIT {
            self.over = true;
            return;
        }
        put_frame(&mut self.outgoing, reply);
        self.write();
    }

    /// Sends what the other side takes now.
    pub(crate) fn write(&mut self) {
        while !self.outgoing.is_empty() && !self.over {
            match send(&self.socket, &self.outgoing, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => self.over = true,
            }
        }
        if self.outgoing.is_empty() {
            self.outgoing = Vec::new();
        }
    }
}

/// Appends a message as a frame.
pub(crate) fn put_frame(bytes: &mut Vec<u8>, message: &impl Message) {
    let length = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_le_bytes());
    // A Vec grows as needed, so encoding into it cannot fail.
    let _ = message.encode(bytes);
}

/// Takes the first whole frame out of what has come. The buffer grows with what really came, never with what a length announces.
pub(crate) fn take_frame(bytes: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let Some((header, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
    if length > MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    if rest.len() < length {
        return Ok(None);
    }
    let frame = rest[..length].to_vec();
    bytes.drain(..4 + length);
    if bytes.is_empty() {
        *bytes = Vec::new();
    }
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_and_lengths_beyond_the_limit_are_refused() {
        let mut sent = Vec::new();
        for id in 1..4 {
            put_frame(&mut sent, &Request { id, verb: None });
        }
        let (mut came, mut seen) = (Vec::new(), Vec::new());
        for byte in sent {
            came.push(byte);
            while let Some(frame) = take_frame(&mut came).unwrap() {
                seen.push(Request::decode(frame.as_slice()).unwrap().id);
            }
        }
        assert_eq!(seen, [1, 2, 3]);
        assert!(take_frame(&mut u32::MAX.to_le_bytes().to_vec()).is_err());
    }
}
