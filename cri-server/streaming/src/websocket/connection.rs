//! A WebSocket connection: a reader that answers pings and closes by itself, and a task that writes.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::decode::{Decoder, Frame, Role};
use super::{CloseCode, Opcode};
use crate::activity::Activity;

/// Frames that wait for the writer.
const WRITE_QUEUE: usize = 8;
const WRITE_BATCH: usize = 64 << 10;
const READ_BUFFER: usize = 32 << 10;

/// Clients that ping (client-go every 5 s) give up a connection without a pong after a minute. While the reader
/// waits for a process that does not read, it cannot see their pings, so it sends pongs unasked (section 5.5.3).
const UNASKED_PONG: Duration = Duration::from_secs(10);

/// For what is queued when a session is given up.
const LAST_WORDS: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Outgoing {
    Frame { opcode: Opcode, payload: Bytes },
    Close(CloseCode),
    Shutdown,
}

/// Queues frames, as fast as the client takes them.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Outgoing>,
}

/// The client cannot be talked to any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

impl Writer {
    /// One unfragmented frame.
    pub(crate) async fn send(&self, opcode: Opcode, payload: Bytes) -> Result<(), Gone> {
        self.queue.send(Outgoing::Frame { opcode, payload }).await.map_err(|_| Gone)
    }

    /// The last frame; what is sent after it is dropped.
    pub(crate) async fn close(&self, code: CloseCode) {
        let _ = self.queue.send(Outgoing::Close(code)).await;
    }
}

/// Both halves, and the task that writes.
#[derive(Debug)]
pub(crate) struct Connection<S> {
    pub(crate) reader: Reader<S>,
    pub(crate) writer: Writer,
    pub(crate) writing: Writing,
}

impl<S> Connection<S>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    pub(crate) fn start(io: S, activity: Arc<Activity>) -> Self {
        let (read, write) = tokio::io::split(io);
        let (sender, queue) = mpsc::channel(WRITE_QUEUE);
        let writer = Writer { queue: sender };
        let task = tokio::spawn(write_frames(write, queue, Arc::clone(&activity)));
        let reader = Reader {
            io: read,
            buffer: BytesMut::with_capacity(READ_BUFFER),
            decoder: Decoder::new(Role::Server),
            writer: writer.clone(),
            activity,
        };
        Self { reader, writing: Writing { writer: writer.clone(), task: Some(task) }, writer }
    }
}

/// The task that writes; it ends soon after this is dropped.
#[derive(Debug)]
pub(crate) struct Writing {
    writer: Writer,
    task: Option<JoinHandle<()>>,
}

impl Writing {
    /// Closes in order: sends what is queued and a close frame, waits until the client has closed too (`closed`),
    /// for `linger` at most, and shuts down. Ending earlier would make the kernel answer what the client still
    /// sends with a reset, and the client lose what it has not read.
    pub(crate) async fn finish(
        mut self,
        code: CloseCode,
        closed: impl Future<Output = ()>,
        linger: Duration,
    ) {
        self.writer.close(code).await;
        let _ = tokio::time::timeout(linger, closed).await;
        let _ = self.writer.queue.send(Outgoing::Shutdown).await;
        if let Some(task) = &mut self.task {
            let _ = tokio::time::timeout(linger, task).await;
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let Some(mut task) = self.task.take().filter(|task| !task.is_finished()) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return task.abort() };
        // Time for the answer to a client's close, which may be queued; no more, for it may not read at all.
        runtime.spawn(async move {
            if tokio::time::timeout(LAST_WORDS, &mut task).await.is_err() {
                task.abort();
            }
        });
    }
}

async fn write_frames<S>(mut io: WriteHalf<S>, mut queue: mpsc::Receiver<Outgoing>, activity: Arc<Activity>)
where
    S: AsyncWrite,
{
    let mut buffer = BytesMut::new();
    let mut closed = false;
    while let Some(mut next) = queue.recv().await {
        let shutdown = loop {
            match next {
                Outgoing::Shutdown => break true,
                _ if closed => {}
                Outgoing::Frame { opcode, payload } => encode(opcode, &payload, &mut buffer),
                Outgoing::Close(code) => {
                    closed = true;
                    encode(Opcode::Close, &(code as u16).to_be_bytes(), &mut buffer);
                }
            }
            if buffer.len() >= WRITE_BATCH {
                break false;
            }
            match queue.try_recv() {
                Ok(further) => next = further,
                Err(_) => break false,
            }
        };
        if io.write_all(&buffer).await.is_err() || io.flush().await.is_err() {
            return;
        }
        activity.touch();
        buffer.clear();
        if shutdown {
            break;
        }
    }
    let _ = io.shutdown().await;
}

/// Servers do not mask (section 5.1).
fn encode(opcode: Opcode, payload: &[u8], out: &mut BytesMut) {
    out.put_u8(0x80 | opcode as u8);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ 0..=125), _) => out.put_u8(length),
        (_, Ok(length)) => {
            out.put_u8(126);
            out.put_u16(length);
        }
        _ => {
            out.put_u8(127);
            out.put_u64(payload.len() as u64);
        }
    }
    out.put_slice(payload);
}

/// A part of a message from the client.
#[derive(Debug)]
pub(crate) struct MessagePart {
    pub(crate) first: bool,
    pub(crate) last: bool,
    pub(crate) bytes: Bytes,
}

/// Reads messages.
#[derive(Debug)]
pub(crate) struct Reader<S> {
    io: ReadHalf<S>,
    buffer: BytesMut,
    decoder: Decoder,
    writer: Writer,
    activity: Arc<Activity>,
}

impl<S: AsyncRead> Reader<S> {
    /// The next part of a message; none when the client has closed or broke the protocol.
    pub(crate) async fn next(&mut self) -> Option<MessagePart> {
        loop {
            match self.decoder.next(&mut self.buffer) {
                Ok(Some(Frame::Data { first, last, bytes })) => {
                    return Some(MessagePart { first, last, bytes });
                }
                // A client that is gone is found by reading.
                Ok(Some(Frame::Ping(payload))) => drop(self.writer.send(Opcode::Pong, payload).await),
                Ok(Some(Frame::Pong)) => {}
                Ok(Some(Frame::Close)) => {
                    self.writer.close(CloseCode::Normal).await;
                    return None;
                }
                Ok(None) => {
                    self.buffer.reserve(READ_BUFFER);
                    match self.io.read_buf(&mut self.buffer).await {
                        Ok(0) | Err(_) => return None,
                        Ok(_) => self.activity.touch(),
                    }
                }
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "a client broke the WebSocket protocol"
                    );
                    self.writer.close(error.close_code()).await;
                    return None;
                }
            }
        }
    }

    /// Tells the client that it broke the protocol that its messages follow.
    pub(crate) async fn refuse(&mut self, code: CloseCode) {
        self.writer.close(code).await;
    }

    /// Waits for a slow consumer, and keeps the client from giving up meanwhile.
    pub(crate) async fn wait_for<T>(&mut self, consumer: impl Future<Output = T>) -> T {
        let mut consumer = std::pin::pin!(consumer);
        loop {
            match tokio::time::timeout(UNASKED_PONG, consumer.as_mut()).await {
                Ok(done) => return done,
                Err(_elapsed) => drop(self.writer.send(Opcode::Pong, Bytes::new()).await),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pongs_go_out_while_a_consumer_is_slow() {
        let (near, mut far) = tokio::io::duplex(1000);
        let mut connection = Connection::start(near, Arc::new(Activity::new(Duration::from_secs(1000))));
        let slow = tokio::time::sleep(3 * UNASKED_PONG + UNASKED_PONG / 2);
        connection.reader.wait_for(slow).await;
        drop(connection);
        let mut sent = Vec::new();
        far.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent, [0x8a, 0].repeat(3));
    }
}
