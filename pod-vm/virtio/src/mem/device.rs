//! The device.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::request::{ANSWER, Answer, REQUEST, Request};
use crate::device::{Buffers, Device, Memory, Misuse, Queues, Source, Wake};
use crate::state::{DeviceState, RestoreError};
use crate::sys;

/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Bytes of a block of Linux': it begins one only where all of it is usable.
pub const LARGE_BLOCK: u64 = 128 << 20;
/// The guest does not touch what it has not taken.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Bytes of the configuration (`struct virtio_mem_config`).
const CONFIGURATION: usize = 56;

/// How much is usable of a region when so much is wanted, in bytes.
pub fn usable(wanted: u64) -> u64 {
    wanted.next_multiple_of(LARGE_BLOCK)
}

/// What is wanted of the guest and what it has, for who wants it and the device.
#[derive(Debug)]
pub struct Size {
    wanted: AtomicU64,
    has: AtomicU64,
    changed: EventFd,
    told: EventFd,
}

impl Size {
    /// Nothing is wanted. What the guest has done is told by `told`. Fails when there are no descriptors left.
    pub fn new(told: EventFd) -> std::io::Result<Self> {
        let changed = EventFd::new(crate::transport::flags())?;
        Ok(Self { wanted: AtomicU64::new(0), has: AtomicU64::new(0), changed, told })
    }

    /// Bytes that the guest has.
    pub fn has(&self) -> u64 {
        self.has.load(Ordering::SeqCst)
    }

    /// The guest is to have so much, a multiple of [`BLOCK`]. [`usable`] bytes of the region are in the device's memory by now.
    pub fn want(&self, bytes: u64) {
        self.wanted.store(bytes, Ordering::SeqCst);
        // Fails only when it would overflow, and then it is set.
        let _ = self.changed.write(1);
    }
}

/// What the region is and has become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it begins.
    pub begin: u64,
    /// Bytes that there can be.
    pub length: u64,
    /// Bytes that the guest may use. They are never less again: it may have some of the last.
    pub usable: u64,
    /// Bytes that it is to have.
    pub wanted: u64,
    /// Which blocks it has.
    pub blocks: Vec<bool>,
    /// How often the configuration has changed.
    pub generation: u32,
}

/// The device.
#[derive(Debug)]
pub struct Reserve {
    state: State,
    size: Arc<Size>,
    configuration: [u8; CONFIGURATION],
}

impl Reserve {
    /// A region of `length` bytes at `begin`, both multiples of [`LARGE_BLOCK`], of which the guest has nothing yet.
    pub fn new(begin: u64, length: u64, size: Arc<Size>) -> Self {
        let count = usize::try_from(length / BLOCK).unwrap_or(0);
        let blocks = vec![false; count];
        let state = State { begin, length, usable: 0, wanted: 0, blocks, generation: 0 };
        let mut device = Self { state, size, configuration: [0; CONFIGURATION] };
        device.describe();
        device
    }

    fn plugged(&self) -> u64 {
        BLOCK * self.state.blocks.iter().filter(|has| **has).count() as u64
    }

    /// Writes the configuration anew.
    fn describe(&mut self) {
        let state = &self.state;
        let (plugged, configuration) = (self.plugged(), &mut self.configuration);
        let mut put = |at: usize, value: u64| configuration[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(0, BLOCK);
        put(16, state.begin);
        put(24, state.length);
        put(32, state.usable);
        put(40, plugged);
        put(48, state.wanted);
    }

    /// The guest has taken blocks, or given some back.
    fn note(&mut self) {
        self.describe();
        self.size.has.store(self.plugged(), Ordering::SeqCst);
        // Fails only when it would overflow, and then it is set.
        let _ = self.size.told.write(1);
    }

    fn carry_out(&mut self, request: Request, memory: &Memory) -> Answer {
        let (begin, usable) = (self.state.begin, self.state.usable);
        match request {
            Request::Plug(wanted) => {
                let Some(range) = wanted.in_region(begin, usable) else { return Answer::Wrong };
                if self.state.blocks[range.clone()].iter().any(|has| *has) {
                    return Answer::Wrong;
                }
                if self.plugged() + u64::from(wanted.count) * BLOCK > self.state.wanted {
                    return Answer::Refused;
                }
                self.state.blocks[range].fill(true);
            }
            Request::Unplug(wanted) => {
                let Some(range) = wanted.in_region(begin, usable) else { return Answer::Wrong };
                if !self.state.blocks[range.clone()].iter().all(|has| *has) {
                    return Answer::Wrong;
                }
                self.release(range, memory);
            }
            Request::UnplugAll => {
                let usable = usize::try_from(usable / BLOCK).unwrap_or(0);
                self.release(0..usable, memory);
            }
            Request::State(wanted) => {
                let Some(range) = wanted.in_region(begin, usable) else { return Answer::Wrong };
                let blocks = &self.state.blocks[range];
                return match (blocks.contains(&true), blocks.contains(&false)) {
                    (true, false) => Answer::Plugged,
                    (false, _) => Answer::Unplugged,
                    (true, true) => Answer::Mixed,
                };
            }
            Request::Unknown => return Answer::Wrong,
        }
        self.note();
        Answer::Done
    }

    /// Takes blocks back, with the host's memory that is behind them.
    fn release(&mut self, range: Range<usize>, memory: &Memory) {
        let begin = self.state.begin + range.start as u64 * BLOCK;
        sys::discard_at(memory, begin, range.len() as u64 * BLOCK);
        self.state.blocks[range].fill(false);
    }
}

impl Device for Reserve {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_MEM
    }

    fn queues(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    fn generation(&self) -> u32 {
        self.state.generation
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        Ok(())
    }

    /// What the guest has stays: its kernel goes on using it without the driver.
    fn reset(&mut self) {}

    fn state(&self) -> DeviceState {
        DeviceState::Mem(self.state.clone())
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        let DeviceState::Mem(state) = state else { return Err(RestoreError::Differs("it is no memory's")) };
        let of = |state: &State| (state.begin, state.length, state.blocks.len());
        if of(&state) != of(&self.state) {
            return Err(RestoreError::Differs("it is of memory in another place"));
        }
        self.size.wanted.store(state.wanted, Ordering::SeqCst);
        self.state = state;
        self.note();
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { descriptor: sys::descriptor(&self.size.changed), edge: false }]
    }

    fn serve(&mut self, wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        if let Wake::Source(_) = wake {
            let _ = self.size.changed.read();
            self.state.wanted = self.size.wanted.load(Ordering::SeqCst).min(self.state.length);
            self.state.usable = self.state.usable.max(usable(self.state.wanted)).min(self.state.length);
            self.state.generation = self.state.generation.wrapping_add(1);
            self.describe();
            queues.interrupt.configuration();
            return Ok(false);
        }
        queues.take(0, |chain| {
            let buffers = Buffers::new(chain, REQUEST.max(ANSWER) * 64)?;
            let mut bytes = [0; REQUEST];
            if buffers.read(memory, 0, &mut bytes)? < REQUEST || buffers.lengths[1] < ANSWER {
                return Err(Misuse::Request("a request about memory is too short"));
            }
            let answer = self.carry_out(Request::decode(&bytes), memory).encode();
            let written = buffers.write(memory, 0, &answer)?;
            Ok(u32::try_from(written).unwrap_or(0))
        })
    }
}
