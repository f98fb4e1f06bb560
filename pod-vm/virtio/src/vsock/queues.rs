//! Packets out of the guest's transmit queue and into its receive queue.
//!
//! A buffer's header is copied once and only the copy is looked at; so is the payload, of which a connection takes what it wants.

use std::io::{self, Read, Write};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemory;

use super::muxer::Muxer;
use super::packet::{HEADER_LENGTH, Header, MAX_PAYLOAD};

/// Why a queue cannot be used: the guest has placed it, or filled it, in a way that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("use the guest's queue")]
pub struct QueueError(#[from] virtio_queue::Error);

/// Where payloads are copied through.
#[derive(Debug)]
pub struct Scratch(Vec<u8>);

impl Default for Scratch {
    fn default() -> Self {
        Self(vec![0; MAX_PAYLOAD])
    }
}

/// Takes packets from the guest's transmit queue, at most as many as it has places. Tells how many buffers are given back.
pub fn drain<Q: QueueOwnedT + QueueT, M: GuestMemory>(
    queue: &mut Q,
    memory: &M,
    muxer: &mut Muxer,
    scratch: &mut Scratch,
) -> Result<usize, QueueError> {
    let mut taken = 0;
    while taken < usize::from(queue.size()) && muxer.accepts() {
        let Some(chain) = queue.iter(memory)?.next() else { break };
        let head = chain.head_index();
        let packet = chain.reader(memory).map_err(io::Error::other).and_then(|mut reader| {
            let mut bytes = [0; HEADER_LENGTH];
            reader.read_exact(&mut bytes)?;
            let header = Header::decode(&bytes);
            let length = usize::try_from(header.length).unwrap_or(usize::MAX);
            let payload = scratch.0.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
            reader.read_exact(payload)?;
            Ok((header, &*payload))
        });
        match packet {
            Ok((header, payload)) => muxer.receive(&header, payload),
            Err(_) => muxer.drop_packet(),
        }
        queue.add_used(memory, head, 0)?;
        taken += 1;
    }
    Ok(taken)
}

/// What became of the guest's receive queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Buffers that are given back.
    pub buffers: usize,
    /// There are more packets and no buffer for them.
    pub starved: bool,
}

/// Puts packets into the guest's receive queue as long as there are packets and buffers, but at most as many as it has places.
pub fn fill<Q: QueueOwnedT + QueueT, M: GuestMemory>(
    queue: &mut Q,
    memory: &M,
    muxer: &mut Muxer,
    scratch: &mut Scratch,
) -> Result<Filled, QueueError> {
    let mut buffers = 0;
    while buffers < usize::from(queue.size()) && muxer.has_packet() {
        let Some(chain) = queue.iter(memory)?.next() else {
            return Ok(Filled { buffers, starved: true });
        };
        let head = chain.head_index();
        let mut used = 0;
        match chain.writer(memory) {
            Ok(mut writer) if writer.available_bytes() >= HEADER_LENGTH => {
                let room = (writer.available_bytes() - HEADER_LENGTH).min(MAX_PAYLOAD);
                let Some(header) = muxer.next_packet(&mut scratch.0[..room]) else {
                    queue.go_to_previous_position();
                    break;
                };
                // At most the room.
                let length = usize::try_from(header.length).unwrap_or(0).min(room);
                let written =
                    writer.write_all(&header.encode()).and_then(|()| writer.write_all(&scratch.0[..length]));
                if written.is_err() {
                    // The buffer is not in the guest's memory. What was in the packet is the guest's loss.
                    muxer.drop_packet();
                } else {
                    used = HEADER_LENGTH + length;
                }
            }
            // A buffer that nothing fits into.
            _ => muxer.drop_packet(),
        }
        queue.add_used(memory, head, u32::try_from(used).unwrap_or(0))?;
        buffers += 1;
    }
    Ok(Filled { buffers, starved: false })
}
