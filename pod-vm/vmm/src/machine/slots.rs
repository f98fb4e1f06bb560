//! KVM's memory slots: which parts of this process's memory are the guest's, and where.

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::MachineError;
use crate::sys;

/// A slot that is in use.
#[derive(Debug)]
pub(crate) struct Slot(u32);

/// All of a machine's.
pub(crate) struct Slots {
    vm: VmFd,
    /// No number from here on has been used.
    next: u32,
    free: Vec<u32>,
}

impl Slots {
    pub(crate) fn new(vm: VmFd) -> Self {
        Self { vm, next: 0, free: Vec::new() }
    }

    /// Makes a region the guest's. It has to stay mapped until [`Self::remove`], or for as long as the machine lives: devices hold it.
    ///
    /// One that is mapped for reading alone the guest can only read.
    pub(crate) fn add(&mut self, region: &GuestRegionMmap) -> Result<Slot, kvm_ioctls::Error> {
        let number = self.free.last().copied().unwrap_or(self.next);
        let flags = if region.prot() & libc::PROT_WRITE == 0 { KVM_MEM_READONLY } else { 0 };
        let described = kvm_userspace_memory_region {
            slot: number,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        sys::add_memory(&self.vm, described)?;
        if self.free.pop().is_none() {
            self.next += 1;
        }
        Ok(Slot(number))
    }

    /// The guest has it no longer.
    pub(crate) fn remove(&mut self, slot: Slot) -> Result<(), MachineError> {
        let nothing = kvm_userspace_memory_region { slot: slot.0, ..Default::default() };
        sys::add_memory(&self.vm, nothing)
            .map_err(|error| MachineError::Kvm("take memory from the guest", error.into()))?;
        self.free.push(slot.0);
        Ok(())
    }
}
