//! Bytes from the guest that the client's socket has no room for yet.

/// A queue of bytes that holds no memory while it is empty.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    bytes: Vec<u8>,
    /// How many at the front are gone already.
    start: usize,
}

impl Backlog {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn front(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        // Moved to the front before it would have to grow.
        if self.bytes.len() + bytes.len() > self.bytes.capacity() && self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Forgets `count` bytes at the front.
    pub(crate) fn advance(&mut self, count: usize) {
        self.start = (self.start + count).min(self.bytes.len());
        if self.is_empty() {
            *self = Self::default();
        }
    }
}
