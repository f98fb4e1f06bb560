//! What a guest asks of its memory (`struct virtio_mem_req`), and what it is answered.

use super::device::BLOCK;

/// Bytes of a request.
pub(super) const REQUEST: usize = 24;
/// Bytes of an answer (`struct virtio_mem_resp`).
pub(super) const ANSWER: usize = 10;

/// Some blocks: where in the guest's memory they begin, and how many they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) address: u64,
    pub(super) count: u16,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Blocks),
    Unplug(Blocks),
    UnplugAll,
    State(Blocks),
    Unknown,
}

impl Request {
    pub(super) fn decode(bytes: &[u8; REQUEST]) -> Self {
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let blocks = Blocks { address: u64::from_le_bytes(address), count: short(16) };
        match short(0) {
            0 => Self::Plug(blocks),
            1 => Self::Unplug(blocks),
            2 => Self::UnplugAll,
            3 => Self::State(blocks),
            _ => Self::Unknown,
        }
    }
}

impl Blocks {
    /// Their numbers in a region that begins at `begin` and has `usable` bytes. `None`: they are not in it.
    pub(super) fn in_region(self, begin: u64, usable: u64) -> Option<std::ops::Range<usize>> {
        let from = self.address.checked_sub(begin).filter(|from| from.is_multiple_of(BLOCK))?;
        let end = from.checked_add(u64::from(self.count) * BLOCK)?;
        let number = |bytes: u64| usize::try_from(bytes / BLOCK).ok();
        (self.count > 0 && end <= usable).then_some(number(from)?..number(end)?)
    }
}

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// Not so much is wanted.
    Refused,
    Wrong,
    Plugged,
    Unplugged,
    Mixed,
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER] {
        let (kind, state) = match self {
            Self::Done | Self::Plugged => (0, 0),
            Self::Refused => (1, 0),
            Self::Wrong => (3, 0),
            Self::Unplugged => (0, 1),
            Self::Mixed => (0, 2),
        };
        let mut bytes = [0; ANSWER];
        (bytes[0], bytes[8]) = (kind, state);
        bytes
    }
}
