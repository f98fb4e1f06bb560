//! What CPUID answers: what the host's processor and KVM have, and each virtual processor's place among the others.
//!
//! Linux wants two or three descriptions of the same places, by maker of the processor. Here every processor is a core of one package.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`
const HAS_INDEX: u32 = 1;
/// Leaf 1, `ecx`: the local APIC's timer can wait for a moment of the time stamp counter, which KVM does for every guest.
const TSC_DEADLINE: u32 = 1 << 24;
/// The same: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, `edx`: there are several processors in the package.
const SEVERAL: u32 = 1 << 28;

/// Where the physical addresses end that processors can use (leaf 0x80000008, `eax`; 36 bits where it is not there).
pub(crate) fn address_end(supported: &CpuId) -> u64 {
    let sizes = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    1 << sizes.map_or(36, |entry| entry.eax & 0xff).clamp(32, 52)
}

/// The answers for processor `number` of `count`, from those that KVM supports.
pub(crate) fn identity(supported: &CpuId, number: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let (number, count) = (u32::from(number), u32::from(count));
    // Bits that a processor's number takes.
    let bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Written anew below.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count.next_power_of_two() << 16 | number << 24;
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx = entry.edx & !SEVERAL | if count > 1 { SEVERAL } else { 0 };
            }
            // Intel's caches: which processors share one. The first and second levels are a core's own.
            4 if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | shared << 14 | (count - 1) << 26;
            }
            0x8000_0008 => {
                entry.ecx = entry.ecx & 0xffff_0000 | bits << 12 | (count - 1);
            }
            // AMD's caches, as Intel's.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & !(0xfff << 14) | shared << 14;
            }
            // AMD's places: APIC number, core, node.
            0x8000_001e => {
                entry.eax = number;
                entry.ebx = number;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    // Levels: a thread of one core, then cores of one package (type 1 and 2).
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if highest >= 0xb {
        for (index, shift, processors, kind) in [(0, 0, 1, 1), (1, bits, count, 2), (2, 0, 0, 0)] {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: HAS_INDEX,
                eax: shift,
                ebx: processors,
                ecx: index | kind << 8,
                edx: number,
                ..kvm_cpuid_entry2::default()
            });
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx: 0x1234_5678, ..kvm_cpuid_entry2::default() }
    }

    #[test]
    fn every_processor_has_a_place_of_its_own() {
        let supported = CpuId::from_entries(&[
            entry(0, 0xd),
            entry(1, 0),
            entry(4, 0x43),
            entry(4, 0x63),
            entry(0xb, 0),
            entry(0x8000_0008, 0),
            entry(0x8000_001e, 0),
        ])
        .unwrap();
        let found = identity(&supported, 2, 3);
        let of = |function: u32| -> Vec<&kvm_cpuid_entry2> {
            found.iter().filter(|entry| entry.function == function).collect()
        };
        let first = of(1)[0];
        assert_eq!((first.ebx, first.edx, first.ecx), (0x0204_5678, SEVERAL, TSC_DEADLINE | HYPERVISOR));
        // The second level is a core's own, the third is shared.
        assert_eq!([of(4)[0].eax >> 14, of(4)[1].eax >> 14 & 0xfff], [2 << 12, 2]);
        let levels = of(0xb);
        assert_eq!(levels.len(), 3);
        assert_eq!((levels[1].eax, levels[1].ebx, levels[1].ecx, levels[1].edx), (2, 3, 0x201, 2));
        assert_eq!(of(0x8000_0008)[0].ecx, 2 << 12 | 2);
        assert_eq!(of(0x8000_001e)[0].eax, 2);
        let alone = identity(&supported, 0, 1);
        let first = alone.iter().find(|entry| entry.function == 1).unwrap();
        assert_eq!((first.ebx, first.edx), (0x0001_5678, 0));
    }
}
