//! Where what is in the guest's physical address space.

use vm_memory::GuestAddress;

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) begin: u64,
    pub(crate) length: u64,
}

impl Range {
    fn new(begin: u64, end: u64) -> Self {
        Self { begin, length: end - begin }
    }
}

/// Three descriptors of segments, for the first processor.
pub(crate) const SEGMENTS: u64 = 0x500;
pub(crate) const START_INFO: u64 = 0x6000;
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
pub(crate) const COMMAND_LINE_LENGTH: u64 = 4096;
/// Tables are where a PC has them, in memory that is reserved. They end below the first mebibyte.
pub(crate) const ACPI: u64 = 0xe_0000;
const RESERVED: u64 = 0x9_fc00;
const MEBIBYTE: u64 = 1 << 20;

/// Below the fourth gigabyte is room for devices.
const HOLE: Range = Range { begin: 0xc000_0000, length: 0x4000_0000 };
/// The registers of virtio devices, one page after the other.
pub(crate) const DEVICES: u64 = 0xd000_0000;
/// The register by which a guest tells of its panic.
pub(crate) const PANIC: u32 = 0xcfff_f000;
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// What KVM needs on Intel's processors: a page of page tables, then three pages of a task state segment.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const TASK_STATE: usize = 0xfffb_d000;

pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_INTERRUPT: u32 = 4;
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
pub(crate) const RESET_PORT: u16 = 0x602;

/// The I/O APIC's inputs that devices can have, each one of its own.
pub(crate) const DEVICE_INTERRUPTS: std::ops::Range<u32> = 5..24;

/// The ranges that memory of that size consists of.
pub(crate) fn memory(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(HOLE.begin);
    // Sizes of memory fit addresses.
    let length = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
    let mut ranges = vec![(GuestAddress(0), length(low))];
    if size > low {
        ranges.push((GuestAddress(HOLE.begin + HOLE.length), length(size - low)));
    }
    ranges
}

/// Where memory lies that a guest gets later: above all that it begins with, and above the hole.
pub(crate) fn growth(size: u64) -> u64 {
    const GIGABYTE: u64 = 1 << 30;
    let high = size.saturating_sub(HOLE.begin);
    (HOLE.begin + HOLE.length + high).next_multiple_of(GIGABYTE)
}

/// Where images lie: above all that memory can become.
pub(crate) fn images(size: u64, reserved: u64) -> u64 {
    growth(size) + reserved
}

/// The memory map of a guest with that much memory.
pub(crate) fn map(size: u64) -> Vec<(Range, bool)> {
    let low = size.min(HOLE.begin);
    let mut map = vec![
        (Range::new(0, RESERVED), true),
        (Range::new(RESERVED, MEBIBYTE), false),
        (Range::new(MEBIBYTE, low), true),
    ];
    if size > low {
        map.push((Range { begin: HOLE.begin + HOLE.length, length: size - low }, true));
    }
    map
}

/// Where the initramfs goes: as high as possible below the hole, above the kernel. `None`: there is no room.
pub(crate) fn initramfs(size: u64, length: u64, kernel_end: u64) -> Option<Range> {
    let begin = size.min(HOLE.begin).checked_sub(length)? & !0xfff;
    (begin >= kernel_end).then_some(Range { begin, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_the_hole() {
        assert_eq!(memory(256 << 20), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(memory(4 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
        for size in [64 << 20, 3 << 30, 5 << 30] {
            let map = map(size);
            let usable: u64 = map.iter().filter(|(_, usable)| *usable).map(|(range, _)| range.length).sum();
            assert_eq!(usable + MEBIBYTE - RESERVED, size);
            assert!(map.iter().all(|(range, _)| range.begin + range.length <= growth(size)));
            assert!(map.windows(2).all(|pair| pair[0].0.begin + pair[0].0.length <= pair[1].0.begin));
        }
    }

    #[test]
    fn the_initramfs_is_above_the_kernel() {
        let at = initramfs(256 << 20, 1000, 0x300_0000).unwrap();
        assert_eq!((at.begin, at.length), ((256 << 20) - 4096, 1000));
        assert_eq!(initramfs(64 << 20, 62 << 20, 0x300_0000), None);
        assert_eq!(initramfs(64 << 20, 65 << 20, 0), None);
        assert!(initramfs(8 << 30, 1000, 0x300_0000).unwrap().begin < 0xc000_0000);
    }
}
