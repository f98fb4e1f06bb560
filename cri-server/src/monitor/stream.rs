//! Stream connections to a monitor: an exec or attach session between the streaming server's channels and the monitor's frames, and
//! descriptors of connections into the pod.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{
    Connect, ErrorCode, Reply, Request, StreamFrame, TerminalSize, stream_frame::Frame,
};
use podvisor_streaming::{Input, Output, Streams};
use prost::Message;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::connection::{MonitorError, frame, next};

/// Largest piece of input per frame.
const PIECE: usize = 64 << 10;

/// Runs a session: `verb` is Exec or Attach. Ends when the process has ended or the client went away.
pub(crate) async fn run(socket: &Path, verb: Verb, streams: Streams) {
    let Streams { input, output } = streams;
    let (reader, writer) = match start(socket, verb).await {
        Ok(halves) => halves,
        Err(error) => {
            let _ = output.send(Output::Failed(crate::error::chain(&error))).await;
            return;
        }
    };
    // When either side is done the session is: dropping the connection ends an exec's process.
    let feeding = tokio::spawn(feed(writer, input));
    deliver(reader, &output).await;
    feeding.abort();
}

async fn start(
    socket: &Path,
    verb: Verb,
) -> Result<(BufReader<OwnedReadHalf>, OwnedWriteHalf), MonitorError> {
    let broken = |source| MonitorError::Connect { path: socket.display().to_string(), source };
    let stream = UnixStream::connect(socket).await.map_err(broken)?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(PIECE, reader);
    writer.write_all(&frame(&Request { id: 1, verb: Some(verb) })).await.map_err(broken)?;
    match next::<Reply>(&mut reader).await.and_then(|reply| reply.result) {
        Some(Answer::Started(_)) => Ok((reader, writer)),
        Some(Answer::Error(error)) => {
            Err(MonitorError::Refused { code: error.code(), detail: error.detail, log: error.runtime_log })
        }
        Some(_) => Err(MonitorError::Confused { verb: "exec or attach" }),
        None => Err(MonitorError::Gone),
    }
}

/// Client → process.
async fn feed(mut writer: OwnedWriteHalf, mut input: mpsc::Receiver<Input>) {
    while let Some(news) = input.recv().await {
        let frames: Vec<Frame> = match news {
            // An empty frame would mean the end of input.
            Input::Stdin(bytes) => bytes.chunks(PIECE).map(|piece| Frame::Stdin(piece.to_vec())).collect(),
            Input::StdinEnd => vec![Frame::Stdin(Vec::new())],
            Input::Resize(size) => {
                vec![Frame::Resize(TerminalSize { width: size.width.into(), height: size.height.into() })]
            }
        };
        for one in frames {
            if writer.write_all(&frame(&StreamFrame { frame: Some(one) })).await.is_err() {
                // The process has ended; what it said last is still on its way to the client.
                return std::future::pending().await;
            }
        }
    }
    // The client went away: closing our side makes the monitor end the exec.
    let _ = writer.shutdown().await;
}

/// Process → client.
async fn deliver(mut reader: BufReader<OwnedReadHalf>, output: &mpsc::Sender<Output>) {
    while let Some(StreamFrame { frame: Some(one) }) = next::<StreamFrame>(&mut reader).await {
        let (news, last) = match one {
            Frame::Stdout(bytes) => (Output::Stdout(Bytes::from(bytes)), false),
            Frame::Stderr(bytes) => (Output::Stderr(Bytes::from(bytes)), false),
            Frame::Exit(exit) => (Output::Exit(exit.code), true),
            Frame::Error(error) => (Output::Failed(error.detail), true),
            Frame::Stdin(_) | Frame::Resize(_) => continue,
        };
        if output.send(news).await.is_err() || last {
            return;
        }
    }
}

/// A connection to `port` inside the pod, made by its monitor.
pub(crate) async fn connect(socket: PathBuf, port: u16) -> Result<OwnedFd, MonitorError> {
    tokio::task::spawn_blocking(move || connect_blocking(&socket, port))
        .await
        .unwrap_or(Err(MonitorError::Gone))
}

fn connect_blocking(socket: &Path, port: u16) -> Result<OwnedFd, MonitorError> {
    use std::io::Write;
    let broken = |source| MonitorError::Connect { path: socket.display().to_string(), source };
    let mut stream = std::os::unix::net::UnixStream::connect(socket).map_err(broken)?;
    // The monitor itself gives up after ten seconds.
    stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(broken)?;
    let verb = Verb::Connect(Connect { port: port.into() });
    stream.write_all(&frame(&Request { id: 1, verb: Some(verb) })).map_err(broken)?;

    let (mut received, mut descriptor) = (Vec::new(), None);
    loop {
        if let Some(length) = received.get(..4) {
            let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
            if received.len() >= 4 + length {
                let reply = Reply::decode(&received[4..4 + length])
                    .map_err(|_| MonitorError::Confused { verb: "connect" })?;
                return answer(reply, descriptor);
            }
        }
        let (bytes, more) = receive(&stream).map_err(broken)?;
        if bytes.is_empty() {
            return Err(MonitorError::Gone);
        }
        received.extend_from_slice(&bytes);
        descriptor = descriptor.or(more);
        if received.len() > PIECE {
            return Err(MonitorError::Confused { verb: "connect" });
        }
    }
}

fn answer(reply: Reply, descriptor: Option<OwnedFd>) -> Result<OwnedFd, MonitorError> {
    match (reply.result, descriptor) {
        (Some(Answer::Connected(_)), Some(descriptor)) => Ok(descriptor),
        (Some(Answer::Error(error)), _) => Err(MonitorError::Refused {
            code: ErrorCode::try_from(error.code).unwrap_or_default(),
            detail: error.detail,
            log: error.runtime_log,
        }),
        _ => Err(MonitorError::Confused { verb: "connect" }),
    }
}

/// Some bytes, and the descriptor that came with them, unix(7) SCM_RIGHTS.
fn receive(stream: impl AsFd) -> std::io::Result<(Vec<u8>, Option<OwnedFd>)> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    bytes.truncate(received.bytes);
    Ok((bytes, descriptor))
}
