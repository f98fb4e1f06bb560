//! The uncompressed stream as the tar reader sees it: buffers from the other thread, hashed as they come in.

use std::sync::mpsc::{Receiver, Sender};

use sha2::{Digest, Sha256};

use crate::error::{TarProblem, UnpackError};

/// Sees every byte of the tar once, in order.
pub(crate) type Observer<'o> = dyn FnMut(&[u8]) + Send + 'o;

/// What goes from the decoding thread to this one.
#[derive(Debug)]
pub(crate) enum Message {
    Data(Vec<u8>),
    /// Everything came. Without it the stream was cut short by an error on the other side.
    End,
}

/// Why there are no more bytes.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The other thread failed and knows why.
    Source,
    /// This side failed.
    Failed(UnpackError),
}

impl From<UnpackError> for Stop {
    fn from(error: UnpackError) -> Self {
        Self::Failed(error)
    }
}

/// Reads buffers in order and gives them back.
pub(crate) struct Chunks<'o> {
    full: Receiver<Message>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
    ended: bool,
    /// Length of all buffers so far, with the current one.
    received: u64,
    limit: u64,
    hash: Sha256,
    observer: Option<&'o mut Observer<'o>>,
}

impl<'o> Chunks<'o> {
    /// `limit` bounds the stream, bytes.
    pub(crate) fn new(
        full: Receiver<Message>,
        empty: Sender<Vec<u8>>,
        limit: u64,
        observer: Option<&'o mut Observer<'o>>,
    ) -> Self {
        let hash = Sha256::new();
        Self {
            full,
            empty,
            current: Vec::new(),
            position: 0,
            ended: false,
            received: 0,
            limit,
            hash,
            observer,
        }
    }

    /// How many bytes were taken.
    pub(crate) fn offset(&self) -> u64 {
        self.received - (self.current.len() - self.position) as u64
    }

    /// At most `max` bytes, as many as lie ready; nothing at the end of the stream.
    pub(crate) fn take(&mut self, max: u64) -> Result<&[u8], Stop> {
        while self.position == self.current.len() {
            if self.ended {
                return Ok(&[]);
            }
            self.receive()?;
        }
        let ready = self.current.len() - self.position;
        let length = usize::try_from(max).unwrap_or(usize::MAX).min(ready);
        let start = self.position;
        self.position += length;
        Ok(&self.current[start..start + length])
    }

    /// Fills `buffer`; `false` if the stream ended right before it.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<bool, Stop> {
        let mut filled = 0;
        while filled < buffer.len() {
            let piece = self.take((buffer.len() - filled) as u64)?;
            if piece.is_empty() {
                if filled == 0 {
                    return Ok(false);
                }
                return Err(self.problem(TarProblem::Truncated));
            }
            buffer[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
        }
        Ok(true)
    }

    /// Passes over `count` bytes, which must be there.
    pub(crate) fn skip(&mut self, mut count: u64) -> Result<(), Stop> {
        while count > 0 {
            let length = self.take(count)?.len() as u64;
            if length == 0 {
                return Err(self.problem(TarProblem::Truncated));
            }
            count -= length;
        }
        Ok(())
    }

    /// Reads to the end and returns the digest of everything, in hex.
    pub(crate) fn finish(mut self) -> Result<String, Stop> {
        while !self.take(u64::MAX)?.is_empty() {}
        Ok(hex::encode(self.hash.finalize()))
    }

    pub(crate) fn problem(&self, problem: TarProblem) -> Stop {
        Stop::Failed(UnpackError::Tar { offset: self.offset(), problem })
    }

    fn receive(&mut self) -> Result<(), Stop> {
        let used = std::mem::take(&mut self.current);
        self.position = 0;
        if used.capacity() > 0 {
            // The other side may be through and gone.
            let _ = self.empty.send(used);
        }
        match self.full.recv() {
            Ok(Message::Data(data)) => {
                self.received += data.len() as u64;
                if self.received > self.limit {
                    return Err(UnpackError::Limit { what: "bytes of tar", limit: self.limit }.into());
                }
                self.hash.update(&data);
                if let Some(observer) = &mut self.observer {
                    observer(&data);
                }
                self.current = data;
            }
            Ok(Message::End) => self.ended = true,
            Err(_) => return Err(Stop::Source),
        }
        Ok(())
    }
}
