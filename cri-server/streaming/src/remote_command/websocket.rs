//! Exec and attach over WebSocket: one channel for each of stdin, stdout, stderr, error and resize.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use super::status::{Outcome, Version};
use super::{ClientGone, Outlet, Side, Wanted, relay};
use crate::Backend;
use crate::pieces::{Budget, PieceSender, SESSION_BUDGET};
use crate::server::Conversation;
use crate::websocket::{CloseCode, Codec, Connection, Demultiplexer, Part, Reader, Writer, Writing};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Serves one session on an upgraded connection.
pub(crate) async fn serve<B, S>(
    conversation: Conversation<B>,
    wanted: Wanted,
    connection: Connection<S>,
    codec: Codec,
    version: Version,
) where
    B: Backend,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let Connection { reader, writer, writing } = connection;
    // Browsers and older clients take the first message, an empty one, as the sign that the session is there.
    let first = match wanted {
        Wanted { stdout: true, .. } => STDOUT,
        Wanted { stderr: true, .. } => STDERR,
        _ => ERROR,
    };
    if codec.send(&writer, first, Bytes::new()).await.is_err() {
        return;
    }
    let budget = Budget::new(SESSION_BUDGET);
    let (to_stdin, stdin) = budget.queue();
    let (to_resize, resize) = budget.queue();
    let stdin = wanted.stdin.then_some(stdin);
    let resize = wanted.tty.then_some(resize);
    let demultiplexer = Demultiplexer::new(codec, version >= Version::V5);
    let gone = watch::Sender::new(false);
    let is_gone = gone.subscribe();
    let reading = tokio::spawn(async move {
        distribute(reader, demultiplexer, to_stdin, to_resize).await;
        gone.send_replace(true);
    });
    let outlet = WebSocketOutlet {
        wanted,
        codec,
        version,
        linger: conversation.limits.linger,
        writer,
        writing,
        is_gone,
    };
    let gone = when(outlet.is_gone.clone());
    relay(conversation, stdin, resize, outlet, gone).await;
    reading.abort();
}

/// Completes when the reader has ended.
async fn when(mut gone: watch::Receiver<bool>) {
    let _ = gone.wait_for(|gone| *gone).await;
}

/// Hands what the client sends to its queues, until it closes.
async fn distribute<S: AsyncRead>(
    mut reader: Reader<S>,
    mut demultiplexer: Demultiplexer,
    stdin: PieceSender,
    resize: PieceSender,
) {
    while let Some(part) = reader.next().await {
        match demultiplexer.take(part) {
            // Discarded where the session has no such stream.
            Ok(Part::Data { channel: STDIN, bytes }) => drop(reader.wait_for(stdin.data(bytes)).await),
            Ok(Part::Data { channel: RESIZE, bytes }) => drop(reader.wait_for(resize.data(bytes)).await),
            Ok(Part::End { channel: STDIN }) => stdin.end(),
            Ok(Part::Data { .. } | Part::End { .. } | Part::Nothing) => {}
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "a client sent a bad message");
                reader.refuse(CloseCode::ProtocolError).await;
                return;
            }
        }
    }
}

#[derive(Debug)]
struct WebSocketOutlet {
    wanted: Wanted,
    codec: Codec,
    version: Version,
    linger: Duration,
    writer: Writer,
    writing: Writing,
    is_gone: watch::Receiver<bool>,
}

impl Outlet for WebSocketOutlet {
    async fn write(&mut self, side: Side, bytes: Bytes) -> Result<(), ClientGone> {
        let (wanted, channel) = match side {
            Side::Stdout => (self.wanted.stdout, STDOUT),
            Side::Stderr => (self.wanted.stderr, STDERR),
        };
        if !wanted || bytes.is_empty() {
            return Ok(());
        }
        self.codec.send(&self.writer, channel, bytes).await.map_err(|_| ClientGone)
    }

    async fn finish(self, outcome: Outcome) {
        if let Some(status) = outcome.encode(self.version) {
            let _ = self.codec.send(&self.writer, ERROR, status).await;
        }
        self.writing.finish(CloseCode::Normal, when(self.is_gone), self.linger).await;
    }
}
