//! What kernels and their modules are compressed with, told by the first bytes, unpacked within a bound.
//!
//! The kernel's own table is in `lib/decompress.c`. bzip2, LZMA (the format before xz) and LZO are named and refused: no
//! distribution's kernel for virtual machines uses them, and each would be one more decoder that reads foreign bytes.

use std::io::{self, Read};

use thiserror::Error;

/// Longest dictionary that an xz stream may ask for, KiB. `xz -9` takes 64 MiB; the kernel's script asks for 128 MiB at most.
const XZ_MEMORY: u32 = 160 << 10;

/// Why data could not be unpacked.
#[derive(Debug, Error)]
pub enum DecompressError {
    /// None of the known first bytes.
    #[error("it begins like no compression that kernels use (gzip, xz, lz4, zstd)")]
    Unknown,
    /// Known, but not understood here.
    #[error(
        "it is compressed with {0}, which is not supported; take a kernel compressed with gzip, xz, lz4 or zstd"
    )]
    Unsupported(&'static str),
    /// More came out than allowed.
    #[error("it unpacks to more than {0} bytes")]
    TooLong(u64),
    /// Broken data.
    #[error("it is damaged")]
    Damaged(#[source] io::Error),
}

/// A compression that can be unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    /// The format of `lz4 -l`, which the kernel uses: blocks of 8 MiB, each with its length before it.
    Lz4Legacy,
    Zstd,
}

impl Compression {
    /// Tells the compression by the first bytes.
    pub(crate) fn of(data: &[u8]) -> Result<Self, DecompressError> {
        const KNOWN: [(&[u8], Compression); 4] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        const REFUSED: [(&[u8], &str); 3] =
            [(b"BZh", "bzip2"), (b"\x5d\0\0", "LZMA"), (b"\x89LZO\0\x0d\x0a\x1a\x0a", "LZO")];
        if let Some((_, known)) = KNOWN.iter().find(|(magic, _)| data.starts_with(magic)) {
            return Ok(*known);
        }
        match REFUSED.iter().find(|(magic, _)| data.starts_with(magic)) {
            Some((_, name)) => Err(DecompressError::Unsupported(name)),
            None => Err(DecompressError::Unknown),
        }
    }
}

/// Unpacks `data`, of which nothing may follow the stream but what `compression` ignores; at most `limit` bytes come out.
pub(crate) fn decompress(
    compression: Compression,
    data: &[u8],
    limit: u64,
) -> Result<Vec<u8>, DecompressError> {
    match compression {
        Compression::Gzip => read(flate2::read::GzDecoder::new(data), limit),
        Compression::Xz => read(lzma_rust2::XzReader::new_mem_limit(data, false, XZ_MEMORY), limit),
        Compression::Lz4Legacy => lz4_legacy(data, limit),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(data).map_err(DecompressError::Damaged)?;
            read(decoder.single_frame(), limit)
        }
    }
}

fn read(stream: impl Read, limit: u64) -> Result<Vec<u8>, DecompressError> {
    let mut out = Vec::new();
    stream.take(limit.saturating_add(1)).read_to_end(&mut out).map_err(DecompressError::Damaged)?;
    if out.len() as u64 > limit { Err(DecompressError::TooLong(limit)) } else { Ok(out) }
}

/// The legacy frame of `lz4 -l` (doc/lz4_Frame_format.md, "Legacy frame"): the magic, then blocks: four bytes of
/// compressed length, little endian, and a raw block of 8 MiB at most. The kernel's decoder (`lib/decompress_unlz4.c`) also takes
/// several frames one after the other.
fn lz4_legacy(data: &[u8], limit: u64) -> Result<Vec<u8>, DecompressError> {
    const BLOCK: usize = 8 << 20;
    const MAGIC: [u8; 4] = *b"\x02\x21\x4c\x18";
    let damaged = |text: &str| DecompressError::Damaged(io::Error::new(io::ErrorKind::InvalidData, text));
    let mut out = Vec::new();
    // One buffer for all blocks: a hostile stream has millions of tiny ones.
    let mut buffer = vec![0; BLOCK];
    let mut rest = data;
    while !rest.is_empty() {
        let (length, after) =
            rest.split_first_chunk::<4>().ok_or_else(|| damaged("a block has no length"))?;
        rest = after;
        if *length == MAGIC {
            continue;
        }
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 {
            break;
        }
        let (block, after) = rest.split_at_checked(length).ok_or_else(|| damaged("a block is cut off"))?;
        rest = after;
        let written = lz4_flex::block::decompress_into(block, &mut buffer)
            .map_err(|error| DecompressError::Damaged(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        if (out.len() + written) as u64 > limit {
            return Err(DecompressError::TooLong(limit));
        }
        out.extend_from_slice(&buffer[..written]);
    }
    Ok(out)
}
