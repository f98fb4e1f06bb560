//! One stream: its headers, what the client sends on it, and the way back.

use bytes::Bytes;

use super::connection::Link;
use super::frame::{MAX_SENT_DATA, Outgoing, ResetStatus};
use super::header_block::Headers;
use super::table::Closed;
use crate::pieces::{Piece, PieceReceiver};

/// Consumed bytes after which the client's window is opened again.
const ACKNOWLEDGE: u32 = 16 << 10;

/// A stream that the client opened. It has to be accepted or refused; both directions end independently.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) sender: StreamSender,
    pub(crate) receiver: StreamReceiver,
}

impl Stream {
    pub(super) fn new(link: Link, id: u32, headers: Headers, pieces: PieceReceiver) -> Self {
        let sender = StreamSender { link: link.clone(), id };
        Self { id, headers, sender, receiver: StreamReceiver { link, id, pieces, consumed: 0 } }
    }

    /// Answers SYN_REPLY. Clients wait for it, and drop data that comes before it.
    pub(crate) async fn accept(&self) -> Result<(), Closed> {
        self.sender.link.send(Outgoing::SynReply { stream: self.id }).await
    }

    pub(crate) async fn refuse(self) {
        self.sender.reset(ResetStatus::RefusedStream).await;
    }
}

/// Sends on a stream. Dropping it ends nothing on the wire: use [`StreamSender::finish`] or [`StreamSender::reset`].
#[derive(Debug)]
pub(crate) struct StreamSender {
    link: Link,
    id: u32,
}

impl StreamSender {
    /// Queues the bytes, as fast as the client takes them.
    pub(crate) async fn data(&self, mut bytes: Bytes) -> Result<(), Closed> {
        while !bytes.is_empty() {
            let want = bytes.len().min(MAX_SENT_DATA);
            let granted = self.link.table().take_credit(self.id, want).await?;
            let part = bytes.split_to(granted.min(want));
            self.link.send(Outgoing::Data { stream: self.id, bytes: part, fin: false }).await?;
        }
        Ok(())
    }

    /// Half-closes the stream.
    pub(crate) async fn finish(&self) {
        if self.link.table().close_outbound(self.id) {
            let _ = self.link.send(Outgoing::Data { stream: self.id, bytes: Bytes::new(), fin: true }).await;
        }
    }

    /// Ends both directions.
    pub(crate) async fn reset(&self, status: ResetStatus) {
        if self.link.table().remove(self.id) {
            let _ = self.link.send(Outgoing::Reset { stream: self.id, status }).await;
        }
    }
}

impl Drop for StreamSender {
    fn drop(&mut self) {
        self.link.table().close_outbound(self.id);
    }
}

/// Receives from a stream. Once it is dropped, what still comes is discarded.
#[derive(Debug)]
pub(crate) struct StreamReceiver {
    link: Link,
    id: u32,
    pieces: PieceReceiver,
    /// Bytes for which no WINDOW_UPDATE was sent yet.
    consumed: u32,
}

impl StreamReceiver {
    /// The next piece; none: the stream was reset or the client is gone.
    pub(crate) async fn next(&mut self) -> Option<Piece> {
        let piece = self.pieces.next().await?;
        if let Piece::Data(bytes) = &piece {
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            self.consumed = self.consumed.saturating_add(length);
            if self.consumed >= ACKNOWLEDGE {
                let delta = std::mem::take(&mut self.consumed);
                let _ = self.link.send(Outgoing::WindowUpdate { stream: self.id, delta }).await;
            }
            self.link.consumed(length).await;
        }
        Some(piece)
    }
}

impl Drop for StreamReceiver {
    fn drop(&mut self) {
        self.link.table().close_inbound(self.id, false);
    }
}
