//! A device with what every transport has to keep of it: what was negotiated, and the queues.

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::device::{Device, Interrupt, Memory, Misuse, Queues, Wake, is_writable};
use crate::state::{EndpointState, RestoreError, Ring};

/// Features that every device has.
const COMMON: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// All that was negotiated with the guest's driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// The device's status (virtio 1.3, 2.1).
    pub status: u8,
    /// The features that the driver accepts.
    pub features: u64,
    /// How often the guest has made nonsense, since it began.
    pub misuses: u64,
}

/// A device and its queues.
pub struct Endpoint {
    device: Box<dyn Device>,
    negotiated: Negotiated,
    queues: Vec<Queue>,
    memory: Memory,
}

impl Endpoint {
    /// A device that no driver has found yet. Fails when the device's queues have impossible sizes.
    pub fn new(device: Box<dyn Device>, memory: Memory) -> Result<Self, Misuse> {
        let queues = device.queues().iter().map(|size| Queue::new(*size)).collect::<Result<_, _>>()?;
        Ok(Self { device, negotiated: Negotiated::default(), queues, memory })
    }

    /// The device.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The guest has more memory, or less. What a driver has put into queues lies in both.
    pub fn set_memory(&mut self, memory: Memory) {
        self.memory = memory;
    }

    /// What was negotiated.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// All that the driver has negotiated, and all that the device is.
    pub fn state(&self) -> EndpointState {
        let rings = self.queues.iter().map(Ring::from).collect();
        EndpointState { negotiated: self.negotiated, rings, device: self.device.state() }
    }

    /// Goes on where a device of the same parts was when it had this state: the driver's queues lie in the memory that this one has. Whoever
    /// serves it then looks at all its queues.
    pub fn restore(&mut self, state: EndpointState) -> Result<(), RestoreError> {
        let EndpointState { negotiated, rings, device } = state;
        let queues = rings.into_iter().map(Queue::try_from).collect::<Result<Vec<_>, _>>();
        let queues = queues.map_err(Misuse::from)?;
        if !queues.iter().map(Queue::max_size).eq(self.device.queues().iter().copied()) {
            return Err(RestoreError::Differs("it has other queues"));
        }
        (self.negotiated, self.queues) = (negotiated, queues);
        if negotiated.status & status(VIRTIO_CONFIG_S_DRIVER_OK) != 0 {
            self.begin()?;
        }
        self.device.restore(device, &self.memory)
    }

    /// The features that are offered.
    pub fn features(&self) -> u64 {
        self.device.features() | COMMON
    }

    /// The driver accepts features: 32 of them, the higher or the lower ones. It is heard only before it has said that this is done.
    pub fn accept(&mut self, high: bool, features: u32) {
        if self.negotiated.status & status(VIRTIO_CONFIG_S_FEATURES_OK) != 0 {
            return;
        }
        let shift = if high { 32 } else { 0 };
        let mask = u64::from(u32::MAX) << shift;
        self.negotiated.features = self.negotiated.features & !mask | u64::from(features) << shift;
    }

    /// A queue that the driver may set up now: before it is ready, and before the queue is.
    pub fn queue(&mut self, index: usize) -> Option<&mut Queue> {
        let running = self.negotiated.status & status(VIRTIO_CONFIG_S_DRIVER_OK) != 0;
        self.queues.get_mut(index).filter(|_| !running)
    }

    /// How many places the device's queue can have; 0: there is no such queue.
    pub fn queue_limit(&self, index: usize) -> u16 {
        self.queues.get(index).map_or(0, Queue::max_size)
    }

    /// Whether the driver uses that queue.
    pub fn queue_ready(&self, index: usize) -> bool {
        self.queues.get(index).is_some_and(Queue::ready)
    }

    /// The driver writes the status. True: it has begun, and all queues are to be looked at.
    pub fn set_status(&mut self, value: u8, interrupt: &dyn Interrupt) -> bool {
        let before = self.negotiated.status;
        if value == 0 {
            self.reset();
            return false;
        }
        // Bits are only ever added, and the device's own one is not the driver's.
        let value = value & !status(VIRTIO_CONFIG_S_NEEDS_RESET) | before;
        let added = value & !before;
        self.negotiated.status = value;
        if added & status(VIRTIO_CONFIG_S_FEATURES_OK) != 0 && !self.features_fit() {
            self.negotiated.status &= !status(VIRTIO_CONFIG_S_FEATURES_OK);
        }
        let ready = [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ];
        let ready = ready.into_iter().map(status).fold(0, |all, bit| all | bit);
        if added & status(VIRTIO_CONFIG_S_DRIVER_OK) == 0
            || self.negotiated.status & status(VIRTIO_CONFIG_S_FAILED) != 0
        {
            return false;
        }
        let begun = if self.negotiated.status & ready == ready {
            self.begin()
        } else {
            Err(Misuse::Request("the driver is ready before it has done what it has to"))
        };
        match begun {
            Ok(()) => true,
            Err(misuse) => {
                self.broken(&misuse, interrupt);
                false
            }
        }
    }

    fn features_fit(&self) -> bool {
        let features = self.negotiated.features;
        features & !self.features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn begin(&mut self) -> Result<(), Misuse> {
        let events = self.negotiated.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in self.queues.iter_mut().filter(|queue| queue.ready()) {
            // No region that may be written to ends where one begins that may not.
            let used = GuestAddress(queue.used_ring());
            if !queue.is_valid(&self.memory) || !is_writable(&self.memory, used) {
                return Err(Misuse::Request("a queue does not lie in the guest's memory"));
            }
            queue.set_event_idx(events);
        }
        self.device.begin(self.negotiated.features)
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.negotiated = Negotiated { misuses: self.negotiated.misuses, ..Negotiated::default() };
    }

    /// Lets the device look at something. True: it has not finished.
    pub fn serve(&mut self, wake: Wake, interrupt: &dyn Interrupt) -> bool {
        let wanted = status(VIRTIO_CONFIG_S_DRIVER_OK);
        let stopped = status(VIRTIO_CONFIG_S_NEEDS_RESET) | status(VIRTIO_CONFIG_S_FAILED);
        let running = self.negotiated.status & (wanted | stopped) == wanted;
        let mut queues = Queues { memory: &self.memory, all: &mut self.queues, interrupt, running };
        match self.device.serve(wake, &mut queues) {
            Ok(more) => more && running,
            Err(misuse) => {
                self.broken(&misuse, interrupt);
                false
            }
        }
    }

    /// The device does nothing more until the driver begins anew.
    fn broken(&mut self, misuse: &Misuse, interrupt: &dyn Interrupt) {
        self.negotiated.misuses += 1;
        self.negotiated.status |= status(VIRTIO_CONFIG_S_NEEDS_RESET);
        // A guest can do this as often as it likes: the first time is told.
        if self.negotiated.misuses == 1 {
            log::warn!("device {}: {}", self.device.kind(), chain(misuse));
        }
        interrupt.configuration();
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(chain);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// A bit of the status as the byte that it is in.
fn status(bit: u32) -> u8 {
    // All of them are below 256.
    u8::try_from(bit).unwrap_or(0)
}
