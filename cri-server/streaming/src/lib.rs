//! Exec, attach and port-forward over HTTP upgrades: SPDY/3.1 and WebSocket (v4 and v5 `channel.k8s.io`, `portforward.k8s.io`).
//!
//! A CRI call [`Server::offer`]s a session and returns the URL; whoever connects to it gets the session's streams, once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Where to listen and for how long things live.
#[derive(Debug, Clone)]
pub struct Options {
    /// Loopback unless TLS is configured.
    pub address: SocketAddr,
    /// PEM certificate chain and key.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Lifetime of an unused URL.
    pub token_lifetime: Duration,
    /// A session on which nothing moves ends after this long.
    pub idle_timeout: Duration,
}

/// What a URL leads to.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub enum Session {
    Exec { container: String, command: Vec<String>, tty: bool, stdin: bool, stdout: bool, stderr: bool },
    Attach { container: String, tty: bool, stdin: bool, stdout: bool, stderr: bool },
    /// Only these ports, unless empty.
    PortForward { sandbox: String, ports: Vec<u16> },
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// From the client to the process. Closing the channel means the client went away.
#[derive(Debug)]
pub enum Input {
    /// Bytes for stdin.
    Stdin(Bytes),
    /// The client closed its input (half-close).
    StdinEnd,
    /// The client's terminal changed.
    Resize(TerminalSize),
}

/// From the process to the client.
#[derive(Debug)]
pub enum Output {
    /// Bytes of stdout (or of the terminal).
    Stdout(Bytes),
    /// Bytes of stderr.
    Stderr(Bytes),
    /// Exit code; last message of an exec. For attach the channel just closes.
    Exit(i32),
    /// The session could not be started or broke; told to the client as a Kubernetes Status of kind failure.
    Failed(String),
}

/// Both ends of a running session. The channels are bounded: a slow side slows the other.
#[derive(Debug)]
pub struct Streams {
    /// What the client sends.
    pub input: mpsc::Receiver<Input>,
    /// What the client gets.
    pub output: mpsc::Sender<Output>,
}

/// The daemon's side: starts what a URL was offered for.
pub trait Backend: Send + Sync + 'static {
    /// Runs an exec or attach session to its end.
    fn run(&self, session: Session, streams: Streams) -> impl Future<Output = ()> + Send;
    /// A connection to `port` inside the sandbox.
    fn connect(&self, sandbox: &str, port: u16) -> impl Future<Output = Result<TcpStream, String>> + Send;
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct StreamingError;

/// The streaming server.
#[derive(Debug)]
pub struct Server {}

impl Server {
    /// Listens; sessions go to `backend`. Refuses a non-loopback address without TLS.
    pub async fn start<B: Backend>(_options: Options, _backend: Arc<B>) -> Result<Self, StreamingError> {
        todo!()
    }

    /// A URL with a fresh single-use 128-bit token.
    pub fn offer(&self, _session: Session) -> String {
        todo!()
    }

    /// Stops accepting; running sessions go on until they end or the process does.
    pub fn close(&self) {
        todo!()
    }
}
