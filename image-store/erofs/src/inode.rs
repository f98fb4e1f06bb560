//! An inode with its extended attributes, as `struct erofs_inode_extended`, `erofs_xattr_ibody_header` and `erofs_xattr_entry` in Linux'
//! `fs/erofs/erofs_fs.h` lay them out.

use crate::ErofsError;
use crate::node::{Kind, Node, Xattr};

/// Inodes begin at multiples of this; a multiple of it is an inode's number (nid).
pub(crate) const SLOT: u64 = 32;
/// The same as a length in memory.
pub(crate) const SLOT_BYTES: usize = 32;
/// Length of an inode without attributes.
pub(crate) const SIZE: usize = 64;
/// Where the number of links stands in it.
pub(crate) const LINKS: u64 = 0x2c;

/// How the content of a file is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// In blocks.
    FlatPlain = 0,
    /// In blocks, the last of them behind the inode.
    FlatInline = 2,
    /// In chunks, by a map behind the inode.
    ChunkBased = 4,
}

/// What an inode says beside what its [`Node`] knows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields {
    pub(crate) layout: DataLayout,
    pub(crate) size: u64,
    /// First block, format of the chunks, or device number.
    pub(crate) union: u32,
    /// For stat(2).
    pub(crate) number: u32,
    pub(crate) links: u32,
}

/// The inode with its attributes.
pub(crate) fn encode(node: &Node, fields: Fields) -> Result<Vec<u8>, ErofsError> {
    let attributes = attributes(&node.xattrs)?;
    let mut inode = Vec::with_capacity(SIZE + attributes.len());
    // Bit 0: the extended form.
    inode.extend((1 | (fields.layout as u16) << 1).to_le_bytes());
    inode.extend(attribute_count(attributes.len())?.to_le_bytes());
    inode.extend((kind_bits(&node.kind) | (node.mode & 0o7777)).to_le_bytes());
    inode.extend([0; 2]);
    inode.extend(fields.size.to_le_bytes());
    inode.extend(fields.union.to_le_bytes());
    inode.extend(fields.number.to_le_bytes());
    inode.extend(node.uid.to_le_bytes());
    inode.extend(node.gid.to_le_bytes());
    inode.extend(node.mtime.seconds.to_le_bytes());
    inode.extend(node.mtime.nanoseconds.to_le_bytes());
    inode.extend(fields.links.to_le_bytes());
    inode.extend([0; 16]);
    inode.extend(attributes);
    Ok(inode)
}

/// S_IFMT bits.
fn kind_bits(kind: &Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        // A whiteout is a device to overlayfs, and never comes here.
        Kind::CharDevice { .. } | Kind::Whiteout => 0o020_000,
        Kind::Directory { .. } => 0o040_000,
        Kind::BlockDevice { .. } => 0o060_000,
        Kind::File { .. } => 0o100_000,
        Kind::Symlink { .. } => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}

/// The type in a directory entry: Linux' `FT_*`.
pub(crate) fn entry_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory { .. } => 2,
        Kind::CharDevice { .. } | Kind::Whiteout => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink { .. } => 7,
    }
}

/// A device's number as Linux' `new_encode_dev` packs it.
pub(crate) fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// The number that stands for an attribute's prefix, and what is left of its name.
pub(crate) fn attribute(name: &[u8]) -> Option<(u8, &[u8])> {
    const PREFIXES: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => {
            PREFIXES.iter().find_map(|&(number, prefix)| name.strip_prefix(prefix).map(|rest| (number, rest)))
        }
    }
}

/// A header of 12 bytes without shared attributes, then entries at multiples of 4; nothing at all without attributes.
fn attributes(xattrs: &[Xattr]) -> Result<Vec<u8>, ErofsError> {
    const WHAT: &str = "an extended attribute";
    let mut body = Vec::new();
    for Xattr { name, value } in xattrs {
        let (prefix, rest) =
            attribute(name).ok_or(ErofsError::Damaged("an attribute has no known prefix"))?;
        if body.is_empty() {
            body.resize(12, 0);
        }
        let too_large = |limit: u64| move |_| ErofsError::TooLarge { what: WHAT, limit };
        body.push(u8::try_from(rest.len()).map_err(too_large(u8::MAX.into()))?);
        body.push(prefix);
        body.extend(u16::try_from(value.len()).map_err(too_large(u16::MAX.into()))?.to_le_bytes());
        body.extend(rest);
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    Ok(body)
}

/// `i_xattr_icount`: 1 for the header, 1 more for every 4 bytes behind it.
fn attribute_count(length: usize) -> Result<u16, ErofsError> {
    let words = length.checked_sub(12).map_or(0, |rest| rest / 4 + 1);
    let what = "all extended attributes of a file together";
    u16::try_from(words).map_err(|_| ErofsError::TooLarge { what, limit: u64::from(u16::MAX) * 4 })
}
