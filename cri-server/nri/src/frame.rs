//! The bytes on a plugin's socket, without any input or output: frames of the multiplexer, and in them ttRPC messages.
//!
//! A multiplexer frame is the number of a connection and a length, 4 bytes each, big endian, then that many bytes. The bytes of
//! one connection are a stream: a ttRPC message may be spread over several frames, and is 10 bytes of header (length, stream,
//! type, flags), then its body.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The connection on which podvisor calls the plugin.
pub(crate) const PLUGIN_SERVICE: u32 = 1;
/// The connection on which the plugin calls podvisor.
pub(crate) const RUNTIME_SERVICE: u32 = 2;

/// Longest body of a ttRPC message (ttrpc, channel.go): a longer one is not read by the other side either.
pub(crate) const LONGEST_MESSAGE: usize = 4 << 20;

const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;

/// The other side reads through a buffer of this size and refuses a first frame that does not fit into it.
const FIRST_FRAME: usize = 4096;

/// What a ttRPC message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    Response,
}

/// One ttRPC message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    /// Of the multiplexer.
    pub(crate) connection: u32,
    pub(crate) stream: u32,
    pub(crate) kind: Kind,
    pub(crate) body: Bytes,
}

/// What a peer may not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// A frame for a connection that does not exist.
    #[error("a frame for connection {0}, which does not exist")]
    Connection(u32),
    /// A frame that is too long.
    #[error("a frame of {0} bytes")]
    FrameLength(usize),
    /// A message that is too long.
    #[error("a message of {0} bytes")]
    MessageLength(usize),
    /// A message of a type that has no place here, e.g. a stream's data.
    #[error("a message of type {0}")]
    Type(u8),
}

/// Takes apart what arrives. Holds at most one unfinished message per connection and one unfinished frame.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// What has arrived and is no whole frame yet.
    trunk: BytesMut,
    streams: BTreeMap<u32, BytesMut>,
}

impl Decoder {
    /// Where to read into.
    pub(crate) fn buffer(&mut self) -> &mut BytesMut {
        &mut self.trunk
    }

    /// The next whole message. `None`: more has to be read.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, FrameError> {
        loop {
            for (connection, stream) in &mut self.streams {
                if let Some(message) = message(*connection, stream)? {
                    return Ok(Some(message));
                }
            }
            let Some(mut header) = self.trunk.get(..FRAME_HEADER) else { return Ok(None) };
            let (connection, length) = (header.get_u32(), header.get_u32() as usize);
            if !matches!(connection, PLUGIN_SERVICE | RUNTIME_SERVICE) {
                return Err(FrameError::Connection(connection));
            }
            if length > MESSAGE_HEADER + LONGEST_MESSAGE {
                return Err(FrameError::FrameLength(length));
            }
            if self.trunk.len() < FRAME_HEADER + length {
                return Ok(None);
            }
            self.trunk.advance(FRAME_HEADER);
            let payload = self.trunk.split_to(length);
            self.streams.entry(connection).or_default().unsplit(payload);
        }
    }
}

/// Takes a whole message off the front of a connection's bytes.
fn message(connection: u32, bytes: &mut BytesMut) -> Result<Option<Message>, FrameError> {
    let Some(mut header) = bytes.get(..MESSAGE_HEADER) else { return Ok(None) };
    let (length, stream) = (header.get_u32() as usize, header.get_u32());
    let kind = match header.get_u8() {
        1 => Kind::Request,
        2 => Kind::Response,
        other => return Err(FrameError::Type(other)),
    };
    if length > LONGEST_MESSAGE {
        return Err(FrameError::MessageLength(length));
    }
    if bytes.len() < MESSAGE_HEADER + length {
        return Ok(None);
    }
    bytes.advance(MESSAGE_HEADER);
    let body = bytes.split_to(length).freeze();
    if bytes.is_empty() {
        // Not a growing remainder of what has been read.
        *bytes = BytesMut::new();
    }
    Ok(Some(Message { connection, stream, kind, body }))
}

/// A message as it is written. Its body has at most [`LONGEST_MESSAGE`] bytes.
///
/// In at most two frames, the first of which fits into the reader's buffer; the rest goes straight into the message that is being
/// read. Many small frames would overrun the reader's queue, which ends the connection.
pub(crate) fn encode(message: &Message) -> Bytes {
    let length = MESSAGE_HEADER + message.body.len();
    let first = length.min(FIRST_FRAME);
    let mut bytes = BytesMut::with_capacity(2 * FRAME_HEADER + length);
    bytes.put_u32(message.connection);
    bytes.put_u32(u32::try_from(first).unwrap_or(u32::MAX));
    bytes.put_u32(u32::try_from(message.body.len()).unwrap_or(u32::MAX));
    bytes.put_u32(message.stream);
    bytes.put_u8(match message.kind {
        Kind::Request => 1,
        Kind::Response => 2,
    });
    bytes.put_u8(0);
    let (beginning, rest) = message.body.split_at(first - MESSAGE_HEADER);
    bytes.put_slice(beginning);
    if !rest.is_empty() {
        bytes.put_u32(message.connection);
        bytes.put_u32(u32::try_from(rest.len()).unwrap_or(u32::MAX));
        bytes.put_slice(rest);
    }
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(connection: u32, stream: u32, length: usize) -> Message {
        let body = (0..length).map(|at| u8::try_from(at % 251).unwrap_or_default()).collect::<Vec<_>>();
        Message { connection, stream, kind: Kind::Request, body: body.into() }
    }

    #[test]
    fn what_is_written_is_read_however_it_is_cut() {
        for length in [0, 1, 4085, 4086, 4087, 5000, 8182, 8183, 100_000, LONGEST_MESSAGE] {
            let messages = [of(1, 1, length), of(2, 2, 3), of(1, 3, length)];
            let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message).to_vec()).collect();
            for piece in [bytes.len(), 4096, 7] {
                if piece == 7 && length > 10_000 {
                    continue;
                }
                let mut decoder = Decoder::default();
                let mut read = Vec::new();
                for part in bytes.chunks(piece) {
                    decoder.buffer().extend_from_slice(part);
                    while let Some(message) = decoder.next().unwrap() {
                        read.push(message);
                    }
                }
                // Each connection's messages in their order.
                let of = |connection| {
                    let is = move |message: &&Message| message.connection == connection;
                    (
                        read.iter().filter(is).cloned().collect::<Vec<_>>(),
                        messages.iter().filter(is).cloned().collect::<Vec<_>>(),
                    )
                };
                for (found, wanted) in [of(1), of(2)] {
                    assert_eq!(found, wanted, "{length} bytes in pieces of {piece}");
                }
            }
        }
    }

    #[test]
    fn lengths_and_numbers_are_limited() {
        let cases: [(&[u8], FrameError); 5] = [
            (&[0, 0, 0, 0, 0, 0, 0, 1, 0], FrameError::Connection(0)),
            (&[0, 0, 0, 3, 0, 0, 0, 1, 0], FrameError::Connection(3)),
            (&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff], FrameError::FrameLength(0xffff_ffff)),
            (
                &[0, 0, 0, 1, 0, 0, 0, 10, 0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0],
                FrameError::MessageLength(LONGEST_MESSAGE + 1),
            ),
            (&[0, 0, 0, 1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0], FrameError::Type(3)),
        ];
        for (bytes, error) in cases {
            let mut decoder = Decoder::default();
            decoder.buffer().extend_from_slice(bytes);
            assert_eq!(decoder.next(), Err(error), "{bytes:x?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), small in any::<bool>()) {
            let mut decoder = Decoder::default();
            // Mostly plausible headers, else the first byte ends it.
            if small {
                decoder.buffer().extend_from_slice(&[0, 0, 0, 1, 0, 0, 0]);
            }
            decoder.buffer().extend_from_slice(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
        }
    }
}
