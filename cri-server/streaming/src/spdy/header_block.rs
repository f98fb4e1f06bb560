//! Header blocks (SPDY/3 draft, section 2.6.10): name and value pairs in one zlib stream per direction.
//!
//! The stream goes on from block to block, so a block that cannot be read makes all later ones unreadable and ends
//! the session. What a block may become when inflated is bounded before it is inflated.

use std::fmt;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

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

/// The sending direction.
pub(crate) struct HeaderWriter {
    deflate: Compress,
}

impl HeaderWriter {
    pub(crate) fn new() -> Self {
        let mut deflate = Compress::new(Compression::fast(), true);
        // Fails only on a stream that was used already.
        let accepted = deflate.set_dictionary(&DICTIONARY);
        debug_assert!(accepted.is_ok());
        Self { deflate }
    }

    /// Compresses one block, up to a flush, so that the peer can read it at once.
    pub(crate) fn write(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        push_length(&mut block, headers.len());
        for (name, value) in headers {
            push_length(&mut block, name.len());
            block.extend_from_slice(name.as_bytes());
            push_length(&mut block, value.len());
            block.extend_from_slice(value.as_bytes());
        }
        let mut compressed = Vec::with_capacity(64);
        let start = self.deflate.total_in();
        loop {
            let used = usize::try_from(self.deflate.total_in() - start).unwrap_or(block.len());
            let rest = block.get(used..).unwrap_or_default();
            let status = self.deflate.compress_vec(rest, &mut compressed, FlushCompress::Sync);
            // The flush is complete when there was room left over (zlib's deflate()).
            if status.is_err() || (compressed.len() < compressed.capacity()) {
                return compressed;
            }
            compressed.reserve(compressed.capacity());
        }
    }
}

fn push_length(block: &mut Vec<u8>, length: usize) {
    block.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
}

impl fmt::Debug for HeaderWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeaderWriter").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_follow_each_other_in_one_stream() {
        let (mut writer, mut reader) = (HeaderWriter::new(), HeaderReader::new());
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
    fn a_bomb_is_refused_before_it_unfolds() {
        let (mut writer, mut reader) = (HeaderWriter::new(), HeaderReader::new());
        let value = "x".repeat(1 << 20);
        let compressed = writer.write(&[("a", &value)]);
        assert!(compressed.len() < 16 << 10, "{}", compressed.len());
        assert!(matches!(reader.read(&compressed), Err(HeaderError::TooLarge)));
    }

    #[test]
    fn the_largest_block_passes() {
        let (mut writer, mut reader) = (HeaderWriter::new(), HeaderReader::new());
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
        let mut deflate = Compress::new(Compression::fast(), true);
        deflate.set_dictionary(b"not the one of the draft").unwrap();
        let mut compressed = Vec::with_capacity(64);
        deflate.compress_vec(&[0; 4], &mut compressed, FlushCompress::Sync).unwrap();
        assert!(matches!(HeaderReader::new().read(&compressed), Err(HeaderError::Dictionary)));
    }
}
