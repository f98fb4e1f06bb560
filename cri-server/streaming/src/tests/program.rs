//! A backend whose processes are small programs, and whose sandbox is a TCP server.

use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::pattern;
use crate::Tunnel;
use crate::{Backend, Input, Output, Session, Streams};

/// Counts what happened, for tests to wait on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) started: usize,
    /// Sessions whose client went while they ran.
    pub(super) abandoned: usize,
    /// Output that could be handed over so far, in bytes.
    pub(super) produced: usize,
}

#[derive(Debug)]
pub(super) struct Programs {
    pub(super) seen: watch::Sender<Seen>,
}

impl Programs {
    pub(super) fn new() -> Self {
        Self { seen: watch::Sender::default() }
    }

    pub(super) async fn until(&self, condition: impl FnMut(&Seen) -> bool) {
        super::patiently(self.seen.subscribe().wait_for(condition)).await.unwrap();
    }
}

impl Backend for Programs {
    async fn run(&self, session: Session, streams: Streams) {
        self.seen.send_modify(|seen| seen.started += 1);
        let Streams { mut input, output } = streams;
        let Session::Exec { command, .. } = session else {
            // An attach sees what was said before it, and its input, until that ends.
            let _ = output.send(Output::Stdout(Bytes::from_static(b"attached "))).await;
            while let Some(Input::Stdin(bytes)) = input.recv().await {
                let _ = output.send(Output::Stdout(bytes)).await;
            }
            return;
        };
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        let end = match words[..] {
            // Copies its input; `cat N` exits with N.
            ["cat", ref code @ ..] => loop {
                match input.recv().await {
                    Some(Input::Stdin(bytes)) => {
                        let _ = output.send(Output::Stdout(bytes)).await;
                    }
                    Some(Input::StdinEnd) => {
                        let code = code.first().map_or(0, |code| code.parse().unwrap());
                        break Some(Output::Exit(code));
                    }
                    Some(Input::Resize(_)) => {}
                    None => {
                        self.seen.send_modify(|seen| seen.abandoned += 1);
                        break None;
                    }
                }
            },
            // Both outputs, and an exit code.
            ["both", code] => {
                for _ in 0..100 {
                    let _ = output.send(Output::Stdout(Bytes::from_static(b"out "))).await;
                    let _ = output.send(Output::Stderr(Bytes::from_static(b"err "))).await;
                }
                Some(Output::Exit(code.parse().unwrap()))
            }
            // As much output as asked for, in uneven pieces.
            ["big", length] => {
                let bytes = Bytes::from(pattern(length.parse().unwrap()));
                let mut rest = bytes.clone();
                let mut size = 1;
                while !rest.is_empty() {
                    let piece = rest.split_to(size.min(rest.len()));
                    let length = piece.len();
                    if output.send(Output::Stdout(piece)).await.is_err() {
                        self.seen.send_modify(|seen| seen.abandoned += 1);
                        return;
                    }
                    self.seen.send_modify(|seen| seen.produced += length);
                    size = (size * 3 + 1) % 200_000;
                }
                Some(Output::Exit(0))
            }
            // Says each size of the terminal, until its input ends.
            ["sizes"] => loop {
                match input.recv().await {
                    Some(Input::Resize(size)) => {
                        let text = format!("{}x{} ", size.width, size.height);
                        let _ = output.send(Output::Stdout(text.into())).await;
                    }
                    Some(Input::Stdin(_)) => {}
                    Some(Input::StdinEnd) | None => break Some(Output::Exit(0)),
                }
            },
            // Reads nothing, and runs until its client goes.
            ["sleep"] => {
                output.closed().await;
                self.seen.send_modify(|seen| seen.abandoned += 1);
                None
            }
            // Does not want any input.
            ["deaf"] => {
                drop(input);
                let _ = output.send(Output::Stdout(Bytes::from_static(b"deaf"))).await;
                self.until(|seen| seen.produced > 0).await;
                Some(Output::Exit(0))
            }
            ["fail", why] => Some(Output::Failed(why.to_owned())),
            // Forgets to say how it ended.
            ["vanish"] => None,
            ref other => panic!("no program {other:?}"),
        };
        if let Some(end) = end {
            let _ = output.send(end).await;
        }
    }

    async fn connect(&self, sandbox: &str, port: u16) -> Result<Tunnel, String> {
        assert_eq!(sandbox, "sandbox");
        TcpStream::connect(("127.0.0.1", port)).await.map(Tunnel::from).map_err(|error| error.to_string())
    }
}

/// A TCP server that answers with what it is sent, and closes when its client has.
pub(super) async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    address
}

/// A TCP server that reads to the end before it answers with how much it got, and one that says something and
/// closes at once when asked for nothing.
pub(super) async fn counting_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all).await;
                let _ = stream.write_all(format!("{} bytes", all.len()).as_bytes()).await;
            });
        }
    });
    address
}
