//! The connection to the monitor: frames in, frames out, never waiting but at the very end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use podvisor_proto::hypervisor::{Event, MAX_FRAME, Reply, Request, event, reply};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::failure::Failure;

/// Bytes that may wait to be read by the monitor. One that lets more pile up does not read, and is as good as gone.
const QUEUE_LIMIT: usize = 2 * MAX_FRAME;
const READ_AT_ONCE: usize = 4096;

/// The monitor's end, as far as this side sees it.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    over: bool,
}

impl Control {
    /// Takes over this side of the connection.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, incoming: Vec::new(), outgoing: Vec::new(), over: false }
    }

    /// Whether [`Self::write`] has something to send.
    pub fn wants_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The monitor is gone, or sends what is no request.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Reads what there is and takes the whole requests out of it.
    pub fn read(&mut self) -> Vec<Request> {
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
                    Ok(request) if request.id != 0 => requests.push(request),
                    _ => self.over = true,
                },
                Err(FrameTooLong) => self.over = true,
            }
        }
        requests
    }

    /// Answers a request.
    pub fn reply(&mut self, id: u64, outcome: Result<reply::Result, Failure>) {
        let result = outcome.unwrap_or_else(|failure| reply::Result::Error(failure.into()));
        self.put(&Reply { id, result: Some(result) });
    }

    /// Sends an event.
    pub fn tell(&mut self, kind: event::Kind) {
        self.put(&Reply { id: 0, result: Some(reply::Result::Event(Event { kind: Some(kind) })) });
    }

    fn put(&mut self, reply: &Reply) {
        if self.outgoing.len() > QUEUE_LIMIT {
            self.over = true;
            return;
        }
        let length = u32::try_from(reply.encoded_len()).unwrap_or(u32::MAX);
        self.outgoing.extend_from_slice(&length.to_le_bytes());
        // A Vec grows as needed, so encoding into it cannot fail.
        let _ = reply.encode(&mut self.outgoing);
        self.write();
    }

    /// Sends what the monitor takes now.
    pub fn write(&mut self) {
        while !self.outgoing.is_empty() && !self.over {
            match send(&self.socket, &self.outgoing, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => self.over = true,
            }
        }
    }

    /// Sends all that is left, for the program is about to end.
    pub fn finish(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.wants_to_write() && !self.over {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut watched = [PollFd::new(&self.socket, PollFlags::OUT)];
            match poll(&mut watched, Some(&left)) {
                Ok(0) => return,
                Ok(_) => self.write(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A length beyond what is allowed.
#[derive(Debug, PartialEq, Eq)]
struct FrameTooLong;

/// Takes the first whole frame out of what has come. The buffer grows with what really came, never with what a length announces.
fn take_frame(bytes: &mut Vec<u8>) -> Result<Option<Vec<u8>>, FrameTooLong> {
    let Some((header, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
    if length > MAX_FRAME {
        return Err(FrameTooLong);
    }
    let Some(frame) = rest.get(..length).map(<[u8]>::to_vec) else { return Ok(None) };
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
        for text in ["", "one", "two"] {
            sent.extend_from_slice(&u32::try_from(text.len()).unwrap().to_le_bytes());
            sent.extend_from_slice(text.as_bytes());
        }
        let (mut came, mut seen) = (Vec::new(), Vec::new());
        for byte in sent {
            came.push(byte);
            seen.extend(take_frame(&mut came).unwrap());
        }
        assert_eq!(seen, [&b""[..], b"one", b"two"]);
        assert_eq!(take_frame(&mut u32::MAX.to_le_bytes().to_vec()), Err(FrameTooLong));
    }
}
