//! Requests that the file server has, and the queue that it has them in. Here the device is the driver.

use std::ops::Range;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::bounce::{Bounce, Places};
use crate::device::{Buffers, Misuse};

/// Places of a queue in the bounce memory, two for each request.
pub(super) const PLACES: u16 = 128;
/// Requests that the file server may have of a queue.
const REQUESTS: u16 = PLACES / 2;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A request that the guest waits for the answer to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Of its buffers.
    pub head: u16,
    /// What it asks, and where the answer goes.
    pub buffers: Buffers,
}

/// A request that was put there.
#[derive(Debug)]
pub(super) struct Passed {
    /// Of the guest's buffers; `None`: the guest has forgotten it.
    pub(super) head: Option<u16>,
    pub(super) buffers: Buffers,
    pub(super) area: Range<usize>,
    /// Where in the area the answer is.
    pub(super) answer: usize,
}

/// One queue.
#[derive(Debug)]
pub(super) struct Shadow {
    places: Places,
    passed: Vec<Option<Passed>>,
    available: u16,
    used: u16,
}

impl Shadow {
    pub(super) fn new(index: usize) -> Self {
        let passed = (0..REQUESTS).map(|_| None).collect();
        Self { places: Places::of(index), passed, available: 0, used: 0 }
    }

    pub(super) fn places(&self) -> Places {
        self.places
    }

    pub(super) fn has_room(&self) -> bool {
        self.passed.iter().any(Option::is_none)
    }

    /// What the guest waits for.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        let passed = self.passed.iter().flatten();
        passed
            .filter_map(|passed| Some(Waiting { head: passed.head?, buffers: passed.buffers.clone() }))
            .collect()
    }

    /// Nobody waits for the answers any more.
    pub(super) fn forget(&mut self) {
        self.passed.iter_mut().flatten().for_each(|passed| passed.head = None);
    }

    /// Puts a request, which lies in its area, into the queue. There is room.
    pub(super) fn put(&mut self, bounce: &Bounce, passed: Passed) -> Result<(), Misuse> {
        let Some(slot) = self.passed.iter().position(Option::is_none) else { return Ok(()) };
        // Less than the number of places.
        let first = u16::try_from(2 * slot).unwrap_or(0);
        let area = passed.area.start as u64;
        let parts = [
            (area, passed.buffers.lengths[0], 0),
            (area + passed.answer as u64, passed.buffers.lengths[1], WRITE),
        ];
        let parts: Vec<_> = parts.into_iter().filter(|(_, length, _)| *length > 0).collect();
        for (number, (address, length, flags)) in parts.iter().enumerate() {
            let more = number + 1 < parts.len();
            let index = first + u16::from(number > 0);
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&u32::try_from(*length).unwrap_or(0).to_le_bytes());
            bytes[12..14].copy_from_slice(&(flags | if more { NEXT } else { 0 }).to_le_bytes());
            bytes[14..].copy_from_slice(&if more { index + 1 } else { 0 }.to_le_bytes());
            self.write(bounce, self.places.descriptors + 16 * u64::from(index), &bytes)?;
        }
        let place = u64::from(self.available % PLACES);
        self.write(bounce, self.places.available + 4 + 2 * place, &first.to_le_bytes())?;
        self.available = self.available.wrapping_add(1);
        let index = GuestAddress(self.places.available + 2);
        bounce.memory.store(self.available, index, Ordering::Release).map_err(lost)?;
        self.passed[slot] = Some(passed);
        Ok(())
    }

    #[allow(clippy::unused_self)]
    fn write(&self, bounce: &Bounce, at: u64, bytes: &[u8]) -> Result<(), Misuse> {
        bounce.memory.write_slice(bytes, GuestAddress(at)).map_err(lost)
    }

    /// The next request that the server has answered, and with how many bytes.
    pub(super) fn answered(&mut self, bounce: &Bounce) -> Result<Option<(Passed, usize)>, Misuse> {
        let index: u16 =
            bounce.memory.load(GuestAddress(self.places.used + 2), Ordering::Acquire).map_err(lost)?;
        if index == self.used {
            return Ok(None);
        }
        let place = self.places.used + 4 + 8 * u64::from(self.used % PLACES);
        let mut element = [0; 8];
        bounce.memory.read_slice(&mut element, GuestAddress(place)).map_err(lost)?;
        self.used = self.used.wrapping_add(1);
        let [id, length] =
            [0, 4].map(|at| u32::from_le_bytes(element[at..at + 4].try_into().unwrap_or_default()) as usize);
        let slot = self.passed.get_mut(id / 2).filter(|_| id.is_multiple_of(2));
        let passed = slot.and_then(Option::take);
        passed
            .filter(|passed| length <= passed.buffers.lengths[1])
            .map(|passed| Some((passed, length)))
            .ok_or_else(|| {
                Misuse::Gone(std::io::Error::other("the file server has answered what it was not asked"))
            })
    }
}

/// It is this process's own memory, and everything in it has its place.
fn lost(error: vm_memory::GuestMemoryError) -> Misuse {
    Misuse::Gone(std::io::Error::other(error))
}
