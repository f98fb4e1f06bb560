//! The device.

use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::bounce::Bounce;
use super::request::{Passed, Shadow, Waiting};
use super::server::{Server, ServerError};
use crate::device::{Buffers, Device, Memory, Misuse, Queues, Source, Wake};
use crate::state::{DeviceState, RestoreError};
use crate::sys;

/// One for what the guest forgets, one for everything else.
const QUEUES: usize = 2;
/// Bytes of a request in either direction: Linux asks for a megabyte of a file at most, and some headers.
const MOST: usize = (1 << 20) + (64 << 10);
const TAG: usize = 36;

/// The request that ends everything that was opened (`FUSE_DESTROY`): length, number, and a unique name, little endian, in `struct
/// fuse_in_header`.
const DESTROY: [u8; 40] = {
    let mut header = [0; 40];
    (header[0], header[4], header[8]) = (40, 38, 1);
    header
};
/// `struct fuse_out_header`
const ANSWER: usize = 16;

/// What a share is, and what the guest waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its tag.
    pub tag: String,
    /// A driver has asked for something, perhaps.
    pub begun: bool,
    /// Requests of each queue that the file server has not answered. They are put to it again, as after a server that has gone: what the guest
    /// has opened is the server's to know.
    pub waiting: Vec<Vec<Waiting>>,
}

/// The device.
pub struct Share {
    server: Server,
    bounce: Bounce,
    shadows: Vec<Shadow>,
    configuration: Vec<u8>,
    tag: String,
    begun: bool,
}

impl Share {
    /// A share of that tag, at most 36 bytes, whose file server is at the other end of `socket`. Waits for it to answer.
    pub fn new(socket: UnixStream, tag: &str) -> Result<Self, ServerError> {
        let bounce = Bounce::new().map_err(ServerError::Memory)?;
        let shadows: Vec<Shadow> = (0..QUEUES).map(Shadow::new).collect();
        let server = Server::new(socket, &bounce, &shadows)?;
        let mut configuration: Vec<u8> = tag.bytes().take(TAG).collect();
        configuration.resize(TAG, 0);
        configuration.extend(1u32.to_le_bytes());
        Ok(Self { server, bounce, shadows, configuration, tag: tag.to_owned(), begun: false })
    }

    /// Hands on what the guest asks, as long as there is room. True: there is more.
    fn pass(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        let mut passed = 0;
        let more = loop {
            let Some(queue) = queues.get(index) else { break false };
            queue.disable_notification(memory)?;
            if !self.shadows[index].has_room() {
                // An answer makes room, and then the guest is looked at again.
                break false;
            }
            if passed == queue.size() {
                break true;
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break false;
            };
            let head = chain.head_index();
            let buffers = Buffers::new(chain, MOST)?;
            if buffers.lengths[0] == 0 {
                return Err(Misuse::Request("a file server is asked nothing"));
            }
            if !put(&mut self.bounce, &mut self.shadows[index], memory, Waiting { head, buffers })? {
                queue.go_to_previous_position();
                break false;
            }
            passed += 1;
        };
        if passed > 0 {
            self.server.kick(index);
        }
        Ok(more)
    }

    /// Gives the guest what the server has answered.
    fn answer(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<(), Misuse> {
        let memory = queues.memory;
        let _ = self.server.calls.get(index).map(vmm_sys_util::eventfd::EventFd::read);
        let mut answered = false;
        while let Some((passed, length)) = self.shadows[index].answered(&self.bounce)? {
            let copied = match (passed.head, queues.get(index)) {
                (Some(head), Some(queue)) => {
                    let from = GuestAddress((passed.area.start + passed.answer) as u64);
                    let copied = passed.buffers.copy_in(memory, &self.bounce.memory, from, length);
                    answered = true;
                    copied.and_then(|()| {
                        Ok(queue.add_used(memory, head, u32::try_from(length).unwrap_or(0))?)
                    })
                }
                _ => Ok(()),
            };
            self.bounce.give_back(&passed.area);
            copied?;
        }
        if answered {
            queues.notify(index)?;
        }
        Ok(())
    }
}

/// Hands a request on; false: there is no room for it in the memory. There is in the queue.
fn put(bounce: &mut Bounce, shadow: &mut Shadow, memory: &Memory, request: Waiting) -> Result<bool, Misuse> {
    let Waiting { head, buffers } = request;
    // The answer begins on a page of its own.
    let answer = buffers.lengths[0].next_multiple_of(4096);
    let Some(area) = bounce.take(answer + buffers.lengths[1]) else { return Ok(false) };
    if let Err(misuse) = buffers.copy_out(memory, &bounce.memory, GuestAddress(area.start as u64)) {
        bounce.give_back(&area);
        return Err(misuse);
    }
    shadow.put(bounce, Passed { head: Some(head), buffers, area, answer })?;
    Ok(true)
}

impl Device for Share {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_FS
    }

    /// Linux asks for no more pages at once than the queue has places.
    fn queues(&self) -> &'static [u16] {
        &[128, 512]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    fn begin(&mut self, _features: u64) -> Result<(), Misuse> {
        self.begun = true;
        Ok(())
    }

    /// What the guest had opened is closed, by a request of the device's own. Without room for one the server is behind with requests that nobody
    /// waits for, and keeps what was opened.
    fn reset(&mut self) {
        self.shadows.iter_mut().for_each(Shadow::forget);
        let shadow = &mut self.shadows[1];
        if !std::mem::take(&mut self.begun) || !shadow.has_room() {
            return;
        }
        let Some(area) = self.bounce.take(2 * 4096) else { return };
        let mut buffers = Buffers::default();
        buffers.lengths = [DESTROY.len(), ANSWER];
        let at = GuestAddress(area.start as u64);
        let written = vm_memory::Bytes::write_slice(&self.bounce.memory, &DESTROY, at);
        let passed = Passed { head: None, buffers, area, answer: 4096 };
        if written.is_ok() && shadow.put(&self.bounce, passed).is_ok() {
            self.server.kick(1);
        }
    }

    fn state(&self) -> DeviceState {
        let waiting = self.shadows.iter().map(Shadow::waiting).collect();
        DeviceState::Fs(State { tag: self.tag.clone(), begun: self.begun, waiting })
    }

    fn restore(&mut self, state: DeviceState, memory: &Memory) -> Result<(), RestoreError> {
        let DeviceState::Fs(state) = state else { return Err(RestoreError::Differs("it is no share's")) };
        if state.tag != self.tag || state.waiting.len() != self.shadows.len() {
            return Err(RestoreError::Differs("it is of another share"));
        }
        self.begun = state.begun;
        for (index, waiting) in state.waiting.into_iter().enumerate() {
            for request in waiting {
                let shadow = &mut self.shadows[index];
                if !shadow.has_room() || !put(&mut self.bounce, shadow, memory, request)? {
                    return Err(RestoreError::Differs("more is asked than there is room for"));
                }
            }
            self.server.kick(index);
        }
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        self.server
            .calls
            .iter()
            .map(|call| Source { descriptor: sys::descriptor(call), edge: false })
            .collect()
    }

    fn serve(&mut self, wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        match wake {
            Wake::Queue(index) => self.pass(index, queues),
            Wake::Source(index) => {
                self.answer(index, queues)?;
                // What waited for room, in either queue. What is still left is woken by the answers that make it.
                let more = self.pass(0, queues)?;
                Ok(self.pass(1, queues)? || more)
            }
        }
    }
}
