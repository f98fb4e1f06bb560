//! The layer's two byte streams, compressed and plain, each hashed by a thread of its own while this one goes on.
//!
//! A reader given by the caller need not be `Send`, so reading, decompressing and writing stay on the caller's
//! thread; a chunk of 256 KiB is shared with the hashing thread through an `Arc` and never copied.

use std::fmt::Write as _;
use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};
use zstd::stream::read::Decoder as ZstdDecoder;

use crate::Compression;
use crate::error::Fault;

const CHUNK: usize = 256 * 1024;
/// Chunks that may wait to be hashed: bounds memory to this, plus one in each hand, times 256 KiB.
const QUEUED: usize = 4;
/// Frames that need more than 128 MiB of history are refused, as `zstd -d` does by default.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Marks an error as the caller's reader's own, through whatever decompressor it passes.
#[derive(Debug, thiserror::Error)]
#[error("the source failed")]
pub(crate) struct SourceFailed(#[source] pub(crate) io::Error);

pub(crate) struct Source<R>(pub(crate) R);

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => error,
            _ => io::Error::other(SourceFailed(error)),
        })
    }
}

/// Decompresses; any number of gzip members or zstd frames after each other count as one stream.
pub(crate) enum Decompressor<R: BufRead> {
    None(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(Box<ZstdDecoder<'static, R>>),
}

impl<R: BufRead> Decompressor<R> {
    pub(crate) fn new(source: R, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(source),
            Compression::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(source))),
            Compression::Zstd => {
                let mut decoder = ZstdDecoder::with_buffer(source)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Self::Zstd(Box::new(decoder))
            }
        })
    }

    pub(crate) fn into_source(self) -> R {
        match self {
            Self::None(source) => source,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        }
    }
}

impl<R: BufRead> Read for Decompressor<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None(source) => source.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

struct Hasher {
    queue: SyncSender<(Arc<Vec<u8>>, usize)>,
    thread: JoinHandle<String>,
}

impl Hasher {
    fn start() -> io::Result<Self> {
        let (queue, chunks) = sync_channel::<(Arc<Vec<u8>>, usize)>(QUEUED);
        let thread = std::thread::Builder::new().name("layer-sha256".into()).spawn(move || {
            let mut hash = Sha256::new();
            for (chunk, length) in chunks {
                hash.update(&chunk[..length]);
            }
            let mut text = String::from("sha256:");
            for byte in hash.finalize() {
                let _ = write!(text, "{byte:02x}");
            }
            text
        })?;
        Ok(Self { queue, thread })
    }
}

/// A buffered reader that hashes what passes and ends with an error after `limit` bytes.
pub(crate) struct Hashed<R> {
    source: R,
    ring: [Arc<Vec<u8>>; QUEUED + 2],
    current: usize,
    position: usize,
    length: usize,
    total: u64,
    limit: u64,
    hasher: Option<Hasher>,
}

impl<R: Read> Hashed<R> {
    pub(crate) fn new(source: R, limit: u64, hash: bool) -> io::Result<Self> {
        let hasher = if hash { Some(Hasher::start()?) } else { None };
        let ring = std::array::from_fn(|_| Arc::new(Vec::new()));
        Ok(Self { source, ring, current: 0, position: 0, length: 0, total: 0, limit, hasher })
    }

    /// Bytes handed out so far.
    pub(crate) fn offset(&self) -> u64 {
        self.total - (self.length - self.position) as u64
    }

    pub(crate) fn into_source(self) -> R {
        self.source
    }

    /// Reads what is left, throws it away, and gives the hash of everything (`None` if not hashing).
    pub(crate) fn drain(&mut self) -> io::Result<Option<String>> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                break;
            }
            self.consume(length);
        }
        let Some(Hasher { queue, thread }) = self.hasher.take() else { return Ok(None) };
        drop(queue);
        thread.join().map(Some).map_err(|_| io::Error::other("the hashing thread panicked"))
    }

    fn refill(&mut self) -> io::Result<()> {
        self.current = (self.current + 1) % self.ring.len();
        (self.position, self.length) = (0, 0);
        let slot = &mut self.ring[self.current];
        if Arc::get_mut(slot).is_none_or(|chunk| chunk.is_empty()) {
            *slot = Arc::new(vec![0; CHUNK]);
        }
        let Some(chunk) = Arc::get_mut(slot) else { return Err(io::ErrorKind::OutOfMemory.into()) };
        let mut length = 0;
        while length < chunk.len() {
            match self.source.read(&mut chunk[length..]) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.total = self.total.saturating_add(length as u64);
        if self.total > self.limit {
            return Err(io::Error::other(Fault::TooLarge { what: "the tar", limit: self.limit }));
        }
        self.length = length;
        if let Some(hasher) = &self.hasher
            && length > 0
        {
            let chunk = (Arc::clone(&self.ring[self.current]), length);
            hasher.queue.send(chunk).map_err(|_| io::Error::other("the hashing thread is gone"))?;
        }
        Ok(())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: Read> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.length {
            self.refill()?;
        }
        Ok(&self.ring[self.current][self.position..self.length])
    }

    fn consume(&mut self, count: usize) {
        self.position = (self.position + count).min(self.length);
    }
}
