//! The device: packets are moved between the guest's queues and the clients' sockets until nothing moves.

use std::os::fd::AsFd;

use virtio_queue::{QueueOwnedT, QueueT};

use super::muxer::State;
use super::{GUEST_CID, Muxer, Scratch, drain, fill};
use crate::device::{Buffers, Device, Memory, Misuse, Queues, Source, Wake};
use crate::state::{DeviceState, RestoreError};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// The only event: all connections are gone (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, virtio 1.3, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// Rounds of moving before others have their turn.
const ROUNDS: usize = 16;

/// The device, for a transport that leads into the same process.
#[derive(Debug)]
pub struct Vsock {
    muxer: Muxer,
    scratch: Scratch,
    configuration: [u8; 8],
}

impl Vsock {
    /// Serves the clients of `muxer`.
    pub fn new(muxer: Muxer) -> Self {
        Self { muxer, scratch: Scratch::default(), configuration: GUEST_CID.to_le_bytes() }
    }

    /// True when something was moved.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        let Some(queue) = queues.get(TRANSMIT) else { return Ok(false) };
        queue.disable_notification(memory)?;
        let moved = drain(queue, memory, &mut self.muxer, &mut self.scratch)? > 0;
        if moved {
            queues.notify(TRANSMIT)?;
        }
        Ok(moved)
    }

    /// True when something was moved, and true when there is more than the guest has buffers for.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<(bool, bool), Misuse> {
        let memory = queues.memory;
        let Some(queue) = queues.get(RECEIVE) else { return Ok((false, false)) };
        queue.disable_notification(memory)?;
        let filled = fill(queue, memory, &mut self.muxer, &mut self.scratch)?;
        if filled.buffers > 0 {
            queues.notify(RECEIVE)?;
        }
        Ok((filled.buffers > 0, filled.starved))
    }

    /// Tells the guest that its connections are gone, if they are. True: there may be a buffer to tell it in by now.
    fn tell(&mut self, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        if !self.muxer.state.lost {
            return Ok(false);
        }
        let Some(queue) = queues.get(EVENTS) else { return Ok(false) };
        let Some(chain) = queue.iter(memory)?.next() else {
            return Ok(queue.enable_notification(memory)?);
        };
        let head = chain.head_index();
        let written = Buffers::new(chain, usize::MAX)?.write(memory, 0, &TRANSPORT_RESET)?;
        queue.add_used(memory, head, u32::try_from(written).unwrap_or(0))?;
        self.muxer.state.lost = false;
        queues.notify(EVENTS)?;
        Ok(false)
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK
    }

    /// For what the guest receives, what it sends, and events.
    fn queues(&self) -> &'static [u16] {
        &[256, 256, 64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        // A driver that begins knows of no connection.
        self.muxer.reset();
        Ok(())
    }

    fn reset(&mut self) {
        self.muxer.reset();
    }

    fn state(&self) -> DeviceState {
        DeviceState::Vsock(self.muxer.state)
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else { return Err(RestoreError::Differs("it is no vsock's")) };
        self.muxer.state = State { lost: true, ..state };
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { descriptor: self.muxer.as_fd(), edge: false }]
    }

    fn serve(&mut self, _wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        for _ in 0..ROUNDS {
            // Before anything of a connection that the guest does not know.
            let untold = self.tell(queues)?;
            // A broken epoll cannot be mended from here, and does not happen.
            let _ = self.muxer.advance();
            let sent = self.transmit(queues)?;
            let (received, starved) = self.receive(queues)?;
            if sent || received {
                continue;
            }
            // Nothing moves: from now on the guest has to say when it has put something there. It may have just done so.
            let mut more = untold;
            if self.muxer.accepts()
                && let Some(queue) = queues.get(TRANSMIT)
            {
                more |= queue.enable_notification(memory)?;
            }
            if starved && let Some(queue) = queues.get(RECEIVE) {
                more |= queue.enable_notification(memory)?;
            }
            if !more {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
