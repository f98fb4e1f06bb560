//! Exec, attach and port-forward over HTTP upgrades: SPDY/3.1 and WebSocket (v4 and v5 `channel.k8s.io`, `portforward.k8s.io`).
//!
//! A CRI call [`Server::offer`]s a session and returns the URL; whoever connects to it gets the session's streams, once.
//! README.md has the map of the files, the invariants and the decisions.

mod activity;
mod pieces;
mod port_forward;
mod remote_command;
mod server;
mod spdy;
mod tls;
mod tokens;
mod tunnel;
mod upgrade;
mod websocket;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

pub use tunnel::Tunnel;

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
    Exec {
        container: String,
        command: Vec<String>,
        tty: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    Attach {
        container: String,
        tty: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    },
    /// Only these ports, unless empty.
    PortForward {
        sandbox: String,
        ports: Vec<u16>,
    },
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
    fn connect(&self, sandbox: &str, port: u16) -> impl Future<Output = Result<Tunnel, String>> + Send;
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    /// URLs are the only credential, so they travel in clear on this machine only.
    #[error("streaming on {address} needs TLS: only a loopback address does without")]
    NeedsTls {
        /// What was configured.
        address: SocketAddr,
    },
    /// The address is in use or not ours.
    #[error("cannot listen on {address} for streaming")]
    Listen {
        /// What was configured.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Certificate or key cannot be used.
    #[error("cannot stream over TLS")]
    Certificate(#[from] CertificateError),
}

pub use tls::CertificateError;

/// The streaming server. Dropping it is like [`Server::close`].
#[derive(Debug)]
pub struct Server {
    listening: server::Listening,
}

impl Server {
    /// Listens; sessions go to `backend`. Refuses a non-loopback address without TLS.
    pub async fn start<B: Backend>(options: Options, backend: Arc<B>) -> Result<Self, StreamingError> {
        Self::start_with(options, server::Limits::default(), backend).await
    }

    async fn start_with<B: Backend>(
        options: Options,
        limits: server::Limits,
        backend: Arc<B>,
    ) -> Result<Self, StreamingError> {
        Ok(Self { listening: server::listen(options, limits, backend).await? })
    }

    /// Where it listens, with the port that the system chose if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.listening.address
    }

    /// A URL with a fresh single-use 128-bit token. At most 1024 are outstanding; beyond that the oldest expires.
    pub fn offer(&self, session: Session) -> String {
        let kind = server::kind_of(&session);
        format!("{}/{kind}/{}", self.listening.base, self.listening.tokens.offer(session))
    }

    /// Stops accepting and forgets unused URLs; running sessions go on until they end or the process does.
    pub fn close(&self) {
        self.listening.accepting.abort();
        self.listening.tokens.clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}
