//! Two threads and the buffers that go round between them.

use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;

use crate::chunks::{Chunks, Message, Observer, Stop};
use crate::decode::Decoded;
use crate::error::UnpackError;
use crate::extract::{Written, extract};
use crate::{Compression, Limits, Unpacked};

const BUFFER: usize = 256 << 10;
/// Buffers on their way. With one in work at each end: 2 MiB per layer.
const BUFFERS_ON_THE_WAY: usize = 6;
/// What headers, extensions and fill bytes of an entry may take of the tar, bytes.
const OVERHEAD_PER_ENTRY: u64 = 8 << 10;
/// What may surround the entries (fill of the last record), bytes.
const OVERHEAD: u64 = 64 << 20;

/// Reads `source` to its end and unpacks it below `target`, an empty directory, in overlayfs form: a whiteout `.wh.NAME`
/// becomes a 0/0 character device, `.wh..wh..opq` the xattr `trusted.overlay.opaque=y`.
///
/// Blocks. After an error the target is in an undefined state: the caller removes it ([`crate::remove_tree`]). Nobody
/// else may change the target meanwhile. Needs root's capabilities to give files their owners.
pub fn unpack(
    source: impl Read,
    compression: Compression,
    target: BorrowedFd<'_>,
    limits: Limits,
) -> Result<Unpacked, UnpackError> {
    run(source, compression, target, limits, None)
}

/// The same; `observer` sees the tar go by (to hash it with something else, or to make another form of it).
pub fn unpack_observed(
    source: impl Read,
    compression: Compression,
    target: BorrowedFd<'_>,
    limits: Limits,
    observer: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<Unpacked, UnpackError> {
    run(source, compression, target, limits, Some(observer))
}

fn run<'o>(
    source: impl Read,
    compression: Compression,
    target: BorrowedFd<'_>,
    limits: Limits,
    observer: Option<&'o mut Observer<'o>>,
) -> Result<Unpacked, UnpackError> {
    let stream_limit = limits
        .entries
        .saturating_mul(OVERHEAD_PER_ENTRY)
        .saturating_add(limits.bytes)
        .saturating_add(OVERHEAD);
    let (full, receiver) = sync_channel(BUFFERS_ON_THE_WAY);
    let (empty, used) = channel();
    thread::scope(|scope| {
        let writer = thread::Builder::new()
            .name("unpack".to_owned())
            .spawn_scoped(scope, move || {
                extract(Chunks::new(receiver, empty, stream_limit, observer), target, limits)
            })
            .map_err(UnpackError::Thread)?;
        let fed = feed(source, compression, full, &used);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (fed, written) {
            (Ok(digest), Ok(written)) => Ok(summary(digest, written)),
            // The feeder stops quietly when the other side is gone, so its error came first.
            (Err(error), _) | (Ok(_), Err(Stop::Failed(error))) => Err(error),
            (Ok(_), Err(Stop::Source)) => Err(UnpackError::Read(std::io::ErrorKind::BrokenPipe.into())),
        }
    })
}

/// Decodes until the end, or until nobody listens any more. Returns the digest of what was read.
fn feed(
    source: impl Read,
    compression: Compression,
    full: SyncSender<Message>,
    used: &Receiver<Vec<u8>>,
) -> Result<Option<String>, UnpackError> {
    let mut decoded = Decoded::new(source, compression)?;
    loop {
        // The channel is bounded, so there are never more than a few buffers.
        let mut buffer = used.try_recv().unwrap_or_default();
        buffer.resize(BUFFER, 0);
        let length = decoded.fill(&mut buffer)?;
        if length == 0 {
            break;
        }
        buffer.truncate(length);
        if full.send(Message::Data(buffer)).is_err() {
            break;
        }
    }
    let _ = full.send(Message::End);
    Ok(decoded.finish())
}

fn summary(digest: Option<String>, written: Written) -> Unpacked {
    let diff_id = format!("sha256:{}", written.hash);
    Unpacked {
        digest: digest.map_or_else(|| diff_id.clone(), |hash| format!("sha256:{hash}")),
        diff_id,
        size: written.size,
        allocated: written.allocated,
        inodes: written.inodes,
    }
}
