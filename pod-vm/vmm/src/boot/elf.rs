//! The kernel: an ELF file with a PVH entry.
//!
//! The file is the operator's, made by `podvisor guest build`; a wrong number in it gives an error, or a guest that does not run, never more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use podvisor_virtio::device::Memory;

use super::{BootError, load};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Program headers of a kernel: less than ten.
const MOST_HEADERS: u16 = 64;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// Bytes of notes that are looked at.
const MOST_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h)
const PHYS32_ENTRY: u32 = 18;

/// A kernel that lies in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Physical address of the PVH entry.
    pub(crate) entry: u32,
    /// Where it ends.
    pub(crate) end: u64,
}

/// A part of the file, and where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

/// Puts the kernel into the guest's memory, which is all zeros yet.
pub(crate) fn load_kernel(memory: &Memory, file: &File) -> Result<Kernel, BootError> {
    let segments = segments(file)?;
    let mut end = 0;
    for segment in segments.iter().filter(|segment| segment.kind == LOAD) {
        if segment.in_memory < segment.in_file {
            return Err(BootError::Kernel("a segment is larger in the file than in memory"));
        }
        load(memory, "kernel", file, segment.offset, segment.address, segment.in_file)?;
        let last = segment.address.checked_add(segment.in_memory).ok_or(BootError::Room("kernel"))?;
        end = end.max(last);
    }
    if end == 0 {
        return Err(BootError::Kernel("it has nothing to load"));
    }
    let mut notes = segments.iter().filter(|segment| segment.kind == NOTE);
    let entry = notes.find_map(|segment| entry(file, segment).transpose()).transpose()?;
    let entry = entry.ok_or(BootError::Kernel("it has no PVH entry (CONFIG_PVH)"))?;
    Ok(Kernel { entry, end })
}

fn segments(file: &File) -> Result<Vec<Segment>, BootError> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).map_err(read)?;
    // 64 bits, little endian, for x86-64.
    if !header.starts_with(b"\x7fELF\x02\x01\x01") || number(&header, 18, 2) != 62 {
        return Err(BootError::Kernel("it is no ELF file for x86-64"));
    }
    let (at, size, count) = (number(&header, 32, 8), number(&header, 54, 2), number(&header, 56, 2));
    if size != PROGRAM_HEADER as u64 || count > u64::from(MOST_HEADERS) {
        return Err(BootError::Kernel("its program headers are none"));
    }
    (0..count)
        .map(|index| {
            let mut bytes = [0; PROGRAM_HEADER];
            let place = at.saturating_add(index * size);
            file.read_exact_at(&mut bytes, place).map_err(read)?;
            Ok(Segment {
                kind: u32::try_from(number(&bytes, 0, 4)).unwrap_or(0),
                offset: number(&bytes, 8, 8),
                address: number(&bytes, 24, 8),
                in_file: number(&bytes, 32, 8),
                in_memory: number(&bytes, 40, 8),
            })
        })
        .collect()
}

/// The entry that a segment of notes names.
fn entry(file: &File, segment: &Segment) -> Result<Option<u32>, BootError> {
    let mut bytes = vec![0; usize::try_from(segment.in_file.min(MOST_NOTES)).unwrap_or(0)];
    file.read_exact_at(&mut bytes, segment.offset).map_err(read)?;
    let mut rest = bytes.as_slice();
    while rest.len() >= 12 {
        let [name, content, kind] = [0, 4, 8].map(|at| number(rest, at, 4));
        let padded = |length: u64| usize::try_from(length.next_multiple_of(4)).unwrap_or(usize::MAX);
        let begin = padded(name).saturating_add(12);
        let Some(found) = rest.get(begin..) else { break };
        let is_ours = rest.get(12..16) == Some(b"Xen\0") && kind == u64::from(PHYS32_ENTRY);
        if is_ours && name == 4 && content >= 4 && found.len() >= 4 {
            return Ok(u32::try_from(number(found, 0, 4)).ok());
        }
        let Some(next) = found.get(padded(content)..) else { break };
        rest = next;
    }
    Ok(None)
}

fn read(error: io::Error) -> BootError {
    BootError::Read("kernel", error)
}

/// A little endian number of `length` bytes; what is not there is zero.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let bytes = bytes.get(at..at + length).unwrap_or_default();
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// A file with a segment of "code" at 1 MiB and a note.
    fn kernel(change: impl Fn(&mut Vec<u8>)) -> File {
        let mut bytes = vec![0; 0x300];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 2;
        let mut segment = |at: usize, kind: u32, offset: u64, address: u64, length: u64| {
            bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 24..at + 32].copy_from_slice(&address.to_le_bytes());
            bytes[at + 32..at + 40].copy_from_slice(&length.to_le_bytes());
            bytes[at + 40..at + 48].copy_from_slice(&(2 * length).to_le_bytes());
        };
        segment(64, LOAD, 0x200, 0x10_0000, 4);
        segment(120, NOTE, 0x220, 0, 0x40);
        bytes[0x200..0x204].copy_from_slice(b"code");
        // A note of somebody else's, then ours.
        bytes[0x220..0x238].copy_from_slice(b"\x05\0\0\0\x01\0\0\0\x12\0\0\0Lnux\0\0\0\0\x07\0\0\0");
        bytes[0x238..0x24c].copy_from_slice(b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0\x10\0\x10\0");
        change(&mut bytes);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    #[test]
    fn segments_go_where_they_belong() {
        let memory = memory();
        let loaded = load_kernel(&memory, &kernel(|_| {})).unwrap();
        assert_eq!(loaded, Kernel { entry: 0x10_0010, end: 0x10_0008 });
        let mut code = [0; 4];
        memory.read_slice(&mut code, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(&code, b"code");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let error = load_kernel(&memory(), &kernel(change)).unwrap_err();
            error.to_string()
        };
        assert!(refused(&|bytes| bytes.truncate(10)).contains("read the kernel"));
        assert!(refused(&|bytes| bytes[0] = 0).contains("no ELF"));
        assert!(refused(&|bytes| bytes[18] = 40).contains("no ELF"));
        assert!(refused(&|bytes| bytes[56] = 200).contains("program headers"));
        assert!(refused(&|bytes| bytes[0x244] = b'x').contains("no PVH entry"));
        assert!(refused(&|bytes| bytes[64 + 24 + 3] = 1).contains("not enough"));
        assert!(refused(&|bytes| bytes[64 + 32] = 100).contains("larger in the file"));
        assert!(refused(&|bytes| bytes[64] = 9).contains("nothing to load"));
        // Lengths of notes that lead nowhere.
        assert!(refused(&|bytes| bytes[0x220..0x228].fill(0xff)).contains("no PVH entry"));
    }
}
