//! The guest's side, for tests: a driver that builds rings, and makes nonsense of them when it is told to.

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::device::{Device, Interrupt, Memory, Wake};
use crate::endpoint::Endpoint;

/// Counts interrupts.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    pub(crate) queues: AtomicU32,
    pub(crate) configuration: AtomicU32,
}

impl Interrupt for Counter {
    fn queue(&self, _index: usize) {
        self.queues.fetch_add(1, Ordering::SeqCst);
    }

    fn configuration(&self) {
        self.configuration.fetch_add(1, Ordering::SeqCst);
    }
}

/// One part of a request.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    Out(Vec<u8>),
    In(usize),
    /// Anything: address, length, flags.
    Raw(u64, u32, u16),
}

/// Places of each queue.
pub(crate) const PLACES: u16 = 16;
const QUEUE: u64 = 0x1000;
const BUFFERS: u64 = 0x10_0000;
/// Bytes of memory.
pub(crate) const MEMORY: usize = 16 << 20;

/// A driver with its device.
pub(crate) struct Driver {
    pub(crate) memory: Memory,
    pub(crate) endpoint: Endpoint,
    pub(crate) interrupt: Counter,
    available: Vec<u16>,
    used: Vec<u16>,
    free: u64,
    /// Where the writable parts of the requests are, by the head.
    parts: std::collections::BTreeMap<(usize, u16), Vec<(u64, usize)>>,
    next: Vec<u16>,
}

impl Driver {
    /// Has negotiated everything that is offered but events.
    pub(crate) fn new(device: Box<dyn Device>) -> Self {
        Self::with(device, u64::MAX)
    }

    /// Accepts those of the offered features that are in `mask`.
    pub(crate) fn with(device: Box<dyn Device>, mask: u64) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let queues = device.queues().len();
        let endpoint = Endpoint::new(device, memory.clone()).unwrap();
        let mut driver = Self {
            memory,
            endpoint,
            interrupt: Counter::default(),
            available: vec![0; queues],
            used: vec![0; queues],
            free: BUFFERS,
            parts: std::collections::BTreeMap::new(),
            next: vec![0; queues],
        };
        driver.begin(mask);
        driver
    }

    /// The same with another device, made of the same parts, that goes on from this one's state. All queues are looked at, as on a machine that goes on.
    pub(crate) fn moved(mut self, device: Box<dyn Device>) -> Self {
        let kept = serde_json::to_string(&self.endpoint.state()).unwrap();
        self.endpoint = Endpoint::new(device, self.memory.clone()).unwrap();
        self.endpoint.restore(serde_json::from_str(&kept).unwrap()).unwrap();
        (0..self.available.len()).for_each(|queue| while self.serve(Wake::Queue(queue)) {});
        self
    }

    fn begin(&mut self, mask: u64) {
        let Self { endpoint, interrupt, .. } = self;
        endpoint.set_status(1, interrupt);
        endpoint.set_status(3, interrupt);
        let features = endpoint.features() & mask & !(1 << 29) | 1 << 32;
        endpoint.accept(false, u32::try_from(features & 0xffff_ffff).unwrap());
        endpoint.accept(true, u32::try_from(features >> 32).unwrap());
        endpoint.set_status(11, interrupt);
        assert_eq!(endpoint.negotiated().status, 11);
        for index in 0..self.available.len() {
            let at = u32::try_from(Self::at(index)).unwrap();
            let queue = self.endpoint.queue(index).unwrap();
            queue.set_size(PLACES);
            queue.set_desc_table_address(Some(at), Some(0));
            queue.set_avail_ring_address(Some(at + 0x400), Some(0));
            queue.set_used_ring_address(Some(at + 0x800), Some(0));
            queue.set_ready(true);
        }
        assert!(self.endpoint.set_status(15, &self.interrupt));
    }

    fn at(queue: usize) -> u64 {
        QUEUE * (queue as u64 + 1)
    }

    /// Puts a request into a queue; gives its head.
    pub(crate) fn put(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let head = self.next[queue];
        let mut writable = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            let index = (head + u16::try_from(number).unwrap()) % PLACES;
            let more = if number + 1 < parts.len() { VRING_DESC_F_NEXT } else { 0 };
            let (address, length, flags) = match part {
                Part::Out(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(self.free)).unwrap();
                    (self.free, bytes.len(), more)
                }
                Part::In(length) => {
                    writable.push((self.free, *length));
                    (self.free, *length, more | VRING_DESC_F_WRITE)
                }
                Part::Raw(address, length, flags) => (*address, *length as usize, more | u32::from(*flags)),
            };
            if !matches!(part, Part::Raw(..)) {
                self.free += length.next_multiple_of(16) as u64;
            }
            let at = Self::at(queue) + 16 * u64::from(index);
            self.memory.write_obj(address, GuestAddress(at)).unwrap();
            self.memory.write_obj(u32::try_from(length).unwrap(), GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(u16::try_from(flags).unwrap(), GuestAddress(at + 12)).unwrap();
            self.memory.write_obj((index + 1) % PLACES, GuestAddress(at + 14)).unwrap();
        }
        self.next[queue] = (head + u16::try_from(parts.len()).unwrap()) % PLACES;
        let ring = Self::at(queue) + 0x400;
        let place = u64::from(self.available[queue] % PLACES);
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * place)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.announce(queue, self.available[queue]);
        self.parts.insert((queue, head), writable);
        head
    }

    /// Says that so many requests have been put into a queue.
    pub(crate) fn announce(&self, queue: usize, index: u16) {
        self.memory.write_obj(index, GuestAddress(Self::at(queue) + 0x402)).unwrap();
    }

    /// Has the device look.
    pub(crate) fn serve(&mut self, wake: Wake) -> bool {
        self.endpoint.serve(wake, &self.interrupt)
    }

    /// What the device has given back since: heads, lengths, and what is in the writable parts, in one piece.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32, Vec<u8>)> {
        let ring = Self::at(queue) + 0x800;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut found = Vec::new();
        while self.used[queue] != index {
            let place = ring + 4 + 8 * u64::from(self.used[queue] % PLACES);
            let head: u32 = self.memory.read_obj(GuestAddress(place)).unwrap();
            let head = u16::try_from(head).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(place + 4)).unwrap();
            let mut bytes = Vec::new();
            for (address, size) in &self.parts[&(queue, head)] {
                let mut part = vec![0; *size];
                self.memory.read_slice(&mut part, GuestAddress(*address)).unwrap();
                bytes.extend(part);
            }
            found.push((head, length, bytes));
            self.used[queue] = self.used[queue].wrapping_add(1);
        }
        found
    }

    /// The device has stopped, has said so, and does nothing more.
    pub(crate) fn is_broken(&mut self) -> bool {
        let negotiated = self.endpoint.negotiated();
        let told = self.interrupt.configuration.load(Ordering::SeqCst) == 1;
        negotiated.status & 0x40 != 0 && negotiated.misuses == 1 && told && !self.serve(Wake::Queue(0))
    }
}
