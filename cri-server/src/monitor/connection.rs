//! One control connection to a monitor: requests in any order, matched by number; events as they come.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{
    ErrorCode, Event, Hello, HelloReply, MAX_FRAME, PROTOCOL_VERSION, Reply, Request,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tonic::Code;

/// Why a monitor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MonitorError {
    #[error("cannot reach the pod's monitor at {path}")]
    Connect { path: String, source: std::io::Error },
    #[error("the pod's monitor has gone")]
    Gone,
    #[error("the pod's monitor did not answer {verb} within {limit:?}")]
    Silent { verb: &'static str, limit: Duration },
    #[error("the pod's monitor answered {verb} with something else")]
    Confused { verb: &'static str },
    #[error("{detail}{}{log}", if log.is_empty() { "" } else { ": " })]
    Refused { code: ErrorCode, detail: String, log: String },
    #[error("cannot start monitor {path}")]
    Spawn { path: String, source: std::io::Error },
}

impl MonitorError {
    pub(crate) fn code(&self) -> Code {
        match self {
            MonitorError::Refused { code, .. } => match code {
                ErrorCode::Unsupported => Code::Unimplemented,
                ErrorCode::Invalid => Code::InvalidArgument,
                ErrorCode::NotFound => Code::NotFound,
                ErrorCode::AlreadyExists => Code::AlreadyExists,
                ErrorCode::WrongState => Code::FailedPrecondition,
                ErrorCode::Timeout => Code::DeadlineExceeded,
                ErrorCode::Unspecified
                | ErrorCode::RuntimeFailed
                | ErrorCode::RuntimeMissing
                | ErrorCode::System
                | ErrorCode::VmFailed => Code::Internal,
            },
            MonitorError::Gone | MonitorError::Connect { .. } => Code::Unavailable,
            MonitorError::Silent { .. } => Code::DeadlineExceeded,
            MonitorError::Confused { .. } | MonitorError::Spawn { .. } => Code::Internal,
        }
    }

    /// What was refused does not fit what the container is by now.
    pub(crate) fn is_wrong_state(&self) -> bool {
        matches!(self, MonitorError::Refused { code: ErrorCode::WrongState, .. })
    }

    /// The OCI runtime, or the agent in a virtual machine, has begun and failed.
    pub(crate) fn is_runtime_failure(&self) -> bool {
        matches!(self, MonitorError::Refused { code: ErrorCode::RuntimeFailed | ErrorCode::System, .. })
    }

    /// What was refused was not there (any more).
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, MonitorError::Refused { code: ErrorCode::NotFound, .. })
    }
}

/// What a connection tells its owner unasked.
#[derive(Debug)]
pub(crate) enum Notice {
    /// Something happened in the pod.
    Event(Event),
    /// The connection ended: the monitor died or was shut down.
    Closed,
}

type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>>;

/// A control connection. Cheap to clone; the connection ends with the last clone.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    requests: mpsc::Sender<Vec<u8>>,
    pending: Pending,
    next: Arc<AtomicU64>,
    /// For verbs that call the OCI runtime.
    runtime_limit: Duration,
}

/// For verbs that need no time of their own.
const SOON: Duration = Duration::from_secs(10);
/// For verbs that call the OCI runtime, which has `seconds` for a call: a creation that fails is two, and the monitor needs a moment
/// of its own. It keeps the limit itself; this one is for a monitor that does not run.
pub(crate) fn runtime_limit(seconds: u32) -> Duration {
    Duration::from_secs(u64::from(seconds) * 2) + SOON
}

impl Connection {
    /// Connects to a pod's monitor and greets it.
    pub(crate) async fn open(
        path: &Path,
        runtime_limit: Duration,
        notices: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<(Self, HelloReply), MonitorError> {
        let socket = UnixStream::connect(path)
            .await
            .map_err(|source| MonitorError::Connect { path: path.display().to_string(), source })?;
        let connection = Self::over(socket, runtime_limit, notices);
        let hello = connection.hello().await?;
        Ok((connection, hello))
    }

    /// Speaks over a connected socket. `notices` is called from the reading task and must not block.
    pub(crate) fn over(
        socket: UnixStream,
        runtime_limit: Duration,
        notices: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Self {
        let (reader, writer) = socket.into_split();
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        // Requests are small; a queue of a few is enough for a pod's worth of concurrency.
        let (requests, queue) = mpsc::channel(16);
        tokio::spawn(write(writer, queue));
        let waiting = pending.clone();
        tokio::spawn(async move {
            read(reader, &waiting, &notices).await;
            // Everybody who waits learns that there will be no answer.
            waiting.lock().expect("no panic under this lock").take();
            notices(Notice::Closed);
        });
        Self { requests, pending, next: Arc::new(AtomicU64::new(1)), runtime_limit }
    }

    pub(crate) async fn hello(&self) -> Result<HelloReply, MonitorError> {
        match self.call(Verb::Hello(Hello { protocol_version: PROTOCOL_VERSION })).await? {
            Answer::Hello(hello) => Ok(hello),
            _ => Err(MonitorError::Confused { verb: "hello" }),
        }
    }

    /// Asks and waits for the answer, within the limit of the verb.
    pub(crate) async fn call(&self, verb: Verb) -> Result<Answer, MonitorError> {
        let (name, limit) = self.limits(&verb);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        match self.pending.lock().expect("no panic under this lock").as_mut() {
            Some(pending) => pending.insert(id, sender),
            None => return Err(MonitorError::Gone),
        };
        let frame = frame(&Request { id, verb: Some(verb) });
        let waiting = Forget { pending: &self.pending, id };
        let asked = async {
            self.requests.send(frame).await.map_err(|_| MonitorError::Gone)?;
            Ok(answer.await)
        };
        let answer = match limit {
            Some(limit) => tokio::time::timeout(limit, asked)
                .await
                .map_err(|_| MonitorError::Silent { verb: name, limit })??,
            None => asked.await?,
        };
        drop(waiting);
        match answer {
            Ok(Answer::Error(error)) => Err(MonitorError::Refused {
                code: error.code(),
                detail: error.detail,
                log: error.runtime_log,
            }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(MonitorError::Gone),
        }
    }

    /// Asks for something that has nothing to tell.
    pub(crate) async fn command(&self, verb: Verb) -> Result<(), MonitorError> {
        let (name, _) = self.limits(&verb);
        match self.call(verb).await? {
            Answer::Done(_) => Ok(()),
            _ => Err(MonitorError::Confused { verb: name }),
        }
    }

    fn limits(&self, verb: &Verb) -> (&'static str, Option<Duration>) {
        let runtime = Some(self.runtime_limit);
        match verb {
            Verb::Hello(_) => ("hello", Some(SOON)),
            Verb::Adopt(_) => ("adopt", Some(SOON)),
            Verb::Subscribe(_) => ("subscribe", Some(SOON)),
            Verb::ListProcesses(_) => ("list processes", Some(SOON)),
            Verb::StartInit(_) => ("start init", Some(SOON)),
            Verb::CreateContainer(_) => ("create container", runtime),
            Verb::StartContainer(_) => ("start container", runtime),
            Verb::KillContainer(_) => ("kill container", runtime),
            Verb::DeleteContainer(_) => ("delete container", runtime),
            Verb::UpdateContainer(_) => ("update container", runtime),
            Verb::ReopenLog(_) => ("reopen log", Some(SOON)),
            // The caller has its own limit.
            Verb::CheckpointContainer(_) => ("checkpoint container", None),
            Verb::ResumeContainer(_) => ("resume container", runtime),
            // The caller has its own limit, or wants none.
            Verb::ExecSync(_) => ("exec", None),
            Verb::Exec(_) => ("exec", runtime),
            Verb::Attach(_) => ("attach", Some(SOON)),
            Verb::Connect(_) => ("connect", Some(SOON)),
            Verb::Shutdown(_) => ("shutdown", Some(SOON)),
            // It has a limit of its own.
            Verb::StartVm(_) => ("start the virtual machine", None),
            Verb::GuestStats(_) => ("stats of the guest", Some(SOON)),
            Verb::ResizeVm(_) => ("resize the virtual machine", runtime),
        }
    }
}

/// Takes the entry out again when a caller gives up waiting.
struct Forget<'a> {
    pending: &'a Pending,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.lock().expect("no panic under this lock").as_mut() {
            pending.remove(&self.id);
        }
    }
}

/// A message with its length before it.
pub(crate) fn frame(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    message.encode(&mut bytes).expect("a vector grows");
    bytes
}

/// The next message; `None` at the end of the stream or when the peer breaks the protocol.
pub(crate) async fn next<M: Message + Default>(reader: &mut (impl AsyncReadExt + Unpin)) -> Option<M> {
    let length = reader.read_u32_le().await.ok()? as usize;
    if length > MAX_FRAME {
        return None;
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).await.ok()?;
    M::decode(bytes.as_slice()).ok()
}

async fn write(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = queue.recv().await {
        if writer.write_all(&frame).await.is_err() {
            return;
        }
    }
    // Dropping the write half ends the connection on the monitor's side.
}

async fn read(reader: OwnedReadHalf, pending: &Pending, notices: &(impl Fn(Notice) + Sync)) {
    let mut reader = BufReader::with_capacity(1024, reader);
    while let Some(reply) = next::<Reply>(&mut reader).await {
        match reply.result {
            Some(Answer::Event(event)) => notices(Notice::Event(event)),
            Some(answer) => {
                let waiting = pending
                    .lock()
                    .expect("no panic under this lock")
                    .as_mut()
                    .and_then(|pending| pending.remove(&reply.id));
                if let Some(waiting) = waiting {
                    let _ = waiting.send(answer);
                }
            }
            None => {}
        }
    }
}
