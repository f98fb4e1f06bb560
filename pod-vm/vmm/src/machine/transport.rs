//! How the guest finds virtio devices: places on the bus, each with an interrupt and with wakes for queues. Devices come to places and leave them.
//!
//! A trait, because there is more than one way; what speaks for which is measured (`pod-vm/README.md`).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use podvisor_virtio::device::Interrupt;
use podvisor_virtio::endpoint::Endpoint;
use podvisor_virtio::transport::mmio::{self, Line, Registers};
use podvisor_virtio::transport::{Attached, kicks};
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use crate::boot::acpi;
use crate::layout::{DEVICE_INTERRUPTS, DEVICES};

/// A way.
pub(crate) trait Transport: Send + Sync {
    /// Puts a device into a place that is free; gives the place's number. `None`: none is.
    fn attach(&self, endpoint: Endpoint) -> Option<(usize, Attached)>;
    /// The device in a place is to go, or after all not: drivers that have not found it yet find none.
    fn leave(&self, place: usize, leaving: bool);
    /// Whether no driver uses the device in a place. `None`: that is not known just now.
    fn is_unused(&self, place: usize) -> Option<bool>;
    /// Takes the device out of a place.
    fn detach(&self, place: usize);
    /// What the guest is to be told of the places: definitions for the DSDT.
    fn describe(&self) -> Vec<u8>;
    /// A processor reads; false: not here.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool;
    /// A processor writes; false: not here.
    fn write(&self, address: u64, bytes: &[u8]) -> bool;
}

/// Queues of a device: what each place has wakes for.
const QUEUES: usize = 3;

/// A place. What KVM has to do with it is arranged before the machine runs, so that nothing has to be asked of KVM later.
struct Place {
    line: Arc<Line>,
    kicks: Arc<[EventFd]>,
    /// `None`: there is no device.
    registers: Mutex<Option<Registers>>,
}

/// virtio-mmio: a page of registers for each device, and an input of the I/O APIC of its own.
pub(crate) struct Mmio {
    places: Vec<Place>,
    /// Where the search for a free place begins: one that a device has just left is the last to get another.
    next: AtomicUsize,
    /// Told when a driver says how far it is.
    news: EventFd,
}

impl Mmio {
    /// Devices that there can be.
    pub(crate) const PLACES: usize = (DEVICE_INTERRUPTS.end - DEVICE_INTERRUPTS.start) as usize;

    /// Has `count` places, at most [`Self::PLACES`].
    pub(crate) fn new(vm: &VmFd, count: usize, news: EventFd) -> Result<Self, MachineError> {
        if count > Self::PLACES {
            return Err(MachineError::Places(Self::PLACES));
        }
        let failed = |what| move |error: kvm_ioctls::Error| MachineError::Kvm(what, error.into());
        let mut places = Vec::new();
        for (number, interrupt) in DEVICE_INTERRUPTS.enumerate().take(count) {
            let trigger =
                EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(MachineError::Descriptors)?;
            vm.register_irqfd(&trigger, interrupt).map_err(failed("connect an interrupt"))?;
            let kicks = kicks(QUEUES).map_err(MachineError::Descriptors)?;
            let notify = IoEventAddress::Mmio(address(number) + mmio::QUEUE_NOTIFY);
            for (queue, kick) in (0u32..).zip(kicks.iter()) {
                vm.register_ioevent(kick, &notify, queue).map_err(failed("connect a queue"))?;
            }
            places.push(Place { line: Arc::new(Line::new(trigger)), kicks, registers: Mutex::new(None) });
        }
        Ok(Self { places, next: AtomicUsize::new(0), news })
    }

    fn find(&self, address: u64) -> Option<(&Place, u64)> {
        let from = address.checked_sub(DEVICES)?;
        let place = self.places.get(usize::try_from(from / mmio::LENGTH).ok()?)?;
        Some((place, from % mmio::LENGTH))
    }

    fn registers<R>(&self, place: usize, look: impl FnOnce(&mut Option<Registers>) -> R) -> Option<R> {
        self.places.get(place).map(|place| place.with(look))
    }
}

impl Place {
    fn with<R>(&self, look: impl FnOnce(&mut Option<Registers>) -> R) -> R {
        look(&mut self.registers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn address(number: usize) -> u64 {
    DEVICES + mmio::LENGTH * number as u64
}

impl Transport for Mmio {
    fn attach(&self, endpoint: Endpoint) -> Option<(usize, Attached)> {
        let begin = self.next.load(Ordering::SeqCst);
        let count = self.places.len();
        // Only one thread gives and takes places.
        let numbers = (begin..begin + count).map(|number| number % count);
        let free = numbers.into_iter().find(|number| self.places[*number].with(|it| it.is_none()))?;
        let place = &self.places[free];
        place.line.clear();
        let interrupt: Arc<dyn Interrupt> = place.line.clone();
        let attached = Attached::with_kicks(endpoint, interrupt, Arc::clone(&place.kicks));
        place.with(|registers| *registers = Some(Registers::new(attached.clone(), Arc::clone(&place.line))));
        self.next.store(free + 1, Ordering::SeqCst);
        Some((free, attached))
    }

    fn leave(&self, place: usize, leaving: bool) {
        self.registers(place, |registers| registers.as_mut().map(|registers| registers.leave(leaving)));
    }

    fn is_unused(&self, place: usize) -> Option<bool> {
        self.registers(place, |registers| registers.as_ref().map_or(Some(true), Registers::is_unused))?
    }

    fn detach(&self, place: usize) {
        // Dropped when nobody can reach it any more.
        drop(self.registers(place, Option::take));
    }

    fn describe(&self) -> Vec<u8> {
        let of = |(number, interrupt): (usize, u32)| {
            // Both are in the first four gigabytes.
            let address = u32::try_from(address(number)).unwrap_or(0);
            let length = u32::try_from(mmio::LENGTH).unwrap_or(0);
            acpi::virtio_mmio(u8::try_from(number).unwrap_or(0), address, length, interrupt)
        };
        (0..self.places.len()).zip(DEVICE_INTERRUPTS).flat_map(of).collect()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let Some((place, offset)) = self.find(address) else { return false };
        place.with(|registers| match registers {
            Some(registers) => registers.read(offset, bytes),
            None => mmio::read_empty(offset, bytes),
        });
        true
    }

    fn write(&self, address: u64, bytes: &[u8]) -> bool {
        let Some((place, offset)) = self.find(address) else { return false };
        place.with(|registers| {
            if let Some(registers) = registers {
                registers.write(offset, bytes);
            }
        });
        if offset == mmio::STATUS {
            // Fails only when it would overflow, and then it is set.
            let _ = self.news.write(1);
        }
        true
    }
}
