//! From bytes to SPDY events, without waiting for whole data frames.

use bytes::{Buf, Bytes, BytesMut};

use super::frame::{
    CONTROL_BIT, FLAG_FIN, FLAG_UNIDIRECTIONAL, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS,
    SETTINGS_INITIAL_WINDOW_SIZE, SYN_REPLY, SYN_STREAM, VERSION, WINDOW_UPDATE,
};
use super::header_block::{HeaderError, HeaderReader, Headers};

/// Bytes before the payload of each frame.
const HEAD: usize = 8;
/// The largest control frame taken, in bytes of payload. Data frames may be as long as their length field allows.
const MAX_CONTROL: usize = 16 << 10;
/// Data frames are passed on in pieces of at most this many bytes.
const MAX_PIECE: usize = 32 << 10;
/// Stream identifiers, windows and their changes have 31 bits.
const LOW_31: u32 = 0x7fff_ffff;

/// What the peer said.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    SynStream {
        stream: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
    },
    SynReply {
        stream: u32,
        fin: bool,
    },
    Reset {
        stream: u32,
        status: u32,
    },
    /// SETTINGS; only the initial window matters to us.
    Settings {
        initial_window: Option<u32>,
    },
    Ping(u32),
    GoAway,
    Headers {
        stream: u32,
        fin: bool,
    },
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A part of a data frame; `fin` on its last part.
    Data {
        stream: u32,
        bytes: Bytes,
        fin: bool,
    },
}

/// Why the bytes are not SPDY/3.1. The session cannot go on after any of these.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("a control frame of type {kind} has {length} bytes, more than {MAX_CONTROL}")]
    TooLong { kind: u16, length: usize },
    #[error("a control frame of type {kind} has {length} bytes, too few for its fields")]
    TooShort { kind: u16, length: usize },
    #[error("a control frame has SPDY version {0}")]
    Version(u16),
    #[error("a SETTINGS frame announces {0} entries that it does not have")]
    Settings(u32),
    #[error("a frame of type {kind} has unreadable headers")]
    Headers {
        kind: u16,
        #[source]
        source: HeaderError,
    },
    #[error("a data frame names stream 0")]
    StreamZero,
}

/// Feeds on a buffer that grows at its end.
#[derive(Debug)]
pub(crate) struct Decoder {
    headers: HeaderReader,
    /// The data frame that is being passed on.
    data: Option<OpenData>,
}

#[derive(Debug)]
struct OpenData {
    stream: u32,
    rest: usize,
    fin: bool,
}

impl Decoder {
    pub(crate) fn new() -> Self {
        Self { headers: HeaderReader::new(), data: None }
    }

    /// The next event in the buffer, if a whole one is there. The buffer never needs to hold more than
    /// a control frame.
    pub(crate) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, DecodeError> {
        loop {
            if let Some(data) = &mut self.data {
                if data.rest > 0 && buffer.is_empty() {
                    return Ok(None);
                }
                let length = data.rest.min(buffer.len()).min(MAX_PIECE);
                // A copy: a slice would keep the whole receive buffer alive for as long as a slow consumer likes.
                let bytes = Bytes::copy_from_slice(&buffer[..length]);
                buffer.advance(length);
                data.rest -= length;
                let done = data.rest == 0;
                let event = Event::Data { stream: data.stream, bytes, fin: done && data.fin };
                if done {
                    self.data = None;
                }
                return Ok(Some(event));
            }
            let Some(head) = buffer.first_chunk::<HEAD>() else { return Ok(None) };
            let [first, .., flags, high, middle, low] = *head;
            let length = usize::try_from(u32::from_be_bytes([0, high, middle, low])).unwrap_or(usize::MAX);
            let mut fields = &head[..4];
            if first & CONTROL_BIT == 0 {
                let stream = fields.get_u32();
                if stream == 0 {
                    return Err(DecodeError::StreamZero);
                }
                buffer.advance(HEAD);
                self.data = Some(OpenData { stream, rest: length, fin: flags & FLAG_FIN != 0 });
                continue;
            }
            let version = fields.get_u16() & !(u16::from(CONTROL_BIT) << 8);
            let kind = fields.get_u16();
            if version != VERSION {
                return Err(DecodeError::Version(version));
            }
            if length > MAX_CONTROL {
                return Err(DecodeError::TooLong { kind, length });
            }
            if buffer.len() < HEAD + length {
                return Ok(None);
            }
            buffer.advance(HEAD);
            let payload = buffer.split_to(length);
            // An unknown kind is passed over (section 2.2.1).
            if let Some(event) = self.control(kind, flags, &payload)? {
                return Ok(Some(event));
            }
        }
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Option<Event>, DecodeError> {
        let length = payload.len();
        let mut fields = payload;
        let mut field = || {
            if fields.len() < 4 { Err(DecodeError::TooShort { kind, length }) } else { Ok(fields.get_u32()) }
        };
        let fin = flags & FLAG_FIN != 0;
        Ok(Some(match kind {
            SYN_STREAM => {
                let stream = field()? & LOW_31;
                let _associated = field()?;
                // Priority and credential slot, which nobody uses.
                let block = payload.get(10..).ok_or(DecodeError::TooShort { kind, length })?;
                let headers = self.read_headers(kind, block)?;
                Event::SynStream { stream, fin, unidirectional: flags & FLAG_UNIDIRECTIONAL != 0, headers }
            }
            // The headers of these two say nothing to us, but the zlib stream must be followed.
            SYN_REPLY => {
                let stream = field()? & LOW_31;
                self.read_headers(kind, &payload[4..])?;
                Event::SynReply { stream, fin }
            }
            HEADERS => {
                let stream = field()? & LOW_31;
                self.read_headers(kind, &payload[4..])?;
                Event::Headers { stream, fin }
            }
            RST_STREAM => Event::Reset { stream: field()? & LOW_31, status: field()? },
            SETTINGS => {
                let count = field()?;
                let mut initial_window = None;
                for _ in 0..count {
                    // Eight bits of flags and 24 of identifier.
                    let (id, value) = match (field(), field()) {
                        (Ok(id), Ok(value)) => (id & 0x00ff_ffff, value),
                        _ => return Err(DecodeError::Settings(count)),
                    };
                    if id == SETTINGS_INITIAL_WINDOW_SIZE {
                        initial_window = Some(value & LOW_31);
                    }
                }
                Event::Settings { initial_window }
            }
            PING => Event::Ping(field()?),
            GOAWAY => {
                let _last_good_stream = field()?;
                Event::GoAway
            }
            WINDOW_UPDATE => Event::WindowUpdate { stream: field()? & LOW_31, delta: field()? & LOW_31 },
            _ => return Ok(None),
        }))
    }

    fn read_headers(&mut self, kind: u16, block: &[u8]) -> Result<Headers, DecodeError> {
        self.headers.read(block).map_err(|source| DecodeError::Headers { kind, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> (Vec<Event>, Option<DecodeError>) {
        let mut buffer = BytesMut::from(bytes);
        let mut decoder = Decoder::new();
        let mut events = Vec::new();
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => return (events, None),
                Err(error) => return (events, Some(error)),
            }
        }
    }

    #[test]
    fn a_data_frame_is_passed_on_as_it_arrives() {
        let mut decoder = Decoder::new();
        let mut buffer = BytesMut::from(&[0, 0, 0, 3, FLAG_FIN, 0, 0, 3, b'a'][..]);
        let data = |text: &'static str, fin| Event::Data { stream: 3, bytes: Bytes::from(text), fin };
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(data("a", false)));
        assert_eq!(decoder.next(&mut buffer).unwrap(), None);
        buffer.extend_from_slice(b"bc");
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(data("bc", true)));
        buffer.extend_from_slice(&[0, 0, 0, 3, FLAG_FIN, 0, 0, 0]);
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(data("", true)));
        assert_eq!(decoder.next(&mut buffer).unwrap(), None);
    }

    #[test]
    fn control_frames_are_read_whole() {
        let settings =
            [0x80, 3, 0, 4, 0, 0, 0, 20, 0, 0, 0, 2, 1, 0, 0, 4, 0, 0, 0, 9, 0, 0, 0, 7, 0, 1, 0, 0];
        assert_eq!(decode(&settings).0, [Event::Settings { initial_window: Some(0x1_0000) }]);
        assert_eq!(decode(&settings[..27]).0, []);
        let unknown_then_ping = [0x80, 3, 0, 99, 0, 0, 0, 1, 5, 0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 7];
        assert_eq!(decode(&unknown_then_ping).0, [Event::Ping(7)]);
        let reset = [0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 1];
        assert_eq!(decode(&reset).0, [Event::Reset { stream: 5, status: 1 }]);
        let update = [0x80, 3, 0, 9, 0, 0, 0, 8, 0x80, 0, 0, 5, 0x80, 0, 0, 1];
        assert_eq!(decode(&update).0, [Event::WindowUpdate { stream: 5, delta: 1 }]);
    }

    #[test]
    fn what_is_not_spdy_is_refused() {
        let wrong: [(&[u8], &str); 7] = [
            (&[0x80, 2, 0, 1, 0, 0, 0, 0], "a control frame has SPDY version 2"),
            (&[0x80, 3, 0, 1, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0], "too few"),
            (&[0x80, 3, 0, 1, 0, 1, 0, 0], "more than"),
            (&[0x80, 3, 0, 4, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff], "announces 4294967295 entries"),
            (&[0x80, 3, 0, 6, 0, 0, 0, 2, 0, 0], "too few"),
            (&[0x80, 3, 0, 2, 0, 0, 0, 6, 0, 0, 0, 1, 9, 9], "unreadable headers"),
            (&[0, 0, 0, 0, 0, 0, 0, 0], "stream 0"),
        ];
        for (bytes, text) in wrong {
            let (events, error) = decode(bytes);
            let error = error.expect("an error").to_string();
            assert!(events.is_empty() && error.contains(text), "{bytes:?}: {error}");
        }
    }
}
