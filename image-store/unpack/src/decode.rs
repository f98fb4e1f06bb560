//! From the bytes of the registry to the bytes of the tar.

use std::cell::RefCell;
use std::io::{self, BufReader, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use crate::Compression;
use crate::error::UnpackError;

const READ_BUFFER: usize = 128 << 10;
/// 128 MiB, what `zstd --ultra -22` asks for; a frame that wants more would make us allocate it.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Reads a source and decompresses it.
pub(crate) struct Decoded<R: Read> {
    stage: Stage<R>,
    /// Shared with the source below the decoder.
    watch: Rc<RefCell<Watch>>,
}

enum Stage<R: Read> {
    Plain(Watched<R>),
    // Boxed: the decoders' states are large.
    Gzip(Box<MultiGzDecoder<BufReader<Watched<R>>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<Watched<R>>>>),
}

/// What was seen below the decoder.
#[derive(Default)]
struct Watch {
    hash: Sha256,
    /// The source's own error, which a decoder would mix up with its own.
    error: Option<io::Error>,
}

struct Watched<R> {
    source: R,
    watch: Rc<RefCell<Watch>>,
    /// A plain tar is hashed on the other side, once.
    hashed: bool,
}

impl<R: Read> Decoded<R> {
    pub(crate) fn new(source: R, compression: Compression) -> Result<Self, UnpackError> {
        let watch = Rc::new(RefCell::new(Watch::default()));
        let hashed = compression != Compression::None;
        let watched = Watched { source, watch: Rc::clone(&watch), hashed };
        let buffered = |watched| BufReader::with_capacity(READ_BUFFER, watched);
        let stage = match compression {
            Compression::None => Stage::Plain(watched),
            Compression::Gzip => Stage::Gzip(Box::new(MultiGzDecoder::new(buffered(watched)))),
            Compression::Zstd => {
                let failed = |source| UnpackError::Decompress { format: "zstd", source };
                let mut decoder =
                    zstd::stream::read::Decoder::with_buffer(buffered(watched)).map_err(failed)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(failed)?;
                Stage::Zstd(Box::new(decoder))
            }
        };
        Ok(Self { stage, watch })
    }

    /// Fills `buffer` as far as there is something.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let read = match &mut self.stage {
                Stage::Plain(source) => source.read(rest),
                Stage::Gzip(decoder) => decoder.read(rest),
                Stage::Zstd(decoder) => decoder.read(rest),
            };
            match read {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failure(error)),
            }
        }
        Ok(filled)
    }

    /// The digest of everything read, in hex; `None` for a plain tar, whose digest is that of the tar.
    pub(crate) fn finish(self) -> Option<String> {
        let hashed = !matches!(self.stage, Stage::Plain(_));
        let watch = std::mem::take(&mut *self.watch.borrow_mut());
        hashed.then(|| hex::encode(watch.hash.finalize()))
    }

    fn failure(&self, error: io::Error) -> UnpackError {
        if let Some(error) = self.watch.borrow_mut().error.take() {
            return UnpackError::Read(error);
        }
        match self.stage {
            Stage::Plain(_) => UnpackError::Read(error),
            Stage::Gzip(_) => UnpackError::Decompress { format: "gzip", source: error },
            Stage::Zstd(_) => UnpackError::Decompress { format: "zstd", source: error },
        }
    }
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.source.read(buffer) {
            Ok(length) => {
                if self.hashed {
                    self.watch.borrow_mut().hash.update(&buffer[..length]);
                }
                Ok(length)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.watch.borrow_mut().error = Some(error);
                Err(kind.into())
            }
        }
    }
}
