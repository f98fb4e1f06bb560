//! What the streaming server's URLs lead to: sessions in the monitors of pods.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{Attach, Exec};
use podvisor_streaming::{Backend, Output, Session, Streams, Tunnel};

use crate::error::PodError;
use crate::monitor::stream;
use crate::node::Node;
use crate::pod::Pods;
use crate::service::exec_sync::process;

/// The backend of the streaming server.
#[derive(Debug)]
pub(crate) struct Sessions {
    pub(crate) node: Arc<Node>,
    pub(crate) pods: Arc<Pods>,
}

impl Sessions {
    /// The request for the monitor, made when the client connects: the container may have ended since the URL was given out.
    async fn begin(&self, session: Session) -> Result<(PathBuf, Verb), PodError> {
        match session {
            Session::Exec { container, command, tty, stdin, stdout, stderr } => {
                let (pod, container) = self.pods.find_container(&container)?;
                let exec = process(&self.node, &container, &command, tty).await?;
                let verb = Exec { exec: Some(exec), stdin, stdout, stderr, terminal: tty };
                Ok((self.node.monitor_socket(&pod.id), Verb::Exec(verb)))
            }
            Session::Attach { container, stdin, stdout, stderr, .. } => {
                let (pod, _) = self.pods.find_container(&container)?;
                let verb = Attach { container_id: container, stdin, stdout, stderr };
                Ok((self.node.monitor_socket(&pod.id), Verb::Attach(verb)))
            }
            Session::PortForward { .. } => {
                Err(PodError::Unsupported("port-forward is no exec or attach session".into()))
            }
        }
    }
}

/// What the monitor hands over: TCP, or for a virtual machine a unix socket.
fn tunnel(connection: OwnedFd, in_vm: bool) -> std::io::Result<Tunnel> {
    if in_vm {
        let stream = std::os::unix::net::UnixStream::from(connection);
        stream.set_nonblocking(true)?;
        return tokio::net::UnixStream::from_std(stream).map(Tunnel::from);
    }
    let stream = std::net::TcpStream::from(connection);
    stream.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(stream).map(Tunnel::from)
}

impl Backend for Sessions {
    async fn run(&self, session: Session, streams: Streams) {
        match self.begin(session).await {
            Ok((socket, verb)) => stream::run(&socket, verb, streams).await,
            Err(error) => {
                let _ = streams.output.send(Output::Failed(crate::error::chain(&error))).await;
            }
        }
    }

    async fn connect(&self, sandbox: &str, port: u16) -> Result<Tunnel, String> {
        let view = self.pods.find(sandbox).map_err(|error| error.to_string())?.view();
        if !view.is_ready() {
            return Err(format!("sandbox {sandbox} is not ready: {}", view.why()));
        }
        let connection = stream::connect(self.node.monitor_socket(&view.record.id), port)
            .await
            .map_err(|error| crate::error::chain(&error))?;
        tunnel(connection, view.record.runtime.vm().is_some())
            .map_err(|error| format!("cannot use the connection to port {port}: {error}"))
    }
}
