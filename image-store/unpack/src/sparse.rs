//! Sparse files: which stretches of a file are in the archive, the rest being holes.
//!
//! Source: GNU tar's manual, "Storing Sparse Files": the old GNU header (type `S`) and the pax variants 0.0, 0.1, 1.0.

use crate::error::Fault;
use crate::header::{self, BLOCK};
use crate::pax::unsigned;

/// Stretches accepted in one file.
const MAX_EXTENTS: usize = 1 << 20;

/// A stretch of the file whose bytes are stored in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Checks a map: in order, disjoint, inside the file, and exactly as long as what is stored.
pub(crate) fn validate(extents: &[Extent], real_size: u64, stored: u64) -> Result<(), Fault> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for extent in extents {
        if extent.offset < end {
            return Err(Fault::Sparse);
        }
        end = extent.offset.checked_add(extent.length).ok_or(Fault::Sparse)?;
        sum += extent.length;
    }
    if end > real_size || sum != stored { Err(Fault::Sparse) } else { Ok(()) }
}

fn push(extents: &mut Vec<Extent>, offset: u64, length: u64) -> Result<(), Fault> {
    if extents.len() >= MAX_EXTENTS {
        return Err(Fault::TooLarge { what: "sparse map", limit: MAX_EXTENTS as u64 });
    }
    extents.push(Extent { offset, length });
    Ok(())
}

/// Reads pairs of 12-byte numbers from an old GNU header or one of its extension blocks; says whether more follow.
pub(crate) fn read_old_gnu(
    block: &[u8; BLOCK],
    is_extension: bool,
    extents: &mut Vec<Extent>,
) -> Result<bool, Fault> {
    let (pairs, more) =
        if is_extension { (&block[..504], block[504]) } else { (&block[386..482], block[482]) };
    for pair in pairs.chunks_exact(24) {
        // An unused pair begins with NUL.
        if pair[0] == 0 {
            break;
        }
        let offset = header::length(&pair[..12], "sparse offset")?;
        push(extents, offset, header::length(&pair[12..], "sparse length")?)?;
    }
    Ok(more != 0)
}

/// The file's size with its holes, from an old GNU header.
pub(crate) fn old_gnu_real_size(block: &[u8; BLOCK]) -> Result<u64, Fault> {
    header::length(&block[483..495], "sparse file's size")
}

/// `GNU.sparse.*` records.
#[derive(Debug, Default)]
pub(crate) struct PaxSparse {
    major: Option<u64>,
    minor: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    real_size: Option<u64>,
    extents: Option<Vec<Extent>>,
    /// An offset record of version 0.0 that waits for its length.
    offset: Option<u64>,
}

/// What the records add up to.
#[derive(Debug)]
pub(crate) enum SparseForm {
    /// Not sparse.
    Dense,
    /// The map came with the records (0.0, 0.1).
    Mapped { real_size: u64, extents: Vec<Extent> },
    /// The map stands before the data (1.0).
    Leading { real_size: u64 },
}

impl PaxSparse {
    pub(crate) fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        match key {
            b"major" => self.major = Some(unsigned(value)?),
            b"minor" => self.minor = Some(unsigned(value)?),
            b"name" if value.contains(&0) => return Err(Fault::Name),
            b"name" => self.name = Some(value.to_vec()).filter(|name| !name.is_empty()),
            b"size" | b"realsize" => self.real_size = Some(unsigned(value)?),
            b"offset" if self.offset.is_some() => return Err(Fault::Sparse),
            b"offset" => self.offset = Some(unsigned(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or(Fault::Sparse)?;
                push(self.extents.get_or_insert_default(), offset, unsigned(value)?)?;
            }
            b"map" => {
                let mut extents = Vec::new();
                let mut numbers = value.split(|&byte| byte == b',');
                while !value.is_empty() {
                    let Some(offset) = numbers.next() else { break };
                    let length = numbers.next().ok_or(Fault::Sparse)?;
                    push(&mut extents, unsigned(offset)?, unsigned(length)?)?;
                }
                self.extents = Some(extents);
            }
            // `numblocks` says again how long the map is.
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn form(self) -> Result<SparseForm, Fault> {
        if self.offset.is_some() {
            return Err(Fault::Sparse);
        }
        match (self.major, self.minor, self.extents) {
            (Some(1), Some(0), _) => {
                Ok(SparseForm::Leading { real_size: self.real_size.ok_or(Fault::Sparse)? })
            }
            (None, None, Some(extents)) | (Some(0), Some(0 | 1), Some(extents)) => {
                Ok(SparseForm::Mapped { real_size: self.real_size.ok_or(Fault::Sparse)?, extents })
            }
            (None, None, None) => Ok(SparseForm::Dense),
            _ => Err(Fault::Sparse),
        }
    }
}

/// Collects the map that stands before the data in version 1.0: a count, then offset and length of each stretch, one
/// decimal number a line, padded with NULs to whole blocks.
#[derive(Debug, Default)]
pub(crate) struct LeadingMap {
    line: Vec<u8>,
    expected: Option<u64>,
    offset: Option<u64>,
    extents: Vec<Extent>,
}

impl LeadingMap {
    /// Takes one block; gives the map when it is complete.
    pub(crate) fn block(&mut self, block: &[u8; BLOCK]) -> Result<Option<Vec<Extent>>, Fault> {
        for &byte in block {
            if byte != b'\n' {
                // No number needs more; longer lines would only eat memory.
                if self.line.len() >= 20 {
                    return Err(Fault::Sparse);
                }
                self.line.push(byte);
                continue;
            }
            let value = unsigned(&self.line)?;
            self.line.clear();
            match (self.expected, self.offset.take()) {
                (None, _) if value > MAX_EXTENTS as u64 => {
                    return Err(Fault::TooLarge { what: "sparse map", limit: MAX_EXTENTS as u64 });
                }
                (None, _) => self.expected = Some(value),
                (Some(_), None) => self.offset = Some(value),
                (Some(_), Some(offset)) => push(&mut self.extents, offset, value)?,
            }
            if self.expected == Some(self.extents.len() as u64) && self.offset.is_none() {
                return Ok(Some(std::mem::take(&mut self.extents)));
            }
        }
        Ok(None)
    }
}
