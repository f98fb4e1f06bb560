//! What a device is apart from its threads and descriptors, as plain data: what a device that is made anew, of the same parts, needs so that the
//! guest's driver goes on with it and notices nothing. The guest's memory, in which the rings lie, goes with it.
//!
//! What a device has beyond its guest does not: clients of vsock (the guest is told that its connections are gone), and what a file server has
//! opened for the guest.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use crate::device::Misuse;
use crate::endpoint::Negotiated;
use crate::{balloon, block, fs, mem, net, pmem, vsock};

/// Why a device cannot go on from a state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is of another device, or of one that was made of other parts.
    #[error("take up a device's state: {0}")]
    Differs(&'static str),
    /// What the guest has left in its memory makes no sense, or the device's parts are gone.
    #[error(transparent)]
    Misuse(#[from] Misuse),
}

/// Of each kind of device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Memory that the guest does not use.
    Balloon(balloon::State),
    /// A disk.
    Block(block::State),
    /// Random bytes: there is none.
    Entropy,
    /// A share.
    Fs(fs::State),
    /// Memory that comes and goes.
    Mem(mem::State),
    /// A network interface.
    Net(net::State),
    /// An image.
    Pmem(pmem::State),
    /// The guest's ports.
    Vsock(vsock::State),
}

/// A queue (`virtio_queue::QueueState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Places that it can have, and has.
    limit: u16,
    size: u16,
    ready: bool,
    /// `VIRTIO_RING_F_EVENT_IDX`
    events: bool,
    /// Where its parts are.
    descriptors: u64,
    available: u64,
    used: u64,
    /// How far the parts have been used.
    next_available: u16,
    next_used: u16,
}

impl From<&Queue> for Ring {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            limit: state.max_size,
            size: state.size,
            ready: state.ready,
            events: state.event_idx_enabled,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        }
    }
}

impl TryFrom<Ring> for Queue {
    type Error = virtio_queue::Error;

    fn try_from(ring: Ring) -> Result<Self, Self::Error> {
        Self::try_from(QueueState {
            max_size: ring.limit,
            size: ring.size,
            ready: ring.ready,
            event_idx_enabled: ring.events,
            desc_table: ring.descriptors,
            avail_ring: ring.available,
            used_ring: ring.used,
            next_avail: ring.next_available,
            next_used: ring.next_used,
        })
    }
}

/// A device with what was negotiated with the guest's driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointState {
    /// What was negotiated.
    pub negotiated: Negotiated,
    /// Its queues.
    pub rings: Vec<Ring>,
    /// What it is itself.
    pub device: DeviceState,
}
