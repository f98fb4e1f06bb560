//! The server as clients see it, over real sockets.

mod exec;
mod forward;
mod fuzz;
mod http;
mod program;
mod spdy_client;
mod websocket_client;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::server::Limits;
use crate::{Options, Server, Session};
use program::Programs;

/// How long anything may take before a test calls it lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Any byte stream.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

pub(super) fn options() -> Options {
    Options {
        address: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        token_lifetime: Duration::from_secs(600),
        idle_timeout: Duration::from_secs(600),
    }
}

pub(super) fn limits() -> Limits {
    Limits { linger: Duration::from_secs(20), ..Limits::default() }
}

/// A server whose backend runs [`Programs`].
pub(super) struct Fixture {
    pub(super) server: Server,
    programs: Arc<Programs>,
}

impl Fixture {
    pub(super) async fn start() -> Self {
        Self::with(options(), limits()).await
    }

    pub(super) async fn with(options: Options, limits: Limits) -> Self {
        let programs = Arc::new(Programs::new());
        let server = Server::start_with(options, limits, Arc::clone(&programs)).await.unwrap();
        Self { server, programs }
    }

    /// The URL of an exec without a terminal, with all streams.
    pub(super) fn exec(&self, command: &[&str]) -> String {
        self.server.offer(exec(command))
    }

    pub(super) fn forward(&self, ports: &[u16]) -> String {
        self.server.offer(Session::PortForward { sandbox: "sandbox".to_owned(), ports: ports.to_vec() })
    }
}

pub(super) fn exec(command: &[&str]) -> Session {
    Session::Exec {
        container: "container".to_owned(),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    }
}

pub(super) fn exec_tty(command: &[&str]) -> Session {
    let Session::Exec { container, command, .. } = exec(command) else { unreachable!() };
    Session::Exec { container, command, tty: true, stdin: true, stdout: true, stderr: false }
}

/// Address and path of a URL.
pub(super) fn split(url: &str) -> (&str, String) {
    let rest = url.split_once("://").unwrap().1;
    let (address, path) = rest.split_once('/').unwrap();
    (address, format!("/{path}"))
}

/// A response's head, with the connection behind it.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) io: Box<dyn Io>,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (known, value) = line.split_once(": ")?;
            known.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

/// Sends a request and reads the head of the answer, not a byte more.
pub(super) async fn request(url: &str, method: &str, headers: &[(&str, &str)]) -> Answer {
    let tcp = TcpStream::connect(split(url).0).await.unwrap();
    request_on(Box::new(tcp), url, method, headers).await
}

pub(super) async fn request_on(
    mut io: Box<dyn Io>,
    url: &str,
    method: &str,
    headers: &[(&str, &str)],
) -> Answer {
    let (address, path) = split(url);
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n");
    for (name, value) in headers {
        text.extend([name, ": ", value, "\r\n"]);
    }
    text.push_str("\r\n");
    io.write_all(text.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(patiently(io.read_u8()).await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, io }
}

pub(super) async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Bytes that tell when some are lost, doubled or out of order.
pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}
