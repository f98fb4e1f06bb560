//! A driver that does what the bytes say: requests of any form, rings with anything in them, wakes in any order.

use podvisor_virtio::device::{Device, Interrupt, Memory, Wake};
use podvisor_virtio::endpoint::Endpoint;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

/// Nobody hears it.
pub(crate) struct Silent;

impl Interrupt for Silent {
    fn queue(&self, _index: usize) {}

    fn configuration(&self) {}
}

/// Places of each queue.
const PLACES: u16 = 16;
/// Bytes that a queue takes, and where its rings are in them.
const QUEUE: u32 = 0x1000;
const AVAILABLE: u32 = 0x400;
const USED: u32 = 0x800;
/// Where the parts of requests are put, one after the other, and over again.
const BUFFERS: u64 = 0x1_0000;
const END: u64 = 0x4_0000;
/// Wakes of one kind are repeated as long as the device says that there is more, at most so often.
const ROUNDS: usize = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub(crate) struct Guest {
    memory: Memory,
    endpoint: Endpoint,
    features: u64,
    available: Vec<u16>,
    /// How many things besides queues wake the device.
    sources: usize,
    next: u16,
    free: u64,
}

/// Where a queue is.
fn place(index: usize) -> u32 {
    // Devices have less than ten queues.
    QUEUE * u32::try_from(index).unwrap_or(0)
}

impl Guest {
    /// A guest with memory from 0 on, and where `further` says.
    pub(crate) fn new(device: Box<dyn Device>, input: &mut Input<'_>, further: &[(u64, usize)]) -> Self {
        let first = (GuestAddress(0), usize::try_from(END).unwrap_or(0));
        let further = further.iter().map(|(begin, length)| (GuestAddress(*begin), *length));
        let ranges: Vec<_> = std::iter::once(first).chain(further).collect();
        let memory = Memory::from_ranges(&ranges).expect("memory");
        let (queues, sources) = (device.queues().len(), device.sources().len());
        let endpoint = Endpoint::new(device, memory.clone()).expect("queues");
        let features = input.long() | 1 << 32;
        let mut guest =
            Self { memory, endpoint, features, available: vec![0; queues], sources, next: 0, free: BUFFERS };
        guest.begin();
        guest
    }

    fn begin(&mut self) {
        for status in [0, 1, 3] {
            self.endpoint.set_status(status, &Silent);
        }
        let features = self.features & self.endpoint.features();
        for (high, shift) in [(false, 0), (true, 32)] {
            let half = features >> shift & u64::from(u32::MAX);
            self.endpoint.accept(high, u32::try_from(half).unwrap_or(0));
        }
        self.endpoint.set_status(11, &Silent);
        for index in 0..self.available.len() {
            let at = place(index);
            let Some(queue) = self.endpoint.queue(index) else { continue };
            queue.set_size(PLACES);
            queue.set_desc_table_address(Some(at), Some(0));
            queue.set_avail_ring_address(Some(at + AVAILABLE), Some(0));
            queue.set_used_ring_address(Some(at + USED), Some(0));
            queue.set_ready(true);
            self.available[index] = 0;
            self.write(at + AVAILABLE, &[0; 4]);
            self.write(at + USED, &[0; 4]);
        }
        self.endpoint.set_status(15, &Silent);
    }

    fn write(&self, at: u32, bytes: &[u8]) {
        // What does not fit is not written.
        let _ = self.memory.write_slice(bytes, GuestAddress(at.into()));
    }

    /// Does all that the bytes say; `other` is what the device's other side does.
    pub(crate) fn act(&mut self, input: &mut Input<'_>, mut other: impl FnMut(&mut Input<'_>)) {
        while !input.is_empty() {
            match input.byte() % 8 {
                0 | 1 => self.request(input),
                2 => {
                    let at = u32::from(input.short() % 0x4000);
                    let count = input.below(32);
                    let bytes = input.bytes(count);
                    self.write(at, bytes);
                }
                3 => {
                    let queue = input.below(self.available.len());
                    self.serve(Wake::Queue(queue));
                }
                4 if self.sources > 0 => {
                    let source = input.below(self.sources);
                    self.serve(Wake::Source(source));
                }
                4 => {}
                5 => self.begin(),
                6 => {
                    let queue = input.below(self.available.len());
                    let index = input.short();
                    self.announce(queue, index);
                }
                _ => other(input),
            }
        }
    }

    fn serve(&mut self, wake: Wake) {
        for _ in 0..ROUNDS {
            if !self.endpoint.serve(wake, &Silent) {
                return;
            }
        }
    }

    /// Puts a request into a queue, and has it looked at.
    fn request(&mut self, input: &mut Input<'_>) {
        let queue = input.below(self.available.len());
        let parts = u16::from(input.byte() % 5 + 1);
        let head = self.next;
        for part in 0..parts {
            let kind = input.byte();
            let length = u32::from(input.short());
            let mut address = self.free;
            if kind & 4 != 0 {
                address = input.long();
            } else {
                let bytes = input.bytes(usize::from(kind >> 3) * 2);
                let _ = self.memory.write_slice(bytes, GuestAddress(address));
                self.free += u64::from(length).next_multiple_of(16);
                if self.free >= END - u64::from(u16::MAX) {
                    self.free = BUFFERS;
                }
            }
            let index = (head + part) % PLACES;
            let more = if part + 1 < parts { NEXT } else { 0 };
            // Readable, writable, or a table of further descriptors (4).
            let flags = more | if kind & 1 != 0 { WRITE } else { 0 } | if kind & 2 != 0 { 4 } else { 0 };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(((index + 1) % PLACES).to_le_bytes());
            self.write(place(queue) + 16 * u32::from(index), &descriptor);
        }
        self.next = (head + parts) % PLACES;
        let index = self.available[queue];
        self.write(place(queue) + AVAILABLE + 4 + 2 * u32::from(index % PLACES), &head.to_le_bytes());
        self.announce(queue, index.wrapping_add(1));
        self.serve(Wake::Queue(queue));
    }

    fn announce(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        self.write(place(queue) + AVAILABLE + 2, &index.to_le_bytes());
    }
}
