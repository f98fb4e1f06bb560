//! The device.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::buffer::spare_capacity;
use rustix::io::{Errno, read};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_queue::{QueueOwnedT, QueueT};

use super::request::{BUFFERS, HEADER, Offloads, PACKET};
use crate::device::{Buffers, Device, Memory, Misuse, Queues, Source, Wake};
use crate::state::{DeviceState, RestoreError};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Packets that are taken from the tap before others have their turn.
const AT_ONCE: usize = 64;
/// Bytes of the configuration: address, status, pairs of queues, MTU.
const CONFIGURATION: usize = 12;

/// What an interface is, and what has become of its packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The hardware address.
    pub address: [u8; 6],
    /// Bytes; 0: not said.
    pub mtu: u16,
    /// The features that the guest's driver accepts.
    pub features: u64,
    /// Packets of the guest's that the tap did not take.
    pub lost: u64,
    /// A packet from the tap that the guest has no buffers for yet. Empty: there is none.
    pub waiting: Vec<u8>,
}

/// Tells the tap what the guest takes over from the host.
type Offload = Box<dyn Fn(BorrowedFd<'_>, Offloads) -> io::Result<()> + Send>;

/// The device.
pub struct Network {
    tap: File,
    offload: Offload,
    state: State,
    configuration: [u8; CONFIGURATION],
    /// A packet from the guest.
    outgoing: Vec<u8>,
}

impl Network {
    /// An interface at `tap`, which is nonblocking and has headers of [`HEADER`] bytes.
    pub fn new(
        tap: File,
        address: [u8; 6],
        mtu: u16,
        offload: impl Fn(BorrowedFd<'_>, Offloads) -> io::Result<()> + Send + 'static,
    ) -> Self {
        let mut configuration = [0; CONFIGURATION];
        configuration[..6].copy_from_slice(&address);
        configuration[10..].copy_from_slice(&mtu.to_le_bytes());
        Self {
            tap,
            offload: Box::new(offload),
            state: State { address, mtu, features: 0, lost: 0, waiting: Vec::new() },
            configuration,
            outgoing: Vec::new(),
        }
    }

    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        let Self { tap, state, outgoing: packet, .. } = self;
        queues.take(TRANSMIT, |chain| {
            let buffers = Buffers::new(chain, PACKET)?;
            let length = buffers.read(memory, 0, packet)?;
            if length < HEADER {
                return Err(Misuse::Request("a packet is shorter than its header"));
            }
            // A packet is taken as a whole or not at all, as on any wire.
            if tap.write(&packet[..length]).is_err() {
                state.lost += 1;
            }
            Ok(0)
        })
    }

    /// True: there is more.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        if queues.get(RECEIVE).is_none() {
            return Ok(false);
        }
        let mut given = false;
        let mut more = true;
        for _ in 0..AT_ONCE {
            if self.state.waiting.is_empty() {
                match read(&self.tap, spare_capacity(&mut self.state.waiting)) {
                    Ok(1..) => {}
                    Err(Errno::INTR) => continue,
                    // The next packet wakes; a tap that has gone gives none.
                    Ok(0) | Err(_) => {
                        more = false;
                        break;
                    }
                }
            }
            let Some(queue) = queues.get(RECEIVE) else { break };
            queue.disable_notification(memory)?;
            if self.deliver(queues)? {
                self.state.waiting.clear();
                given = true;
                continue;
            }
            // The guest's next buffers wake.
            more = false;
            break;
        }
        if given {
            queues.notify(RECEIVE)?;
        }
        Ok(more)
    }

    /// Puts the packet that waits into the guest's buffers; false: they are not enough.
    fn deliver(&mut self, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        let memory = queues.memory;
        let State { features, waiting, .. } = &mut self.state;
        let merge = *features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let Some(queue) = queues.get(RECEIVE) else { return Ok(false) };
        let length = waiting.len();
        // What has no header is no packet.
        let Some(number) = waiting.get_mut(BUFFERS..HEADER) else { return Ok(true) };
        let mut chains = Vec::new();
        let mut room = 0;
        while room < length && (merge || chains.is_empty()) {
            let Some(chain) = queue.iter(memory)?.next() else {
                // From here on the guest says when there are more: before those that were looked at are left where they are, or it would
                // speak of those. There may be more by now.
                if queue.enable_notification(memory)? {
                    continue;
                }
                // All or none.
                for _ in 0..chains.len() {
                    queue.go_to_previous_position();
                }
                return Ok(false);
            };
            let head = chain.head_index();
            let buffers = Buffers::new(chain, usize::MAX)?;
            if buffers.lengths[1] == 0 {
                return Err(Misuse::Request("there is no room for a packet"));
            }
            room += buffers.lengths[1];
            chains.push((head, buffers));
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        number.copy_from_slice(&count.to_le_bytes());
        let mut done = 0;
        for (head, buffers) in chains {
            let written = buffers.write(memory, 0, &waiting[done..])?;
            done += written;
            // A packet that does not fit the only buffer it may have is cut off, and then dropped by whoever checks it.
            queue.add_used(memory, head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(true)
    }
}

impl Device for Network {
    fn kind(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET
    }

    fn queues(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn features(&self) -> u64 {
        let all = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        let always = all.into_iter().fold(0, |features, bit| features | 1 << bit);
        if self.state.mtu == 0 { always } else { always | 1 << VIRTIO_NET_F_MTU }
    }

    fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    fn begin(&mut self, features: u64) -> Result<(), Misuse> {
        (self.offload)(self.tap.as_fd(), Offloads::from_features(features)).map_err(Misuse::Gone)?;
        self.state.features = features;
        self.state.waiting.reserve_exact(PACKET);
        self.outgoing.resize(PACKET, 0);
        Ok(())
    }

    fn reset(&mut self) {
        (self.state.waiting, self.outgoing) = (Vec::new(), Vec::new());
        self.state.features = 0;
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(self.state.clone())
    }

    fn restore(&mut self, state: DeviceState, _memory: &Memory) -> Result<(), RestoreError> {
        let DeviceState::Net(mut state) = state else {
            return Err(RestoreError::Differs("it is no network's"));
        };
        let of = |state: &State| (state.address, state.mtu, state.features);
        if of(&state) != of(&self.state) || state.waiting.len() > PACKET {
            return Err(RestoreError::Differs("it is of another network"));
        }
        state.waiting.reserve_exact(PACKET - state.waiting.len());
        self.state = state;
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { descriptor: self.tap.as_fd(), edge: true }]
    }

    fn serve(&mut self, wake: Wake, queues: &mut Queues<'_>) -> Result<bool, Misuse> {
        match wake {
            Wake::Queue(TRANSMIT) => self.transmit(queues),
            _ => self.receive(queues),
        }
    }
}
