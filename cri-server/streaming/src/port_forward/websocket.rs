//! Port-forward over WebSocket channels: for the port at place i of the request channel 2i carries data and channel
//! 2i+1 errors; the first message on each, from us, is the port as two bytes, little endian. One connection per port.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::Target;
use super::copy::{Broken, FromClient, ToClient, copy, is_ordinary};
use crate::Backend;
use crate::activity::Activity;
use crate::pieces::{Budget, Piece, PieceReceiver, PieceSender, SESSION_BUDGET};
use crate::server::Limits;
use crate::websocket::{CloseCode, Codec, Connection, Demultiplexer, Part, Reader, Writer};

/// How many ports have channel numbers: 255 is kept for signals, and digits end where ASCII does.
pub(crate) fn max_ports(codec: Codec) -> usize {
    match codec {
        Codec::Binary => 127,
        Codec::Base64 => 39,
    }
}

/// Serves one session on an upgraded connection, until all its connections have ended, the client closes it, or
/// nothing moves any more.
pub(crate) async fn serve<B, S>(
    target: Target<B>,
    connection: Connection<S>,
    codec: Codec,
    limits: Arc<Limits>,
    activity: Arc<Activity>,
) where
    B: Backend,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let Connection { reader, writer, writing } = connection;
    let target = Arc::new(target);
    let budget = Budget::new(SESSION_BUDGET);
    let mut forwards = JoinSet::new();
    let mut queues = Vec::new();
    // Numbered without a gap: see max_ports().
    for (channel, &port) in (0..=u8::MAX).step_by(2).zip(&target.ports) {
        let (queue, received) = budget.queue();
        queues.push(queue);
        let to_client = ToChannel { codec, writer: writer.clone(), channel };
        forwards.spawn(forward(Arc::clone(&target), port, received, to_client));
    }
    let mut reading = std::pin::pin!(distribute(reader, codec, queues));
    let finished = async { while forwards.join_next().await.is_some() {} };
    tokio::select! {
        () = reading.as_mut() => return,
        () = finished => {}
        () = activity.idle() => {
            tracing::info!("a port-forward session is ended because nothing moved on it");
        }
    }
    drop(forwards);
    let told = writing.finish(CloseCode::Normal, reading, limits.linger);
    let _ = tokio::time::timeout(2 * limits.linger, told).await;
}

/// Hands what the client sends to the connections, until it closes.
async fn distribute<S: AsyncRead>(mut reader: Reader<S>, codec: Codec, queues: Vec<PieceSender>) {
    let mut demultiplexer = Demultiplexer::new(codec, false);
    while let Some(part) = reader.next().await {
        match demultiplexer.take(part) {
            // Error channels are ours alone.
            Ok(Part::Data { channel, bytes }) if channel.is_multiple_of(2) => {
                if let Some(queue) = queues.get(usize::from(channel / 2)) {
                    reader.wait_for(queue.data(bytes)).await;
                }
            }
            Ok(Part::Data { .. } | Part::End { .. } | Part::Nothing) => {}
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "a client sent a bad message");
                reader.refuse(CloseCode::ProtocolError).await;
                return;
            }
        }
    }
}

/// The pair of channels of one connection.
#[derive(Debug)]
struct ToChannel {
    codec: Codec,
    writer: Writer,
    /// Of data; errors have the next.
    channel: u8,
}

impl ToChannel {
    async fn send(&self, channel: u8, bytes: Bytes) -> bool {
        self.codec.send(&self.writer, channel, bytes).await.is_ok()
    }
}

impl ToClient for ToChannel {
    async fn data(&mut self, bytes: Bytes) -> bool {
        self.send(self.channel, bytes).await
    }

    async fn end(&mut self) -> bool {
        false
    }
}

impl FromClient for PieceReceiver {
    async fn next(&mut self) -> Option<Piece> {
        PieceReceiver::next(self).await
    }
}

async fn forward<B: Backend>(
    target: Arc<Target<B>>,
    port: u16,
    from_client: PieceReceiver,
    mut to_client: ToChannel,
) {
    let announcement = Bytes::copy_from_slice(&port.to_le_bytes());
    for channel in [to_client.channel, to_client.channel + 1] {
        if !to_client.send(channel, announcement.clone()).await {
            return;
        }
    }
    let problem = match target.connect(port).await {
        Err(why) => Some(why),
        Ok(connection) => match copy(connection, from_client, &mut to_client).await {
            Err(Broken::Connection(error)) if !is_ordinary(&error) => {
                Some(format!("error forwarding port {port}: {error}"))
            }
            Ok(()) | Err(Broken::Connection(_) | Broken::ClientGone | Broken::Finished) => None,
        },
    };
    if let Some(problem) = problem {
        tracing::debug!(port, error = problem, "cannot forward a connection");
        to_client.send(to_client.channel + 1, Bytes::from(problem)).await;
    }
}
