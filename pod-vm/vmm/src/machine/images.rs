//! Images in the guest's memory: files of the host's, mapped one after the other, that the guest reads where they are. All machines that have the same
//! file read the same pages of the host's.
//!
//! ```text
//! begin                                                       begin + length, a multiple of 2 MiB
//! │ file 1 … │ file 2 … │ … zeros …                 │ label │
//!            └ each at a multiple of 4 KiB           └ the last 4 KiB: the serial, then zeros
//! ```
//!
//! The label is what the guest knows the device by: persistent memory has no serial of its own (virtio 1.3, section 5.19).

use std::fs::File;
use std::io;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::slots::Slot;
use crate::sys;

/// What files and the label begin at a multiple of.
const PAGE: u64 = 4096;
/// What Linux takes as persistent memory: whole subsections (include/linux/mmzone.h).
const SUBSECTION: u64 = 2 << 20;
/// Where they begin: no two share a section of Linux'.
const SECTION: u64 = 128 << 20;

/// The part of the guest's addresses that images are in.
#[derive(Debug)]
pub(crate) struct Area {
    begin: u64,
    end: u64,
    /// Where images are, in their order.
    taken: Vec<(u64, u64)>,
}

/// An image that the guest has.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) begin: u64,
    pub(crate) length: u64,
    pub(crate) slot: Slot,
}

impl Area {
    /// Of the addresses from `begin` on, below `end`.
    pub(crate) fn new(begin: u64, end: u64) -> Self {
        Self { begin: begin.next_multiple_of(SECTION), end, taken: Vec::new() }
    }

    /// A part of that length that nobody has.
    pub(crate) fn take(&mut self, length: u64) -> Option<u64> {
        let mut begin = self.begin;
        for (taken, until) in &self.taken {
            if taken.checked_sub(begin).is_some_and(|room| room >= length) {
                break;
            }
            begin = until.next_multiple_of(SECTION);
        }
        let until = begin.checked_add(length).filter(|until| *until <= self.end)?;
        self.taken.push((begin, until));
        self.taken.sort_unstable();
        Some(begin)
    }

    pub(crate) fn give_back(&mut self, begin: u64) {
        self.taken.retain(|(taken, _)| *taken != begin);
    }
}

/// How long an image of files of these lengths is, with its label.
pub(crate) fn length(files: &[u64]) -> Option<u64> {
    let pages =
        files.iter().try_fold(PAGE, |sum, length| sum.checked_add(length.checked_next_multiple_of(PAGE)?));
    pages?.checked_next_multiple_of(SUBSECTION)
}

/// Maps the files, which are as long as that.
pub(crate) fn map(files: &[(File, u64)], serial: &str, length: u64) -> io::Result<MmapRegion> {
    let size = usize::try_from(length).map_err(io::Error::other)?;
    // Nothing of it is ever this process's own but the label.
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let region = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(flags)
        .build()
        .map_err(io::Error::other)?;
    let mut at = 0;
    for (file, length) in files.iter().filter(|(_, length)| *length > 0) {
        sys::map_file(&region, at, file, *length)?;
        at += length.next_multiple_of(PAGE);
    }
    let mut label = [0; 4096];
    let (name, _) = label.split_at_mut(serial.len());
    name.copy_from_slice(serial.as_bytes());
    sys::map_page(&region, length - PAGE, &label)?;
    Ok(region)
}

/// As the guest's memory is made of.
pub(crate) fn region(mapped: MmapRegion, begin: u64) -> io::Result<GuestRegionMmap> {
    GuestRegionMmap::new(mapped, GuestAddress(begin)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap};

    use super::*;

    #[test]
    fn lengths() {
        assert_eq!(length(&[]), Some(2 << 20));
        assert_eq!(length(&[(2 << 20) - 4096]), Some(2 << 20));
        assert_eq!(length(&[(2 << 20) - 4095]), Some(4 << 20));
        assert_eq!(length(&[1, 1]), Some(2 << 20));
        assert_eq!(length(&[u64::MAX, 1]), None);
    }

    #[test]
    fn places_are_given_and_given_back() {
        let mut area = Area::new(5 << 30, 6 << 30);
        assert_eq!(area.take(2 << 20), Some(5 << 30));
        assert_eq!(area.take(200 << 20), Some((5 << 30) + SECTION));
        assert_eq!(area.take(2 << 20), Some((5 << 30) + 3 * SECTION));
        area.give_back((5 << 30) + SECTION);
        assert_eq!(area.take(300 << 20), Some((5 << 30) + 4 * SECTION));
        assert_eq!(area.take(256 << 20), Some((5 << 30) + SECTION));
        assert_eq!(area.take(1 << 30), None);
        assert_eq!(area.take(u64::MAX), None);
    }

    #[test]
    fn files_lie_one_after_the_other() {
        let files: Vec<(File, u64)> = [&b"first"[..], b"", &[7; 5000]]
            .iter()
            .map(|bytes| {
                let mut file = tempfile::tempfile().unwrap();
                io::Write::write_all(&mut file, bytes).unwrap();
                (file, bytes.len() as u64)
            })
            .collect();
        let mapped = map(&files, "an-image", 2 << 20).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region(mapped, 1 << 30).unwrap()]).unwrap();
        let read = |at: u64, length: usize| {
            let mut bytes = vec![1; length];
            memory.read_slice(&mut bytes, GuestAddress((1 << 30) + at)).unwrap();
            bytes
        };
        assert_eq!(read(0, 8), b"first\0\0\0");
        assert_eq!(read(4096, 5000), [7; 5000]);
        assert_eq!(read(4096 + 5000, 100), [0; 100]);
        assert_eq!(read((2 << 20) - 4096, 9), b"an-image\0");
        let found = memory.find_region(GuestAddress(1 << 30)).unwrap();
        assert_eq!(found.prot(), libc::PROT_READ);
    }
}
