//! Files with holes: which parts of them are in the tar, and whether that is possible at all.

use super::header::BLOCK;
use super::number::{decimal, number};
use crate::chunks::{Chunks, Stop};
use crate::error::TarProblem;

/// More segments than this is no sparse file any more. Bounds memory to some MiB.
const SEGMENTS_MAX: usize = 1 << 18;

/// A part that is in the tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Segments in order, without overlap, inside the file, and exactly as long as the data in the tar.
pub(super) fn check(map: &[Segment], real_size: u64, packed: u64) -> Result<(), TarProblem> {
    let mut end = 0;
    let mut sum: u64 = 0;
    for segment in map {
        let last = segment.offset.checked_add(segment.length).ok_or(TarProblem::Sparse)?;
        if segment.offset < end || last > real_size {
            return Err(TarProblem::Sparse);
        }
        end = last;
        sum += segment.length;
    }
    if sum == packed && i64::try_from(real_size).is_ok() { Ok(()) } else { Err(TarProblem::Sparse) }
}

/// GNU's old form: entries in the header, and more in blocks behind it (which the size does not count).
pub(super) fn gnu(chunks: &mut Chunks<'_>, first: &[u8], extended: bool) -> Result<Vec<Segment>, Stop> {
    let mut map = Vec::new();
    let mut is_over = entries(&mut map, first).map_err(|problem| chunks.problem(problem))?;
    let mut block = [0; BLOCK];
    let mut more = extended;
    while more {
        if !chunks.fill(&mut block)? {
            return Err(chunks.problem(TarProblem::Truncated));
        }
        if !is_over {
            is_over = entries(&mut map, &block[..504]).map_err(|problem| chunks.problem(problem))?;
        }
        more = block[504] != 0;
        if map.len() > SEGMENTS_MAX || (is_over && more) {
            return Err(chunks.problem(TarProblem::Sparse));
        }
    }
    Ok(map)
}

/// Entries of 12 + 12 bytes, until one is empty; says whether one was.
fn entries(map: &mut Vec<Segment>, bytes: &[u8]) -> Result<bool, TarProblem> {
    for entry in bytes.chunks_exact(24) {
        let (offset, length) = entry.split_at(12);
        if offset[0] == 0 || length[0] == 0 {
            return Ok(true);
        }
        let read =
            |field| number(field).and_then(|value| u64::try_from(value).ok()).ok_or(TarProblem::Sparse);
        map.push(Segment { offset: read(offset)?, length: read(length)? });
    }
    Ok(false)
}

/// GNU's 1.0 form: decimal lines in front of the data, filled up to whole blocks. Returns how many bytes that took.
pub(super) fn in_front(chunks: &mut Chunks<'_>, packed: u64) -> Result<(Vec<Segment>, u64), Stop> {
    let mut lines = Lines { chunks, block: [0; BLOCK], position: BLOCK, used: 0, packed };
    let count = usize::try_from(lines.next()?).unwrap_or(usize::MAX);
    if count > SEGMENTS_MAX {
        return Err(lines.chunks.problem(TarProblem::Sparse));
    }
    let mut map = Vec::new();
    for _ in 0..count {
        map.push(Segment { offset: lines.next()?, length: lines.next()? });
    }
    Ok((map, lines.used))
}

struct Lines<'c, 'o> {
    chunks: &'c mut Chunks<'o>,
    block: [u8; BLOCK],
    position: usize,
    used: u64,
    packed: u64,
}

impl Lines<'_, '_> {
    fn next(&mut self) -> Result<u64, Stop> {
        let mut digits = Vec::with_capacity(20);
        loop {
            if self.position == BLOCK {
                if self.packed - self.used < BLOCK as u64 {
                    return Err(self.chunks.problem(TarProblem::Sparse));
                }
                if !self.chunks.fill(&mut self.block)? {
                    return Err(self.chunks.problem(TarProblem::Truncated));
                }
                self.used += BLOCK as u64;
                self.position = 0;
            }
            let byte = self.block[self.position];
            self.position += 1;
            if byte == b'\n' {
                break;
            }
            if digits.len() == 20 {
                return Err(self.chunks.problem(TarProblem::Sparse));
            }
            digits.push(byte);
        }
        decimal(&digits).ok_or_else(|| self.chunks.problem(TarProblem::Sparse))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(list: &[(u64, u64)]) -> Vec<Segment> {
        list.iter().map(|&(offset, length)| Segment { offset, length }).collect()
    }

    #[test]
    fn only_possible_maps() {
        for (map, real_size, packed, is_good) in [
            (&[][..], 0, 0, true),
            (&[], 1 << 40, 0, true),
            (&[(0, 5), (10, 5)], 20, 10, true),
            (&[(0, 5), (5, 5), (10, 0)], 10, 10, true),
            (&[(0, 5), (4, 5)], 20, 10, false),
            (&[(10, 5), (0, 5)], 20, 10, false),
            (&[(0, 5)], 4, 5, false),
            (&[(0, 5)], 20, 6, false),
            (&[(u64::MAX, 5)], u64::MAX, 5, false),
            (&[], u64::MAX, 0, false),
        ] {
            assert_eq!(
                check(&segments(map), real_size, packed).is_ok(),
                is_good,
                "{map:?} {real_size} {packed}"
            );
        }
    }
}
