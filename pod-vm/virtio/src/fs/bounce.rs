//! The memory that the device and the file server have in common.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemory, GuestRegionMmap};

use crate::device::Memory;

/// Bytes of it: some of the largest requests at a time. What no request was put into takes no memory.
pub const MEMORY: u64 = LENGTH as u64;
const LENGTH: usize = 8 << 20;
/// Bytes at its beginning for each of the two queues.
const QUEUE: usize = 16 << 10;
const PAGE: usize = 4096;
const FIRST_PAGE: usize = 2 * QUEUE / PAGE;

/// Where a queue's three parts lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl Places {
    /// Of the queue with that index.
    pub(super) fn of(queue: usize) -> Self {
        let begin = (queue * QUEUE) as u64;
        Self { descriptors: begin, available: begin + 4096, used: begin + 8192 }
    }
}

/// The memory, and which of its pages are taken.
#[derive(Debug)]
pub(super) struct Bounce {
    pub(super) memory: Memory,
    taken: Vec<bool>,
}

impl Bounce {
    pub(super) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("podvisor-share", flags)?);
        ftruncate(&file, MEMORY)?;
        // Neither side can take a page from under the other.
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), LENGTH).map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or(io::ErrorKind::InvalidInput)?;
        let memory = Memory::from_regions(vec![region]).map_err(io::Error::other)?;
        let mut taken = vec![false; LENGTH / PAGE];
        taken[..FIRST_PAGE].fill(true);
        Ok(Self { memory, taken })
    }

    /// Its only region.
    pub(super) fn region(&self) -> Option<&GuestRegionMmap> {
        self.memory.iter().next()
    }

    /// Takes room for `length` bytes in one piece, the first there is; `None` while there is none.
    pub(super) fn take(&mut self, length: usize) -> Option<Range<usize>> {
        let pages = length.div_ceil(PAGE);
        let mut run = 0;
        for page in FIRST_PAGE..self.taken.len() {
            run = if self.taken[page] { 0 } else { run + 1 };
            if run == pages {
                let first = page + 1 - pages;
                self.taken[first..=page].fill(true);
                return Some(first * PAGE..(page + 1) * PAGE);
            }
        }
        None
    }

    pub(super) fn give_back(&mut self, area: &Range<usize>) {
        self.taken[area.start / PAGE..area.end / PAGE].fill(false);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryRegion;

    use super::*;

    #[test]
    fn areas_do_not_overlap() {
        let mut bounce = Bounce::new().unwrap();
        assert_eq!(bounce.region().unwrap().len(), LENGTH as u64);
        let areas: Vec<_> = std::iter::from_fn(|| bounce.take(1_000_000)).collect();
        assert_eq!(areas.len(), (LENGTH / PAGE - FIRST_PAGE) / 245);
        assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(areas[0].start >= 2 * QUEUE && areas.last().unwrap().end <= LENGTH);
        bounce.give_back(&areas[3]);
        assert_eq!(bounce.take(980_000).unwrap().start, areas[3].start);
        assert_eq!(bounce.take(LENGTH), None);
    }
}
