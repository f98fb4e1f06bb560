//! `struct hvm_start_info` and what it points to (xen/include/public/arch-x86/hvm/start_info.h, version 1).

use podvisor_virtio::device::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{COMMAND_LINE, COMMAND_LINE_LENGTH, Range, START_INFO};

const MAGIC: u32 = 0x336e_c578;
/// From its beginning: one module, then the memory map.
const MODULES: u64 = 0x40;
const MEMORY_MAP: u64 = 0x80;

/// What the kernel is to be told.
#[derive(Debug)]
pub(crate) struct StartInfo<'a> {
    pub(crate) command_line: &'a str,
    pub(crate) initramfs: Range,
    /// Tables' root.
    pub(crate) rsdp: u64,
    /// All of the physical memory, and whether it may be used.
    pub(crate) map: &'a [(Range, bool)],
}

/// Writes it into the guest's memory.
pub(crate) fn write(memory: &Memory, info: &StartInfo<'_>) -> Result<(), BootError> {
    let line = info.command_line.as_bytes();
    if line.len() as u64 >= COMMAND_LINE_LENGTH {
        return Err(BootError::Room("command line"));
    }
    memory.write_slice(line, GuestAddress(COMMAND_LINE))?;

    let entries = u32::try_from(info.map.len()).unwrap_or(0);
    let mut bytes = Vec::new();
    // Magic, version, flags, number of modules.
    for word in [MAGIC, 1, 0, 1] {
        bytes.extend(word.to_le_bytes());
    }
    for address in [START_INFO + MODULES, COMMAND_LINE, info.rsdp, START_INFO + MEMORY_MAP] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend(entries.to_le_bytes());
    bytes.resize(usize::try_from(MODULES).unwrap_or(0), 0);
    // Address, length, command line, reserved.
    for word in [info.initramfs.begin, info.initramfs.length, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(usize::try_from(MEMORY_MAP).unwrap_or(0), 0);
    for (range, usable) in info.map {
        bytes.extend(range.begin.to_le_bytes());
        bytes.extend(range.length.to_le_bytes());
        // XEN_HVM_MEMMAP_TYPE_RAM or _RESERVED, then a reserved word.
        bytes.extend((if *usable { 1u32 } else { 2 }).to_le_bytes());
        bytes.extend([0; 4]);
    }
    memory.write_slice(&bytes, GuestAddress(START_INFO))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_stands_in_its_place() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let map =
            [(Range { begin: 0, length: 0x9_fc00 }, true), (Range { begin: 0x9_fc00, length: 0x400 }, false)];
        let initramfs = Range { begin: 0x5000_0000, length: 7 };
        write(&memory, &StartInfo { command_line: "quiet", initramfs, rsdp: 0xe_0000, map: &map }).unwrap();
        let word = |at: u64| memory.read_obj::<u32>(GuestAddress(START_INFO + at)).unwrap();
        let long = |at: u64| memory.read_obj::<u64>(GuestAddress(START_INFO + at)).unwrap();
        assert_eq!([word(0), word(4), word(8), word(12)], [MAGIC, 1, 0, 1]);
        assert_eq!([long(16), long(24)], [START_INFO + MODULES, COMMAND_LINE]);
        assert_eq!([long(32), long(40)], [0xe_0000, START_INFO + MEMORY_MAP]);
        assert_eq!(word(48), 2);
        assert_eq!([long(0x40), long(0x48)], [0x5000_0000, 7]);
        assert_eq!((long(0x80), long(0x88), word(0x90)), (0, 0x9_fc00, 1));
        assert_eq!((long(0x98), long(0xa0), word(0xa8)), (0x9_fc00, 0x400, 2));
        let mut line = [1; 6];
        memory.read_slice(&mut line, GuestAddress(COMMAND_LINE)).unwrap();
        assert_eq!(&line, b"quiet\0");
        let long = "x".repeat(5000);
        let too_long = StartInfo { command_line: &long, initramfs, rsdp: 0, map: &map };
        assert!(write(&memory, &too_long).is_err());
    }
}
