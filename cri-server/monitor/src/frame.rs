//! Frames of the monitor's protocols: a little-endian u32 of length, then one message.

use std::io;
use std::os::fd::AsFd;

use prost::Message;
use rustix::buffer::spare_capacity;

/// One frame that holds `message`.
pub(crate) fn frame(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    // A Vec grows as needed, so encoding into it cannot fail.
    let _ = message.encode(&mut bytes);
    bytes
}

/// How a read went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    /// There are new bytes.
    More,
    /// Nothing just now.
    Nothing,
    /// The other side will send nothing more.
    End,
}

/// Why what came is no frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a frame of {length} bytes is longer than the {limit} that are allowed")]
pub(crate) struct FrameTooLong {
    length: usize,
    limit: usize,
}

/// Bytes on their way to becoming frames. Grows with what really came, never with what a length announces.
#[derive(Debug)]
pub(crate) struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    /// Of one frame, in bytes.
    limit: usize,
}

impl Incoming {
    const READ_AT_ONCE: usize = 16 * 1024;

    pub(crate) fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, limit }
    }

    /// Reads once.
    pub(crate) fn fill(&mut self, source: impl AsFd) -> io::Result<Filled> {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.reserve(Self::READ_AT_ONCE);
        match rustix::io::read(source, spare_capacity(&mut self.bytes)) {
            Ok(0) => Ok(Filled::End),
            Ok(_) => Ok(Filled::More),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                self.release();
                Ok(Filled::Nothing)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the next whole frame.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>, FrameTooLong> {
        let rest = &self.bytes[self.start..];
        let Some((header, body)) = rest.split_first_chunk::<4>() else {
            self.release();
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(FrameTooLong { length, limit: self.limit });
        }
        if body.len() < length {
            return Ok(None);
        }
        let from = self.start + 4;
        self.start = from + length;
        Ok(Some(&self.bytes[from..from + length]))
    }

    /// An idle connection keeps no buffer.
    fn release(&mut self) {
        if self.start == self.bytes.len() {
            *self = Self::new(self.limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use podvisor_proto::monitor::{Connect, Request, request::Verb};

    use super::*;

    #[test]
    fn frames_come_out_whole_however_they_came_in() {
        let request = |id| Request { id, verb: Some(Verb::Connect(Connect { port: 80 })) };
        let bytes: Vec<u8> = (1..4).flat_map(|id| frame(&request(id))).collect();
        let (mut writer, reader) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut incoming = Incoming::new(64);
        let mut seen = Vec::new();
        for byte in bytes {
            writer.write_all(&[byte]).unwrap();
            assert_eq!(incoming.fill(&reader).unwrap(), Filled::More);
            while let Some(body) = incoming.next().unwrap() {
                seen.push(Request::decode(body).unwrap().id);
            }
        }
        assert_eq!(seen, [1, 2, 3]);
        assert_eq!(incoming.bytes.capacity(), 0);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_come() {
        let (mut writer, reader) = std::os::unix::net::UnixStream::pair().unwrap();
        writer.write_all(&u32::MAX.to_le_bytes()).unwrap();
        let mut incoming = Incoming::new(64);
        incoming.fill(&reader).unwrap();
        assert_eq!(incoming.next(), Err(FrameTooLong { length: u32::MAX as usize, limit: 64 }));
    }
}
