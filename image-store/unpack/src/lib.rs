//! A layer's tar becomes a directory. The tar is hostile: nothing outside the target is ever touched.

use std::io::Read;
use std::os::fd::BorrowedFd;

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
    /// Sum of all file sizes, bytes.
    pub bytes: u64,
    /// Number of entries.
    pub entries: u64,
}

/// Why a layer was refused or could not be written.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct UnpackError;

/// Reads `source` to its end and unpacks it below `target`, an empty directory, in overlayfs form: a whiteout `.wh.NAME`
/// becomes a 0/0 character device, `.wh..wh..opq` the xattr `trusted.overlay.opaque=y`.
pub fn unpack(
    _source: impl Read,
    _compression: Compression,
    _target: BorrowedFd<'_>,
    _limits: Limits,
) -> Result<Unpacked, UnpackError> {
    todo!()
}
