//! From bytes to WebSocket frames (RFC 6455, section 5), without waiting for whole messages.

use bytes::{Buf, Bytes, BytesMut};

use super::{CloseCode, Opcode};

/// The longest data frame taken, in bytes. It is passed on in pieces, so this bounds nonsense, not memory.
const MAX_FRAME: u64 = 64 << 20;
/// A control frame's payload (section 5.5).
const MAX_CONTROL: u64 = 125;
const MAX_PIECE: usize = 32 << 10;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;

/// Which end reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Frames must be masked.
    Server,
    /// Frames must not be masked.
    #[cfg(test)]
    Client,
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A part of a message: `first` and `last` mark where the message begins and ends.
    Data {
        first: bool,
        last: bool,
        bytes: Bytes,
    },
    Ping(Bytes),
    Pong,
    Close,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum DecodeError {
    #[error("reserved bits or operation codes are used in a frame that begins with {0:#04x}")]
    Reserved(u8),
    #[error("a frame is not masked as its direction demands")]
    Mask,
    #[error("a control frame is fragmented or longer than {MAX_CONTROL} bytes")]
    Control,
    #[error("a message begins within another, or a continuation outside of one")]
    Fragments,
    #[error("a frame has {0} bytes, more than {MAX_FRAME}")]
    TooLarge(u64),
}

impl DecodeError {
    pub(crate) fn close_code(&self) -> CloseCode {
        match self {
            Self::TooLarge(_) => CloseCode::TooLarge,
            Self::Reserved(_) | Self::Mask | Self::Control | Self::Fragments => CloseCode::ProtocolError,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Decoder {
    role: Role,
    /// A message has begun and its last frame has not.
    within_message: bool,
    /// The data frame that is being passed on.
    data: Option<OpenData>,
}

#[derive(Debug)]
struct OpenData {
    first: bool,
    fin: bool,
    rest: u64,
    mask: Mask,
}

/// The masking key, turned as far as bytes were unmasked.
#[derive(Debug, Clone, Copy)]
struct Mask([u8; 4]);

impl Mask {
    fn apply(&mut self, bytes: &mut [u8]) {
        for (byte, key) in bytes.iter_mut().zip(self.0.iter().cycle()) {
            *byte ^= key;
        }
        self.0.rotate_left(bytes.len() % 4);
    }
}

#[derive(Debug)]
struct Head {
    first_byte: u8,
    length: u64,
    mask: Mask,
    /// Of the head itself.
    size: usize,
}

impl Head {
    /// None: not all of it is there.
    fn parse(buffer: &[u8], role: Role) -> Result<Option<Self>, DecodeError> {
        let &[first_byte, second, ref rest @ ..] = buffer else { return Ok(None) };
        let masked = second & MASKED != 0;
        let wanted = match role {
            Role::Server => true,
            #[cfg(test)]
            Role::Client => false,
        };
        if masked != wanted {
            return Err(DecodeError::Mask);
        }
        let mut rest = rest;
        let Some((length, mask)) = length_and_mask(second & !MASKED, masked, &mut rest) else {
            return Ok(None);
        };
        Ok(Some(Self { first_byte, length, mask, size: buffer.len() - rest.len() }))
    }
}

/// None: not all of it is there.
fn length_and_mask(length: u8, masked: bool, rest: &mut &[u8]) -> Option<(u64, Mask)> {
    let length = match length {
        126 => u64::from(u16::from_be_bytes(take(rest)?)),
        127 => u64::from_be_bytes(take(rest)?),
        short => u64::from(short),
    };
    Some((length, Mask(if masked { take(rest)? } else { [0; 4] })))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, further) = rest.split_first_chunk::<N>()?;
    *rest = further;
    Some(*taken)
}

impl Decoder {
    pub(crate) fn new(role: Role) -> Self {
        Self { role, within_message: false, data: None }
    }

    /// The next frame, or part of one, if it is there.
    pub(crate) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, DecodeError> {
        if let Some(data) = &mut self.data {
            if data.rest > 0 && buffer.is_empty() {
                return Ok(None);
            }
            let rest = usize::try_from(data.rest).unwrap_or(usize::MAX);
            let length = rest.min(buffer.len()).min(MAX_PIECE);
            data.mask.apply(&mut buffer[..length]);
            // A copy, so that a slow consumer does not keep the receive buffer alive.
            let bytes = Bytes::copy_from_slice(&buffer[..length]);
            buffer.advance(length);
            data.rest -= length as u64;
            let first = std::mem::take(&mut data.first);
            let last = data.rest == 0 && data.fin;
            if data.rest == 0 {
                self.data = None;
            }
            return Ok(Some(Frame::Data { first, last, bytes }));
        }
        // Told before the whole head is there: what follows a nonsense first byte may never come.
        if let Some(&first_byte) = buffer.first()
            && (first_byte & RESERVED != 0 || opcode(first_byte).is_none())
        {
            return Err(DecodeError::Reserved(first_byte));
        }
        let Some(head) = Head::parse(buffer, self.role)? else { return Ok(None) };
        let fin = head.first_byte & FIN != 0;
        let Some(opcode) = opcode(head.first_byte) else {
            return Err(DecodeError::Reserved(head.first_byte));
        };
        match opcode {
            Opcode::Continuation | Opcode::Text | Opcode::Binary => {
                let first = opcode != Opcode::Continuation;
                if first == self.within_message {
                    return Err(DecodeError::Fragments);
                }
                if head.length > MAX_FRAME {
                    return Err(DecodeError::TooLarge(head.length));
                }
                self.within_message = !fin;
                buffer.advance(head.size);
                self.data = Some(OpenData { first, fin, rest: head.length, mask: head.mask });
                self.next(buffer)
            }
            Opcode::Close | Opcode::Ping | Opcode::Pong => {
                if !fin || head.length > MAX_CONTROL {
                    return Err(DecodeError::Control);
                }
                let length = usize::try_from(head.length).unwrap_or(usize::MAX);
                if buffer.len() < head.size + length {
                    return Ok(None);
                }
                buffer.advance(head.size);
                let mut payload = buffer.split_to(length);
                let mut mask = head.mask;
                mask.apply(&mut payload);
                Ok(Some(match opcode {
                    Opcode::Ping => Frame::Ping(Bytes::copy_from_slice(&payload)),
                    Opcode::Pong => Frame::Pong,
                    _ => Frame::Close,
                }))
            }
        }
    }
}

fn opcode(first_byte: u8) -> Option<Opcode> {
    [Opcode::Continuation, Opcode::Text, Opcode::Binary, Opcode::Close, Opcode::Ping, Opcode::Pong]
        .into_iter()
        .find(|opcode| *opcode as u8 == first_byte & 0x0f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(first: bool, last: bool, bytes: &'static [u8]) -> Frame {
        Frame::Data { first, last, bytes: Bytes::from_static(bytes) }
    }

    #[test]
    fn a_fragmented_message_with_a_ping_between() {
        let mut decoder = Decoder::new(Role::Server);
        let mut buffer = BytesMut::new();
        // "Hel", ping "x", "lo", each masked; the first frame arrives in two parts.
        buffer.extend_from_slice(&[0x02, 0x83, 1, 2, 3, 4, b'H' ^ 1, b'e' ^ 2]);
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(data(true, false, b"He")));
        assert_eq!(decoder.next(&mut buffer).unwrap(), None);
        buffer.extend_from_slice(&[b'l' ^ 3, 0x89, 0x81, 9, 9, 9, 9, b'x' ^ 9]);
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(data(false, false, b"l")));
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(Frame::Ping(Bytes::from_static(b"x"))));
        buffer.extend_from_slice(&[0x80, 0x82, 0, 0, 0, 0, b'l', b'o', 0x88, 0x80, 1, 1, 1, 1]);
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(data(false, true, b"lo")));
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(Frame::Close));
        assert!(buffer.is_empty());
    }

    #[test]
    fn heads_may_arrive_byte_by_byte() {
        let mut decoder = Decoder::new(Role::Server);
        let mut frame = vec![0x82, 0xff, 0, 0, 0, 0, 0, 1, 0, 0, 5, 6, 7, 8];
        frame.extend((0..65536_usize).map(|at| [5, 6, 7, 8][at % 4]));
        let mut buffer = BytesMut::new();
        let (mut total, mut ended) = (0, false);
        for byte in frame {
            buffer.extend_from_slice(&[byte]);
            while let Some(Frame::Data { bytes, last, .. }) = decoder.next(&mut buffer).unwrap() {
                assert!(bytes.iter().all(|byte| *byte == 0));
                total += bytes.len();
                ended = last;
            }
        }
        assert!(ended && total == 65536, "{total}");
    }

    #[test]
    fn what_the_standard_forbids_is_refused() {
        let wrong: [(&[u8], DecodeError); 9] = [
            (&[0x82, 0x01, b'a'], DecodeError::Mask),
            (&[0xc2], DecodeError::Reserved(0xc2)),
            (&[0x83, 0x80], DecodeError::Reserved(0x83)),
            (&[0x09, 0x80, 0, 0, 0, 0], DecodeError::Control),
            (&[0x89, 0xfe, 0, 126, 0, 0, 0, 0], DecodeError::Control),
            (&[0x80, 0x80, 0, 0, 0, 0], DecodeError::Fragments),
            (&[0x02, 0x80, 0, 0, 0, 0, 0x82, 0x80, 0, 0, 0, 0], DecodeError::Fragments),
            (&[0x82, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], DecodeError::TooLarge(0xff << 56)),
            (&[0x82, 0xff, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0], DecodeError::TooLarge((64 << 20) + 1)),
        ];
        for (bytes, expected) in wrong {
            let mut decoder = Decoder::new(Role::Server);
            let mut buffer = BytesMut::from(bytes);
            let error = loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("{bytes:?} is taken"),
                    Err(error) => break error,
                }
            };
            assert_eq!(error, expected);
        }
    }
}
