//! Exec and attach over SPDY: one stream for each of error, stdin, stdout, stderr and resize.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::status::{Outcome, Version};
use super::{ClientGone, Outlet, Side, Wanted, relay};
use crate::Backend;
use crate::server::Conversation;
use crate::spdy::{Connection, Stream, StreamSender};

/// Header of a new stream that says what it is for.
const STREAM_TYPE: &str = "streamType";

/// The streams that a client has opened so far, in whatever order.
#[derive(Debug, Default)]
struct Opened {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Opened {
    fn place(&mut self, stream: &Stream) -> Option<&mut Option<Stream>> {
        match stream.headers.get(STREAM_TYPE)? {
            "error" => Some(&mut self.error),
            "stdin" => Some(&mut self.stdin),
            "stdout" => Some(&mut self.stdout),
            "stderr" => Some(&mut self.stderr),
            "resize" => Some(&mut self.resize),
            _ => None,
        }
    }

    fn complete(&self, wanted: Wanted, version: Version) -> bool {
        let needed = [
            (&self.error, true),
            (&self.stdin, wanted.stdin),
            (&self.stdout, wanted.stdout),
            (&self.stderr, wanted.stderr),
            (&self.resize, wanted.tty && version >= Version::V3),
        ];
        needed.iter().all(|(stream, needed)| stream.is_some() || !needed)
    }

    /// Takes streams until all are there.
    async fn collect(&mut self, connection: &mut Connection, wanted: Wanted, version: Version) -> Collected {
        while !self.complete(wanted, version) {
            let Some(stream) = connection.accept().await else { return Collected::Gone };
            match self.place(&stream) {
                Some(place @ None) => {
                    if stream.accept().await.is_err() {
                        return Collected::Gone;
                    }
                    *place = Some(stream);
                }
                Some(Some(_)) | None => stream.refuse().await,
            }
        }
        Collected::Complete
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Collected {
    Complete,
    Gone,
}

/// Serves one session on an upgraded connection.
pub(crate) async fn serve<B: Backend>(
    conversation: Conversation<B>,
    wanted: Wanted,
    mut connection: Connection,
    version: Version,
) {
    let linger = conversation.limits.linger;
    let deadline = Instant::now() + conversation.limits.stream_creation;
    let mut opened = Opened::default();
    let collected = tokio::time::timeout_at(deadline, opened.collect(&mut connection, wanted, version)).await;
    // A client that does not read cannot be told that it opened too many.
    let _ = tokio::time::timeout(linger, connection.refuse_more()).await;
    let mut outlet = SpdyOutlet {
        version,
        linger,
        stdout: None,
        stderr: None,
        error: None,
        unread: Vec::new(),
        connection,
    };
    outlet.error = opened.error.map(|stream| stream.sender);
    match collected {
        Ok(Collected::Complete) => {}
        Ok(Collected::Gone) => return,
        Err(_elapsed) => {
            let why = "the client did not open the streams of its session in time";
            tracing::debug!("a client did not open its streams in time");
            let told = outlet.finish(Outcome::Failed(why.to_owned()));
            // A client that does not even read must not hold the session.
            let _ = tokio::time::timeout(linger, told).await;
            return;
        }
    }
    let mut receive = |stream: Option<Stream>, wanted: bool| {
        let stream = stream?;
        // Held open, for clients take the end of stdin's way back as the end of the session.
        outlet.unread.push(stream.sender);
        wanted.then_some(stream.receiver)
    };
    let stdin = receive(opened.stdin, wanted.stdin);
    let resize = receive(opened.resize, wanted.tty);
    outlet.stdout = opened.stdout.map(|stream| stream.sender);
    outlet.stderr = opened.stderr.map(|stream| stream.sender);
    let gone = outlet.connection.gone();
    relay(conversation, stdin, resize, outlet, gone).await;
}

#[derive(Debug)]
struct SpdyOutlet {
    version: Version,
    linger: Duration,
    stdout: Option<StreamSender>,
    stderr: Option<StreamSender>,
    error: Option<StreamSender>,
    /// Our side of streams on which only the client sends.
    unread: Vec<StreamSender>,
    connection: Connection,
}

impl Outlet for SpdyOutlet {
    async fn write(&mut self, side: Side, bytes: Bytes) -> Result<(), ClientGone> {
        let stream = match side {
            Side::Stdout => &self.stdout,
            Side::Stderr => &self.stderr,
        };
        // Neither a stream that was not asked for nor one that the client has reset ends the session.
        if let Some(stream) = stream {
            let _ = stream.data(bytes).await;
        }
        Ok(())
    }

    async fn finish(self, outcome: Outcome) {
        for stream in [&self.stdout, &self.stderr].into_iter().flatten() {
            stream.finish().await;
        }
        if let Some(error) = &self.error {
            if let Some(status) = outcome.encode(self.version) {
                let _ = error.data(status).await;
            }
            error.finish().await;
        }
        for stream in &self.unread {
            stream.finish().await;
        }
        self.connection.finish(self.linger).await;
    }
}
