//! One endpoint during one pull: which scheme it speaks, what it demands, and whether it is worth asking.

use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::Value;

use crate::challenge::Challenge;
use crate::credentials::{Fingerprint, Login, LoginSource};
use crate::docker_config::ask_helper;
use crate::endpoint::{Endpoint, Kind, Scheme};
use crate::failure::{Failure, printable};
use crate::redirect;
use crate::token::{self, TokenCache, TokenKey, TokenRequest};
use crate::transport::{Outgoing, Transport};

/// Error bodies are read this far, and this long.
const ERROR_BODY_MAX: u64 = 16 << 10;
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a request is sent with an authorization that somebody else got, before it is refused.
const ROUNDS_MAX: u32 = 3;

/// What all pulls share.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) transport: Transport,
    pub(crate) tokens: TokenCache,
}

/// An endpoint and what was learnt about it.
pub(crate) struct Session {
    endpoint: Endpoint,
    logins: Vec<LoginSource>,
    fingerprint: Fingerprint,
    /// [`UNKNOWN`], [`HTTPS`] or [`PLAIN`].
    speaks: AtomicU8,
    authorization: Mutex<Option<HeaderValue>>,
    /// Whoever holds it gets a new authorization; the others wait and use that.
    renewing: tokio::sync::Mutex<()>,
    /// What was sent to log in: must not come back in an error.
    secrets: Mutex<Vec<String>>,
    /// It failed during this pull: others are asked first.
    demoted: AtomicBool,
}

/// Where an authorization comes from. Only a fresh one that is refused is a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Renewed {
    Fresh,
    /// From an earlier pull.
    Kept,
    /// Another request of this pull was faster.
    ByAnother,
}

const UNKNOWN: u8 = 0;
const HTTPS: u8 = 1;
const PLAIN: u8 = 2;

impl Session {
    pub(crate) fn new(endpoint: Endpoint, logins: Vec<LoginSource>, tokens: &TokenCache) -> Self {
        let speaks = match endpoint.scheme {
            Scheme::Https => HTTPS,
            Scheme::Http => PLAIN,
            Scheme::Either => UNKNOWN,
        };
        let session = Self {
            fingerprint: Fingerprint::of(&logins),
            endpoint,
            logins,
            speaks: AtomicU8::new(speaks),
            authorization: Mutex::new(None),
            renewing: tokio::sync::Mutex::new(()),
            secrets: Mutex::new(Vec::new()),
            demoted: AtomicBool::new(false),
        };
        if speaks != UNKNOWN {
            *session.authorization() = tokens.get(&session.token_key(speaks == PLAIN));
        }
        session
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn is_demoted(&self) -> bool {
        self.demoted.load(Ordering::Relaxed)
    }

    pub(crate) fn demote(&self) {
        self.demoted.store(true, Ordering::Relaxed);
    }

    /// The URL asked, as errors show it.
    pub(crate) fn shown(&self, kind: Kind, version: &str) -> String {
        let plain = self.speaks.load(Ordering::Relaxed) == PLAIN;
        match self.endpoint.url(plain, kind, version) {
            Ok(uri) => redirect::shown(&uri),
            Err(text) => text,
        }
    }

    /// Asks for a manifest or blob; logs in when that is demanded. Only 200 and 206 are answers.
    pub(crate) async fn get(
        &self,
        wire: &Wire,
        kind: Kind,
        version: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, Failure> {
        let speaks = self.speaks.load(Ordering::Relaxed);
        if speaks != UNKNOWN {
            return self.get_over(wire, speaks == PLAIN, kind, version, headers).await;
        }
        let over_tls = self.get_over(wire, false, kind, version, headers).await;
        match over_tls {
            Err(first) if first.is_unconnected() => {
                let plain = self.get_over(wire, true, kind, version, headers).await;
                match plain {
                    Err(second) if second.is_unconnected() => Err(first),
                    // What servers answer that expected TLS: the first failure was the one that counts.
                    Err(Failure::Status { status: StatusCode::BAD_REQUEST, .. }) => Err(first),
                    answer => {
                        self.speaks.store(PLAIN, Ordering::Relaxed);
                        answer
                    }
                }
            }
            answer => {
                self.speaks.store(HTTPS, Ordering::Relaxed);
                answer
            }
        }
    }

    async fn get_over(
        &self,
        wire: &Wire,
        plain: bool,
        kind: Kind,
        version: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, Failure> {
        let uri = self.endpoint.url(plain, kind, version).map_err(Failure::Configuration)?;
        let mut rounds = 0;
        loop {
            let used = self.authorization().clone();
            let mut origin_headers = self.endpoint.headers.clone();
            if let Some(header) = &used {
                origin_headers.insert(AUTHORIZATION, header.clone());
            }
            let outgoing = Outgoing {
                method: Method::GET,
                uri: uri.clone(),
                headers: headers.clone(),
                origin_headers,
                tls: &self.endpoint.tls,
                body: bytes::Bytes::new(),
                follow_redirects: true,
            };
            let answer = wire.transport.send(outgoing).await?;
            let status = answer.response.status();
            if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
                return Ok(answer.response);
            }
            if status != StatusCode::UNAUTHORIZED || answer.left_origin {
                let detail = self.detail(wire, answer.response).await;
                return Err(Failure::Status { status, detail });
            }
            if rounds >= ROUNDS_MAX {
                let detail = self.detail(wire, answer.response).await;
                return Err(self.denied(&format!("{status}{detail}")));
            }
            let challenge = Challenge::best(answer.response.headers());
            drop(answer);
            rounds = match self.renew(wire, plain, challenge, used.as_ref()).await? {
                Renewed::Fresh => ROUNDS_MAX,
                Renewed::Kept | Renewed::ByAnother => rounds + 1,
            };
        }
    }

    /// Meets a challenge: afterwards there is another authorization than `used`, which was refused.
    async fn renew(
        &self,
        wire: &Wire,
        plain: bool,
        challenge: Option<Challenge>,
        used: Option<&HeaderValue>,
    ) -> Result<Renewed, Failure> {
        let _one_at_a_time = self.renewing.lock().await;
        if self.authorization().as_ref() != used {
            return Ok(Renewed::ByAnother);
        }
        let key = self.token_key(plain);
        if let Some(kept) = wire.tokens.get(&key) {
            if Some(&kept) != used {
                *self.authorization() = Some(kept);
                return Ok(Renewed::Kept);
            }
            wire.tokens.forget(&key);
        }
        let login = self.login().await?;
        let header = match (challenge, &login) {
            (None, _) => {
                return Err(self.denied("401 Unauthorized without a challenge that can be met"));
            }
            (Some(_), Some(Login::RegistryToken(token))) => token::authorization("Bearer", token)?,
            (Some(Challenge::Basic), login) => match login.as_ref().and_then(Login::encoded) {
                Some(encoded) => token::authorization("Basic", &encoded)?,
                None => return Err(self.denied("401 Unauthorized: asks for user and password")),
            },
            (Some(Challenge::Bearer { realm, service, scope }), login) => {
                let request =
                    TokenRequest { realm: &realm, service: service.as_deref(), scope: scope.as_deref() };
                let fetched =
                    token::fetch(&wire.transport, &self.endpoint, plain, &request, login.as_ref()).await;
                let token = fetched.map_err(|failure| match failure {
                    Failure::Unauthorized(text) => self.denied(&text),
                    other => other,
                })?;
                if let Some((_, secret)) = token.header.to_str().ok().and_then(|text| text.split_once(' ')) {
                    self.remember(secret.to_owned());
                }
                wire.tokens.put(key, &token);
                token.header
            }
        };
        if Some(&header) == used {
            return Err(self.denied("401 Unauthorized"));
        }
        *self.authorization() = Some(header);
        Ok(Renewed::Fresh)
    }

    /// The first source that has a login. A helper that fails is told about only if nothing else helps.
    async fn login(&self) -> Result<Option<Login>, Failure> {
        let mut failed = None;
        for source in &self.logins {
            let login = match source {
                LoginSource::Known(login) => login.clone(),
                LoginSource::Helper { name, server } => match ask_helper(name, server).await {
                    Ok(Some(login)) => login,
                    Ok(None) => continue,
                    Err(problem) => {
                        failed.get_or_insert(problem);
                        continue;
                    }
                },
                LoginSource::Unreadable(_) => continue,
            };
            login.secrets().into_iter().for_each(|secret| self.remember(secret));
            return Ok(Some(login));
        }
        match failed {
            Some(problem) => Err(self.denied(&format!("401 Unauthorized: {problem}"))),
            None => Ok(None),
        }
    }

    /// The refusal with what an operator has to know about where credentials were looked for.
    fn denied(&self, answer: &str) -> Failure {
        let host = &self.endpoint.credential_host;
        let has_source = self.logins.iter().any(|source| !matches!(source, LoginSource::Unreadable(_)));
        let which = if has_source { "with credentials" } else { "no credentials" };
        let mut text = format!("{answer}, {which} for {host}");
        for source in &self.logins {
            if let LoginSource::Unreadable(why) = source {
                let _ = write!(text, " ({why})");
            }
        }
        Failure::Unauthorized(text)
    }

    /// ` (CODE: message)` of an error answer (distribution-spec, "Error Codes"), if it has one.
    async fn detail(&self, wire: &Wire, response: Response<Incoming>) -> String {
        let read =
            tokio::time::timeout(ERROR_BODY_TIMEOUT, wire.transport.read(response, ERROR_BODY_MAX)).await;
        let Ok(Ok(bytes)) = read else { return String::new() };
        let Ok(answer) = serde_json::from_slice::<Value>(&bytes) else { return String::new() };
        let Some(error) = answer.pointer("/errors/0") else { return String::new() };
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
        if self.is_secret_in(text("code")) || self.is_secret_in(text("message")) {
            return " (its message repeats a secret)".to_owned();
        }
        match (printable(text("code")).as_str(), printable(text("message")).as_str()) {
            ("", "") => String::new(),
            (code, "") => format!(" ({code})"),
            ("", message) => format!(" ({message})"),
            (code, message) => format!(" ({code}: {message})"),
        }
    }

    /// Whether a text from the server repeats something that was sent to it in confidence.
    fn is_secret_in(&self, text: &str) -> bool {
        // Short configured headers are no secrets, and their values turn up everywhere.
        const HEADER_MIN: usize = 8;
        let secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        let authorization = self.authorization();
        let token = authorization.as_ref().and_then(|header| header.to_str().ok()?.split_once(' '));
        let headers = self.endpoint.headers.values().filter_map(|value| value.to_str().ok());
        secrets
            .iter()
            .map(String::as_str)
            .filter(|secret| !secret.is_empty())
            .chain(token.map(|(_, token)| token))
            .chain(headers.filter(|value| value.len() >= HEADER_MIN))
            .any(|secret| text.contains(secret))
    }

    fn remember(&self, secret: String) {
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        if !secrets.contains(&secret) {
            secrets.push(secret);
        }
    }

    fn token_key(&self, plain: bool) -> TokenKey {
        TokenKey {
            origin: self.endpoint.origin(plain),
            repository: self.endpoint.repository.clone(),
            login: self.fingerprint,
        }
    }

    fn authorization(&self) -> MutexGuard<'_, Option<HeaderValue>> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("endpoint", &self.endpoint)
            .field("demoted", &self.is_demoted())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenCache(..)")
    }
}
