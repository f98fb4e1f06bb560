//! HTTP requests with a bound on everything: time to the header, silence in a body, size, redirects.
//!
//! HTTP/1.1 only: layers come in parallel over connections of their own, which is faster than one HTTP/2
//! connection's flow control, and dropping a body ends exactly its connection.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, LOCATION, PROXY_AUTHORIZATION, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::{Instant, timeout};

use crate::connect::{Connector, Proxies};
use crate::failure::Failure;
use crate::redirect;
use crate::stamp::Stamp;
use crate::tls::TlsSettings;

const REDIRECTS_MAX: usize = 10;
const IDLE_CONNECTIONS_MAX: usize = 8;
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// A host that does not even accept is not worth a whole progress timeout: the next endpoint may.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Different sets of certificates in use at once; more than that means configuration was changed a lot.
const CLIENTS_MAX: usize = 64;
/// How many progress timeouts a small document may take in all.
const DOCUMENT_PATIENCE: u32 = 10;

type HttpClient = Client<HttpsConnector<Connector>, Full<Bytes>>;
/// A pool, and the state of the certificate files it was made with.
type Pooled = (Vec<Option<Stamp>>, HttpClient);

/// Connection pools, one per way of verifying.
pub(crate) struct Transport {
    clients: Mutex<HashMap<TlsSettings, Pooled>>,
    connector: Connector,
    proxies: Proxies,
    user_agent: HeaderValue,
    progress_timeout: Duration,
}

/// A request to one host; redirects go on from there.
pub(crate) struct Outgoing<'a> {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    /// Sent wherever a redirect leads.
    pub(crate) headers: HeaderMap,
    /// Sent to the host of `uri` alone: credentials and configured headers.
    pub(crate) origin_headers: HeaderMap,
    pub(crate) tls: &'a TlsSettings,
    pub(crate) body: Bytes,
    pub(crate) follow_redirects: bool,
}

/// An answer that is no redirect.
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    /// Whether it comes from another host than the one asked.
    pub(crate) left_origin: bool,
}

impl Transport {
    pub(crate) fn new(user_agent: HeaderValue, progress_timeout: Duration) -> Self {
        let proxies = Proxies::from_environment();
        let connector = Connector::new(proxies.clone(), CONNECT_TIMEOUT.min(progress_timeout));
        Self { clients: Mutex::default(), connector, proxies, user_agent, progress_timeout }
    }

    pub(crate) fn progress_timeout(&self) -> Duration {
        self.progress_timeout
    }

    /// Sends a request and follows its redirects.
    pub(crate) async fn send(&self, outgoing: Outgoing<'_>) -> Result<Answer, Failure> {
        let origin = outgoing.uri.clone();
        let mut uri = outgoing.uri;
        let mut body = outgoing.body;
        let mut visited = HashSet::from([uri.to_string()]);
        for _ in 0..=REDIRECTS_MAX {
            let at_origin = redirect::same_origin(&origin, &uri);
            let mut headers = outgoing.headers.clone();
            if at_origin {
                headers.extend(outgoing.origin_headers.clone());
            }
            let response = if redirect::same_host(&origin, &uri) {
                self.send_once(outgoing.tls, &outgoing.method, &uri, headers, body.clone()).await?
            } else {
                let tls = outgoing.tls.for_other_host();
                self.send_once(&tls, &outgoing.method, &uri, headers, body.clone()).await?
            };
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer { response, left_origin: !at_origin });
            }
            if !outgoing.follow_redirects {
                return Err(Failure::Redirect(format!("{} to a request with a secret", response.status())));
            }
            let location = response.headers().get(LOCATION);
            let next = redirect::target(&uri, location).map_err(Failure::Redirect)?;
            if !visited.insert(next.to_string()) {
                return Err(Failure::Redirect(format!("loop at {}", redirect::shown(&next))));
            }
            uri = next;
            body = Bytes::new();
        }
        Err(Failure::Redirect(format!("more than {REDIRECTS_MAX}, the last to {}", redirect::shown(&uri))))
    }

    /// One request, one answer's header.
    async fn send_once(
        &self,
        tls: &TlsSettings,
        method: &Method,
        uri: &Uri,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, Failure> {
        headers.insert(USER_AGENT, self.user_agent.clone());
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(authorization) = self.proxies.authorization(uri) {
            headers.insert(PROXY_AUTHORIZATION, authorization);
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method.clone();
        *request.uri_mut() = uri.clone();
        *request.headers_mut() = headers;
        let client = self.client(tls).await?;
        match timeout(self.progress_timeout, client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Failure::from_client(&error)),
            Err(_) => Err(Failure::NoAnswer(self.progress_timeout)),
        }
    }

    /// The pool for `tls`, made anew when its files changed.
    async fn client(&self, tls: &TlsSettings) -> Result<HttpClient, Failure> {
        let stamps = tls.stamps();
        {
            let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((known, client)) = clients.get(tls)
                && *known == stamps
            {
                return Ok(client.clone());
            }
        }
        // Reading the system's roots takes milliseconds.
        let settings = tls.clone();
        let config = tokio::task::spawn_blocking(move || settings.client_config())
            .await
            .unwrap_or_else(|_| Err("TLS cannot be set up: the daemon is shutting down".to_owned()))
            .map_err(Failure::Configuration)?;
        let connector = HttpsConnector::from((self.connector.clone(), config));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        clients.insert(tls.clone(), (stamps, client.clone()));
        Ok(client)
    }

    /// Reads a small body whole: never more than `limit` bytes, whatever the header says.
    pub(crate) async fn read(&self, response: Response<Incoming>, limit: u64) -> Result<Bytes, Failure> {
        refuse_encoding(response.headers())?;
        let announced = response.body().size_hint().exact();
        if announced.is_some_and(|size| size > limit) {
            return Err(Failure::TooLarge { limit });
        }
        let patience = self.progress_timeout * DOCUMENT_PATIENCE;
        let deadline = Instant::now() + patience;
        let mut body = response.into_body();
        let mut bytes = BytesMut::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::TooSlow(patience));
            }
            match timeout(self.progress_timeout.min(left), body.frame()).await {
                Err(_) => return Err(Failure::Stalled(self.progress_timeout)),
                Ok(None) => return Ok(bytes.freeze()),
                Ok(Some(Err(error))) => return Err(Failure::from_body(&error)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        if bytes.len() as u64 + data.len() as u64 > limit {
                            return Err(Failure::TooLarge { limit });
                        }
                        bytes.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// Digests are of the bytes as they are; nobody asked for another encoding.
pub(crate) fn refuse_encoding(headers: &HeaderMap) -> Result<(), Failure> {
    match headers.get(CONTENT_ENCODING) {
        None => Ok(()),
        Some(encoding) if encoding.as_bytes().eq_ignore_ascii_case(b"identity") => Ok(()),
        Some(_) => Err(Failure::Garbage {
            what: "answer",
            problem: "it has a content-encoding that was not asked for".to_owned(),
        }),
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("progress_timeout", &self.progress_timeout).finish_non_exhaustive()
    }
}
