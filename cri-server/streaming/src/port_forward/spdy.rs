//! Port-forward over SPDY: for each connection a stream `error` and a stream `data`, joined by their request id.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Target;
use super::copy::{Broken, FromClient, ToClient, copy, is_ordinary};
use crate::Backend;
use crate::activity::Activity;
use crate::pieces::Piece;
use crate::server::Limits;
use crate::spdy::{Connection, ResetStatus, Stream, StreamReceiver, StreamSender};

/// What the headers of a stream say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Purpose {
    data: bool,
    port: u16,
    request: String,
}

impl Purpose {
    fn of(stream: &Stream) -> Option<Self> {
        let data = match stream.headers.get("streamType")? {
            "data" => true,
            "error" => false,
            _ => return None,
        };
        let port = stream.headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
        let request = match stream.headers.get("requestID") {
            Some(request) if !request.is_empty() => request.to_owned(),
            // Old clients send none, and open `data` right after `error`: the odd numbers follow each other.
            _ if data => stream.id.saturating_sub(2).to_string(),
            _ => stream.id.to_string(),
        };
        Some(Self { data, port, request })
    }
}

/// The streams of a connection until both are there.
#[derive(Debug)]
struct Pair {
    data: Option<(u16, Stream)>,
    error: Option<Stream>,
    deadline: Instant,
}

/// Serves one session on an upgraded connection, until the client closes it or nothing moves any more.
pub(crate) async fn serve<B: Backend>(
    target: Target<B>,
    mut connection: Connection,
    limits: Arc<Limits>,
    activity: Arc<Activity>,
) {
    let gone = connection.gone();
    tokio::select! {
        () = take_streams(target, &mut connection, &limits) => return,
        // Seen also while an answer waits for a client that does not read.
        () = gone => return,
        () = activity.idle() => {}
    }
    tracing::info!("a port-forward session is ended because nothing moved on it");
    let _ = tokio::time::timeout(limits.linger, connection.finish(limits.linger)).await;
}

async fn take_streams<B: Backend>(target: Target<B>, connection: &mut Connection, limits: &Limits) {
    let target = Arc::new(target);
    let mut pairs: HashMap<String, Pair> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let deadline = pairs.values().map(|pair| pair.deadline).min();
        tokio::select! {
            stream = connection.accept() => {
                let Some(stream) = stream else { return };
                if let Some((port, data, error)) = enter(&mut pairs, stream, limits.stream_creation).await {
                    forwards.spawn(forward(Arc::clone(&target), port, data, error));
                }
            }
            Some(_ended) = forwards.join_next() => {}
            () = until(deadline) => drop_overdue(&mut pairs).await,
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Puts a stream in its pair; the pair, with its port, when it is complete.
async fn enter(
    pairs: &mut HashMap<String, Pair>,
    stream: Stream,
    patience: Duration,
) -> Option<(u16, Stream, Stream)> {
    let Some(Purpose { data, port, request }) = Purpose::of(&stream) else {
        stream.refuse().await;
        return None;
    };
    let mut pair = pairs.remove(&request).unwrap_or_else(|| Pair {
        data: None,
        error: None,
        deadline: Instant::now() + patience,
    });
    let taken = if data { pair.data.is_some() } else { pair.error.is_some() };
    if taken {
        stream.refuse().await;
    } else {
        // If the client is gone, the next accept() says so.
        let _ = stream.accept().await;
        if data {
            pair.data = Some((port, stream));
        } else {
            pair.error = Some(stream);
        }
    }
    match pair {
        Pair { data: Some((port, data)), error: Some(error), .. } => Some((port, data, error)),
        incomplete => {
            pairs.insert(request, incomplete);
            None
        }
    }
}

async fn drop_overdue(pairs: &mut HashMap<String, Pair>) {
    let now = Instant::now();
    let overdue: Vec<_> =
        pairs.iter().filter(|(_, pair)| pair.deadline <= now).map(|(request, _)| request.clone()).collect();
    for request in overdue {
        let Some(Pair { data, error, .. }) = pairs.remove(&request) else { continue };
        if let Some(Stream { sender, .. }) = error {
            say(&sender, format!("error forwarding request {request}: its data stream did not come in time"))
                .await;
        }
        if let Some((_, data)) = data {
            data.sender.reset(ResetStatus::Cancel).await;
        }
    }
}

/// The whole content of an error stream.
async fn say(error: &StreamSender, message: String) {
    let _ = error.data(Bytes::from(message)).await;
    error.finish().await;
}

async fn forward<B: Backend>(target: Arc<Target<B>>, port: u16, data: Stream, error: Stream) {
    // Clients send nothing on it; what they do send is discarded.
    drop(error.receiver);
    let error = error.sender;
    let connection = match target.connect(port).await {
        Ok(connection) => connection,
        Err(why) => {
            tracing::debug!(port, error = why, "cannot forward a connection");
            say(&error, why).await;
            data.sender.reset(ResetStatus::Cancel).await;
            return;
        }
    };
    let Stream { mut sender, receiver, .. } = data;
    match copy(connection, receiver, &mut sender).await {
        Ok(()) | Err(Broken::ClientGone | Broken::Finished) => error.finish().await,
        Err(Broken::Connection(broken)) => {
            if is_ordinary(&broken) {
                error.finish().await;
            } else {
                say(&error, format!("error forwarding port {port}: {broken}")).await;
            }
            sender.reset(ResetStatus::Cancel).await;
        }
    }
}

impl FromClient for StreamReceiver {
    async fn next(&mut self) -> Option<Piece> {
        StreamReceiver::next(self).await
    }
}

impl ToClient for StreamSender {
    async fn data(&mut self, bytes: Bytes) -> bool {
        StreamSender::data(self, bytes).await.is_ok()
    }

    async fn end(&mut self) -> bool {
        self.finish().await;
        true
    }
}
