//! Byte queues whose memory is bounded per session, not per stream.
//!
//! SPDY as Kubernetes clients speak it has no flow control (they neither send nor honour WINDOW_UPDATE), so the
//! reader of a connection can only stop reading, and then every stream of the session stands still. To make that
//! rare, a stream may queue what its consumer has not taken yet, as long as all streams of the session together
//! stay within one budget.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// What one session may hold in its queues, in bytes.
pub(crate) const SESSION_BUDGET: usize = 2 << 20;

/// What a queued piece costs beside its bytes, so that a flood of tiny ones is bounded too.
const OVERHEAD: usize = 128;

/// A part of a byte stream.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    /// The peer has finished its side of the stream.
    End,
}

/// Shared by all queues of a session.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    permits: Arc<Semaphore>,
    total: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(bytes)), total: bytes }
    }

    /// A new queue under this budget.
    pub(crate) fn queue(&self) -> (PieceSender, PieceReceiver) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (PieceSender { budget: self.clone(), queue: sender }, PieceReceiver { queue: receiver })
    }
}

#[derive(Debug)]
struct Queued {
    piece: Piece,
    /// Given back when the consumer takes the piece, or drops the queue.
    _cost: Option<OwnedSemaphorePermit>,
}

/// The reader's end.
#[derive(Debug, Clone)]
pub(crate) struct PieceSender {
    budget: Budget,
    queue: mpsc::UnboundedSender<Queued>,
}

impl PieceSender {
    /// Waits until the budget allows it, and queues the bytes. False: nobody listens any more, and they are dropped.
    pub(crate) async fn data(&self, bytes: Bytes) -> bool {
        let cost = u32::try_from((bytes.len() + OVERHEAD).min(self.budget.total)).unwrap_or(u32::MAX);
        let permit = tokio::select! {
            biased;
            () = self.queue.closed() => return false,
            permit = self.budget.permits.clone().acquire_many_owned(cost) => permit,
        };
        // The semaphore is never closed.
        let Ok(permit) = permit else { return false };
        self.queue.send(Queued { piece: Piece::Data(bytes), _cost: Some(permit) }).is_ok()
    }

    /// Queues the end of the stream.
    pub(crate) fn end(&self) {
        let _ = self.queue.send(Queued { piece: Piece::End, _cost: None });
    }
}

/// The consumer's end. Dropping it makes the sender discard what comes.
#[derive(Debug)]
pub(crate) struct PieceReceiver {
    queue: mpsc::UnboundedReceiver<Queued>,
}

impl PieceReceiver {
    /// The next piece; none: the stream was reset or the client is gone.
    pub(crate) async fn next(&mut self) -> Option<Piece> {
        self.queue.recv().await.map(|queued| queued.piece)
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[tokio::test]
    async fn all_queues_share_one_budget() {
        let budget = Budget::new(1000);
        let (first, mut taken) = budget.queue();
        let (second, _kept) = budget.queue();
        assert!(first.data(Bytes::from(vec![0; 700])).await);
        let mut waiting = std::pin::pin!(second.data(Bytes::from(vec![0; 700])));
        assert!(poll(waiting.as_mut()).is_pending());
        assert!(matches!(taken.next().await, Some(Piece::Data(bytes)) if bytes.len() == 700));
        assert!(waiting.await);
    }

    #[tokio::test]
    async fn a_dropped_consumer_frees_the_waiting_reader() {
        let budget = Budget::new(1000);
        let (full, _kept) = budget.queue();
        assert!(full.data(Bytes::from(vec![0; 5000])).await, "a piece beyond the budget costs all of it");
        let (sender, receiver) = budget.queue();
        let mut waiting = std::pin::pin!(sender.data(Bytes::from_static(b"x")));
        assert!(poll(waiting.as_mut()).is_pending());
        drop(receiver);
        assert!(!waiting.await);
    }

    #[tokio::test]
    async fn the_end_needs_no_budget() {
        let budget = Budget::new(200);
        let (sender, mut receiver) = budget.queue();
        assert!(sender.data(Bytes::from(vec![0; 200])).await);
        sender.end();
        drop(sender);
        assert!(matches!(receiver.next().await, Some(Piece::Data(_))));
        assert!(matches!(receiver.next().await, Some(Piece::End)));
        assert!(receiver.next().await.is_none());
    }
}
