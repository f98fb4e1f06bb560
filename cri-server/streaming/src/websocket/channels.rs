//! Channels: each message belongs to one byte stream, named by its first byte.
//!
//! `channel.k8s.io` and its versions put the number there as it is and send binary messages; the `base64.` variants
//! put it there as a digit, and the rest of the text message is base64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut as _, Bytes, BytesMut};

use super::Opcode;
use super::connection::{Gone, MessagePart, Writer};

/// In v5: the byte after it is a channel that the client has finished.
const CLOSE_SIGNAL: u8 = 255;
/// The largest message that we send, in bytes of payload.
const MAX_SENT: usize = 32 << 10;

/// How channel and payload stand in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Binary,
    Base64,
}

impl Codec {
    /// Sends the bytes on a channel; no bytes are an empty message.
    pub(crate) async fn send(self, writer: &Writer, channel: u8, mut bytes: Bytes) -> Result<(), Gone> {
        loop {
            let part = bytes.split_to(bytes.len().min(MAX_SENT));
            let (opcode, payload) = self.encode(channel, &part);
            writer.send(opcode, payload).await?;
            if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    fn encode(self, channel: u8, bytes: &[u8]) -> (Opcode, Bytes) {
        match self {
            Self::Binary => {
                let mut message = BytesMut::with_capacity(1 + bytes.len());
                message.put_u8(channel);
                message.put_slice(bytes);
                (Opcode::Binary, message.freeze())
            }
            Self::Base64 => {
                let mut message = String::with_capacity(1 + bytes.len().div_ceil(3) * 4);
                message.push(char::from(b'0'.saturating_add(channel)));
                STANDARD.encode_string(bytes, &mut message);
                (Opcode::Text, Bytes::from(message))
            }
        }
    }
}

/// What a message part means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Data {
        channel: u8,
        bytes: Bytes,
    },
    /// The client has finished the channel.
    End {
        channel: u8,
    },
    /// Nothing yet.
    Nothing,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ChannelError {
    #[error("a close signal names no channel, or more than one")]
    CloseSignal,
    #[error("a message is not base64")]
    Base64,
}

/// Takes messages apart as they arrive.
#[derive(Debug)]
pub(crate) struct Demultiplexer {
    codec: Codec,
    /// The close signal has a meaning (v5).
    half_close: bool,
    /// Of the message that is being read; none before its first byte.
    channel: Option<u8>,
    /// Base64 that is not yet decoded, or what follows a close signal.
    held: BytesMut,
}

impl Demultiplexer {
    pub(crate) fn new(codec: Codec, half_close: bool) -> Self {
        Self { codec, half_close, channel: None, held: BytesMut::new() }
    }

    pub(crate) fn take(&mut self, part: MessagePart) -> Result<Part, ChannelError> {
        let MessagePart { first, last, mut bytes } = part;
        if first {
            self.channel = None;
            self.held.clear();
        }
        let channel = match self.channel {
            Some(channel) => channel,
            None if bytes.is_empty() => return Ok(Part::Nothing),
            None => {
                let byte = bytes.split_to(1)[0];
                let channel = match self.codec {
                    Codec::Binary => byte,
                    Codec::Base64 => byte.wrapping_sub(b'0'),
                };
                *self.channel.insert(channel)
            }
        };
        if self.half_close && channel == CLOSE_SIGNAL {
            self.held.put_slice(&bytes);
            return match (&self.held[..], last) {
                (&[channel], true) => Ok(Part::End { channel }),
                ([] | [_], false) => Ok(Part::Nothing),
                _ => Err(ChannelError::CloseSignal),
            };
        }
        if self.codec == Codec::Base64 {
            bytes = self.decode(&bytes, last)?;
        }
        if bytes.is_empty() { Ok(Part::Nothing) } else { Ok(Part::Data { channel, bytes }) }
    }

    fn decode(&mut self, text: &[u8], last: bool) -> Result<Bytes, ChannelError> {
        self.held.extend(text.iter().filter(|byte| !matches!(byte, b'\r' | b'\n')));
        // The last group may be padded, and only the last; so one stays until the message ends.
        let ready = if last { self.held.len() } else { self.held.len().saturating_sub(1) / 4 * 4 };
        let text = self.held.split_to(ready);
        STANDARD.decode(&text).map(Bytes::from).map_err(|_| ChannelError::Base64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(first: bool, last: bool, bytes: &[u8]) -> MessagePart {
        MessagePart { first, last, bytes: Bytes::copy_from_slice(bytes) }
    }

    fn data(channel: u8, bytes: &'static [u8]) -> Part {
        Part::Data { channel, bytes: Bytes::from_static(bytes) }
    }

    #[test]
    fn binary_messages_in_parts() {
        let mut channels = Demultiplexer::new(Codec::Binary, true);
        assert_eq!(channels.take(part(true, true, b"")), Ok(Part::Nothing));
        assert_eq!(channels.take(part(true, true, b"\x00ab")), Ok(data(0, b"ab")));
        assert_eq!(channels.take(part(true, false, b"\x04")), Ok(Part::Nothing));
        assert_eq!(channels.take(part(false, false, b"x")), Ok(data(4, b"x")));
        assert_eq!(channels.take(part(false, true, b"y")), Ok(data(4, b"y")));
        assert_eq!(channels.take(part(true, true, b"\xff\x00")), Ok(Part::End { channel: 0 }));
        assert_eq!(channels.take(part(true, false, b"\xff")), Ok(Part::Nothing));
        assert_eq!(channels.take(part(false, true, b"\x02")), Ok(Part::End { channel: 2 }));
        assert_eq!(channels.take(part(true, true, b"\xff")), Err(ChannelError::CloseSignal));
        assert_eq!(channels.take(part(true, true, b"\xff12")), Err(ChannelError::CloseSignal));
    }

    #[test]
    fn before_v5_255_is_a_channel_like_others() {
        let mut channels = Demultiplexer::new(Codec::Binary, false);
        assert_eq!(channels.take(part(true, true, b"\xff\x00")), Ok(data(255, b"\x00")));
    }

    #[test]
    fn base64_wherever_it_is_cut() {
        let text = b"0Zm9vYmFyIQ==";
        for cut in 0..text.len() {
            let mut channels = Demultiplexer::new(Codec::Base64, false);
            let mut all = Vec::new();
            for piece in [part(true, false, &text[..cut]), part(false, true, &text[cut..])] {
                match channels.take(piece).unwrap() {
                    Part::Data { channel: 0, bytes } => all.extend_from_slice(&bytes),
                    Part::Nothing => {}
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(all, b"foobar!");
        }
        let mut channels = Demultiplexer::new(Codec::Base64, false);
        assert_eq!(channels.take(part(true, true, b"0Zm9v\r\nYmFy\n")), Ok(data(0, b"foobar")));
        assert_eq!(channels.take(part(true, true, b"0Zg==Zg==")), Err(ChannelError::Base64));
        assert_eq!(channels.take(part(true, true, b"0Z")), Err(ChannelError::Base64));
    }

    #[test]
    fn what_is_sent() {
        assert_eq!(Codec::Binary.encode(1, b"a"), (Opcode::Binary, Bytes::from_static(b"\x01a")));
        assert_eq!(Codec::Base64.encode(1, b"a"), (Opcode::Text, Bytes::from_static(b"1YQ==")));
        assert_eq!(Codec::Base64.encode(2, b""), (Opcode::Text, Bytes::from_static(b"2")));
    }
}
