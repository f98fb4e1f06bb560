//! Exec and attach: between the streams of a client and the channels of the backend, whatever the transport.

mod resize;
mod spdy;
mod status;
mod websocket;

pub(crate) use spdy::serve as serve_spdy;
pub(crate) use status::Version;
pub(crate) use websocket::serve as serve_websocket;

#[cfg(test)]
pub(crate) use resize::Resizes;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::pieces::{Piece, PieceReceiver};
use crate::server::Conversation;
use crate::spdy::StreamReceiver;
use crate::{Backend, Input, Output, Session, Streams};
use status::Outcome;

/// Messages that wait between a session and its process, in each direction.
const DEPTH: usize = 8;

/// Which streams the session was offered with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

impl Wanted {
    /// None: not a remote command.
    pub(crate) fn of(session: &Session) -> Option<Self> {
        let (Session::Exec { tty, stdin, stdout, stderr, .. }
        | Session::Attach { tty, stdin, stdout, stderr, .. }) = *session
        else {
            return None;
        };
        // A terminal has one output; the CRI forbids stderr beside it, so no client opens that stream.
        Some(Self { stdin, stdout, stderr: stderr && !tty, tty })
    }
}

/// The process's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Stdout,
    Stderr,
}

/// The client cannot be talked to any more.
#[derive(Debug)]
struct ClientGone;

/// The way to the client.
trait Outlet: Send {
    /// Waits until the client has taken enough to queue the bytes.
    fn write(&mut self, side: Side, bytes: Bytes) -> impl Future<Output = Result<(), ClientGone>> + Send;
    /// Ends all streams, in the order in which nothing is lost, and the connection.
    fn finish(self, outcome: Outcome) -> impl Future<Output = ()> + Send;
}

/// The way from the client.
trait Inlet: Send {
    fn next(&mut self) -> impl Future<Output = Option<Piece>> + Send;
}

impl Inlet for PieceReceiver {
    async fn next(&mut self) -> Option<Piece> {
        PieceReceiver::next(self).await
    }
}

impl Inlet for StreamReceiver {
    async fn next(&mut self) -> Option<Piece> {
        StreamReceiver::next(self).await
    }
}

/// Runs the session until the process ends, the client goes, or nothing moves any more. `gone` completes when the
/// client does. The backend is never cancelled: it sees its channels close, and decides.
async fn relay<B, I, O>(
    conversation: Conversation<B>,
    stdin: Option<I>,
    resize: Option<I>,
    mut outlet: O,
    gone: impl Future<Output = ()> + Send,
) where
    B: Backend,
    I: Inlet,
    O: Outlet,
{
    let Conversation { backend, session, limits, activity, permit } = conversation;
    let failed = match &session {
        Session::Attach { .. } => "error attaching to container",
        Session::Exec { .. } | Session::PortForward { .. } => "error executing command in container",
    };
    let ends_by_closing = matches!(session, Session::Attach { .. });
    let (input, from_client) = mpsc::channel(DEPTH);
    let (to_client, mut output) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        backend.run(session, Streams { input: from_client, output: to_client }).await;
        // A session counts until its process is done with it, not until its client has gone.
        drop(permit);
    });
    let inputs = async {
        tokio::join!(feed_stdin(stdin, &input), feed_sizes(resize, &input));
        // The channel stays open until the client goes, for that is what its closing means.
        std::future::pending::<()>().await;
    };
    let mut gone = std::pin::pin!(gone);
    let ended = tokio::select! {
        ended = carry_output(&mut output, &mut outlet) => ended,
        () = inputs => None,
        () = gone.as_mut() => None,
        () = activity.idle() => Some(Ended::Idle),
    };
    // The backend learns at once that nobody listens, even while the client is still told how it ended.
    drop((input, output));
    let outcome = match ended {
        None => return,
        Some(Ended::Exit(0)) => Outcome::Success,
        // Clients read the code as eight bits.
        Some(Ended::Exit(code)) => Outcome::ExitCode(u8::try_from(code).unwrap_or(u8::MAX)),
        Some(Ended::Failed(why)) => Outcome::Failed(format!("{failed}: {why}")),
        Some(Ended::Closed) if ends_by_closing => Outcome::Success,
        Some(Ended::Closed) => Outcome::Failed(format!("{failed}: it ended without an exit code")),
        Some(Ended::Idle) => {
            tracing::info!("a streaming session is ended because nothing moved on it");
            let told = outlet.finish(Outcome::Failed("the session was idle for too long".to_owned()));
            let _ = tokio::time::timeout(limits.linger, told).await;
            return;
        }
    };
    tokio::select! {
        () = outlet.finish(outcome) => {}
        () = gone => {}
        () = activity.idle() => {}
    }
}

/// Why output ends.
#[derive(Debug)]
enum Ended {
    Exit(i32),
    Failed(String),
    Closed,
    Idle,
}

/// None: the client is gone.
async fn carry_output<O: Outlet>(output: &mut mpsc::Receiver<Output>, outlet: &mut O) -> Option<Ended> {
    loop {
        let written = match output.recv().await {
            Some(Output::Stdout(bytes)) => outlet.write(Side::Stdout, bytes).await,
            Some(Output::Stderr(bytes)) => outlet.write(Side::Stderr, bytes).await,
            Some(Output::Exit(code)) => return Some(Ended::Exit(code)),
            Some(Output::Failed(why)) => return Some(Ended::Failed(why)),
            None => return Some(Ended::Closed),
        };
        if let Err(ClientGone) = written {
            return None;
        }
    }
}

async fn feed_stdin<I: Inlet>(stdin: Option<I>, input: &mpsc::Sender<Input>) {
    let Some(mut stdin) = stdin else { return };
    while let Some(piece) = stdin.next().await {
        let message = match piece {
            Piece::Data(bytes) => Input::Stdin(bytes),
            Piece::End => Input::StdinEnd,
        };
        // If the process wants no more, the rest is discarded: what nobody takes would stop the whole connection.
        if input.send(message).await.is_err() {
            return;
        }
    }
}

async fn feed_sizes<I: Inlet>(resize: Option<I>, input: &mpsc::Sender<Input>) {
    let Some(mut resize) = resize else { return };
    let mut sizes = resize::Resizes::default();
    while let Some(Piece::Data(bytes)) = resize.next().await {
        match sizes.take(&bytes) {
            Ok(None) => {}
            Ok(Some(size)) => {
                if input.send(Input::Resize(size)).await.is_err() {
                    return;
                }
            }
            Err(resize::NotASize) => {
                tracing::debug!("a client sent something else than sizes on its resize stream");
                return;
            }
        }
    }
}
