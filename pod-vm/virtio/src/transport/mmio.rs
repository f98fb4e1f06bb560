//! virtio-mmio: a page of registers (virtio 1.3, 4.2.2), one interrupt line.
//!
//! The line is the device's own and edge-triggered: a pulse that comes while the guest handles the one before is remembered by the interrupt
//! controller, so none is lost. Status and acknowledgement of interrupts do not wait for whoever serves the device.
//!
//! A place without a device has registers too: they say that there is none (device number 0), and drivers leave it alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::Attached;
use crate::device::Interrupt;
use crate::state::{EndpointState, RestoreError};

/// Bytes that the registers and the device's configuration take.
pub const LENGTH: u64 = 0x1000;
/// The register that a driver writes a queue's number to.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// The register that a driver says in how far it is.
pub const STATUS: u64 = 0x70;

const DEVICE: u64 = 0x08;
const CONFIGURATION: u64 = 0x100;
/// `virt`
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// `podv`
const VENDOR: u32 = 0x7664_6f70;

/// Bits of the interrupt status.
const USED_BUFFER: u32 = 1;
const CONFIGURATION_CHANGED: u32 = 2;

/// The interrupt line.
#[derive(Debug)]
pub struct Line {
    status: AtomicU32,
    trigger: EventFd,
}

impl Line {
    /// `trigger`: what raises the line.
    pub fn new(trigger: EventFd) -> Self {
        Self { status: AtomicU32::new(0), trigger }
    }

    /// Nothing has happened in the place that it belongs to: another device is there.
    pub fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // Fails only when it would overflow, and then it is raised.
        let _ = self.trigger.write(1);
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: usize) {
        self.raise(USED_BUFFER);
    }

    fn configuration(&self) {
        self.raise(CONFIGURATION_CHANGED);
    }
}

/// What the driver has selected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Selected {
    device_features: u32,
    driver_features: u32,
    queue: u32,
}

/// All that a guest's driver knows of a device, and the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The device and its queues.
    pub endpoint: EndpointState,
    /// What the driver has not acknowledged.
    pub interrupt: u32,
    /// The device is to go.
    pub leaving: bool,
    selected: Selected,
}

/// The registers of one device.
pub struct Registers {
    attached: Attached,
    line: Arc<Line>,
    selected: Selected,
    leaving: bool,
}

impl Registers {
    /// The registers of a device whose interrupt is `line`.
    pub fn new(attached: Attached, line: Arc<Line>) -> Self {
        Self { attached, line, selected: Selected::default(), leaving: false }
    }

    /// What the driver knows of the device, and the device's state.
    pub fn state(&self) -> State {
        State {
            endpoint: self.attached.with(|endpoint, _| endpoint.state()),
            interrupt: self.line.status.load(Ordering::SeqCst),
            leaving: self.leaving,
            selected: self.selected,
        }
    }

    /// Goes on where registers of a device of the same parts were when they had this state. Whoever serves it looks at all queues.
    pub fn restore(&mut self, state: State) -> Result<(), RestoreError> {
        let State { endpoint, interrupt, leaving, selected } = state;
        self.attached.with(|device, _| device.restore(endpoint))?;
        (self.leaving, self.selected) = (leaving, selected);
        self.line.status.store(0, Ordering::SeqCst);
        if interrupt != 0 {
            // Once too often is harmless: the driver looks at the status.
            self.line.raise(interrupt);
        }
        self.attached.kick_all();
        Ok(())
    }

    /// The device is to go: who has not found it yet finds none.
    pub fn leave(&mut self, leaving: bool) {
        self.leaving = leaving;
    }

    /// Whether no driver uses the device. `None`: it is being served just now.
    pub fn is_unused(&self) -> Option<bool> {
        let driver = VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_DRIVER_OK;
        self.attached.try_with(|endpoint, _| u32::from(endpoint.negotiated().status) & driver == 0)
    }

    /// The device behind them.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// The guest reads.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        if let Some(from) = offset.checked_sub(CONFIGURATION) {
            self.attached.with(|endpoint, _| {
                let configuration = endpoint.device().configuration();
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                for (to, byte) in bytes.iter_mut().zip(configuration.iter().skip(from)) {
                    *to = *byte;
                }
            });
            return;
        }
        // Registers are read as a whole (4.2.2.2).
        let Ok(bytes) = <&mut [u8; 4]>::try_from(bytes) else { return };
        *bytes = self.register(offset).to_le_bytes();
    }

    fn register(&self, offset: u64) -> u32 {
        let queue = usize::try_from(self.selected.queue).unwrap_or(usize::MAX);
        match offset {
            0x00 | 0x04 | 0x0c => identity(offset),
            DEVICE if self.leaving => 0,
            DEVICE => self.attached.with(|endpoint, _| endpoint.device().kind()),
            0x10 => {
                let features = self.attached.with(|endpoint, _| endpoint.features());
                match self.selected.device_features {
                    0 => half(features, false),
                    1 => half(features, true),
                    _ => 0,
                }
            }
            0x34 => self.attached.with(|endpoint, _| endpoint.queue_limit(queue)).into(),
            0x44 => self.attached.with(|endpoint, _| endpoint.queue_ready(queue)).into(),
            0x60 => self.line.status.load(Ordering::SeqCst),
            STATUS => self.attached.with(|endpoint, _| endpoint.negotiated().status).into(),
            // No shared memory: its length is all ones.
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.attached.with(|endpoint, _| endpoint.device().generation()),
            _ => 0,
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        // The devices' configuration is not written to.
        let Ok(bytes) = <[u8; 4]>::try_from(bytes) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.selected.device_features = value,
            0x20 => {
                let which = self.selected.driver_features;
                if which < 2 {
                    self.attached.with(|endpoint, _| endpoint.accept(which == 1, value));
                }
            }
            0x24 => self.selected.driver_features = value,
            0x30 => self.selected.queue = value,
            0x38 => {
                // One that is no possible size stays as it was.
                self.queue(|queue| queue.set_size(u16::try_from(value).unwrap_or(0)));
            }
            0x44 => self.queue(|queue| queue.set_ready(value == 1)),
            QUEUE_NOTIFY => self.attached.kick(usize::try_from(value).unwrap_or(usize::MAX)),
            0x64 => {
                self.line.status.fetch_and(!value, Ordering::SeqCst);
            }
            STATUS => {
                let status = u8::try_from(value).unwrap_or(u8::MAX);
                if self.attached.with(|endpoint, interrupt| endpoint.set_status(status, interrupt)) {
                    self.attached.kick_all();
                }
                if status == 0 {
                    self.selected = Selected::default();
                    self.line.status.store(0, Ordering::SeqCst);
                }
            }
            0x80 => self.queue(|queue| queue.set_desc_table_address(Some(value), None)),
            0x84 => self.queue(|queue| queue.set_desc_table_address(None, Some(value))),
            0x90 => self.queue(|queue| queue.set_avail_ring_address(Some(value), None)),
            0x94 => self.queue(|queue| queue.set_avail_ring_address(None, Some(value))),
            0xa0 => self.queue(|queue| queue.set_used_ring_address(Some(value), None)),
            0xa4 => self.queue(|queue| queue.set_used_ring_address(None, Some(value))),
            _ => {}
        }
    }

    fn queue(&self, set: impl FnOnce(&mut Queue)) {
        let index = usize::try_from(self.selected.queue).unwrap_or(usize::MAX);
        self.attached.with(|endpoint, _| endpoint.queue(index).map(set));
    }
}

/// What a place without a device answers.
pub fn read_empty(offset: u64, bytes: &mut [u8]) {
    bytes.fill(0);
    if let Ok(bytes) = <&mut [u8; 4]>::try_from(bytes) {
        *bytes = identity(offset).to_le_bytes();
    }
}

/// What all of them answer.
fn identity(offset: u64) -> u32 {
    match offset {
        0x00 => MAGIC,
        0x04 => VERSION,
        0x0c => VENDOR,
        _ => 0,
    }
}

fn half(features: u64, high: bool) -> u32 {
    // The rest was shifted away or is cut off on purpose.
    u32::try_from(if high { features >> 32 } else { features & u64::from(u32::MAX) }).unwrap_or(0)
}
