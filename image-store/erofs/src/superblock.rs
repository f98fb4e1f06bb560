//! The superblock: `struct erofs_super_block` in Linux' `fs/erofs/erofs_fs.h`, 128 bytes at 1024.

use crate::BLOCK_BYTES;

/// Where it stands.
pub(crate) const OFFSET: usize = 1024;
/// Its length.
pub(crate) const SIZE: usize = 128;

const MAGIC: u32 = 0xE0F5_E1E2;
/// It has a checksum, and the times in inodes are those of modification.
const COMPATIBLE: u32 = 1 | 2;
/// There are files in chunks.
const CHUNKED_FILE: u32 = 4;

/// What it says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Superblock {
    pub(crate) root: u16,
    pub(crate) inodes: u64,
    /// With those of the data blobs.
    pub(crate) blocks: u32,
    pub(crate) uuid: [u8; 16],
    pub(crate) has_chunks: bool,
}

impl Superblock {
    /// Writes it into the first block of the image, which has everything else already: the checksum covers what follows too.
    pub(crate) fn write(&self, first: &mut [u8; BLOCK_BYTES]) {
        let block = &mut first[OFFSET..];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(0x08, &COMPATIBLE.to_le_bytes());
        // Blocks of 2¹² bytes.
        put(0x0c, &[12]);
        put(0x0e, &self.root.to_le_bytes());
        put(0x10, &self.inodes.to_le_bytes());
        put(0x24, &self.blocks.to_le_bytes());
        put(0x30, &self.uuid);
        put(0x50, &(if self.has_chunks { CHUNKED_FILE } else { 0 }).to_le_bytes());
        let checksum = crc32c(block).to_le_bytes();
        block[4..8].copy_from_slice(&checksum);
    }
}

/// CRC-32C (Castagnoli) as Linux' `crc32c(~0, …)`: without the inversion at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::crc32c;

    #[test]
    fn the_checksum_is_the_known_one() {
        // The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
