//! Images for virtual machines: the files of each layer in one data blob, and per image one small EROFS file system that finds them there.
//!
//! | file | idea |
//! |---|---|
//! | `node.rs` | what an image says about a file |
//! | `layer.rs`, `blob.rs` | a layer's tree, read once: its index and its data blob |
//! | `index.rs` | the files of a layer in a stream |
//! | `merge.rs` | the tree that overlayfs would show of the layers |
//! | `image.rs`, `space.rs` | that tree as EROFS metadata; where in it things are put |
//! | `inode.rs`, `directory.rs`, `superblock.rs` | what is on the disk, byte by byte |
//!
//! # Layout
//!
//! A **data blob** holds the contents of a layer's regular files and nothing else: each file begins at a block of 4096 bytes, its content
//! is contiguous, what is left of its last block is zero. A file with holes has a chunk of blocks for each chunk of it that is not a hole
//! altogether. Nothing in a blob says where it will be seen, so all images with that layer share it.
//!
//! A **metadata image** is an EROFS (superblock, inodes, directories) whose files have absolute block numbers, counted from the beginning
//! of the metadata, on behalf of one address range in which the metadata comes first and the blobs follow, in the order of the image's
//! layers, lowest first, nothing between them. All of these files are whole blocks long, so
//!
//! ```text
//! address of blob i = length of the metadata + sum of the lengths of the blobs before i
//! ```
//!
//! A blob of no length takes no room. What comes behind the last one does not matter (a pmem device is padded to 2 MiB).
//!
//! Linux has mounted this since 5.15 (`fs/erofs/erofs_fs.h`): there is no compression, no table of devices (6.1 would want a block device
//! for each entry), no content of files beside inodes, so every file can be mapped with `-o dax`. Directories and symlinks, which are read
//! through the page cache in any case, lie behind their inodes where they fit.
//!
//! # Invariants
//!
//! The same layers give the same bytes. Memory does not grow with the number of files but with the widest directories on the way to one,
//! and with the number of hard-linked files. Numbers read from an index are checked; a damaged one is an error.

mod blob;
mod directory;
mod image;
mod index;
mod inode;
mod layer;
mod merge;
mod node;
mod space;
mod superblock;

pub use image::{Layout, Output, write_image};
pub use index::{IndexWriter, Record, Summary};
pub use layer::write_layer;
pub use merge::{Event, Merge};
pub use node::{Content, HOLE, Kind, Node, Time, Xattr};

/// Bytes in a block.
pub const BLOCK: u64 = 4096;
/// The same as a length in memory.
const BLOCK_BYTES: usize = 4096;

/// The most chunks that a file with holes may be made of: its map is kept in memory.
pub const CHUNKS_MAX: u64 = 1 << 22;

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// Reading an index or writing an image.
    #[error("cannot read or write a part of an image for virtual machines")]
    Io(#[from] std::io::Error),
    /// Not an index, or not all of it.
    #[error("the index of a layer is damaged: {0}")]
    Damaged(&'static str),
    /// More than EROFS has room for.
    #[error("{what} is more than an EROFS image has room for ({limit}); use the form for virtio-fs")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much is possible.
        limit: u64,
    },
}

/// Blocks for so many bytes.
pub fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}
