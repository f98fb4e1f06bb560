//! SPDY/3.1 frames (SPDY/3.1 draft, section 2.2 and 2.6): constants and what we send.

use bytes::{BufMut, Bytes, BytesMut};

use super::header_block::HeaderWriter;

pub(super) const VERSION: u16 = 3;
pub(super) const CONTROL_BIT: u8 = 0x80;

pub(super) const SYN_STREAM: u16 = 1;
pub(super) const SYN_REPLY: u16 = 2;
pub(super) const RST_STREAM: u16 = 3;
pub(super) const SETTINGS: u16 = 4;
pub(super) const PING: u16 = 6;
pub(super) const GOAWAY: u16 = 7;
pub(super) const HEADERS: u16 = 8;
pub(super) const WINDOW_UPDATE: u16 = 9;

pub(super) const FLAG_FIN: u8 = 1;
pub(super) const FLAG_UNIDIRECTIONAL: u8 = 2;

/// SETTINGS entry: the window that streams start with.
pub(super) const SETTINGS_INITIAL_WINDOW_SIZE: u32 = 7;

/// What a window is before anybody says otherwise, in bytes (section 2.6.8).
pub(super) const INITIAL_WINDOW: i64 = 64 << 10;
/// The largest a window may be.
pub(super) const MAX_WINDOW: i64 = (1 << 31) - 1;

/// The largest data frame that we send, in bytes: half a window, so that a peer with flow control can answer in time.
pub(super) const MAX_SENT_DATA: usize = 32 << 10;

/// Why a stream is ended out of turn (section 2.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum ResetStatus {
    InvalidStream = 2,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
}

/// Why the session ends (section 2.6.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum GoAwayStatus {
    Ok = 0,
    ProtocolError = 1,
}

/// A frame to the client. A server of remote commands never opens streams, so there is no SYN_STREAM.
#[derive(Debug)]
pub(crate) enum Outgoing {
    SynReply {
        stream: u32,
    },
    Reset {
        stream: u32,
        status: ResetStatus,
    },
    Ping(u32),
    GoAway {
        last: u32,
        status: GoAwayStatus,
    },
    /// `stream` 0 is the whole session (new in SPDY/3.1).
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// At most [`MAX_SENT_DATA`] bytes.
    Data {
        stream: u32,
        bytes: Bytes,
        fin: bool,
    },
    /// Not a frame: the connection's write side is shut down after everything before it.
    Shutdown,
}

impl Outgoing {
    pub(super) fn encode(&self, headers: &mut HeaderWriter, out: &mut BytesMut) {
        match self {
            Self::SynReply { stream } => {
                let block: Vec<u8> = headers.no_headers().collect();
                control(out, SYN_REPLY, 0, 4 + block.len());
                out.put_u32(*stream);
                out.put_slice(&block);
            }
            Self::Reset { stream, status } => {
                control(out, RST_STREAM, 0, 8);
                out.put_u32(*stream);
                out.put_u32(*status as u32);
            }
            Self::Ping(id) => {
                control(out, PING, 0, 4);
                out.put_u32(*id);
            }
            Self::GoAway { last, status } => {
                control(out, GOAWAY, 0, 8);
                out.put_u32(*last);
                out.put_u32(*status as u32);
            }
            Self::WindowUpdate { stream, delta } => {
                control(out, WINDOW_UPDATE, 0, 8);
                out.put_u32(*stream);
                out.put_u32(*delta);
            }
            Self::Data { stream, bytes, fin } => {
                out.put_u32(*stream);
                flags_and_length(out, if *fin { FLAG_FIN } else { 0 }, bytes.len());
                out.put_slice(bytes);
            }
            Self::Shutdown => {}
        }
    }
}

/// The head of a control frame.
pub(super) fn control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(u16::from(CONTROL_BIT) << 8 | VERSION);
    out.put_u16(kind);
    flags_and_length(out, flags, length);
}

/// Eight bits of flags and 24 of length.
pub(super) fn flags_and_length(out: &mut BytesMut, flags: u8, length: usize) {
    debug_assert!(length < 1 << 24);
    out.put_u8(flags);
    out.put_uint(u64::try_from(length).unwrap_or(0), 3);
}
