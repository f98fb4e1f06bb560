//! An HTTP server on loopback whose every answer is decided by the test, down to the byte at which it breaks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

/// The first byte of a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

/// A proper answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

/// What to do with a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Answer properly.
    Whole(Answer),
    /// Close the connection after so many bytes of the body.
    Cut(Answer, usize),
    /// Fall silent after so many bytes of the body.
    Stall(Answer, usize),
    /// Never stop sending zeros after the body.
    Endless(Answer),
    /// Never answer.
    Hang,
    /// Send header lines for ever, one now and then.
    Loris,
    /// These bytes, whatever they are.
    Raw(Vec<u8>),
}

type Decide = dyn Fn(&Seen) -> Reply + Send + Sync;

/// Stops when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    open: watch::Receiver<usize>,
    task: AbortHandle,
}

impl Answer {
    pub(crate) fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: vec![("content-type".into(), content_type.into())], body: body.into() }
    }

    pub(crate) fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn redirect(location: &str) -> Self {
        Self::status(307).with("location", location)
    }

    pub(crate) fn unauthorized(challenge: &str) -> Self {
        Self::status(401).with("www-authenticate", challenge)
    }

    pub(crate) fn json(body: &str) -> Self {
        Self::new(200, "application/json", body)
    }

    fn head(&self, length: Option<usize>) -> String {
        let mut head = format!("HTTP/1.1 {} Told\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(name);
            head.push_str(": ");
            head.push_str(value);
            head.push_str("\r\n");
        }
        match length {
            Some(length) => head.push_str(&["content-length: ", &length.to_string(), "\r\n"].concat()),
            None => head.push_str("connection: close\r\n"),
        }
        head.push_str("\r\n");
        head
    }
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self::Whole(answer)
    }
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Where a range request wants to start.
    pub(crate) fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

impl Server {
    pub(crate) async fn start(decide: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1", None, decide).await
    }

    pub(crate) async fn start_tls(
        config: ServerConfig,
        decide: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::start_at("127.0.0.1", Some(config), decide).await
    }

    pub(crate) async fn start_at(
        host: &str,
        tls: Option<ServerConfig>,
        decide: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (count, open) = watch::channel(0);
        let (log, decide): (_, Arc<Decide>) = (Arc::clone(&seen), Arc::new(decide));
        let acceptor = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (log, decide, acceptor, count) =
                    (Arc::clone(&log), Arc::clone(&decide), acceptor.clone(), count.clone());
                connections.spawn(async move {
                    count.send_modify(|open| *open += 1);
                    match acceptor {
                        None => {
                            let mut first = [0];
                            if stream.peek(&mut first).await.is_ok() && first[0] != TLS_HANDSHAKE {
                                serve(stream, &log, &*decide).await;
                            }
                        }
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, &log, &*decide).await;
                            }
                        }
                    }
                    count.send_modify(|open| *open -= 1);
                });
            }
        });
        Self { address, seen, open, task: task.abort_handle() }
    }

    /// `host:port/name`.
    pub(crate) fn name(&self, repository: &str) -> String {
        format!("{}/{repository}", self.address)
    }

    /// The requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Requests to paths that contain `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.seen().iter().filter(|seen| seen.path.contains(part)).count()
    }

    /// Waits until no connection is open any more.
    pub(crate) async fn idle(&self) {
        let mut open = self.open.clone();
        let waited = tokio::time::timeout(Duration::from_secs(30), open.wait_for(|open| *open == 0)).await;
        assert!(waited.is_ok(), "connections stay open");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A port on loopback where nothing listens.
pub(crate) async fn unused_address() -> SocketAddr {
    TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap()
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, log: &Mutex<Vec<Seen>>, decide: &Decide) {
    let mut buffer = Vec::new();
    while let Some(seen) = request(&mut stream, &mut buffer).await {
        log.lock().unwrap().push(seen.clone());
        let reply = decide(&seen);
        if respond(&mut stream, reply).await.is_none() {
            return;
        }
    }
}

/// Writes a reply; `None` when the connection is not to be used again.
async fn respond(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), reply: Reply) -> Option<()> {
    match reply {
        Reply::Whole(answer) => {
            stream.write_all(answer.head(Some(answer.body.len())).as_bytes()).await.ok()?;
            stream.write_all(&answer.body).await.ok()?;
            stream.flush().await.ok()
        }
        Reply::Cut(answer, after) => {
            stream.write_all(answer.head(Some(answer.body.len())).as_bytes()).await.ok()?;
            stream.write_all(&answer.body[..after]).await.ok()?;
            stream.shutdown().await.ok()?;
            None
        }
        Reply::Stall(answer, after) => {
            stream.write_all(answer.head(Some(answer.body.len())).as_bytes()).await.ok()?;
            stream.write_all(&answer.body[..after]).await.ok()?;
            stream.flush().await.ok()?;
            gone(stream).await
        }
        Reply::Endless(answer) => {
            stream.write_all(answer.head(None).as_bytes()).await.ok()?;
            stream.write_all(&answer.body).await.ok()?;
            let zeros = vec![0; 64 << 10];
            loop {
                stream.write_all(&zeros).await.ok()?;
            }
        }
        Reply::Hang => gone(stream).await,
        Reply::Loris => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n").await.ok()?;
            let mut clock = tokio::time::interval(Duration::from_millis(20));
            loop {
                clock.tick().await;
                stream.write_all(b"x-slow: yes\r\n").await.ok()?;
                stream.flush().await.ok()?;
            }
        }
        Reply::Raw(bytes) => {
            stream.write_all(&bytes).await.ok()?;
            stream.shutdown().await.ok()?;
            None
        }
    }
}

/// Waits until the client leaves.
async fn gone(stream: &mut (impl AsyncRead + Unpin)) -> Option<()> {
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await.ok()? > 0 {}
    None
}

async fn request(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Seen> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        more(stream, buffer).await?;
    };
    let head = String::from_utf8(buffer.drain(..end).collect()).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers.get("content-length").map_or(Some(0), |length| length.parse().ok())?;
    while buffer.len() < length {
        more(stream, buffer).await?;
    }
    let body = String::from_utf8(buffer.drain(..length).collect()).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Some(Seen { method, path: path.to_owned(), query: query.to_owned(), headers, body })
}

async fn more(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<()> {
    let mut chunk = [0; 4096];
    let count = stream.read(&mut chunk).await.ok().filter(|count| *count > 0)?;
    buffer.extend_from_slice(&chunk[..count]);
    Some(())
}
