//! A connection into a sandbox, whatever it is made of.

use std::fmt;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Both directions of a connection to a port of a sandbox: TCP into a pod's network namespace, a unix socket into a virtual machine.
pub struct Tunnel {
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    /// Shuts its direction down when it is dropped.
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").finish_non_exhaustive()
    }
}

impl From<TcpStream> for Tunnel {
    fn from(stream: TcpStream) -> Self {
        // Forwarded requests are small as often as not; the option fails only on closed sockets.
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        Self { reader: Box::new(reader), writer: Box::new(writer) }
    }
}

impl From<UnixStream> for Tunnel {
    fn from(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: Box::new(reader), writer: Box::new(writer) }
    }
}
