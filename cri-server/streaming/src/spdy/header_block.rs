//! Header blocks (SPDY/3 draft, section 2.6.10): name and value pairs in one zlib stream per direction.
//!
//! The stream goes on from block to block, so a block that cannot be read makes all later ones unreadable and ends
//! the session. What a block may become when inflated is bounded before it is inflated.

use std::fmt;

use flate2::{Decompress, FlushDecompress, Status};

use super::dictionary::{CHECKSUM, DICTIONARY};

/// The most that one block may inflate to. Clients send three short headers.
const MAX_BLOCK: usize = 16 << 10;
const MAX_HEADERS: u32 = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("cannot inflate the header block")]
    Inflate(#[source] flate2::DecompressError),
    #[error("the header block needs a dictionary other than SPDY's")]
    Dictionary,
    #[error("the header block is larger than {MAX_BLOCK} bytes")]
    TooLarge,
    #[error("the header block has {0} headers, more than {MAX_HEADERS}")]
    TooMany(u32),
    #[error("the header block ends within a header")]
    Truncated,
}

/// Names and values as sent.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of a header, whatever the case of its name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(known, _)| known.eq_ignore_ascii_case(name))?;
        // Several values are separated by NUL.
        value.split('\0').next()
    }

    fn parse(mut block: &[u8]) -> Result<Self, HeaderError> {
        let count = take_u32(&mut block)?;
        if count > MAX_HEADERS {
            return Err(HeaderError::TooMany(count));
        }
        (0..count)
            .map(|_| Ok((take_text(&mut block)?, take_text(&mut block)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn take_u32(block: &mut &[u8]) -> Result<u32, HeaderError> {
    let (head, rest) = block.split_first_chunk::<4>().ok_or(HeaderError::Truncated)?;
    *block = rest;
    Ok(u32::from_be_bytes(*head))
}

fn take_text(block: &mut &[u8]) -> Result<String, HeaderError> {
    let length = usize::try_from(take_u32(block)?).map_err(|_| HeaderError::Truncated)?;
    let (text, rest) = block.split_at_checked(length).ok_or(HeaderError::Truncated)?;
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The receiving direction.
pub(crate) struct HeaderReader {
    inflate: Decompress,
}

impl HeaderReader {
    pub(crate) fn new() -> Self {
        Self { inflate: Decompress::new(true) }
    }

    /// Reads one compressed block.
    pub(crate) fn read(&mut self, mut compressed: &[u8]) -> Result<Headers, HeaderError> {
        // One byte more than allowed, so that too much can be told from just enough.
        let mut block = Vec::with_capacity(MAX_BLOCK + 1);
        loop {
            let (read, written) = (self.inflate.total_in(), block.len());
            let result = self.inflate.decompress_vec(compressed, &mut block, FlushDecompress::Sync);
            let used = usize::try_from(self.inflate.total_in() - read).unwrap_or(usize::MAX);
            compressed = compressed.get(used..).unwrap_or_default();
            match result {
                Err(error) if error.needs_dictionary() == Some(CHECKSUM) => {
                    self.inflate.set_dictionary(&DICTIONARY).map_err(HeaderError::Inflate)?;
                    continue;
                }
                Err(error) if error.needs_dictionary().is_some() => return Err(HeaderError::Dictionary),
                Err(error) => return Err(HeaderError::Inflate(error)),
                Ok(Status::Ok | Status::BufError) => {}
                // No peer ends its stream before the connection; what follows would be a second stream.
                Ok(Status::StreamEnd) => return Headers::parse(&block),
            }
            if block.len() > MAX_BLOCK {
                return Err(HeaderError::TooLarge);
            }
            if compressed.is_empty() || (used == 0 && block.len() == written) {
                return Headers::parse(&block);
            }
        }
    }
}

impl fmt::Debug for HeaderReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderReader").finish_non_exhaustive()
    }
}

/// What our zlib stream begins with (RFC 1950): deflate with a window of 32 KiB, then the dictionary's checksum.
const STREAM_START: [u8; 6] = [0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2];

/// A header block without headers, as a stored deflate block (RFC 1951, section 3.2.4) of the four bytes that say
/// "none", and an empty one after it: readers, Go's among them, hand out what they have when they come to that.
const NO_HEADERS: [u8; 14] = [0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// The sending direction. A server has no headers to send, so it needs no compressor, which would cost a session
/// a quarter of a megabyte.
#[derive(Debug, Default)]
pub(crate) struct HeaderWriter {
    begun: bool,
}

impl HeaderWriter {
    /// The next block, which is empty like all of them.
    pub(crate) fn no_headers(&mut self) -> impl Iterator<Item = u8> {
        let start: &[u8] = if std::mem::replace(&mut self.begun, true) { &[] } else { &STREAM_START };
        start.iter().chain(&NO_HEADERS).copied()
    }
}

/// A client's sending direction: with headers, and really compressed.
#[cfg(test)]
pub(crate) struct HeaderCompressor(flate2::Compress);

#[cfg(test)]
impl HeaderCompressor {
    pub(crate) fn new() -> Self {
        let mut deflate = flate2::Compress::new(flate2::Compression::fast(), true);
        deflate.set_dictionary(&DICTIONARY).unwrap();
        Self(deflate)
    }

    /// One block, up to a flush, so that the peer can read it at once.
    pub(crate) fn write(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        let mut push = |length: usize, text: &str| {
            block.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        };
        push(headers.len(), "");
        for (name, value) in headers {
            push(name.len(), name);
            push(value.len(), value);
        }
        let mut compressed = Vec::with_capacity(block.len() + 1000);
        self.0.compress_vec(&block, &mut compressed, flate2::FlushCompress::Sync).unwrap();
        compressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_follow_each_other_in_one_stream() {
        let (mut writer, mut reader) = (HeaderCompressor::new(), HeaderReader::new());
        for round in 0..200 {
            let port = round.to_string();
            let sent = [("streamtype", "error"), ("port", port.as_str()), ("requestid", "12")];
            let headers = reader.read(&writer.write(&sent)).unwrap();
            assert_eq!(headers.get("streamType"), Some("error"));
            assert_eq!(headers.get("port"), Some(port.as_str()));
            assert_eq!(headers.get("host"), None);
            assert_eq!(reader.read(&writer.write(&[])).unwrap(), Headers::default());
        }
    }

    #[test]
    fn our_own_blocks_are_zlib_with_the_dictionary() {
        let (mut writer, mut reader) = (HeaderWriter::default(), HeaderReader::new());
        for _ in 0..1000 {
            let block: Vec<u8> = writer.no_headers().collect();
            assert_eq!(reader.read(&block).unwrap(), Headers::default());
        }
        assert_eq!(STREAM_START[2..], CHECKSUM.to_be_bytes());
    }

    #[test]
    fn a_bomb_is_refused_before_it_unfolds() {
        let (mut writer, mut reader) = (HeaderCompressor::new(), HeaderReader::new());
        let value = "x".repeat(1 << 20);
        let compressed = writer.write(&[("a", &value)]);
        assert!(compressed.len() < 16 << 10, "{}", compressed.len());
        assert!(matches!(reader.read(&compressed), Err(HeaderError::TooLarge)));
    }

    #[test]
    fn the_largest_block_passes() {
        let (mut writer, mut reader) = (HeaderCompressor::new(), HeaderReader::new());
        let value = "x".repeat(MAX_BLOCK - 13);
        assert!(reader.read(&writer.write(&[("a", &value)])).is_ok());
        let value = "x".repeat(MAX_BLOCK - 12);
        assert!(matches!(reader.read(&writer.write(&[("a", &value)])), Err(HeaderError::TooLarge)));
    }

    #[test]
    fn lies_about_lengths_are_found() {
        for block in [&[0, 0, 0, 1, 255, 255, 255, 255][..], &[0, 0, 0, 1, 0, 0, 0, 1, b'a'], &[0, 0]] {
            assert!(matches!(Headers::parse(block), Err(HeaderError::Truncated)), "{block:?}");
        }
        assert!(matches!(Headers::parse(&[0, 0, 1, 0]), Err(HeaderError::TooMany(256))));
    }

    #[test]
    fn another_dictionary_is_refused() {
        let mut deflate = flate2::Compress::new(flate2::Compression::fast(), true);
        deflate.set_dictionary(b"not the one of the draft").unwrap();
        let mut compressed = Vec::with_capacity(64);
        deflate.compress_vec(&[0; 4], &mut compressed, flate2::FlushCompress::Sync).unwrap();
        assert!(matches!(HeaderReader::new().read(&compressed), Err(HeaderError::Dictionary)));
    }
}
