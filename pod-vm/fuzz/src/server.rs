//! A file server that keeps the rules until it is connected, and does what the bytes say from then on.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use podvisor_virtio::device::Memory;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

use crate::input::Input;

/// Numbers of vhost-user's messages (QEMU, docs/interop/vhost-user.rst).
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_VRING_ENABLE: u32 = 18;
/// VERSION_1 and PROTOCOL_FEATURES; then MQ and REPLY_ACK.
const FEATURES: u64 = 1 << 32 | 1 << 30;
const PROTOCOL: u64 = 1 | 1 << 3;
/// Where a queue's ring of answers is, and where everything in the memory that it shares with the device ends.
const QUEUE: u64 = 16 << 10;
const USED: u64 = 8192;
const QUEUES: u32 = 2 * (16 << 10);

pub(crate) struct Server {
    memory: Memory,
    calls: Vec<OwnedFd>,
    _connection: UnixStream,
}

/// Answers until all is set up. `None`: the device says what it never does.
pub(crate) fn set_up(mut socket: UnixStream) -> Option<Server> {
    let (mut memory, mut calls) = (None, Vec::new());
    loop {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&socket, &mut [IoSliceMut::new(&mut header)], &mut ancillary, RecvFlags::WAITALL).ok()?;
        let received = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<OwnedFd>>(),
            _ => Vec::new(),
        });
        let mut descriptors: Vec<OwnedFd> = received.collect();
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags) = (word(0), word(4));
        let mut payload = vec![0; usize::try_from(word(8)).ok()?];
        socket.read_exact(&mut payload).ok()?;
        let reply = match request {
            GET_FEATURES => Some(FEATURES),
            GET_PROTOCOL_FEATURES => Some(PROTOCOL),
            _ => (flags & 8 != 0).then_some(0),
        };
        match request {
            SET_MEM_TABLE => {
                let length = u64::from_le_bytes(payload.get(16..24)?.try_into().ok()?);
                let file = FileOffset::new(descriptors.pop()?.into(), 0);
                let region = MmapRegion::from_file(file, usize::try_from(length).ok()?).ok()?;
                let region = GuestRegionMmap::new(region, GuestAddress(0))?;
                memory = Some(Memory::from_regions(vec![region]).ok()?);
            }
            SET_VRING_CALL => calls.append(&mut descriptors),
            _ => {}
        }
        if let Some(reply) = reply {
            let bytes =
                [&header[..4], &5u32.to_le_bytes(), &8u32.to_le_bytes(), &reply.to_le_bytes()].concat();
            socket.write_all(&bytes).ok()?;
        }
        if request == SET_VRING_ENABLE && payload.first() == Some(&1) {
            return Some(Server { memory: memory?, calls, _connection: socket });
        }
    }
}

impl Server {
    /// Answers a request, asked or not; or writes anything to where the queues are.
    pub(crate) fn act(&self, input: &mut Input<'_>) {
        let queue = input.below(self.calls.len());
        if input.byte() & 1 == 0 {
            let at = GuestAddress(QUEUE * queue as u64 + USED + 2);
            let index: u16 = self.memory.read_obj(at).unwrap_or(0);
            let place = at.0 + 2 + 8 * u64::from(index % 128);
            let _ = self.memory.write_obj(u32::from(input.byte()), GuestAddress(place));
            let _ = self.memory.write_obj(input.word(), GuestAddress(place + 4));
            let _ = self.memory.write_obj(index.wrapping_add(1), at);
        } else {
            let at = u64::from(input.word() % QUEUES);
            let count = input.below(16);
            let _ = self.memory.write_slice(input.bytes(count), GuestAddress(at));
        }
        if let Some(call) = self.calls.get(queue) {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}
