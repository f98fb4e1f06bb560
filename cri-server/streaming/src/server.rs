//! Listens, finds the session that a request's token names, and hands the upgraded connection to it.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use crate::activity::Activity;
use crate::port_forward::{self, Target};
use crate::remote_command::{self, Wanted};
use crate::tls::Certificate;
use crate::tokens::Tokens;
use crate::upgrade::{Dialect, Refusal, Upgrade, negotiate};
use crate::{Backend, Options, Session, StreamingError, spdy, websocket};

/// What protects the daemon from many or slow clients. The values are wide: who has a token is trusted that far.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Tokens that are offered and not used; beyond it the oldest expires.
    pub(crate) outstanding: usize,
    /// Connections that are accepted and not yet upgraded.
    pub(crate) connections: usize,
    /// Sessions at a time.
    pub(crate) sessions: usize,
    /// For TLS, and again for the request.
    pub(crate) handshake: Duration,
    /// For a client to open the streams of a session.
    pub(crate) stream_creation: Duration,
    /// For a client to close after everything was sent.
    pub(crate) linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            outstanding: 1024,
            connections: 512,
            sessions: 1024,
            handshake: Duration::from_secs(10),
            // What kubelet's own streaming server grants.
            stream_creation: Duration::from_secs(30),
            linger: Duration::from_secs(10),
        }
    }
}

/// Request heads longer than this are refused, in bytes.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// After accept() failed, usually for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A session with everything that it needs but its connection.
#[derive(Debug)]
pub(crate) struct Conversation<B> {
    pub(crate) backend: Arc<B>,
    pub(crate) session: Session,
    pub(crate) limits: Arc<Limits>,
    pub(crate) activity: Arc<Activity>,
    /// Its place among the sessions.
    pub(crate) permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Shared<B> {
    backend: Arc<B>,
    tokens: Arc<Tokens>,
    limits: Arc<Limits>,
    idle_timeout: Duration,
    sessions: Arc<Semaphore>,
}

/// A running listener.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) address: SocketAddr,
    /// What the URLs begin with.
    pub(crate) base: String,
    pub(crate) accepting: tokio::task::AbortHandle,
}

pub(crate) async fn listen<B: Backend>(
    options: Options,
    limits: Limits,
    backend: Arc<B>,
) -> Result<Listening, StreamingError> {
    let Options { address, tls, token_lifetime, idle_timeout } = options;
    if tls.is_none() && !address.ip().to_canonical().is_loopback() {
        return Err(StreamingError::NeedsTls { address });
    }
    let tls = match tls {
        None => None,
        Some((certificate, key)) => {
            let certificate = Certificate::read(certificate, key)?;
            let config = certificate.config()?;
            Some((certificate, TlsAcceptor::from(Arc::new(config))))
        }
    };
    let failed = |source| StreamingError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let base = format!("{}://{}", if tls.is_some() { "https" } else { "http" }, reachable(address));
    let tokens = Arc::new(Tokens::new(token_lifetime, limits.outstanding));
    let sessions = Arc::new(Semaphore::new(limits.sessions));
    let shared =
        Shared { backend, tokens: Arc::clone(&tokens), limits: Arc::new(limits), idle_timeout, sessions };
    let accepting = tokio::spawn(accept(listener, tls, Arc::new(shared))).abort_handle();
    Ok(Listening { tokens, address, base, accepting })
}

/// Who gets the URL is on the same machine, and "every address" is not one to connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

async fn accept<B: Backend>(
    listener: TcpListener,
    tls: Option<(Arc<Certificate>, TlsAcceptor)>,
    shared: Arc<Shared<B>>,
) {
    let places = Arc::new(Semaphore::new(shared.limits.connections));
    loop {
        // Never closed. Beyond the limit clients wait in the listen queue.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _peer)) => stream,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot accept a streaming connection"
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        prepare(&stream);
        let (shared, tls) = (Arc::clone(&shared), tls.clone());
        tokio::spawn(async move {
            let _place = place;
            let Some((certificate, acceptor)) = tls else { return converse(stream, shared).await };
            certificate.refresh();
            match tokio::time::timeout(shared.limits.handshake, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => converse(stream, shared).await,
                Ok(Err(error)) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a TLS handshake failed");
                }
                Err(_elapsed) => tracing::debug!("a TLS handshake took too long"),
            }
        });
    }
}

/// Keystrokes go out at once, and a client whose machine died is noticed. Both fail only on closed sockets.
fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
}

/// Answers the requests of one connection, until it is upgraded.
async fn converse<B, S>(stream: S, shared: Arc<Shared<B>>)
where
    B: Backend,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = shared.limits.handshake;
    let service = service_fn(move |request| {
        let response = answer(request, &shared);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(handshake)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(error = &error as &dyn std::error::Error, "a streaming connection failed");
    }
}

fn answer<B: Backend>(mut request: Request<Incoming>, shared: &Arc<Shared<B>>) -> Response<Full<Bytes>> {
    let upgraded = hyper::upgrade::on(&mut request);
    let (mut response, body) = match begin(&request, shared, upgraded) {
        Ok(headers) => {
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *response.headers_mut() = headers;
            return response;
        }
        Err(refusal) => {
            let mut response = Response::new(());
            *response.status_mut() = refusal.status;
            for (name, value) in refusal.headers {
                response.headers_mut().append(name, HeaderValue::from_static(value));
            }
            (response, refusal.message + "\n")
        }
    };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response.map(|()| Full::from(body))
}

/// Starts the session that the request asks for; the headers of the answer. A token is used up only by a request
/// that gets its session: clients that fail with one protocol try another at the same URL.
fn begin<B: Backend>(
    request: &Request<Incoming>,
    shared: &Arc<Shared<B>>,
    upgraded: OnUpgrade,
) -> Result<http::HeaderMap, Refusal> {
    let not_found = || Refusal::new(StatusCode::NOT_FOUND, "no such session, or it was used or has expired");
    let token = token_of(request.uri().path()).ok_or_else(not_found)?;
    let (kind, token) = token;
    let session =
        shared.tokens.look(token).filter(|session| kind_of(session) == kind).ok_or_else(not_found)?;
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST"));
    }
    let Upgrade { dialect, headers } = negotiate(request.headers(), &session)?;
    let permit = Arc::clone(&shared.sessions).try_acquire_owned().map_err(|_| {
        tracing::warn!("a streaming session is refused because there are too many");
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too many sessions")
    })?;
    let session = shared.tokens.take(token).ok_or_else(not_found)?;
    let conversation = Conversation {
        backend: Arc::clone(&shared.backend),
        session,
        limits: Arc::clone(&shared.limits),
        activity: Arc::new(Activity::new(shared.idle_timeout)),
        permit,
    };
    tokio::spawn(async move {
        match upgraded.await {
            Ok(upgraded) => serve(conversation, dialect, TokioIo::new(upgraded)).await,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "cannot upgrade a connection");
            }
        }
    });
    Ok(headers)
}

/// `/KIND/TOKEN`.
fn token_of(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix('/')?.split_once('/')
}

/// How a session is named in its URL.
pub(crate) fn kind_of(session: &Session) -> &'static str {
    match session {
        Session::Exec { .. } => "exec",
        Session::Attach { .. } => "attach",
        Session::PortForward { .. } => "portforward",
    }
}

async fn serve<B, S>(conversation: Conversation<B>, dialect: Dialect, io: S)
where
    B: Backend,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let activity = Arc::clone(&conversation.activity);
    if let Some(wanted) = Wanted::of(&conversation.session) {
        match dialect {
            Dialect::CommandSpdy(version) => {
                let connection = spdy::Connection::start(io, activity);
                remote_command::serve_spdy(conversation, wanted, connection, version).await;
            }
            Dialect::CommandWebSocket(codec, version) => {
                let connection = websocket::Connection::start(io, activity);
                remote_command::serve_websocket(conversation, wanted, connection, codec, version).await;
            }
            Dialect::ForwardSpdy | Dialect::ForwardWebSocket(_) | Dialect::ForwardTunnel => {}
        }
        return;
    }
    let Conversation { backend, session, limits, permit, .. } = conversation;
    let Session::PortForward { sandbox, ports } = session else { return };
    let target = Target::new(backend, sandbox, ports);
    match dialect {
        Dialect::ForwardSpdy => {
            let connection = spdy::Connection::start(io, Arc::clone(&activity));
            port_forward::serve_spdy(target, connection, limits, activity).await;
        }
        Dialect::ForwardTunnel => {
            let outer = websocket::Connection::start(io, Arc::clone(&activity));
            let tunnel = websocket::tunnel(outer, limits.linger);
            let connection = spdy::Connection::start(tunnel, Arc::clone(&activity));
            port_forward::serve_spdy(target, connection, limits, activity).await;
        }
        Dialect::ForwardWebSocket(codec) => {
            let connection = websocket::Connection::start(io, Arc::clone(&activity));
            port_forward::serve_websocket(target, connection, codec, limits, activity).await;
        }
        Dialect::CommandSpdy(_) | Dialect::CommandWebSocket(..) => {}
    }
    drop(permit);
}
