//! How often a flood is read.
//!
//! Who writes much wakes its reader up for every page, and the reader the disk thread: most of the time goes into waking each other up. What comes
//! within a millisecond is read at once instead, from a pipe that has room for it, so that the writer does not wait meanwhile. What comes now and
//! then is read as soon as it is there.

use std::time::{Duration, Instant};

/// How long a flood waits between two reads.
pub(crate) const EACH: Duration = Duration::from_millis(1);
/// So many bytes within that are a flood.
const FLOOD: usize = 4096;
/// Room in the pipe of a flood: 1 GB/s at that pace, and the most that the kernel allows by default (`pipe-max-size`, pipe(7)).
pub(crate) const ROOM: usize = 1 << 20;

/// What has been read of late.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    bytes: usize,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), bytes: 0 }
    }

    /// So much has been read.
    pub(crate) fn count(&mut self, bytes: usize) {
        if self.since.elapsed() > EACH {
            *self = Self::new();
        }
        self.bytes += bytes;
    }

    /// It is better to wait before the next read.
    pub(crate) fn is_flood(&self) -> bool {
        self.bytes >= FLOOD && self.since.elapsed() <= EACH
    }
}
