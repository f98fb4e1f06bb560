//! Where things are put in the metadata: inodes one behind the other in blocks that are never left half way through one, directories in blocks
//! of their own between them.

use std::io;

use crate::inode::SLOT_BYTES;
use crate::{BLOCK, BLOCK_BYTES, ErofsError, Output, blocks_of, superblock};

/// The metadata in the making.
pub(crate) struct Space<'a, O> {
    output: &'a mut O,
    /// Kept to the end: its checksum covers the inode of the root.
    first: Box<[u8; BLOCK_BYTES]>,
    /// Blocks that inodes are being put in, and where they are.
    current: Vec<u8>,
    at: u64,
    /// How many blocks are taken.
    blocks: u64,
}

impl<'a, O: Output> Space<'a, O> {
    pub(crate) fn new(output: &'a mut O) -> Self {
        Self { output, first: Box::new([0; BLOCK_BYTES]), current: Vec::new(), at: BLOCK, blocks: 1 }
    }

    /// Takes room for the root's inode, which has to lie in the first 2 MiB as its number has 16 bits.
    pub(crate) fn root(&mut self, length: usize) -> Result<u64, ErofsError> {
        const BEGIN: usize = superblock::OFFSET + superblock::SIZE;
        if length <= BLOCK_BYTES - BEGIN { Ok(BEGIN as u64) } else { self.inode(&vec![0; length]) }
    }

    /// Adds an inode with what lies behind it and says where it is. It lies in one block if it can, and begins one if it cannot.
    pub(crate) fn inode(&mut self, bytes: &[u8]) -> Result<u64, ErofsError> {
        let begin = self.current.len().next_multiple_of(SLOT_BYTES);
        let room = self.current.len().next_multiple_of(BLOCK_BYTES) - begin;
        if bytes.len() <= room {
            self.current.resize(begin, 0);
        } else {
            self.flush()?;
            self.at = self.take(bytes.len())? * BLOCK;
        }
        let place = self.at + self.current.len() as u64;
        self.current.extend(bytes);
        Ok(place)
    }

    /// Adds blocks and says the number of the first.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> Result<u64, ErofsError> {
        let block = self.take(bytes.len())?;
        self.output.write_at(block * BLOCK, bytes)?;
        let rest = bytes.len().next_multiple_of(BLOCK_BYTES) - bytes.len();
        self.output.write_at(block * BLOCK + bytes.len() as u64, &vec![0; rest])?;
        Ok(block)
    }

    /// Writes over what was added.
    pub(crate) fn patch(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let within = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let is_current = at >= self.at && within(at - self.at) < self.current.len();
        let part = if at < BLOCK {
            self.first.get_mut(within(at)..within(at) + bytes.len())
        } else if is_current {
            self.current.get_mut(within(at - self.at)..within(at - self.at) + bytes.len())
        } else {
            return self.output.write_at(at, bytes);
        };
        part.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(bytes);
        Ok(())
    }

    /// Writes what is left, the first block last; `last` makes its superblock. Says how many blocks there are.
    pub(crate) fn finish(mut self, last: impl FnOnce(&mut [u8; BLOCK_BYTES])) -> Result<u64, ErofsError> {
        self.flush()?;
        last(&mut self.first);
        self.output.write_at(0, &*self.first)?;
        Ok(self.blocks)
    }

    fn take(&mut self, bytes: usize) -> Result<u64, ErofsError> {
        let block = self.blocks;
        self.blocks += blocks_of(bytes as u64);
        let limit = u64::from(u32::MAX);
        if self.blocks < limit {
            Ok(block)
        } else {
            Err(ErofsError::TooLarge { what: "the metadata", limit })
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.current.resize(self.current.len().next_multiple_of(BLOCK_BYTES), 0);
        self.output.write_at(self.at, &self.current)?;
        self.current.clear();
        Ok(())
    }
}
