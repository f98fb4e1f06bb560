//! SPDY inside WebSocket, as `kubectl port-forward` speaks since 1.30 (`SPDY/3.1+portforward.k8s.io`): the payloads
//! of the messages, one after the other, are the SPDY connection.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf,
};

use super::connection::{Connection, Reader, Writer};
use super::{CloseCode, Opcode};

/// Bytes that may be under way inside the tunnel, in each direction.
const PIPE: usize = 64 << 10;
const MESSAGE: usize = 32 << 10;

/// The byte stream in the connection. A task carries it until both ends are closed or the client is gone.
pub(crate) fn tunnel<S>(connection: Connection<S>, linger: Duration) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (near, far) = tokio::io::duplex(PIPE);
    tokio::spawn(async move {
        let (from_server, to_server) = tokio::io::split(far);
        let Connection { reader, writer, writing } = connection;
        let mut upstream = std::pin::pin!(carry_up(reader, to_server));
        tokio::select! {
            // The client is gone, and the server's side sees its connection end.
            () = upstream.as_mut() => {}
            () = carry_down(from_server, writer) => {
                writing.finish(CloseCode::Normal, upstream, linger).await;
            }
        }
    });
    near
}

async fn carry_up<S: AsyncRead>(mut reader: Reader<S>, mut pipe: WriteHalf<DuplexStream>) {
    let mut wanted = true;
    while let Some(part) = reader.next().await {
        // After the server's side is gone, read on: the client's close is still to come.
        wanted = wanted && reader.wait_for(pipe.write_all(&part.bytes)).await.is_ok();
    }
    let _ = pipe.shutdown().await;
}

async fn carry_down(mut pipe: ReadHalf<DuplexStream>, writer: Writer) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(MESSAGE);
        match pipe.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                while !buffer.is_empty() {
                    let message = buffer.split_to(buffer.len().min(MESSAGE)).freeze();
                    if writer.send(Opcode::Binary, message).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
