//! WebSocket (RFC 6455), the server's side of it, and the two ways Kubernetes uses it: messages that begin with a
//! channel number, and a tunnel for SPDY.

mod channels;
mod connection;
mod decode;
mod tunnel;

pub(crate) use channels::{Codec, Demultiplexer, Part};
pub(crate) use connection::{Connection, Reader, Writer, Writing};
pub(crate) use tunnel::tunnel;

#[cfg(test)]
pub(crate) use connection::MessagePart;
#[cfg(test)]
pub(crate) use decode::{Decoder, Frame, Role};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest as _, Sha1};

/// Appended to the client's key (section 1.3).
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Sec-WebSocket-Accept for a Sec-WebSocket-Key; none if that is not 16 bytes in base64.
pub(crate) fn accept_key(key: &str) -> Option<String> {
    let key = key.trim();
    let nonce = STANDARD.decode(key).ok()?;
    (nonce.len() == 16).then(|| {
        let digest = Sha1::new().chain_update(key).chain_update(KEY_SUFFIX).finalize();
        STANDARD.encode(digest)
    })
}

/// What a frame carries (section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

/// Why a connection is closed (section 7.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CloseCode {
    Normal = 1000,
    ProtocolError = 1002,
    TooLarge = 1009,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_key_is_that_of_the_standard() {
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ==").as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ"), None);
        assert_eq!(accept_key("c2hvcnQ="), None);
    }
}
