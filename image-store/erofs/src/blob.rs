//! A data blob in the making: contents appended block by block, hashed on the way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::node::{Content, HOLE};
use crate::{BLOCK, CHUNKS_MAX, ErofsError, blocks_of};

/// What is read at once, bytes.
const PIECE: usize = 256 << 10;
/// The largest chunks that EROFS has: 2³¹ blocks.
const BITS_MAX: u8 = 31;

/// Where a content was put; with this and the file, [`Content`] can be made again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    block: u32,
    /// In chunks of 2^this blocks, because it has holes.
    bits: Option<u8>,
}

pub(crate) struct Blob<'a> {
    file: &'a File,
    /// Whether copies share their blocks with what they were copied from.
    shares: bool,
    blocks: u64,
    hasher: Sha256,
    /// How far.
    hashed: u64,
    buffer: Vec<u8>,
}

impl<'a> Blob<'a> {
    /// `file` is empty.
    pub(crate) fn new(file: &'a File, shares: bool) -> Self {
        Self { file, shares, blocks: 0, hasher: Sha256::new(), hashed: 0, buffer: vec![0; PIECE] }
    }

    /// Appends the content of a file of so many bytes.
    pub(crate) fn append(&mut self, from: &File, size: u64) -> Result<Place, ErofsError> {
        let limit = u64::from(u32::MAX);
        let too_large = ErofsError::TooLarge { what: "the number of blocks of a layer", limit };
        let mut place = Place { block: u32::try_from(self.blocks).unwrap_or(u32::MAX), bits: None };
        if size > 0 && Extents::of(from, size).hole(0)? < size {
            place.bits = Some(chunk_bits(from, size)?);
        }
        let content = content(place, from, size)?;
        let begin = self.blocks;
        self.blocks += match &content {
            Content::Plain { .. } => blocks_of(size),
            Content::Chunks { bits, blocks } => {
                let lengths = (0_u64..).zip(blocks).filter(|&(_, &block)| block != HOLE);
                lengths.map(|(at, _)| chunk_length(at, *bits, size)).sum()
            }
        };
        // A hole's mark is no block.
        if self.blocks >= limit {
            return Err(too_large);
        }
        match content {
            Content::Plain { .. } => self.copy(from, 0, begin * BLOCK, size)?,
            Content::Chunks { bits, blocks } => {
                for extent in Extents::of(from, size) {
                    let (at, end) = extent?;
                    let chunk = BLOCK << bits;
                    // Chunks that follow each other and are no holes do so here too: an extent is one piece.
                    let block = usize::try_from(at / chunk).ok().and_then(|at| blocks.get(at));
                    let block = block.ok_or(ErofsError::Damaged("a file has changed"))?;
                    self.copy(from, at, u64::from(*block) * BLOCK + at % chunk, end - at)?;
                }
            }
        }
        Ok(place)
    }

    /// The length in blocks, and the digest. The file is as long as that.
    pub(crate) fn finish(mut self) -> io::Result<(u32, [u8; 32])> {
        self.zeros(self.blocks * BLOCK);
        self.file.set_len(self.blocks * BLOCK)?;
        Ok((u32::try_from(self.blocks).unwrap_or(u32::MAX), self.hasher.finalize().into()))
    }

    fn copy(&mut self, from: &File, mut at: u64, mut to: u64, length: u64) -> io::Result<()> {
        self.zeros(to);
        if self.shares && length > 0 {
            self.share(from, at, to, length)?;
        }
        let end = at + length;
        while at < end {
            let piece = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            from.read_exact_at(&mut self.buffer[..piece], at)?;
            self.hasher.update(&self.buffer[..piece]);
            if !self.shares {
                self.file.write_all_at(&self.buffer[..piece], to)?;
            }
            at += piece as u64;
            to += piece as u64;
        }
        self.hashed = to;
        Ok(())
    }

    /// copy_file_range(2) shares whole blocks where the file system can, and copies the rest.
    fn share(&self, from: &File, mut at: u64, mut to: u64, mut length: u64) -> io::Result<()> {
        while length > 0 {
            let piece = usize::try_from(length).unwrap_or(usize::MAX).min(1 << 30);
            match rustix::fs::copy_file_range(from, Some(&mut at), self.file, Some(&mut to), piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => length -= count as u64,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// What is not written up to there is zero.
    fn zeros(&mut self, to: u64) {
        const ZEROS: &[u8] = &[0; 64 << 10];
        while self.hashed < to {
            let piece = (to - self.hashed).min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..usize::try_from(piece).unwrap_or(ZEROS.len())]);
            self.hashed += piece;
        }
    }
}

/// The parts of a file that are no holes.
pub(crate) struct Extents<'a> {
    file: &'a File,
    size: u64,
    at: u64,
}

impl<'a> Extents<'a> {
    fn of(file: &'a File, size: u64) -> Self {
        Self { file, size, at: 0 }
    }

    fn hole(&self, from: u64) -> io::Result<u64> {
        Ok(rustix::fs::seek(self.file, SeekFrom::Hole(from))?.min(self.size))
    }
}

impl Iterator for Extents<'_> {
    type Item = io::Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        let begin = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
            Ok(begin) if begin < self.size => begin,
            Ok(_) | Err(Errno::NXIO) => return None,
            Err(error) => return Some(Err(error.into())),
        };
        let end = self.hole(begin);
        self.at = *end.as_ref().unwrap_or(&self.size);
        Some(end.map(|end| (begin, end)))
    }
}

/// What an index says of a content that was appended.
pub(crate) fn content(place: Place, file: &File, size: u64) -> Result<Content, ErofsError> {
    let Place { block, bits: Some(bits) } = place else { return Ok(Content::Plain { block: place.block }) };
    let count = blocks_of(size).div_ceil(1 << bits);
    let mut blocks = vec![HOLE; usize::try_from(count).unwrap_or_default()];
    let mut next = u64::from(block);
    for extent in Extents::of(file, size) {
        let (begin, end) = extent?;
        let chunk = BLOCK << bits;
        for at in begin / chunk..end.div_ceil(chunk) {
            let place = usize::try_from(at).ok().and_then(|at| blocks.get_mut(at));
            if let Some(place) = place.filter(|place| **place == HOLE) {
                // One that is too large is refused with the whole.
                *place = u32::try_from(next).unwrap_or(HOLE - 1);
                next += chunk_length(at, bits, size);
            }
        }
    }
    Ok(Content::Chunks { bits, blocks })
}

/// How many blocks the chunk `at` of a file has.
fn chunk_length(at: u64, bits: u8, size: u64) -> u64 {
    (1 << bits).min(blocks_of(size).saturating_sub(at << bits))
}

/// The size of chunks with which a file with holes takes least room: small ones have a long map, large ones holes in them.
fn chunk_bits(file: &File, size: u64) -> Result<u8, ErofsError> {
    let chunks = |bits: u8| blocks_of(size).div_ceil(1 << bits);
    let possible = (0..=BITS_MAX).filter(|&bits| chunks(bits) <= CHUNKS_MAX);
    // How many of them are no holes, and the number of the first that was not looked at.
    let mut filled: Vec<(u8, u64, u64)> = possible.map(|bits| (bits, 0, 0)).collect();
    for extent in Extents::of(file, size) {
        let (begin, end) = extent?;
        for (bits, count, next) in &mut filled {
            let chunk = BLOCK << *bits;
            let begin = (begin / chunk).max(*next);
            let end = end.div_ceil(chunk);
            *count += end.saturating_sub(begin);
            *next = end.max(*next);
        }
    }
    let room = |&(bits, count, _): &(u8, u64, u64)| (count << bits).saturating_mul(BLOCK) + chunks(bits) * 4;
    let best = filled.iter().min_by_key(|filled| room(filled));
    best.map(|&(bits, ..)| bits)
        .ok_or(ErofsError::TooLarge { what: "a file with holes", limit: CHUNKS_MAX << BITS_MAX })
}
