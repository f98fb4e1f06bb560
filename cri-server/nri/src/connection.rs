//! A plugin's socket: ttRPC in both directions over the multiplexer.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use podvisor_proto::ttrpc::{Request, Response, Status};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use crate::frame::{
    Decoder, FrameError, Kind, LONGEST_MESSAGE, Message, PLUGIN_SERVICE, RUNTIME_SERVICE, encode,
};

/// gRPC codes that matter here.
pub(crate) const UNIMPLEMENTED: i32 = 12;
const INTERNAL: i32 = 13;
const INVALID_ARGUMENT: i32 = 3;

const PLUGIN: &str = "nri.pkg.api.v1alpha1.Plugin";
const RUNTIME: &str = "nri.pkg.api.v1alpha1.Runtime";

/// Calls of a plugin that podvisor works on at the same time; more end the connection.
const CALLS_AT_ONCE: usize = 32;

/// Messages that wait to be written. A plugin that reads nothing is dropped by the time limit of its call long before.
const WAITING: usize = 64;

/// Why a call of a plugin brought no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// The plugin's own word.
    #[error("it answered {method} with code {code}: {message}")]
    Answered {
        /// The call.
        method: &'static str,
        /// gRPC code.
        code: i32,
        /// The plugin's text.
        message: String,
    },
    /// The connection is no more.
    #[error("its connection is closed: {0}")]
    Closed(Arc<str>),
    /// No answer in time.
    #[error("it did not answer {method} within {} ms", limit.as_millis())]
    Silent {
        /// The call.
        method: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// An answer that is no message.
    #[error("it answered {method} with something else")]
    Garbled {
        /// The call.
        method: &'static str,
    },
    /// The request does not fit into one message.
    #[error("{method} would take {length} bytes, more than ttRPC allows")]
    TooLong {
        /// The call.
        method: &'static str,
        /// Of its message.
        length: usize,
    },
}

impl CallError {
    /// The plugin has said no. Anything else means that it cannot be talked to any more.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(self, CallError::Answered { .. } | CallError::TooLong { .. })
    }
}

/// A refusal for the plugin.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) code: i32,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { code: INVALID_ARGUMENT, message: message.into() }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self { code: INTERNAL, message: message.into() }
    }
}

pub(crate) type Answer = Pin<Box<dyn Future<Output = Result<Bytes, Refusal>> + Send>>;

/// What podvisor does when the plugin calls `method` of the runtime service. `None`: there is no such method.
pub(crate) type Serve = Box<dyn Fn(&str, Bytes) -> Option<Answer> + Send + Sync>;

type Pending = Arc<Mutex<BTreeMap<u32, oneshot::Sender<Response>>>>;

/// A connection; a clone is the same one. It ends with its last clone.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    outbox: mpsc::Sender<Message>,
    pending: Pending,
    /// Of the next call: odd numbers that rise, as the ttRPC of the other side insists on.
    next: AtomicU32,
    closed: watch::Sender<Option<Arc<str>>>,
    /// Set together with `closed`; cheaper to look at.
    is_closed: AtomicBool,
}

impl Connection {
    /// Starts to talk.
    pub(crate) fn over(socket: UnixStream, serve: Serve) -> Self {
        let (read, write) = socket.into_split();
        let (outbox, messages) = mpsc::channel(WAITING);
        let shared = Arc::new(Shared {
            outbox: outbox.clone(),
            pending: Pending::default(),
            next: AtomicU32::new(1),
            closed: watch::Sender::new(None),
            is_closed: AtomicBool::new(false),
        });
        let (ending, ended) = (Arc::downgrade(&shared), shared.closed.subscribe());
        tokio::spawn(async move {
            let why = tokio::select! {
                why = reading(read, &ending, outbox, serve) => why,
                why = writing(write, messages) => why,
                why = closing(ended) => why,
            };
            if let Some(shared) = ending.upgrade() {
                shared.close(&why);
            }
        });
        Self { shared }
    }

    /// Calls a method of the plugin.
    pub(crate) async fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: &'static str,
        request: &Q,
        limit: Duration,
    ) -> Result<A, CallError> {
        let request = Request {
            service: PLUGIN.into(),
            method: method.into(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            metadata: Vec::new(),
        };
        let length = request.encoded_len();
        if length > LONGEST_MESSAGE {
            return Err(CallError::TooLong { method, length });
        }
        let (sender, answer) = oneshot::channel();
        // A stream that was given up keeps its number: a late answer to it is dropped.
        let stream = self.shared.next.fetch_add(2, Ordering::Relaxed);
        let forget = Forget { pending: self.shared.pending.clone(), stream };
        self.shared.pending.lock().expect("no panic under this lock").insert(stream, sender);
        let message = Message {
            connection: PLUGIN_SERVICE,
            stream,
            kind: Kind::Request,
            body: request.encode_to_vec().into(),
        };
        let conversation = async {
            self.shared.outbox.send(message).await.ok()?;
            answer.await.ok()
        };
        let response = tokio::select! {
            response = tokio::time::timeout(limit, conversation) => response,
            why = closing(self.shared.closed.subscribe()) => return Err(CallError::Closed(why)),
        };
        drop(forget);
        let response = response
            .map_err(|_| CallError::Silent { method, limit })?
            .ok_or_else(|| CallError::Closed(self.why_closed()))?;
        match response.status {
            Some(Status { code, message }) if code != 0 => {
                Err(CallError::Answered { method, code, message: printable(&message) })
            }
            _ => A::decode(response.payload.as_slice()).map_err(|_| CallError::Garbled { method }),
        }
    }

    /// Ends the connection, with the reason that calls in progress are told.
    pub(crate) fn close(&self, why: &str) {
        self.shared.close(why);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.shared.is_closed.load(Ordering::Acquire)
    }

    /// Waits for the end.
    pub(crate) async fn closed(&self) -> Arc<str> {
        closing(self.shared.closed.subscribe()).await
    }

    fn why_closed(&self) -> Arc<str> {
        self.shared.closed.borrow().clone().unwrap_or_else(|| "the plugin has closed it".into())
    }
}

impl Shared {
    fn close(&self, why: &str) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some(why.into());
            }
            first
        });
        self.is_closed.store(true, Ordering::Release);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close("it is not used any more");
    }
}

/// Takes a call out of those that wait, also when its caller goes away.
struct Forget {
    pending: Pending,
    stream: u32,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.pending.lock().expect("no panic under this lock").remove(&self.stream);
    }
}

async fn closing(mut closed: watch::Receiver<Option<Arc<str>>>) -> Arc<str> {
    match closed.wait_for(Option::is_some).await {
        Ok(why) => why.clone().unwrap_or_default(),
        Err(_) => "it is not used any more".into(),
    }
}

async fn writing(mut socket: OwnedWriteHalf, mut messages: mpsc::Receiver<Message>) -> Arc<str> {
    while let Some(message) = messages.recv().await {
        if let Err(error) = socket.write_all(&encode(&message)).await {
            return error.to_string().into();
        }
    }
    "it is not used any more".into()
}

async fn reading(
    mut socket: OwnedReadHalf,
    shared: &std::sync::Weak<Shared>,
    outbox: mpsc::Sender<Message>,
    serve: Serve,
) -> Arc<str> {
    let mut decoder = Decoder::default();
    let calls = Arc::new(tokio::sync::Semaphore::new(CALLS_AT_ONCE));
    let pending = match shared.upgrade() {
        Some(shared) => shared.pending.clone(),
        None => return "it is not used any more".into(),
    };
    loop {
        match socket.read_buf(decoder.buffer()).await {
            Ok(0) => return "the plugin has closed it".into(),
            Ok(_) => {}
            Err(error) => return error.to_string().into(),
        }
        loop {
            let message = match decoder.next() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => return violation(&error),
            };
            match (message.connection, message.kind) {
                (PLUGIN_SERVICE, Kind::Response) => {
                    let Ok(response) = Response::decode(message.body) else {
                        return "the plugin has sent an answer that is none".into();
                    };
                    let waiting = pending.lock().expect("no panic under this lock").remove(&message.stream);
                    if let Some(waiting) = waiting {
                        let _ = waiting.send(response);
                    }
                }
                (RUNTIME_SERVICE, Kind::Request) => {
                    let Ok(request) = Request::decode(message.body) else {
                        return "the plugin has sent a call that is none".into();
                    };
                    let Ok(permit) = calls.clone().try_acquire_owned() else {
                        return format!("the plugin has more than {CALLS_AT_ONCE} calls in flight").into();
                    };
                    let answer = if request.service == RUNTIME {
                        serve(&request.method, request.payload.into())
                    } else {
                        None
                    };
                    let (outbox, stream) = (outbox.clone(), message.stream);
                    tokio::spawn(async move {
                        let response = respond(answer, &request.service, &request.method).await;
                        let body = response.encode_to_vec().into();
                        let connection = RUNTIME_SERVICE;
                        let _ = outbox.send(Message { connection, stream, kind: Kind::Response, body }).await;
                        drop(permit);
                    });
                }
                _ => return "the plugin has sent a message on the wrong connection".into(),
            }
        }
    }
}

fn violation(error: &FrameError) -> Arc<str> {
    format!("the plugin has sent {error}").into()
}

async fn respond(answer: Option<Answer>, service: &str, method: &str) -> Response {
    let outcome = match answer {
        Some(answer) => answer.await,
        None => Err(Refusal {
            code: UNIMPLEMENTED,
            message: format!("there is no {}/{}", printable(service), printable(method)),
        }),
    };
    match outcome {
        Ok(payload) if payload.len() > LONGEST_MESSAGE - 64 => {
            let status = Status { code: INTERNAL, message: "the answer is too long".into() };
            Response { status: Some(status), payload: Vec::new() }
        }
        Ok(payload) => Response { status: None, payload: payload.into() },
        Err(Refusal { code, message }) => {
            Response { status: Some(Status { code, message }), payload: Vec::new() }
        }
    }
}

/// A plugin's text as it may stand in an error and in the log.
pub(crate) fn printable(text: &str) -> String {
    const LONGEST: usize = 1024;
    text.chars().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
