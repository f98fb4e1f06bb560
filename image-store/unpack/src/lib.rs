//! A layer's tar becomes a directory. The tar is hostile: nothing outside the target is ever touched.
//!
//! | file | idea |
//! |---|---|
//! | `stream.rs` | the compressed and the plain stream, buffered, hashed by threads, decompressed |
//! | `header.rs`, `pax.rs`, `sparse.rs` | what the bytes of a header, a pax record, a sparse map mean |
//! | `archive.rs` | the stream as entries |
//! | `names.rs` | an entry's name as a place below the target, or a whiteout |
//! | `tree.rs` | finding and making directories with the target as the root; replacing; links |
//! | `unpacker.rs` | content, ownership, modes, attributes, times, limits |
//! | `remove.rs` | [`remove_tree`] |
//!
//! Invariants: every system call names a single component relative to a descriptor, except openat2(2) with
//! `RESOLVE_IN_ROOT`; the last component is never followed; no number from the tar is used unchecked; memory does not
//! grow with the layer beyond the directories' names (bounded) and one header. Nothing is synced: that is for the
//! caller, who makes the directory visible.
//!
//! Decisions. The `tar` crate works with path strings, so a link planted by one entry can redirect the next: written
//! anew instead. Global pax headers are ignored, and a missing end mark is accepted, because Go's archive/tar, which
//! scanners and the other runtimes use, does so, and all must see the same tree. The digests, not the end
//! mark, tell whether a stream is whole: compare them before using the result.

mod archive;
mod error;
mod header;
mod names;
mod pax;
mod remove;
mod sparse;
mod stream;
mod tree;
mod unpacker;

use std::io::Read;
use std::os::fd::BorrowedFd;

pub use error::{Fault, UnpackError, UnpackErrorKind};
pub use remove::{RemoveError, remove_tree};

use archive::Archive;
use error::Failure;
use stream::{Decompressor, Hashed, Source};
use unpacker::Unpacker;

/// How the stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Plain tar.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// `sha256:…` of the bytes read.
    pub digest: String,
    /// `sha256:…` of the tar inside.
    pub diff_id: String,
    /// Bytes of file content written.
    pub size: u64,
    /// Inodes made.
    pub inodes: u64,
}

/// Bounds on what a layer may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sum of all file sizes, holes included, bytes.
    pub bytes: u64,
    /// Number of entries, and of inodes (a name may imply directories that have no entry).
    pub entries: u64,
}

impl Limits {
    /// How long the uncompressed tar may be: content, and for each entry its headers and padding, some of them with
    /// many attributes. Against streams that expand to headers or trailing zeros without end.
    fn tar_bytes(self) -> u64 {
        self.bytes.saturating_add(self.entries.saturating_mul(8192)).saturating_add(1 << 20)
    }
}

/// Reads `source` to its end and unpacks it below `target`, an empty directory, in overlayfs form: a whiteout `.wh.NAME`
/// becomes a 0/0 character device, `.wh..wh..opq` the xattr `trusted.overlay.opaque=y`.
///
/// Needs root's capabilities (owners, device nodes, `trusted.` attributes). After an error, or if a digest is not the
/// expected one, what is below `target` is partial or wrong: remove it. Nothing is synced. To cancel, let `source` fail.
pub fn unpack(
    source: impl Read,
    compression: Compression,
    target: BorrowedFd<'_>,
    limits: Limits,
) -> Result<Unpacked, UnpackError> {
    let start = |source| UnpackError::System { action: "start unpacking to", path: ".".into(), source };
    // Without compression both digests are the same.
    let is_compressed = compression != Compression::None;
    let compressed = Hashed::new(Source(source), u64::MAX, is_compressed).map_err(start)?;
    let tar = Decompressor::new(compressed, compression).map_err(start)?;
    let mut archive = Archive::new(Hashed::new(tar, limits.tar_bytes(), true).map_err(start)?);
    let mut unpacker = Unpacker::new(target, limits);

    while let Some(entry) = archive.next().map_err(|failure| failure.at(b"", archive.offset()))? {
        let path = entry.path.clone();
        unpacker.place(entry, &mut archive).map_err(|failure| failure.at(&path, archive.offset()))?;
    }
    unpacker.finish().map_err(|(path, failure)| failure.at(&path, archive.offset()))?;

    let offset = archive.offset();
    let end = |error| Failure::Stream(error).at(b"", offset);
    let mut tar = archive.into_stream();
    let diff_id = tar.drain().map_err(end)?.unwrap_or_default();
    let mut compressed = tar.into_source().into_source();
    let digest = compressed.drain().map_err(end)?.unwrap_or_else(|| diff_id.clone());
    Ok(Unpacked { digest, diff_id, size: unpacker.written(), inodes: unpacker.inodes() })
}
