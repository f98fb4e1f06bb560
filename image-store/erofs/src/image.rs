//! The merged tree as the metadata of an EROFS. It is made twice: the first time only to see how long it gets, because the data blobs lie
//! behind it and their addresses stand in it.
//!
//! Directories are written when everything in them was, so that only the entries of those that are open are kept; the number of the directory
//! above is filled in later.

use std::collections::HashMap;
use std::io::{self, Read, Seek};

use sha2::{Digest, Sha256};

use crate::directory::{self, Child};
use crate::index::Summary;
use crate::inode::{self, DataLayout, Fields, LINKS, SLOT};
use crate::merge::{Event, Merge};
use crate::node::{Content, HOLE, Kind, Node};
use crate::space::Space;
use crate::superblock::Superblock;
use crate::{BLOCK, ErofsError, blocks_of};

/// The block number of a file that has no blocks.
const NO_BLOCK: u32 = u32::MAX;

/// Where a metadata image goes.
pub trait Output {
    /// Writes all of `bytes` at `offset`, and makes what was skipped zeros.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl Output for std::fs::File {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }
}

impl Output for Vec<u8> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let begin = usize::try_from(offset).map_err(io::Error::other)?;
        self.resize(self.len().max(begin + bytes.len()), 0);
        self[begin..begin + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// Only to see how long it gets.
struct Nowhere;

impl Output for Nowhere {
    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// How long the parts of an image are, in blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The metadata.
    pub metadata: u32,
    /// The data blobs, lowest layer first.
    pub blobs: Vec<u32>,
    /// Identifies the content.
    pub uuid: [u8; 16],
}

/// Merges layers, given as their indexes, lowest first, into a metadata image.
pub fn write_image<I: Read + Seek>(
    indexes: &mut [I],
    output: &mut impl Output,
) -> Result<Layout, ErofsError> {
    let mut hasher = Sha256::new_with_prefix(b"podvisor-erofs 1");
    let mut blobs = Vec::new();
    for index in &mut *indexes {
        let summary = Summary::read(index)?;
        hasher.update(summary.index);
        blobs.push(summary.blocks);
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hasher.finalize()[..16]);
    // RFC 9562: version 8, made in a way of one's own.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;

    let metadata = Writer::new(&mut Nowhere, &blobs, 0).write(indexes, uuid)?;
    Writer::new(output, &blobs, metadata).write(indexes, uuid)?;
    let limit = u64::from(u32::MAX);
    let metadata =
        u32::try_from(metadata).map_err(|_| ErofsError::TooLarge { what: "the metadata", limit })?;
    Ok(Layout { metadata, blobs, uuid })
}

/// A directory that is not finished.
struct Open {
    name: Vec<u8>,
    node: Node,
    children: Vec<Child>,
    /// Where the directories in it want the number of this one.
    wanted: Vec<u64>,
}

/// A layer's data blob.
#[derive(Clone, Copy)]
struct Blob {
    begin: u64,
    blocks: u64,
}

struct Writer<'a, O> {
    space: Space<'a, O>,
    blobs: Vec<Blob>,
    /// All blocks of the image, the metadata's included.
    total: u64,
    open: Vec<Open>,
    /// Files with several names, by layer and link: their number, and how many names were seen.
    links: HashMap<(usize, u32), (u64, u32)>,
    inodes: u32,
    has_chunks: bool,
}

impl<'a, O: Output> Writer<'a, O> {
    fn new(output: &'a mut O, blobs: &[u32], metadata: u64) -> Self {
        let mut total = metadata;
        let blobs = blobs.iter().map(|&blocks| {
            let blob = Blob { begin: total, blocks: blocks.into() };
            total += blob.blocks;
            blob
        });
        let blobs = blobs.collect();
        Self {
            space: Space::new(output),
            blobs,
            total,
            open: Vec::new(),
            links: HashMap::new(),
            inodes: 0,
            has_chunks: false,
        }
    }

    fn write<I: Read + Seek>(mut self, indexes: &mut [I], uuid: [u8; 16]) -> Result<u64, ErofsError> {
        let limit = u64::from(u32::MAX);
        let blocks = u32::try_from(self.total).ok().filter(|&blocks| blocks < NO_BLOCK);
        let blocks =
            blocks.ok_or(ErofsError::TooLarge { what: "the number of blocks of all layers", limit })?;
        for index in &mut *indexes {
            index.rewind()?;
        }
        let mut merge = Merge::new(indexes.iter_mut())?;
        let mut root = 0;
        while let Some(event) = merge.step()? {
            match event {
                Event::Enter { name, node } => {
                    if self.open.is_empty() {
                        root = self.space.root(inode::encode(&node, DIRECTORY)?.len())?;
                    }
                    self.open.push(Open { name, node, children: Vec::new(), wanted: Vec::new() });
                }
                Event::File { name, node, layer } => self.file(name, &node, layer)?,
                Event::Leave => self.leave(root)?,
            }
        }
        for (nid, count) in std::mem::take(&mut self.links).into_values().filter(|&(_, count)| count > 1) {
            self.space.patch(nid * SLOT + LINKS, &count.to_le_bytes())?;
        }
        let superblock = Superblock {
            root: u16::try_from(root / SLOT).unwrap_or_default(),
            inodes: self.inodes.into(),
            blocks,
            uuid,
            has_chunks: self.has_chunks,
        };
        self.space.finish(|first| superblock.write(first))
    }

    fn number(&mut self) -> Result<u32, ErofsError> {
        let limit = u64::from(u32::MAX);
        self.inodes =
            self.inodes.checked_add(1).ok_or(ErofsError::TooLarge { what: "the number of files", limit })?;
        Ok(self.inodes)
    }

    fn file(&mut self, name: Vec<u8>, node: &Node, layer: usize) -> Result<(), ErofsError> {
        let link = node.link.map(|link| (layer, link));
        let known = link.and_then(|link| self.links.get_mut(&link));
        let nid = if let Some((nid, count)) = known {
            *count += 1;
            *nid
        } else {
            let nid = self.inode(node, layer)? / SLOT;
            self.links.extend(link.map(|link| (link, (nid, 1))));
            nid
        };
        let entry_type = inode::entry_type(&node.kind);
        let directory = self.open.last_mut().ok_or(ErofsError::Damaged("a file is in no directory"))?;
        directory.children.push(Child { name, nid, entry_type });
        Ok(())
    }

    /// Adds what is no directory, and says where it is.
    fn inode(&mut self, node: &Node, layer: usize) -> Result<u64, ErofsError> {
        let mut fields =
            Fields { layout: DataLayout::FlatPlain, size: 0, union: 0, number: self.number()?, links: 1 };
        let mut behind = Vec::new();
        match &node.kind {
            Kind::File { size, content } => {
                fields.size = *size;
                match content {
                    Content::Plain { block } => {
                        fields.union = self.address(layer, *block, blocks_of(*size))?;
                    }
                    Content::Chunks { bits, blocks } => {
                        self.has_chunks = true;
                        fields.layout = DataLayout::ChunkBased;
                        // A map of plain block numbers, without devices.
                        fields.union = u32::from(*bits);
                        for (at, &block) in (0_u64..).zip(blocks) {
                            let rest = blocks_of(*size).saturating_sub(at << bits);
                            let address = match block {
                                HOLE => HOLE,
                                block => self.address(layer, block, rest.min(1 << bits))?,
                            };
                            behind.extend(address.to_le_bytes());
                        }
                    }
                }
            }
            Kind::Symlink { to } => {
                fields.size = to.len() as u64;
                fields.layout = DataLayout::FlatInline;
                let length = inode::encode(node, fields)?.len() + to.len();
                if length as u64 <= BLOCK {
                    fields.union = NO_BLOCK;
                    behind.clone_from(to);
                } else {
                    fields.layout = DataLayout::FlatPlain;
                    fields.union = block_number(self.space.data(to)?);
                }
            }
            &Kind::CharDevice { major, minor } | &Kind::BlockDevice { major, minor } => {
                fields.union = inode::device(major, minor);
            }
            Kind::Fifo | Kind::Socket | Kind::Whiteout | Kind::Directory { .. } => {}
        }
        let mut bytes = inode::encode(node, fields)?;
        bytes.extend(behind);
        self.space.inode(&bytes)
    }

    /// The block number in the image of a block in a layer's blob.
    fn address(&self, layer: usize, block: u32, count: u64) -> Result<u32, ErofsError> {
        if count == 0 {
            return Ok(NO_BLOCK);
        }
        let blob = self.blobs.get(layer).filter(|blob| u64::from(block) + count <= blob.blocks);
        let blob = blob.ok_or(ErofsError::Damaged("a file is not in the data blob"))?;
        Ok(block_number(blob.begin + u64::from(block)))
    }

    /// Writes the innermost open directory; `root` is where the inode of the root has to be.
    fn leave(&mut self, root: u64) -> Result<(), ErofsError> {
        let Some(Open { name, node, children, wanted }) = self.open.pop() else { return Ok(()) };
        let is_root = self.open.is_empty();
        let directory::Content { mut full, mut last, own, above } = directory::content(&children);
        let subdirectories = children.iter().filter(|child| child.entry_type == 2).count();
        let mut fields = Fields {
            layout: DataLayout::FlatInline,
            size: (full.len() + last.len()) as u64,
            number: self.number()?,
            links: u32::try_from(subdirectories + 2).unwrap_or(u32::MAX),
            ..DIRECTORY
        };
        let length = inode::encode(&node, fields)?.len();
        if is_root || (length + last.len()) as u64 > BLOCK {
            fields.layout = DataLayout::FlatPlain;
            full.append(&mut last);
        }
        let in_blocks = full.len();
        let data = if full.is_empty() { u64::from(NO_BLOCK) } else { self.space.data(&full)? };
        fields.union = block_number(data);
        let mut bytes = inode::encode(&node, fields)?;
        bytes.append(&mut last);
        let place = if is_root {
            self.space.patch(root, &bytes)?;
            root
        } else {
            self.space.inode(&bytes)?
        };
        let nid = place / SLOT;
        let find = |at: usize| match at.checked_sub(in_blocks) {
            Some(behind) => place + (length + behind) as u64,
            None => data * BLOCK + at as u64,
        };
        for at in wanted.into_iter().chain([find(own)]) {
            self.space.patch(at, &nid.to_le_bytes())?;
        }
        match self.open.last_mut() {
            Some(parent) => {
                parent.wanted.push(find(above));
                parent.children.push(Child { name, nid, entry_type: inode::entry_type(&node.kind) });
            }
            // Above the root is the root.
            None => self.space.patch(find(above), &nid.to_le_bytes())?,
        }
        Ok(())
    }
}

/// Of a directory; the rest is filled in.
const DIRECTORY: Fields = Fields { layout: DataLayout::FlatPlain, size: 0, union: 0, number: 0, links: 0 };

/// What is larger was refused: by [`Space`], and for all blocks together before anything was written.
fn block_number(block: u64) -> u32 {
    u32::try_from(block).unwrap_or(NO_BLOCK)
}
