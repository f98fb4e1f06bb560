//! The content of a directory: in each block first the entries (`struct erofs_dirent`, 12 bytes) in the order of their names, then the names.
//! A name ends where the next begins, the last one of a block at its end or at the first zero.

use crate::BLOCK_BYTES;

const ENTRY: usize = 12;
const DIRECTORY: u8 = 2;

/// An entry.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) name: Vec<u8>,
    pub(crate) nid: u64,
    pub(crate) entry_type: u8,
}

/// A directory's content, but for the numbers of itself and of the one above it, which are not known yet.
#[derive(Debug)]
pub(crate) struct Content {
    /// All but the last block.
    pub(crate) full: Vec<u8>,
    /// The last block, as far as it is used: never empty.
    pub(crate) last: Vec<u8>,
    /// Where the number of `.` is to be written.
    pub(crate) own: usize,
    /// Where that of `..` is to be written.
    pub(crate) above: usize,
}

/// Lays out what is in a directory besides `.` and `..`; `children` are in the order of their names.
pub(crate) fn content(children: &[Child]) -> Content {
    let dots = |name: &[u8]| Child { name: name.to_vec(), nid: 0, entry_type: DIRECTORY };
    let (own, above) = (dots(b"."), dots(b".."));
    // `!` and some others come before a dot; nothing comes between one and two.
    let before = children.partition_point(|child| child.name < own.name);
    let between = children.partition_point(|child| child.name < above.name);
    let entries = || {
        let (head, rest) = children.split_at(before);
        let (middle, tail) = rest.split_at(between - before);
        head.iter().chain([&own]).chain(middle).chain([&above]).chain(tail)
    };
    let mut content = Content { full: Vec::new(), last: Vec::new(), own: 0, above: 0 };
    let mut block: Vec<&Child> = Vec::new();
    let mut used = 0;
    for entry in entries() {
        let length = ENTRY + entry.name.len();
        if used + length > BLOCK_BYTES {
            content.push(&block, true);
            block.clear();
            used = 0;
        }
        used += length;
        block.push(entry);
    }
    content.push(&block, false);
    content
}

impl Content {
    fn push(&mut self, entries: &[&Child], is_full: bool) {
        let begin = self.full.len();
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let mut name_at = entries.len() * ENTRY;
        for entry in entries {
            match entry.name.as_slice() {
                b"." => self.own = begin + block.len(),
                b".." => self.above = begin + block.len(),
                _ => {}
            }
            block.extend(entry.nid.to_le_bytes());
            block.extend(u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
            block.extend([entry.entry_type, 0]);
            name_at += entry.name.len();
        }
        for entry in entries {
            block.extend(&entry.name);
        }
        if is_full {
            block.resize(BLOCK_BYTES, 0);
            self.full.extend(block);
        } else {
            self.last = block;
        }
    }
}
