//! A layer's index: all its files in a stream, depth first, the names of a directory in the order of their bytes. It is made together with
//! the data blob and never changed. Behind the files come the blob's length and digest, and a digest of everything before it.
//!
//! All numbers are little-endian. A file is a tag, its name behind a length byte, owner and the rest, then what only its kind has; a directory's
//! files follow it, and [`END`] ends it.

use std::io::{Read, Seek, SeekFrom, Write};

use sha2::{Digest, Sha256};

use crate::node::{Content, Kind, Node, Time, Xattr};
use crate::{BLOCK, CHUNKS_MAX, ErofsError, blocks_of};

const MAGIC: &[u8; 8] = b"pvindex1";
/// Length of [`Summary`] on the disk, with the digest behind it.
const TRAILER: i64 = 4 + 8 + 32 + 32;
const NO_LINK: u32 = u32::MAX;

const END: u8 = 0;
const PLAIN: u8 = 1;
const CHUNKS: u8 = 2;
const DIRECTORY: u8 = 3;
const OPAQUE: u8 = 4;
const SYMLINK: u8 = 5;
const CHAR_DEVICE: u8 = 6;
const BLOCK_DEVICE: u8 = 7;
const FIFO: u8 = 8;
const SOCKET: u8 = 9;
const WHITEOUT: u8 = 10;

/// One step through a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A file; if it is a directory, the files in it follow. The root's name is empty.
    File {
        /// Name in its directory.
        name: Vec<u8>,
        /// What is there.
        node: Node,
    },
    /// The end of a directory.
    Leave,
}

/// What an index says at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Length of the data blob, in blocks.
    pub blocks: u32,
    /// How many files there are.
    pub entries: u64,
    /// SHA-256 of the data blob.
    pub blob: [u8; 32],
    /// SHA-256 of the index up to here.
    pub index: [u8; 32],
}

impl Summary {
    /// Reads it from the end of an index.
    pub fn read(index: &mut (impl Read + Seek)) -> Result<Self, ErofsError> {
        index.seek(SeekFrom::End(-TRAILER)).map_err(|_| ErofsError::Damaged("it is too short"))?;
        let fixed = |index: &mut dyn Read| {
            let mut bytes = [0; 32];
            index.read_exact(&mut bytes).map(|()| bytes)
        };
        let mut head = [0; 12];
        index.read_exact(&mut head)?;
        let (blocks, entries) = head.split_at(4);
        let summary = Self {
            blocks: u32::from_le_bytes(blocks.try_into().unwrap_or_default()),
            entries: u64::from_le_bytes(entries.try_into().unwrap_or_default()),
            blob: fixed(index)?,
            index: fixed(index)?,
        };
        index.rewind()?;
        Ok(summary)
    }
}

/// Hashes what goes through.
struct Hashing<S> {
    stream: S,
    hasher: Sha256,
}

impl<W: Write> Hashing<W> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hasher.update(bytes);
        self.stream.write_all(bytes)
    }
}

impl<R: Read> Hashing<R> {
    fn get<const N: usize>(&mut self) -> Result<[u8; N], ErofsError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ErofsError> {
        self.stream.read_exact(bytes)?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// At most 64 KiB at once are taken on the word of a number that may be wrong.
    fn bytes(&mut self, length: usize) -> Result<Vec<u8>, ErofsError> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let begin = bytes.len();
            bytes.resize(length.min(begin + (64 << 10)), 0);
            self.fill(&mut bytes[begin..])?;
        }
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, ErofsError> {
        Ok(self.get::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, ErofsError> {
        self.get().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, ErofsError> {
        self.get().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ErofsError> {
        self.get().map(u64::from_le_bytes)
    }
}

/// Writes an index. The files have to come in the order that the index has.
pub struct IndexWriter<W> {
    stream: Hashing<W>,
    entries: u64,
}

impl<W: Write> IndexWriter<W> {
    /// Begins one.
    pub fn new(stream: W) -> std::io::Result<Self> {
        let mut stream = Hashing { stream, hasher: Sha256::new() };
        stream.put(MAGIC)?;
        Ok(Self { stream, entries: 0 })
    }

    /// Adds a file: the root first, with an empty name.
    pub fn file(&mut self, name: &[u8], node: &Node) -> Result<(), ErofsError> {
        self.entries += 1;
        let tag = match &node.kind {
            Kind::File { content: Content::Plain { .. }, .. } => PLAIN,
            Kind::File { content: Content::Chunks { .. }, .. } => CHUNKS,
            Kind::Directory { opaque: false } => DIRECTORY,
            Kind::Directory { opaque: true } => OPAQUE,
            Kind::Symlink { .. } => SYMLINK,
            Kind::CharDevice { .. } => CHAR_DEVICE,
            Kind::BlockDevice { .. } => BLOCK_DEVICE,
            Kind::Fifo => FIFO,
            Kind::Socket => SOCKET,
            Kind::Whiteout => WHITEOUT,
        };
        let mut bytes = vec![tag];
        push_short(&mut bytes, name, "the length of a name")?;
        if tag != WHITEOUT {
            bytes.extend(node.mode.to_le_bytes());
            bytes.extend(node.uid.to_le_bytes());
            bytes.extend(node.gid.to_le_bytes());
            bytes.extend(node.mtime.seconds.to_le_bytes());
            bytes.extend(node.mtime.nanoseconds.to_le_bytes());
            bytes.extend(node.link.unwrap_or(NO_LINK).to_le_bytes());
            push_xattrs(&mut bytes, &node.xattrs)?;
        }
        match &node.kind {
            Kind::File { size, content } => {
                bytes.extend(size.to_le_bytes());
                match content {
                    Content::Plain { block } => bytes.extend(block.to_le_bytes()),
                    Content::Chunks { bits, blocks } => {
                        bytes.push(*bits);
                        bytes.extend(blocks.iter().flat_map(|block| block.to_le_bytes()));
                    }
                }
            }
            Kind::Symlink { to } => {
                let limit = u64::from(u16::MAX);
                let length = u16::try_from(to.len())
                    .map_err(|_| ErofsError::TooLarge { what: "a symlink's target", limit })?;
                bytes.extend(length.to_le_bytes());
                bytes.extend(to);
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                bytes.extend(major.to_le_bytes());
                bytes.extend(minor.to_le_bytes());
            }
            Kind::Directory { .. } | Kind::Fifo | Kind::Socket | Kind::Whiteout => {}
        }
        Ok(self.stream.put(&bytes)?)
    }

    /// Ends a directory.
    pub fn leave(&mut self) -> Result<(), ErofsError> {
        Ok(self.stream.put(&[END])?)
    }

    /// Ends the index; the data blob has so many blocks and this digest.
    pub fn finish(mut self, blocks: u32, blob: [u8; 32]) -> Result<(W, Summary), ErofsError> {
        self.stream.put(&blocks.to_le_bytes())?;
        self.stream.put(&self.entries.to_le_bytes())?;
        self.stream.put(&blob)?;
        let index: [u8; 32] = self.stream.hasher.finalize().into();
        self.stream.stream.write_all(&index)?;
        self.stream.stream.flush()?;
        Ok((self.stream.stream, Summary { blocks, entries: self.entries, blob, index }))
    }
}

fn push_short(bytes: &mut Vec<u8>, text: &[u8], what: &'static str) -> Result<(), ErofsError> {
    let length = u8::try_from(text.len()).map_err(|_| ErofsError::TooLarge { what, limit: 255 })?;
    bytes.push(length);
    bytes.extend(text);
    Ok(())
}

fn push_xattrs(bytes: &mut Vec<u8>, xattrs: &[Xattr]) -> Result<(), ErofsError> {
    const WHAT: &str = "the extended attributes of a file";
    let limit = u64::from(u16::MAX);
    let too_large = |_| ErofsError::TooLarge { what: WHAT, limit };
    bytes.extend(u16::try_from(xattrs.len()).map_err(too_large)?.to_le_bytes());
    for Xattr { name, value } in xattrs {
        push_short(bytes, name, WHAT)?;
        bytes.extend(u16::try_from(value.len()).map_err(too_large)?.to_le_bytes());
        bytes.extend(value);
    }
    Ok(())
}

/// Reads an index from its beginning.
pub(crate) struct IndexReader<R> {
    stream: Hashing<R>,
    depth: usize,
    begun: bool,
}

impl<R: Read> IndexReader<R> {
    pub(crate) fn new(stream: R) -> Result<Self, ErofsError> {
        let mut stream = Hashing { stream, hasher: Sha256::new() };
        if &stream.get()? != MAGIC {
            return Err(ErofsError::Damaged("it does not begin like one"));
        }
        Ok(Self { stream, depth: 0, begun: false })
    }

    /// The next record; `None` after the end of the root, when the digest was compared too.
    pub(crate) fn next(&mut self) -> Result<Option<Record>, ErofsError> {
        if self.begun && self.depth == 0 {
            return Ok(None);
        }
        let tag = self.stream.u8()?;
        if tag == END {
            self.depth = self.depth.checked_sub(1).ok_or(ErofsError::Damaged("it has no root"))?;
            if self.depth == 0 {
                self.verify()?;
            }
            return Ok(Some(Record::Leave));
        }
        let length = self.stream.u8()?.into();
        let name = self.stream.bytes(length)?;
        let node = self.node(tag)?;
        if self.begun == name.is_empty() || (!self.begun && !node.is_directory()) {
            return Err(ErofsError::Damaged("a file has no name"));
        }
        self.begun = true;
        if node.is_directory() {
            self.depth += 1;
        }
        Ok(Some(Record::File { name, node }))
    }

    fn verify(&mut self) -> Result<(), ErofsError> {
        self.stream.get::<{ 4 + 8 + 32 }>()?;
        let found: [u8; 32] = self.stream.hasher.clone().finalize().into();
        if self.stream.get::<32>()? == found {
            Ok(())
        } else {
            Err(ErofsError::Damaged("its digest is wrong"))
        }
    }

    fn node(&mut self, tag: u8) -> Result<Node, ErofsError> {
        if tag == WHITEOUT {
            return Ok(Node { kind: Kind::Whiteout, ..Node::default() });
        }
        let stream = &mut self.stream;
        let mut node = Node {
            mode: stream.u16()?,
            uid: stream.u32()?,
            gid: stream.u32()?,
            mtime: Time { seconds: stream.u64()?.cast_signed(), nanoseconds: stream.u32()? },
            link: Some(stream.u32()?).filter(|&link| link != NO_LINK),
            ..Node::default()
        };
        for _ in 0..stream.u16()? {
            let length = stream.u8()?.into();
            let name = stream.bytes(length)?;
            let length = stream.u16()?.into();
            node.xattrs.push(Xattr { name, value: stream.bytes(length)? });
        }
        node.kind = match tag {
            PLAIN => Kind::File { size: stream.u64()?, content: Content::Plain { block: stream.u32()? } },
            CHUNKS => {
                let (size, bits) = (stream.u64()?, stream.u8()?);
                let count = Some(bits)
                    .filter(|&bits| bits <= 31)
                    .map(|bits| blocks_of(size).div_ceil(1 << bits))
                    .filter(|&count| count <= CHUNKS_MAX && size <= u64::MAX - BLOCK)
                    .ok_or(ErofsError::Damaged("a file has too many chunks"))?;
                let bytes = stream.bytes(usize::try_from(count * 4).unwrap_or(usize::MAX))?;
                let blocks = bytes
                    .chunks_exact(4)
                    .map(|block| u32::from_le_bytes(block.try_into().unwrap_or_default()))
                    .collect();
                Kind::File { size, content: Content::Chunks { bits, blocks } }
            }
            DIRECTORY => Kind::Directory { opaque: false },
            OPAQUE => Kind::Directory { opaque: true },
            SYMLINK => {
                let length = stream.u16()?.into();
                Kind::Symlink { to: stream.bytes(length)? }
            }
            CHAR_DEVICE => Kind::CharDevice { major: stream.u32()?, minor: stream.u32()? },
            BLOCK_DEVICE => Kind::BlockDevice { major: stream.u32()?, minor: stream.u32()? },
            FIFO => Kind::Fifo,
            SOCKET => Kind::Socket,
            _ => return Err(ErofsError::Damaged("a file is of no known kind")),
        };
        Ok(node)
    }
}
