//! What a device is to whatever carries it: a transport that the guest finds it by, and a thread that serves it.

use std::io;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::state::{DeviceState, RestoreError};
use crate::vsock::QueueError;

/// The guest's memory. A region that is mapped for reading alone is one that devices do not write to.
pub type Memory = GuestMemoryMmap<()>;
/// Buffers that the guest's driver has put into a queue.
pub type Chain<'m> = DescriptorChain<&'m Memory>;

/// What a guest has done that no driver does. The device stops and tells the guest that it needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum Misuse {
    /// A queue is not where, or not what, it must be.
    #[error("use the guest's queue")]
    Queue(#[from] virtio_queue::Error),
    /// Of vsock's queues.
    #[error(transparent)]
    Packets(#[from] QueueError),
    /// A request has not the form that the device's section of the standard gives it.
    #[error("understand the guest's request: {0}")]
    Request(&'static str),
    /// Its buffers are not in its memory.
    #[error("use the guest's buffers")]
    Buffers(#[source] io::Error),
    /// No misuse: what serves the device has gone.
    #[error("serve the device")]
    Gone(#[source] io::Error),
}

/// Something that the device is to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// The guest has put something into that queue.
    Queue(usize),
    /// That one of [`Device::sources`] is ready.
    Source(usize),
}

/// A descriptor that wakes a device.
#[derive(Debug, Clone, Copy)]
pub struct Source<'d> {
    /// Watched for reading, and for writing too when `edge` is set.
    pub descriptor: BorrowedFd<'d>,
    /// Wakes once for everything new, not as long as there is something.
    pub edge: bool,
}

/// How a device makes itself heard.
pub trait Interrupt: Send + Sync {
    /// Buffers of a queue have been used.
    fn queue(&self, index: usize);
    /// The device's configuration has changed, or it needs a reset.
    fn configuration(&self);
}

/// A device. It is served by one thread at a time.
pub trait Device: Send {
    /// Its number (virtio 1.3, section 5).
    fn kind(&self) -> u32;
    /// The most places that each of its queues can have: powers of two.
    fn queues(&self) -> &'static [u16];
    /// The features of its kind that it offers.
    fn features(&self) -> u64;
    /// Its configuration, as the guest reads it; what lies beyond is zero.
    fn configuration(&self) -> &[u8];
    /// Another number each time that the configuration has changed.
    fn generation(&self) -> u32 {
        0
    }
    /// The guest's driver begins, with these features.
    fn begin(&mut self, features: u64) -> Result<(), Misuse>;
    /// The guest's driver has gone: nothing is left of what it asked for.
    fn reset(&mut self);
    /// All that has to survive its threads and descriptors.
    fn state(&self) -> DeviceState;
    /// Goes on from the state of a device that was made of the same parts. If its driver is ready this one has begun, with the same features.
    /// All its queues are looked at afterwards.
    fn restore(&mut self, state: DeviceState, memory: &Memory) -> Result<(), RestoreError>;
    /// What wakes it besides its queues; the same for as long as it lives.
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }
    /// Does a bounded part of what there is to do. True: there is more.
    fn serve(&mut self, wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse>;
}

/// The queues of a device that is served.
pub struct Queues<'q> {
    /// The guest's memory.
    pub memory: &'q Memory,
    pub(crate) all: &'q mut [Queue],
    pub(crate) interrupt: &'q dyn Interrupt,
    /// The driver has said that it is ready.
    pub(crate) running: bool,
}

impl<'q> Queues<'q> {
    /// Queues of a driver that is ready.
    pub fn new(memory: &'q Memory, queues: &'q mut [Queue], interrupt: &'q dyn Interrupt) -> Self {
        Self { memory, all: queues, interrupt, running: true }
    }

    /// A queue that the driver uses.
    pub fn get(&mut self, index: usize) -> Option<&mut Queue> {
        self.all.get_mut(index).filter(|queue| self.running && queue.ready())
    }

    /// Tells the guest of buffers that were used, if it wants to know.
    pub fn notify(&mut self, index: usize) -> Result<(), Misuse> {
        let memory = self.memory;
        if let Some(queue) = self.get(index)
            && queue.needs_notification(memory)?
        {
            self.interrupt.queue(index);
        }
        Ok(())
    }

    /// Takes requests one after the other, at most as many as the queue has places, and gives each back with the number of bytes
    /// that `serve` has written. True: there are more.
    pub fn take(
        &mut self,
        index: usize,
        mut serve: impl FnMut(Chain<'q>) -> Result<u32, Misuse>,
    ) -> Result<bool, Misuse> {
        let memory = self.memory;
        let Some(queue) = self.get(index) else { return Ok(false) };
        queue.disable_notification(memory)?;
        let mut taken = 0;
        while taken < queue.size() {
            let Some(chain) = queue.iter(memory)?.next() else { break };
            let head = chain.head_index();
            let written = serve(chain)?;
            queue.add_used(memory, head, written)?;
            taken += 1;
        }
        let more = taken == queue.size() || queue.enable_notification(memory)?;
        if taken > 0 {
            self.notify(index)?;
        }
        Ok(more)
    }
}

/// Whether devices may write to the region of the guest's memory that has this address.
pub(crate) fn is_writable(memory: &Memory, address: GuestAddress) -> bool {
    memory.find_region(address).is_some_and(|region| region.prot() & libc::PROT_WRITE != 0)
}

/// Buffers of one request: a queue has not more places.
const MOST_BUFFERS: usize = 1024;

/// A part of the guest's memory that a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    address: u64,
    length: u32,
    writable: bool,
}

/// A request's buffers, in their order: those that the device reads, then those that it writes (virtio 1.3, 2.7.4.2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffers {
    buffers: Vec<Buffer>,
    /// Bytes that the device can read, and bytes that it can write.
    pub lengths: [usize; 2],
}

impl Buffers {
    /// Takes them out of the queue, once. At most `most` bytes in either direction.
    pub fn new(chain: Chain<'_>, most: usize) -> Result<Self, Misuse> {
        let mut all = Self::default();
        for descriptor in chain {
            let writable = descriptor.is_write_only();
            if !writable && all.lengths[1] > 0 {
                return Err(Misuse::Request("a buffer to read comes after one to write"));
            }
            let length = &mut all.lengths[usize::from(writable)];
            *length = length.saturating_add(descriptor.len() as usize);
            if *length > most || all.buffers.len() == MOST_BUFFERS {
                return Err(Misuse::Request("it is larger than any"));
            }
            all.buffers.push(Buffer { address: descriptor.addr().0, length: descriptor.len(), writable });
        }
        Ok(all)
    }

    /// Copies what the guest has written, from the byte `from` on. Gives the number of bytes, which is less than there is room for at the
    /// end.
    pub fn read(&self, memory: &Memory, from: usize, bytes: &mut [u8]) -> Result<usize, Misuse> {
        self.each(memory, false, from, bytes.len(), |part, at| {
            part.copy_to(bytes.get_mut(at..).unwrap_or_default());
            Ok(())
        })
    }

    /// Copies into the guest's memory, from the byte `from` on, as much as there is room for. Gives the number of bytes.
    pub fn write(&self, memory: &Memory, from: usize, bytes: &[u8]) -> Result<usize, Misuse> {
        self.each(memory, true, from, bytes.len(), |part, at| {
            part.copy_from(bytes.get(at..).unwrap_or_default());
            Ok(())
        })
    }

    /// Copies all that the guest has written to a place in another memory.
    pub fn copy_out(&self, memory: &Memory, to: &Memory, at: GuestAddress) -> Result<(), Misuse> {
        self.each(memory, false, 0, self.lengths[0], |part, done| {
            let place = to.get_slice(at.unchecked_add(done as u64), part.len()).map_err(io::Error::other)?;
            part.copy_to_volatile_slice(place);
            Ok(())
        })?;
        Ok(())
    }

    /// Copies `length` bytes from a place in another memory to where the guest expects them.
    pub fn copy_in(
        &self,
        memory: &Memory,
        from: &Memory,
        at: GuestAddress,
        length: usize,
    ) -> Result<(), Misuse> {
        self.each(memory, true, 0, length, |part, done| {
            let place =
                from.get_slice(at.unchecked_add(done as u64), part.len()).map_err(io::Error::other)?;
            place.copy_to_volatile_slice(part);
            Ok(())
        })?;
        Ok(())
    }

    /// Calls `copy` with each part of the guest's memory that holds the bytes from `from` on, at most `length` of them, and with how many were
    /// before it. Gives their number.
    pub(crate) fn each(
        &self,
        memory: &Memory,
        writable: bool,
        from: usize,
        length: usize,
        mut copy: impl FnMut(VolatileSlice<'_>, usize) -> io::Result<()>,
    ) -> Result<usize, Misuse> {
        let (mut skip, mut done) = (from, 0);
        for buffer in self.buffers.iter().filter(|buffer| buffer.writable == writable) {
            let size = buffer.length as usize;
            if skip >= size {
                skip -= size;
                continue;
            }
            let count = (size - skip).min(length - done);
            let begin = buffer.address.checked_add(skip as u64).map(GuestAddress);
            let begin = begin.ok_or(Misuse::Request("a buffer has no end"))?;
            let before = done;
            for part in memory.get_slices(begin, count) {
                let part = part.map_err(io::Error::other).map_err(Misuse::Buffers)?;
                let length = part.len();
                let address = begin.unchecked_add((done - before) as u64);
                if writable && !is_writable(memory, address) {
                    return Err(Misuse::Request("a buffer to write is in memory that is only read"));
                }
                copy(part, done).map_err(Misuse::Buffers)?;
                done += length;
            }
            skip = 0;
        }
        Ok(done)
    }
}
