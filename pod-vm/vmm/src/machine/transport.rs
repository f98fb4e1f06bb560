//! How the guest finds virtio devices: a place on the bus and an interrupt for each.
//!
//! A trait, because there is more than one way; what speaks for which is measured (`pod-vm/README.md`).

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use podvisor_virtio::endpoint::Endpoint;
use podvisor_virtio::transport::Attached;
use podvisor_virtio::transport::mmio::{self, Line, Registers};
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use crate::boot::acpi;
use crate::layout::{DEVICE_INTERRUPTS, DEVICES};

/// A way.
pub(crate) trait Transport: Send + Sync {
    /// Gives a device a place, an interrupt, and a wake for each queue.
    fn attach(&mut self, vm: &VmFd, endpoint: Endpoint) -> Result<Attached, MachineError>;
    /// What the guest is to be told of the places: definitions for the DSDT.
    fn describe(&self) -> Vec<u8>;
    /// A processor reads; false: not here.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool;
    /// A processor writes; false: not here.
    fn write(&self, address: u64, bytes: &[u8]) -> bool;
}

/// virtio-mmio: a page of registers for each device, and an input of the I/O APIC of its own.
#[derive(Default)]
pub(crate) struct Mmio(Vec<Mutex<Registers>>);

impl Mmio {
    /// Devices that there can be.
    pub(crate) const PLACES: usize = (DEVICE_INTERRUPTS.end - DEVICE_INTERRUPTS.start) as usize;

    fn registers(&self, address: u64) -> Option<(&Mutex<Registers>, u64)> {
        let from = address.checked_sub(DEVICES)?;
        let registers = self.0.get(usize::try_from(from / mmio::LENGTH).ok()?)?;
        Some((registers, from % mmio::LENGTH))
    }
}

fn place(number: usize) -> u64 {
    DEVICES + mmio::LENGTH * number as u64
}

impl Transport for Mmio {
    fn attach(&mut self, vm: &VmFd, endpoint: Endpoint) -> Result<Attached, MachineError> {
        let number = self.0.len();
        let interrupt = DEVICE_INTERRUPTS.clone().nth(number).ok_or(MachineError::Places(Self::PLACES))?;
        let failed = |what| move |error: kvm_ioctls::Error| MachineError::Kvm(what, error.into());
        let trigger =
            EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(MachineError::Descriptors)?;
        vm.register_irqfd(&trigger, interrupt).map_err(failed("connect an interrupt"))?;
        let line = Arc::new(Line::new(trigger));
        let attached = Attached::new(endpoint, line.clone()).map_err(MachineError::Descriptors)?;
        let notify = IoEventAddress::Mmio(place(number) + mmio::QUEUE_NOTIFY);
        for (queue, kick) in attached.kicks().iter().enumerate() {
            // Devices have less than ten queues.
            let queue = u32::try_from(queue).unwrap_or(u32::MAX);
            vm.register_ioevent(kick, &notify, queue).map_err(failed("connect a queue"))?;
        }
        self.0.push(Mutex::new(Registers::new(attached.clone(), line)));
        Ok(attached)
    }

    fn describe(&self) -> Vec<u8> {
        let of = |(number, interrupt): (usize, u32)| {
            // Both are in the first four gigabytes.
            let address = u32::try_from(place(number)).unwrap_or(0);
            let length = u32::try_from(mmio::LENGTH).unwrap_or(0);
            acpi::virtio_mmio(u8::try_from(number).unwrap_or(0), address, length, interrupt)
        };
        (0..self.0.len()).zip(DEVICE_INTERRUPTS).flat_map(of).collect()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let Some((registers, offset)) = self.registers(address) else { return false };
        registers.lock().unwrap_or_else(PoisonError::into_inner).read(offset, bytes);
        true
    }

    fn write(&self, address: u64, bytes: &[u8]) -> bool {
        let Some((registers, offset)) = self.registers(address) else { return false };
        registers.lock().unwrap_or_else(PoisonError::into_inner).write(offset, bytes);
        true
    }
}
