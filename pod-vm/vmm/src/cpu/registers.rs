//! The state that a processor begins with: the first as PVH has it (xen/docs/misc/pvh.pandoc), 32 bits, protected, without paging. The others wait
//! for the first one to start them.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use podvisor_virtio::device::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{SEGMENTS, START_INFO};
use crate::machine::MachineError;

const PROTECTED: u64 = 1;
/// `MSR_IA32_MISC_ENABLE`: string instructions are fast.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// `MSR_MTRRdefType`: on, memory is cached by writing back.
const CACHING: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Gives a processor its state; `entry` is the first one's.
pub(crate) fn set_up(vcpu: &VcpuFd, memory: &Memory, entry: Option<u32>) -> Result<(), MachineError> {
    let failed = |what| move |error: kvm_ioctls::Error| MachineError::Kvm(what, error.into());
    let entries = [MISC_ENABLE, CACHING].map(|(index, data)| kvm_msr_entry { index, data, reserved: 0 });
    let registers = Msrs::from_entries(&entries).map_err(|_| {
        MachineError::Kvm("list model specific registers", std::io::ErrorKind::OutOfMemory.into())
    })?;
    vcpu.set_msrs(&registers).map_err(failed("set model specific registers"))?;
    let Some(entry) = entry else { return Ok(()) };

    let code = segment(0x08, 0xb, true);
    let data = segment(0x10, 0x3, true);
    let task = kvm_segment { limit: 0x67, g: 0, db: 0, ..segment(0x18, 0xb, false) };
    for (index, bytes) in [0, descriptor(&code), descriptor(&data), descriptor(&task)].into_iter().enumerate()
    {
        memory.write_obj(bytes, GuestAddress(SEGMENTS + 8 * index as u64))?;
    }
    let mut special = vcpu.get_sregs().map_err(failed("get special registers"))?;
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = task;
    (special.gdt.base, special.gdt.limit) = (SEGMENTS, 31);
    (special.idt.base, special.idt.limit) = (0, 0);
    (special.cr0, special.cr3, special.cr4, special.efer) = (PROTECTED, 0, 0, 0);
    vcpu.set_sregs(&special).map_err(failed("set special registers"))?;
    vcpu.set_regs(&kvm_regs { rflags: 2, rip: entry.into(), rbx: START_INFO, ..kvm_regs::default() })
        .map_err(failed("set registers"))
}

/// A flat segment.
fn segment(selector: u16, kind: u8, is_code_or_data: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: u8::from(is_code_or_data),
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// A segment as the processor reads it from memory.
fn descriptor(segment: &kvm_segment) -> u64 {
    // In units of pages where the granularity says so.
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let bit = |bit: u8, at: u32| u64::from(bit) << at;
    limit & 0xffff
        | (limit >> 16 & 0xf) << 48
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.present, 47)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_as_the_processor_has_them() {
        assert_eq!(descriptor(&segment(8, 0xb, true)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(16, 3, true)), 0x00cf_9300_0000_ffff);
    }
}
