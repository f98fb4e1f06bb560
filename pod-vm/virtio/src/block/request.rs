//! What a guest asks a disk for.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::device::{Buffers, Memory, Misuse};

/// `struct virtio_blk_req` up to its data.
pub(super) const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`
pub(super) const SEGMENT: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Name,
    Discard,
    WriteZeroes,
    Unknown,
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Of 512 bytes.
    pub(super) sector: u64,
}

impl Request {
    /// Reads the header, and sees to it that there is room for the status.
    pub(super) fn read(memory: &Memory, buffers: &Buffers) -> Result<Self, Misuse> {
        let mut header = [0; HEADER];
        if buffers.read(memory, 0, &mut header)? != HEADER {
            return Err(Misuse::Request("a disk's request is shorter than its header"));
        }
        if buffers.lengths[1] == 0 {
            return Err(Misuse::Request("a disk's request has no room for the status"));
        }
        let [kind, _, sector @ ..] = split(&header);
        let kind = match kind {
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::Name,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Unknown,
        };
        Ok(Self { kind, sector: u64::from(sector[0]) | u64::from(sector[1]) << 32 })
    }
}

/// A range to be discarded or filled with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) unmap: bool,
    /// Flags that nobody knows.
    pub(super) unknown: bool,
}

impl Segment {
    pub(super) fn decode(bytes: &[u8; SEGMENT]) -> Self {
        let [low, high, sectors, flags] = split(bytes);
        let sector = u64::from(low) | u64::from(high) << 32;
        Self { sector, sectors, unmap: flags & 1 != 0, unknown: flags & !1 != 0 }
    }
}

fn split(bytes: &[u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    words
}

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With so many bytes of data.
    Done(usize),
    Failed,
    Unsupported,
}

impl Outcome {
    pub(super) fn status(self) -> u8 {
        let status = match self {
            Self::Done(_) => VIRTIO_BLK_S_OK,
            Self::Failed => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        // Three small numbers.
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}
