//! Tokens for registries: fetched from the realm that a challenge names (distribution's token and OAuth2
//! specifications), kept until shortly before they expire.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use serde_json::Value;
use tokio::time::Instant;

use crate::credentials::{Fingerprint, Login};
use crate::endpoint::{Endpoint, Kind, Scheme, encoded};
use crate::failure::{Failure, printable};
use crate::redirect;
use crate::transport::{Outgoing, Transport};

/// Tokens with many claims are some KiB.
const ANSWER_MAX: u64 = 1 << 20;
/// The least that the specification allows, and what holds when an answer says nothing.
const LIFETIME_MIN: Duration = Duration::from_secs(60);
const LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// A token this close to its end is not used any more.
const MARGIN: Duration = Duration::from_secs(10);
const CACHE_MAX: usize = 1024;
const CLIENT_ID: &str = "podvisor";

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    pub(crate) origin: String,
    pub(crate) repository: String,
    pub(crate) login: Fingerprint,
}

/// Tokens of all pulls.
#[derive(Default)]
pub(crate) struct TokenCache(Mutex<HashMap<TokenKey, (HeaderValue, Instant)>>);

/// A fresh token.
pub(crate) struct Token {
    /// `Bearer …`.
    pub(crate) header: HeaderValue,
    pub(crate) lifetime: Duration,
}

/// What a Bearer challenge asks for.
pub(crate) struct TokenRequest<'a> {
    pub(crate) realm: &'a str,
    pub(crate) service: Option<&'a str>,
    pub(crate) scope: Option<&'a str>,
}

impl TokenCache {
    pub(crate) fn get(&self, key: &TokenKey) -> Option<HeaderValue> {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(key).filter(|(_, end)| *end > Instant::now()).map(|(header, _)| header.clone())
    }

    pub(crate) fn put(&self, key: TokenKey, token: &Token) {
        let now = Instant::now();
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, (_, end)| *end > now);
        if tokens.len() >= CACHE_MAX {
            tokens.clear();
        }
        tokens.insert(key, (token.header.clone(), now + token.lifetime.saturating_sub(MARGIN)));
    }

    pub(crate) fn forget(&self, key: &TokenKey) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// Asks the realm for a token. `login` goes there only over https, or where the endpoint is insecure anyway.
pub(crate) async fn fetch(
    transport: &Transport,
    endpoint: &Endpoint,
    plain: bool,
    request: &TokenRequest<'_>,
    login: Option<&Login>,
) -> Result<Token, Failure> {
    let realm = realm(request.realm, endpoint)?;
    let server = redirect::shown(&realm);
    let asked = endpoint.url(plain, Kind::Manifests, "x").map_err(Failure::Configuration)?;
    let tls = if redirect::same_host(&asked, &realm) {
        endpoint.tls.clone()
    } else {
        endpoint.tls.for_other_host()
    };
    let mut origin_headers = HeaderMap::new();
    if redirect::same_origin(&asked, &realm) {
        origin_headers.extend(endpoint.headers.clone());
    }
    let default_scope = format!("repository:{}:pull", endpoint.repository);
    let scope = request.scope.filter(|scope| !scope.is_empty()).unwrap_or(&default_scope);
    let mut query = String::new();
    let mut add = |key: &str, value: &str| {
        let mark = if query.is_empty() { "" } else { "&" };
        let _ = write!(query, "{mark}{key}={}", encoded(value));
    };
    if let Some(service) = request.service {
        add("service", service);
    }
    add("scope", scope);
    let outgoing = match login {
        Some(Login::IdentityToken(token)) => {
            add("client_id", CLIENT_ID);
            add("grant_type", "refresh_token");
            add("refresh_token", token);
            let form = HeaderValue::from_static("application/x-www-form-urlencoded");
            Outgoing {
                method: Method::POST,
                uri: realm,
                headers: HeaderMap::from_iter([(CONTENT_TYPE, form)]),
                origin_headers,
                tls: &tls,
                body: Bytes::from(query),
                follow_redirects: false,
            }
        }
        Some(Login::Basic { .. } | Login::RegistryToken(_)) | None => {
            if let Some(Login::Basic { user, .. }) = login {
                add("account", user);
                add("client_id", CLIENT_ID);
            }
            if let Some(encoded) = login.and_then(Login::encoded) {
                origin_headers.insert(AUTHORIZATION, authorization("Basic", &encoded)?);
            }
            Outgoing {
                method: Method::GET,
                uri: with_query(&realm, &query)?,
                headers: HeaderMap::new(),
                origin_headers,
                tls: &tls,
                body: Bytes::new(),
                follow_redirects: true,
            }
        }
    };
    let refused = |answer: String| Failure::TokenServer { server: server.clone(), answer };
    let answer = transport.send(outgoing).await.map_err(|failure| refused(failure.to_string()))?;
    let status = answer.response.status();
    if !status.is_success() {
        return Err(match status {
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Failure::Unauthorized(format!("token server {server}: {status}"))
            }
            _ => refused(status.to_string()),
        });
    }
    let bytes =
        transport.read(answer.response, ANSWER_MAX).await.map_err(|failure| refused(failure.to_string()))?;
    parse(&bytes).ok_or_else(|| refused("its answer holds no token".to_owned()))
}

/// An `Authorization` header that no log shows.
pub(crate) fn authorization(scheme: &str, secret: &str) -> Result<HeaderValue, Failure> {
    let mut header = HeaderValue::from_str(&format!("{scheme} {secret}"))
        .map_err(|_| Failure::Unauthorized("credentials cannot stand in a header".to_owned()))?;
    header.set_sensitive(true);
    Ok(header)
}

fn realm(text: &str, endpoint: &Endpoint) -> Result<Uri, Failure> {
    let bad = |why: &str| {
        let shown = printable(text.split(['?', '#']).next().unwrap_or_default());
        let shown = shown.rsplit('@').next().unwrap_or_default().to_owned();
        Err(Failure::Unauthorized(format!("401 names a token server that cannot be asked: {shown:?} {why}")))
    };
    let Ok(uri) = text.parse::<Uri>() else { return bad("is no URL") };
    match uri.scheme_str() {
        Some("https") => {}
        Some("http") if endpoint.scheme != Scheme::Https => {}
        Some("http") => return bad("is plain http"),
        _ => return bad("is no https URL"),
    }
    if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
        return bad("has no host or has a password");
    }
    Ok(uri)
}

fn with_query(realm: &Uri, query: &str) -> Result<Uri, Failure> {
    let mark = if realm.query().is_some() { '&' } else { '?' };
    let text = format!("{realm}{mark}{query}");
    text.parse().map_err(|_| Failure::Unauthorized("401 asks for a token whose URL is too long".to_owned()))
}

fn parse(bytes: &[u8]) -> Option<Token> {
    let answer: Value = serde_json::from_slice(bytes).ok()?;
    let text = |key: &str| answer.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let token = text("token").or_else(|| text("access_token"))?;
    let lifetime = answer.get("expires_in").and_then(Value::as_u64).map_or(LIFETIME_MIN, Duration::from_secs);
    let lifetime = lifetime.clamp(LIFETIME_MIN, LIFETIME_MAX);
    Some(Token { header: authorization("Bearer", token).ok()?, lifetime })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_tokens() {
        let token = parse(br#"{"token":"a","access_token":"b","expires_in":300}"#).unwrap();
        assert_eq!(token.header, "Bearer a");
        assert!(!format!("{:?}", token.header).contains('a'), "sensitive");
        assert_eq!(token.lifetime, Duration::from_secs(300));
        let token = parse(br#"{"token":"","access_token":"b","expires_in":1}"#).unwrap();
        assert_eq!(token.header, "Bearer b");
        assert_eq!(token.lifetime, LIFETIME_MIN);
        assert_eq!(
            parse(br#"{"token":"b","expires_in":18446744073709551615}"#).unwrap().lifetime,
            LIFETIME_MAX
        );
        for garbage in ["", "[]", "{}", "{\"token\":5}", "{\"token\":\"a\\n\"}", "<html>"] {
            assert!(parse(garbage.as_bytes()).is_none(), "{garbage}");
        }
    }

    #[test]
    fn queries_are_appended() {
        let uri = with_query(&"https://a/t?x=1".parse().unwrap(), "service=y").unwrap();
        assert_eq!(uri, "https://a/t?x=1&service=y");
    }
}
