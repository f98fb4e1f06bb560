//! The two tasks of a SPDY connection: one reads frames and hands them to streams, one writes them.
//!
//! Both sides are bounded: the writer's queue by frames, the reader's queues by the session's byte budget. A client
//! that does not read stops the writer, and with it whoever has something to send.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::decode::{Decoder, Event};
use super::frame::{GoAwayStatus, Outgoing, ResetStatus};
use super::header_block::HeaderWriter;
use super::stream::Stream;
use super::table::{Closed, Refusal, Table};
use crate::activity::Activity;
use crate::pieces::{Budget, SESSION_BUDGET};

/// Frames that wait for the writer.
const WRITE_QUEUE: usize = 8;
/// Streams that wait to be accepted.
const ACCEPT_QUEUE: usize = 16;
/// Waiting frames are written together up to about this many bytes.
const WRITE_BATCH: usize = 64 << 10;
const READ_BUFFER: usize = 32 << 10;
/// Consumed bytes of all streams after which the session's window is opened again.
const ACKNOWLEDGE: u32 = 32 << 10;

/// What streams need of their connection.
#[derive(Debug, Clone)]
pub(super) struct Link(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Table,
    out: mpsc::Sender<Outgoing>,
    /// True once the client cannot be talked to any more.
    gone: watch::Sender<bool>,
    /// Bytes for which the session's window was not opened yet.
    consumed: AtomicU32,
    activity: Arc<Activity>,
}

impl Link {
    pub(super) fn table(&self) -> &Table {
        &self.0.table
    }

    pub(super) async fn send(&self, frame: Outgoing) -> Result<(), Closed> {
        self.0.out.send(frame).await.map_err(|_| Closed)
    }

    /// Counts bytes that left the session's queues.
    pub(super) async fn consumed(&self, length: u32) {
        let before = self.0.consumed.fetch_add(length, Ordering::Relaxed);
        if before.saturating_add(length) >= ACKNOWLEDGE {
            let delta = self.0.consumed.swap(0, Ordering::Relaxed);
            if delta > 0 {
                let _ = self.send(Outgoing::WindowUpdate { stream: 0, delta }).await;
            }
        }
    }

    fn hang_up(&self) {
        self.0.table.clear();
        self.0.gone.send_replace(true);
    }
}

/// The server's end of a SPDY session.
#[derive(Debug)]
pub(crate) struct Connection {
    link: Link,
    incoming: mpsc::Receiver<Stream>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Connection {
    pub(crate) fn start<S>(io: S, activity: Arc<Activity>) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (out, queue) = mpsc::channel(WRITE_QUEUE);
        let (accept, incoming) = mpsc::channel(ACCEPT_QUEUE);
        let link = Link(Arc::new(Shared {
            table: Table::new(Budget::new(SESSION_BUDGET)),
            out,
            gone: watch::Sender::new(false),
            consumed: AtomicU32::new(0),
            activity,
        }));
        let reader = tokio::spawn(read_frames(read, link.clone(), accept));
        let writer = tokio::spawn(write_frames(write, link.clone(), queue));
        Self { link, incoming, reader, writer }
    }

    /// The next stream that the client opens; none when it is gone.
    pub(crate) async fn accept(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Refuses every further stream, also those that wait.
    pub(crate) async fn refuse_more(&mut self) {
        self.link.table().refuse_more();
        self.incoming.close();
        while let Some(stream) = self.incoming.recv().await {
            stream.refuse().await;
        }
    }

    /// Completes when the client is gone.
    pub(crate) fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut gone = self.link.0.gone.subscribe();
        async move {
            // An error means that the connection itself is gone.
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }

    /// Sends what is queued and GOAWAY, then waits until the client has closed too, for `linger` at most: closing
    /// while it still sends would make the kernel answer with a reset, and the client lose what it has not read.
    pub(crate) async fn finish(mut self, linger: Duration) {
        self.link.table().refuse_more();
        self.incoming.close();
        let last = self.link.table().last();
        let _ = self.link.send(Outgoing::GoAway { last, status: GoAwayStatus::Ok }).await;
        let _ = self.link.send(Outgoing::Shutdown).await;
        let _ = (&mut self.writer).await;
        let _ = tokio::time::timeout(linger, &mut self.reader).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
        self.link.hang_up();
    }
}

async fn write_frames<W>(mut io: WriteHalf<W>, link: Link, mut queue: mpsc::Receiver<Outgoing>)
where
    W: AsyncWrite,
{
    let mut headers = HeaderWriter::default();
    let mut buffer = BytesMut::new();
    while let Some(mut frame) = queue.recv().await {
        let shutdown = loop {
            if matches!(frame, Outgoing::Shutdown) {
                break true;
            }
            frame.encode(&mut headers, &mut buffer);
            if buffer.len() >= WRITE_BATCH {
                break false;
            }
            match queue.try_recv() {
                Ok(next) => frame = next,
                Err(_) => break false,
            }
        };
        if io.write_all(&buffer).await.is_err() || io.flush().await.is_err() {
            break;
        }
        link.0.activity.touch();
        buffer.clear();
        if shutdown {
            let _ = io.shutdown().await;
            // The reader goes on until the client closes.
            return;
        }
    }
    link.hang_up();
}

async fn read_frames<R>(mut io: ReadHalf<R>, link: Link, accept: mpsc::Sender<Stream>)
where
    R: AsyncRead,
{
    let mut buffer = BytesMut::with_capacity(READ_BUFFER);
    let mut decoder = Decoder::new();
    'connection: loop {
        loop {
            let event = match decoder.next(&mut buffer) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "a client broke the SPDY protocol"
                    );
                    break_off(&link).await;
                    break 'connection;
                }
            };
            if take(&link, &accept, event).await.is_err() {
                tracing::debug!("a client broke the rules of SPDY streams");
                break_off(&link).await;
                break 'connection;
            }
        }
        buffer.reserve(READ_BUFFER);
        match io.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(_) => link.0.activity.touch(),
        }
    }
    link.hang_up();
}

async fn break_off(link: &Link) {
    let last = link.table().last();
    let _ = link.send(Outgoing::GoAway { last, status: GoAwayStatus::ProtocolError }).await;
    let _ = link.send(Outgoing::Shutdown).await;
}

/// The client did what ends a session.
#[derive(Debug)]
struct Broken;

/// Acts on an event. Answers that cannot be sent are dropped: after the writer's end the reader still goes on.
async fn take(link: &Link, accept: &mpsc::Sender<Stream>, event: Event) -> Result<(), Broken> {
    match event {
        Event::SynStream { stream, fin, unidirectional, headers } => {
            let refused = match link.table().open(stream, fin) {
                Err(Refusal::Identifier) => return Err(Broken),
                Err(Refusal::TooMany | Refusal::Ending) => true,
                Ok(pieces) => {
                    let stream = Stream::new(link.clone(), stream, headers, pieces);
                    if unidirectional {
                        // Nothing could be answered on it.
                        stream.refuse().await;
                    } else if let Err(mpsc::error::SendError(stream)) = accept.send(stream).await {
                        stream.refuse().await;
                    }
                    false
                }
            };
            if refused {
                let _ = link.send(Outgoing::Reset { stream, status: ResetStatus::RefusedStream }).await;
            }
        }
        Event::Data { stream, bytes, fin } => {
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let taken = match link.table().inbound(stream) {
                Some(queue) => bytes.is_empty() || queue.data(bytes).await,
                None if stream > link.table().last() => {
                    let _ = link.send(Outgoing::Reset { stream, status: ResetStatus::InvalidStream }).await;
                    false
                }
                // Sent before the client knew that the stream is over.
                None => false,
            };
            if !taken {
                link.consumed(length).await;
            }
            if fin {
                link.table().close_inbound(stream, true);
            }
        }
        Event::SynReply { stream, fin } | Event::Headers { stream, fin } => {
            if fin {
                link.table().close_inbound(stream, true);
            }
        }
        Event::Reset { stream, .. } => {
            link.table().remove(stream);
        }
        Event::Settings { initial_window } => {
            if let Some(size) = initial_window {
                link.table().set_initial_window(size);
            }
        }
        // An even one would answer a ping of ours; we send none (section 2.6.5).
        Event::Ping(id) if !id.is_multiple_of(2) => {
            let _ = link.send(Outgoing::Ping(id)).await;
        }
        // A client that goes away opens no further streams, and closes when it is done with those it has.
        Event::Ping(_) | Event::GoAway => {}
        Event::WindowUpdate { stream, delta } => {
            if delta == 0 {
                return Err(Broken);
            }
            if !link.table().add_credit(stream, delta) {
                if stream == 0 {
                    return Err(Broken);
                }
                if link.table().remove(stream) {
                    let status = ResetStatus::FlowControlError;
                    let _ = link.send(Outgoing::Reset { stream, status }).await;
                }
            }
        }
    }
    Ok(())
}
