//! Bytes between a client's stream and a connection into the sandbox, both ways at once.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::pieces::Piece;
use crate::tunnel::Tunnel;

const CHUNK: usize = 32 << 10;

/// What the client sends to one connection.
pub(super) trait FromClient: Send {
    /// None: the client gave the stream up.
    fn next(&mut self) -> impl Future<Output = Option<Piece>> + Send;
}

/// What the connection sends to the client.
pub(super) trait ToClient: Send {
    /// False: the client gave the stream up.
    fn data(&mut self, bytes: Bytes) -> impl Future<Output = bool> + Send;
    /// The connection's end sends no more. True: the other direction may go on.
    fn end(&mut self) -> impl Future<Output = bool> + Send;
}

/// How a connection ended before both directions were finished.
#[derive(Debug)]
pub(super) enum Broken {
    ClientGone,
    /// The protocol has no half-close, and the sandbox has nothing more to say.
    Finished,
    Connection(io::Error),
}

/// Copies until both directions have ended, or one breaks.
pub(super) async fn copy<F: FromClient, T: ToClient>(
    connection: Tunnel,
    mut from_client: F,
    to_client: &mut T,
) -> Result<(), Broken> {
    let Tunnel { mut reader, mut writer } = connection;
    let up = async move {
        loop {
            match from_client.next().await {
                Some(Piece::Data(bytes)) => {
                    // The other end does not listen, but may still have to say something. Leaving drops
                    // `from_client`, so that what still comes is discarded.
                    if writer.write_all(&bytes).await.is_err() {
                        return Ok(());
                    }
                }
                Some(Piece::End) => {
                    let _ = writer.shutdown().await;
                    return Ok(());
                }
                None => return Err(Broken::ClientGone),
            }
        }
    };
    let down = async move {
        let mut buffer = BytesMut::with_capacity(CHUNK);
        loop {
            buffer.reserve(CHUNK);
            match reader.read_buf(&mut buffer).await {
                Ok(0) => {
                    let half_closed = to_client.end().await;
                    return if half_closed { Ok(()) } else { Err(Broken::Finished) };
                }
                Ok(_) => {
                    if !to_client.data(buffer.split().freeze()).await {
                        return Err(Broken::ClientGone);
                    }
                }
                Err(error) => return Err(Broken::Connection(error)),
            }
        }
    };
    tokio::try_join!(up, down).map(|((), ())| ())
}

/// Whether an error is one of the ordinary ends of a TCP connection. `kubectl` ends the whole session when it is told
/// of an error on one connection, so it is told only of others.
pub(super) fn is_ordinary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::TimedOut
    )
}
