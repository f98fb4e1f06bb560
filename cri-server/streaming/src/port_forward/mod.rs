//! Port-forward: connections into a sandbox, each over its own pair of streams.

mod copy;
mod spdy;
mod websocket;

pub(crate) use spdy::serve as serve_spdy;
pub(crate) use websocket::{max_ports, serve as serve_websocket};

use std::sync::Arc;
use std::time::Duration;

use crate::Backend;
use crate::tunnel::Tunnel;

/// How long the backend may take for a connection. Inside a sandbox it takes milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a session may connect to.
#[derive(Debug)]
pub(crate) struct Target<B> {
    backend: Arc<B>,
    sandbox: String,
    /// All, if empty.
    ports: Vec<u16>,
}

impl<B: Backend> Target<B> {
    pub(crate) fn new(backend: Arc<B>, sandbox: String, ports: Vec<u16>) -> Self {
        Self { backend, sandbox, ports }
    }

    /// The error is a sentence for the client.
    async fn connect(&self, port: u16) -> Result<Tunnel, String> {
        let Self { backend, sandbox, ports } = self;
        if !ports.is_empty() && !ports.contains(&port) {
            return Err(format!(
                "error forwarding port {port} to pod {sandbox}: it is not among the ports asked for"
            ));
        }
        match tokio::time::timeout(CONNECT_TIMEOUT, backend.connect(sandbox, port)).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(why)) => Err(format!("error forwarding port {port} to pod {sandbox}: {why}")),
            Err(_elapsed) => Err(format!("error forwarding port {port} to pod {sandbox}: no answer in time")),
        }
    }
}
